"""A study as a value: what it refuses, and that it is what the command does."""

import csv
import json
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import flaxnets
from flaxnets.cli.main import run_command
from flaxnets.data import Augmentation, Dataset, Preprocess, Split, from_arrays
from flaxnets.errors import SettingError
from flaxnets.reporting.reproduce import reproduce
from flaxnets.studies import grid
from flaxnets.studies.results import SUMMARY
from flaxnets.training import RECIPES, CheckpointEvery
from tests.conftest import load_script
from tests.factories import make_run
from tests.processes import assert_same_study

TWO_EPOCHS = replace(RECIPES["digits"], epochs=2)
SMALL_BATCHES = replace(RECIPES["digits"], batch_size=20, epochs=1)


def build(depth, num_classes, dtype):
    return flaxnets.create_model(f"cifar_resnet{depth}", num_classes, dtype=dtype)


def test_it_is_what_the_command_does(study, data_dir, tmp_path):
    value = flaxnets.Study([8], data_dir=data_dir, recipe=TWO_EPOCHS)
    results = value.train(tmp_path / "out", checkpoint_every=CheckpointEvery(steps=11))
    assert_same_study(tmp_path / "out", study.out)
    assert [tuple(row) for row in results.rows] == [SUMMARY, SUMMARY]
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        for row, stored in zip(results.rows, csv.DictReader(file), strict=True):
            written = {key: "" if value is None else str(value) for key, value in row.items()}
            assert written == stored
    assert results.conclusion.startswith("After 22 updates from one seed, the training error of")
    figure = results.figure()
    assert isinstance(figure, Figure)
    assert [ax.get_title() for ax in figure.axes] == ["plain", "residual"]
    assert (tmp_path / "out" / "degradation.png").exists()
    again = value.train(tmp_path / "out")  # nothing is left to train
    assert again.rows == results.rows


def made_dataset():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 8, 8, 1), np.uint8), np.arange(40, dtype=np.int32)
    split = Split(images, labels % 4)
    preprocess = Preprocess((8, 8, 1), (0.5,), (0.25,))
    return Dataset("noise", "1", tuple("abcd"), split, split, preprocess, Augmentation())


