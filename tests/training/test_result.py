"""The record of a run, in which not every epoch need be evaluated."""

import csv
import json
import math

import pytest

from flaxnets.decoding import decode, encode
from flaxnets.errors import InputError
from flaxnets.training import RunResult
from flaxnets.training.result import count_evaluations, write_metrics
from tests.factories import make_rows

pytestmark = pytest.mark.unit

MISSING = dict.fromkeys(("train_loss", "train_error", "test_loss", "test_error"))


def make_result(**changes):
    first, second, third = make_rows([80.0, 40.0, 20.0])
    values = {"rows": [first, {**second, **MISSING}, third], "status": "finished"}
    return RunResult(**{**values, "step": 30, "seconds": 1.0, "diverged_step": None, **changes})


def test_epochs_without_evaluation_are_stored_and_read(tmp_path):
    result = make_result()
    stored = json.loads(json.dumps(encode(result)))
    assert decode(RunResult, stored, "it") == result
    assert result.final("train_error") == 20.0
    assert [row["epoch"] for row in result.evaluated] == [1, 3]
    write_metrics(tmp_path, result.rows)
    with (tmp_path / "metrics.csv").open() as file:
        row = list(csv.DictReader(file))[1]
    assert {name for name, value in row.items() if value == ""} == set(MISSING)


def test_a_run_that_has_not_ended_may_end_with_an_epoch_without_evaluation():
    rows = make_result().rows[:2]
    assert math.isnan(make_result(rows=rows, status="unfinished").final("train_error"))
    for status in ("finished", "diverged"):
        with pytest.raises(InputError, match="its first or its last epoch was not evaluated"):
            make_result(rows=rows, status=status)


@pytest.mark.parametrize(
    ("index", "missing", "problem"),
    [
        (0, MISSING, "first or its last"),
        (2, MISSING, "first or its last"),
        (1, {"train_error": 3.0}, "lacks others"),
        (1, {"step": None}, "its rows lack"),
        (1, {"running_train_error": None}, "its rows lack"),
        (1, {"seconds": None}, "its rows lack"),
    ],
)
def test_other_values_may_not_be_missing(index, missing, problem):
    rows = make_result().rows
    rows[index] = {**rows[index], **missing}
    with pytest.raises(InputError, match=problem):
        make_result(rows=rows)


@pytest.mark.parametrize(
    ("epochs", "every", "count"),
    [(20, 1, 20), (20, 5, 5), (20, 20, 2), (20, 30, 2), (7, 3, 4), (1, 1, 1), (1, 9, 1)],
)
def test_the_first_and_the_last_epoch_are_evaluated(epochs, every, count):
    assert count_evaluations(epochs, every) == count
