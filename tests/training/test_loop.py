import csv
from dataclasses import replace

import numpy as np
import pytest

import flaxnets
from flaxnets.errors import InputError
from flaxnets.parallel import data_mesh
from flaxnets.training import (
    RECIPES,
    CheckpointEvery,
    Checkpoints,
    TrainSetup,
    create_state,
    train_run,
)
from flaxnets.training.loop import eval_batch
from flaxnets.training.result import METRICS, best_epoch
from tests.factories import make_run_config
from tests.helpers import stop_at


def metrics(directory):
    """`metrics.csv` without the seconds."""
    with (directory / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def read_result(directory):
    with Checkpoints(directory, read_only=True) as checkpoints:
        return checkpoints.read_result()


def test_a_run_writes_a_row_an_epoch(uninterrupted):
    directory, result = uninterrupted
    assert (result.status, result.step) == ("finished", 28)
    rows = metrics(directory)
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "11"), ("2", "22"), ("3", "28")]
    assert list(result.rows[0]) == list(METRICS)
    assert rows[-1]["learning_rate"] == "0.0001"
    assert float(rows[-1]["test_error"]) == result.final("test_error")
    assert float(rows[-1]["train_error"]) < 60
    stored = read_result(directory)
    assert stored == result


def test_the_same_seed_gives_the_same_run(setup, uninterrupted, tmp_path):
    train_run(setup, 0, tmp_path)
    assert metrics(tmp_path) == metrics(uninterrupted[0])
    train_run(setup, 1, tmp_path / "other")
    assert metrics(tmp_path / "other") != metrics(uninterrupted[0])


@pytest.mark.parametrize("stops", [[5], [11], [1, 22, 25], [28]])
def test_a_resumed_run_is_the_uninterrupted_one(setup, assert_same_run, tmp_path, stops):
    """Stopped in the middle of an epoch, while one is measured, in the very last step."""
    for at in stops:
        result = train_run(setup, 0, tmp_path, *stop_at(at))
        assert (result.status, result.step) == ("unfinished", at)
        assert read_result(tmp_path).status == "unfinished"
    result = train_run(setup, 0, tmp_path)
    assert result.status == "finished"
    assert_same_run(tmp_path)
    assert read_result(tmp_path).status == "finished"


def test_stopped_between_two_epochs(setup, assert_same_run, tmp_path):
    seen = []
    stop = lambda: bool(seen and seen[-1].rows)  # noqa: E731
    result = train_run(setup, 0, tmp_path, seen.append, stop)
    assert (result.status, result.step, len(result.rows)) == ("unfinished", 11, 1)
    train_run(setup, 0, tmp_path)
    assert_same_run(tmp_path)


def test_a_finished_run_is_not_trained_again(setup, uninterrupted):
    directory, result = uninterrupted
    seen = []
    again = train_run(setup, 0, directory, seen.append)
    assert again == result
    assert not seen


def test_a_saved_state_is_that_of_its_step(setup, assert_same_run, tmp_path):
    """Saving copies: the next steps, which reuse the memory, leave a checkpoint alone."""
    train_run(setup, 0, tmp_path, *stop_at(6), CheckpointEvery(steps=1))
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [5, 6]
    (tmp_path / "checkpoints" / "6").rename(tmp_path / "moved-away")
    train_run(setup, 0, tmp_path)
    assert_same_run(tmp_path)


@pytest.mark.parametrize(
    ("lengths", "size"),
    [((), 256), ((1437, 360), 360), ((50_000, 10_000), 400), ((3,), 256), ((512,), 512)],
)
def test_the_batch_size_of_evaluation_needs_little_padding(lengths, size):
    assert eval_batch(data_mesh(), lengths) == size


def test_divergence_ends_the_run_with_a_record(digits, tmp_path):
    recipe = replace(RECIPES["digits"], learning_rate=1e30)
    model = flaxnets.create_model("cifar_resnet8", num_classes=10)
    setup = TrainSetup.create(model, 8, recipe, digits, data_mesh())
    result = train_run(setup, 0, tmp_path)
    assert result.status == "diverged"
    assert result.diverged_step is not None
    assert 1 < result.diverged_step <= 11
    assert result.step == 11  # found when the epoch is measured
    assert read_result(tmp_path) is not None
    seen = []
    again = train_run(setup, 0, tmp_path, seen.append)
    assert (again.status, again.diverged_step) == ("diverged", result.diverged_step)
    assert not seen