@pytest.mark.slow
def test_data_and_networks_of_ones_own(tmp_path):
    value = flaxnets.Study(
        (8,), kinds=["plain", build], dataset=made_dataset(), recipe=SMALL_BATCHES
    )
    assert str(value.default_out) == "runs/degradation/noise-cifar"
    results = value.train(tmp_path / "out")
    assert [run.kind for run in results.runs] == ["plain", f"{__name__}:build"]
    assert {run.result.status for run in results.runs} == {"finished"}
    with pytest.raises(flaxnets.InputError, match=f"built by {__name__}:build"):
        flaxnets.restore(tmp_path / "out" / f"{__name__}:build-8" / "seed-0")
    run = flaxnets.restore(tmp_path / "out" / f"{__name__}:build-8" / "seed-0", build=build)
    assert run.config.dataset.name == "noise"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"depths": ()}, "^depths must name at least one"),
        ({"dataset": None}, "^dataset must be a name or a data set in memory, not NoneType"),
        ({"recipe": 5}, "^recipe must be a Recipe or its name, not 5"),
        ({"family": None}, "^family must be one of"),
        ({"kinds": (partial(build, 8),)}, "^kinds <unknown>|^kinds functools"),
        ({"kinds": ("my-nets:build",)}, "^kinds my-nets:build: give a function"),
        ({"depths": 18}, r"^depths must be a sequence such as \(18, 34, 56\), not 18"),
        ({"depths": (18.5,)}, "^depths must be a sequence"),
        ({"kinds": "plain,residual"}, "^kinds must be a sequence such as"),
        ({"seeds": 3}, "^seeds must be a sequence"),
        ({"depths": (9,)}, "^depths 9: the cifar family has even depths from 8 to 1202"),
        ({"family": "imagenet"}, "^depths 8: the imagenet family has depths 18, 34"),
        ({"kinds": ("plain", "plain")}, "^kinds repeats plain"),
        ({"kinds": ("plane",)}, "^kinds must be one of .* did you mean plain"),
        ({"kinds": ("my_nets.build",)}, "did you mean my_nets:build"),
        ({"kinds": (lambda depth, num_classes, dtype: None,)}, "at the top of a module"),
        ({"seeds": (-1,)}, "^seeds must be from 0"),
        ({"recipe": "digit"}, "^recipe must be one of .* did you mean digits"),
        ({"recipe": "he2015-imagenet"}, "^recipe he2015-imagenet needs validation images"),
        ({"shortcut": "D"}, "^shortcut must be one of A, B, C"),
        ({"precision": "float16"}, "^precision must be one of"),
    ],
)
def test_an_invalid_setting_is_refused_at_once(settings, words):
    with pytest.raises(SettingError, match=words):
        flaxnets.Study(**{"depths": (8,), **settings})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_examples": 41}, "^train_examples is for a data set given by its name"),
        ({"recipe": replace(TWO_EPOCHS, batch_size=41)}, "^batch_size 41 is more than the 40"),
        ({"recipe": replace(SMALL_BATCHES, batch_size=20.0)}, "^recipe or data .*batch_size"),
        ({"kinds": ("math:pi",), "recipe": SMALL_BATCHES}, "^kinds math:pi: it is 3.14"),
        ({"kinds": ("nowhere_at_all:build",)}, "^kinds nowhere_at_all:build: ModuleNotFound"),
        (
            {"kinds": (f"{__name__}:broken",), "recipe": SMALL_BATCHES},
            "^kinds .*:broken at depth 8: RuntimeError: no",
        ),
    ],
)
def test_what_only_data_and_networks_show_is_refused_before_training(settings, words, tmp_path):
    study = flaxnets.Study(**{"depths": (8,), "dataset": made_dataset(), **settings})
    with pytest.raises(SettingError, match=words):
        study.train(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def broken(depth, num_classes, dtype):
    raise RuntimeError("no such network")


def test_an_interrupted_cell_of_a_notebook_saves_its_runs(tmp_path, monkeypatch):
    """KeyboardInterrupt reaches the main thread, while others train: they stop and save."""
    heard = threading.Event()

    class Interrupted:
        def __init__(self, future):
            self._future = future

        def result(self):
            raise KeyboardInterrupt

    class Pool(grid.ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            return Interrupted(super().submit(*args, **kwargs))

    def train_run(setup, seed, directory, on_progress, stop, *_, **__):
        while not stop():
            heard.wait(0.01)
        heard.set()
        return make_run("plain", 8, 0, "unfinished", ()).result

    monkeypatch.setattr(grid, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(grid, "train_run", train_run)
    study = flaxnets.Study((8,), kinds=["plain"], dataset=made_dataset(), recipe=SMALL_BATCHES)
    with pytest.raises(KeyboardInterrupt):
        study.train(tmp_path / "out")
    assert heard.is_set()


def test_a_second_ctrl_c_does_not_unlock_the_directory():
    """Workers that still save would meet those of the next call."""
    pressed = []

    class Pool:
        def shutdown(self, cancel_futures):
            pressed.append(cancel_futures)
            if len(pressed) < 3:
                raise KeyboardInterrupt

    pool: Any = Pool()
    grid._wait_for_workers(pool)
    assert len(pressed) == 3


def test_a_study_of_arrays_is_not_taken_for_a_data_set_with_a_name(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    labels = np.arange(40, dtype=np.uint64) % 2
    arrays = from_arrays((pixels, labels), (pixels, labels.astype(np.int64)))
    recipe = replace(SMALL_BATCHES, batch_size=np.int64(20))
    study = flaxnets.Study((8,), kinds=["plain"], dataset=arrays, recipe=recipe)
    results = study.train(tmp_path / "out")
    assert results.runs[0].result.status == "finished"
    assert study.train(tmp_path / "out").rows == results.rows
    directory = str(tmp_path / "out" / "plain-8" / "seed-0")
    assert run_command(load_script("evaluate").main, [directory]) == 2
    assert "names no data set; give --dataset" in capsys.readouterr().err
    assert run_command(load_script("diagnostics").main, [str(tmp_path / "out")]) == 2
    assert "plain-8 was trained on a data set that has no name" in capsys.readouterr().err
    commands, _ = reproduce([run.config for run in results.runs])
    assert not commands


def test_runs_that_have_ended_are_not_planned_again(digits):
    """Finished and diverged runs have ended; what an unfinished one has done is kept."""
    plan = flaxnets.Study((8,), seeds=(0, 1, 2, 3), kinds=["plain"], dataset=digits).plan()
    runs = [
        make_run("plain", 8, seed, status)
        for seed, status in enumerate(("finished", "diverged", "unfinished"))
    ]
    assert [config.seed for _, config in plan.unfinished(runs)] == [2, 3]
    assert plan.total_steps == 220


def make_pictures(folder: Path) -> None:
    """Two classes, dark and bright, of pictures that differ in size."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for label, (low, high) in {"dark": (0, 100), "bright": (100, 256)}.items():
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(low, high, (20 + number, 30, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{number}.png")


@pytest.mark.slow
def test_a_folder_of_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, evaluated and diagnosed like any other data set, and resumed when it has moved."""
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "pictures")
    one_step = replace(RECIPES["digits"], batch_size=4, epochs=None, steps=1)
    study = flaxnets.Study((8,), kinds=["plain"], dataset="folder:pictures", recipe=one_step)
    assert str(study.default_out) == "runs/degradation/pictures-cifar"
    (row,) = study.train("out").rows
    assert row["status"] == "finished"
    directory = tmp_path / "out" / "plain-8" / "seed-0"
    run = flaxnets.restore(directory)
    assert run.class_names == ("bright", "dark")
    assert run.preprocess.image_shape == (32, 32, 3)  # as published
    assert run.config.dataset.path == str(tmp_path / "pictures")

    assert run_command(load_script("evaluate").main, [str(directory)]) == 0
    evaluation = json.loads((directory / "evaluation-test" / "evaluation.json").read_text())
    assert evaluation["top1_error"] == pytest.approx(row["test_error"])
    diagnostics = load_script("diagnostics")
    capsys.readouterr()
    assert run_command(diagnostics.main, ["out", "--only", "responses", "--images", "4"]) == 0
    named = f"reading the folder that the run names: {tmp_path / 'pictures'}\n"
    assert named in capsys.readouterr().out
    assert (tmp_path / "out" / "diagnostics" / "responses.png").exists()

    (tmp_path / "pictures").rename("elsewhere")
    moved = replace(study, dataset="folder:elsewhere", seeds=(0, 1))
    assert moved.train("out").rows[0] == row
    capsys.readouterr()
    for script, argument in (("evaluate", str(directory)), ("diagnostics", "out")):
        assert run_command(load_script(script).main, [argument]) == 2
        assert "which is gone; put them back, or evaluate the run with" in capsys.readouterr().err
    there = [str(directory), "--dataset", "folder:elsewhere"]
    assert run_command(load_script("evaluate").main, there) == 0
    next((tmp_path / "elsewhere" / "train" / "dark").iterdir()).unlink()
    with pytest.raises(flaxnets.InputError, match=r"dataset\.sha256"):
        moved.train("out")
