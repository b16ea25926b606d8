import csv
import fcntl
import io
import json
import math
import os
from dataclasses import replace

import pytest
from rich.console import Console

from flaxnets import InputError
from flaxnets.decoding import decode
from flaxnets.errors import DamageWarning
from flaxnets.reporting.tables import results_table
from flaxnets.studies.directory import read_study_file, write_study
from flaxnets.studies.results import (
    SUMMARY,
    check_study,
    group_runs,
    open_study,
    write_summary,
)
from flaxnets.training import RECIPES, StudyConfig
from flaxnets.training.environment import record_environment
from tests.factories import make_run, make_study_config

pytestmark = pytest.mark.unit

DEFINITION = make_study_config()


def test_summary_has_a_row_a_run(tmp_path):
    runs = [make_run("plain", 8, 0), make_run("plain", 8, 1, "diverged")]
    runs.append(make_run("residual", 8, 0, "unfinished"))
    write_summary(tmp_path, runs)
    with (tmp_path / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(SUMMARY)
    assert [row["status"] for row in rows] == ["finished", "diverged", "unfinished"]
    assert rows[0]["train_error"] == "19.5"
    assert rows[1]["diverged_step"] == "17"
    assert rows[2]["train_error"] == ""


def test_means_are_over_finished_runs_and_say_so():
    runs = [
        make_run("plain", 8, 0, errors=(30.0, 10.0)),
        make_run("plain", 8, 1, errors=(30.0, 14.0)),
        make_run("plain", 8, 2, "diverged", errors=(90.0,)),
    ]
    (network,) = group_runs(runs)
    assert network.mean("train_error") == 12
    assert network.spread("train_error") == pytest.approx(math.sqrt(8))
    assert network.status == "2 of 3 (1 diverged)"
    assert group_runs(runs[:2])[0].status == "2 finished"
    assert math.isnan(group_runs(runs[2:])[0].mean("train_error"))
    assert results_table([network]).row_count == 1


def test_the_table_fits_80_columns():
    runs = [make_run("residual", 1202, s, "diverged" if s == 2 else "finished") for s in range(3)]
    text = io.StringIO()
    Console(width=80, file=text).print(results_table(group_runs(runs)))
    printed = text.getvalue()
    assert "…" not in printed
    for text in ("cifar_resnet1202", "1-1-1, 0.08 M", "19.50 ± 0.00", "2 of 3 (1", "diverged)"):
        assert text in printed


def test_a_study_is_its_definition(tmp_path):
    out = tmp_path / "new" / "study"
    with open_study(out, DEFINITION):
        stored = json.loads((out / "study.json").read_text())
    assert decode(StudyConfig, stored["study"], "it") == DEFINITION
    assert stored["environments"] == []  # nothing has been trained
    for _ in range(2):
        write_study(out, DEFINITION, [record_environment()])
    (environment,) = json.loads((out / "study.json").read_text())["environments"]
    assert {"packages", "platform", "device_kind", "device_count"} <= set(environment)
    assert {"cpu_cores", "x64", "convolutions"} <= set(environment)
    with open_study(out, DEFINITION):
        pass
    recipe = replace(RECIPES["digits"], epochs=5)
    changed = replace(DEFINITION, family="imagenet", recipe=recipe)
    message = 'family is "cifar" there and "imagenet" here; recipe.epochs is 20 there and 5 here'
    with pytest.raises(InputError, match=message) as raised:
        check_study(out, changed, [])
    assert str(raised.value).endswith(f"use --out {out}-2")


@pytest.mark.parametrize("content", ["my notes", '{"title": "my thesis"}', '{"study": []}'])
def test_a_file_that_may_not_be_ours_is_set_aside(tmp_path, content):
    """Nothing else there says that it is a study's."""
    (tmp_path / "study.json").write_text(content)
    with (
        pytest.warns(DamageWarning, match=r"study\.json is set aside as .*study\.json\.damaged"),
        open_study(tmp_path, DEFINITION),
    ):
        pass
    assert (tmp_path / "study.json.damaged").read_text() == content
    stored = read_study_file(tmp_path)
    assert stored is not None
    assert stored.study == DEFINITION


def test_one_process_at_a_time(tmp_path):
    with (
        open_study(tmp_path, DEFINITION),
        pytest.raises(InputError, match=f"pid {os.getpid()} on"),
        open_study(tmp_path, DEFINITION),
    ):
        pass
    with (tmp_path / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again
