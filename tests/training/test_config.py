"""Configs that are stored in run directories, those of earlier versions among them."""

import json
from pathlib import Path

import pytest

from flaxnets.decoding import encode
from flaxnets.errors import InputError
from flaxnets.models import create_model
from flaxnets.models.cost import count_cost
from flaxnets.studies.directory import list_differences, read_study_file
from flaxnets.studies.restore import build_model
from flaxnets.training.config import DatasetConfig, InitFrom, ModelConfig, comparable, read_config
from tests.factories import make_run_config, make_study_config

pytestmark = pytest.mark.unit

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
STORED = sorted(RESULTS.rglob("config.json"))


def test_there_are_stored_configs():
    assert len(STORED) >= 7


@pytest.mark.parametrize("path", STORED, ids=lambda path: str(path.parent.relative_to(RESULTS)))
def test_a_stored_config_is_read_and_builds_its_network(path):
    """What an earlier version wrote is kept, value by value, and still describes a network."""
    stored = json.loads(path.read_text())
    config = read_config(stored)
    written = encode(config)
    for key, value in stored.items():
        if isinstance(value, dict) and written[key] is not None:
            assert value.items() <= written[key].items()
        else:
            assert written[key] == value
    cost = count_cost(build_model(config), config.preprocess.input_shape, len(config.class_names))
    assert cost.parameters == config.parameters


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/study.json")), ids=lambda p: p.parent.name)
def test_a_stored_study_is_read(path):
    stored = read_study_file(path.parent)
    assert stored is not None
    assert stored.environments[0].packages["jax"]
    for config in path.parent.rglob("config.json"):
        assert read_config(json.loads(config.read_text())).study == stored.study


def test_every_config_survives_a_round_trip():
    config = make_run_config("my_nets:build", init_from=InitFrom("weights.pth", "0" * 64))
    assert read_config(json.loads(json.dumps(encode(config)))) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": 1203}, "depth 1203 is more than 1202"),
        ({"kind": "a b"}, "kind"),
        ({"kind": "plain\n"}, "kind"),
        ({"model": {"num_classes": 10}}, "either a name or a build"),
        ({"model": {"num_classes": 10, "name": "cifar_resnet9998"}}, "cannot be built"),
        ({"precision": "float16"}, "precision"),
        ({"preprocess": {"image_shape": [8, 8, 3], "mean": [0.5], "std": [1.0]}}, "each channel"),
        ({"surprise": 1}, "unknown field surprise"),
        ({"recipe": {"name": "x", "learning_rate": 0.1}}, "steps or epochs"),
    ],
)
def test_an_invalid_config_is_refused_by_name(change, words):
    with pytest.raises(InputError, match=words):
        read_config({**encode(make_run_config()), **change})


def test_early_runs_of_alexnet_have_the_year_as_depth():
    model = ModelConfig(10, "alexnet2012")
    assert make_run_config("alexnet2012", 2012, model=model).depth == 2012
    assert create_model("alexnet2012")


def test_fields_that_earlier_versions_lacked_do_not_differ():
    config = make_run_config()
    stored = encode(config)
    for name in ("path", "streamed", "validation_examples"):
        del stored["dataset"][name]
    for name in ("freeze_backbone", "patience", "init_from"):
        del stored[name]
    before = read_config(stored)
    assert comparable(before) == comparable(config)
    assert comparable(before.study) == comparable(config.study)


def test_what_earlier_versions_stored_is_read():
    stored = encode(make_run_config())
    recipe = {**stored["recipe"], "augment": False}
    start = {"run": "plain-8", "step": 22, "images": 512}
    config = read_config({**stored, "recipe": recipe, "init_from": start})
    assert config.recipe.augment == "none"
    assert config.init_from == InitFrom("plain-8", "step 22, 512 images")
    assert (
        read_config({**stored, "recipe": {**recipe, "augment": True}}).recipe.augment == "default"
    )


def test_a_folder_and_initial_weights_may_move():
    """Their sha256 identifies them; everything else must be equal."""

    def config(folder, weights, sha256):
        dataset = DatasetConfig(
            name=f"folder:{folder}",
            path=f"/{folder}",
            version="folder",
            train_examples=10,
            test_examples=5,
            sha256=sha256,
        )
        return make_run_config(dataset=dataset, init_from=InitFrom(weights, "1" * 64))

    before = config("a", "x.pth", "0" * 64)
    assert comparable(before) == comparable(config("b", "y.pth", "0" * 64))
    changed = comparable(config("a", "x.pth", "2" * 64))
    (difference,) = list_differences(comparable(before), changed)
    assert difference.startswith("dataset.sha256 is ")


def test_how_often_a_run_is_evaluated_is_recorded_and_not_compared():
    often, seldom = make_run_config(), make_run_config(evaluate_every=5)
    stored = encode(seldom)
    assert read_config(stored).evaluate_every == 5
    assert comparable(often) == comparable(seldom)
    assert comparable(often.study) == comparable(seldom.study)
    del stored["evaluate_every"]  # of an earlier version
    assert read_config(stored) == often


def test_the_depth_of_a_named_network_is_not_compared():
    """Early runs have 0 where the name contains no number."""
    model = ModelConfig(10, "vgg_residual")
    before, now = (make_run_config("vgg_residual", depth, model=model) for depth in (0, 12))
    assert comparable(before) == comparable(now)
    assert comparable(make_run_config(depth=8)) != comparable(make_run_config(depth=10))
    assert comparable(make_study_config()) == comparable(make_study_config())