def with_nan(setup, directory, step):
    """A run stopped at `step`, a kernel of which is then NaN, in a directory of its own."""
    train_run(setup, 0, directory / "good", *stop_at(step))
    state = create_state(setup.model, setup.optimizer, 0, setup.image_shape, setup.mesh)
    with Checkpoints(directory / "good") as checkpoints:
        state, result = checkpoints.restore(state), checkpoints.read_result()
    state.params["stage2_block1"]["conv1"]["kernel"] *= np.nan
    with Checkpoints(directory / "bad") as checkpoints:
        checkpoints.save(state, result)
    return directory / "bad"


def test_nan_in_a_kernel_is_found_and_recorded(setup, tmp_path):
    result = train_run(setup, 0, with_nan(setup, tmp_path, 3))
    assert (result.status, result.diverged_step, result.step) == ("diverged", 4, 11)


def test_a_diverged_run_stopped_before_it_was_found(setup, tmp_path):
    """It ends as diverged all the same, at its first step, and is not trained again."""
    directory = with_nan(setup, tmp_path, 3)
    assert train_run(setup, 0, directory, *stop_at(7)).status == "unfinished"
    result = train_run(setup, 0, directory)
    assert (result.status, result.diverged_step, result.step) == ("diverged", 4, 11)
    seen = []
    again = train_run(setup, 0, directory, seen.append)
    assert (again.status, again.diverged_step) == ("diverged", 4)
    assert not seen


EVALUATED = ("train_loss", "train_error", "test_loss", "test_error")


def without_evaluation(row):
    return {**row, **dict.fromkeys(EVALUATED, "")}


def test_fewer_evaluations_leave_training_alone(setup, uninterrupted, assert_same_state, tmp_path):
    """Epoch 2 of 3 is not evaluated, and everything else is the same, bit for bit."""
    result = train_run(replace(setup, evaluate_every=3), 0, tmp_path)
    assert_same_state(tmp_path)
    first, second, third = metrics(uninterrupted[0])
    assert metrics(tmp_path) == [first, without_evaluation(second), third]
    assert result.final("test_error") == uninterrupted[1].final("test_error")
    assert read_result(tmp_path) == result
    assert [row["step"] for row in result.evaluated] == [11, 28]


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3)])
def test_a_run_is_resumed_with_other_evaluations(
    setup, uninterrupted, assert_same_state, tmp_path, before, after
):
    on_progress, stop = stop_at(25)
    for every, must_stop in ((before, stop), (after, lambda: False)):
        config = make_run_config(evaluate_every=every)
        changed = replace(setup, evaluate_every=every)
        train_run(changed, 0, tmp_path, on_progress, must_stop, config=config)
    assert_same_state(tmp_path)
    first, second, third = metrics(uninterrupted[0])
    second = without_evaluation(second) if before == 3 else second
    assert metrics(tmp_path) == [first, second, third]
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.read_config().evaluate_every == after


def test_the_epoch_of_a_divergence_is_evaluated(setup, tmp_path):
    directory = with_nan(setup, tmp_path, 13)
    result = train_run(replace(setup, evaluate_every=3), 0, directory)
    assert (result.status, result.diverged_step, result.step) == ("diverged", 14, 22)
    assert result.final("test_error") > 50


def test_validation_is_for_every_epoch(setup):
    splits = {"validation": setup.splits["test"], **setup.splits}
    with pytest.raises(InputError, match="every epoch must be evaluated"):
        replace(setup, splits=splits, evaluate_every=2)


def test_the_best_epoch_is_the_first_of_the_lowest_error_and_never_one_with_nan():
    nan = float("nan")

    def rows(errors, losses):
        return [
            {"validation_error": error, "validation_loss": loss}
            for error, loss in zip(errors, losses, strict=True)
        ]

    assert best_epoch(rows([30.0, 10.0, 10.0], [1.0, 1.0, 0.5])) == 1
    # Where all logits are NaN the loss is, and the error may be anything.
    assert best_epoch(rows([nan, 30.0, 0.0], [1.0, 1.0, nan])) == 1
    assert best_epoch(rows([nan], [nan])) is None
    assert best_epoch([{"test_error": 3.0}]) is None
    # A stored record may be anything.
    assert best_epoch([{"validation_error": None, "validation_loss": None}]) is None
