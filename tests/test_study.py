import csv
import fcntl
import io
import json
import math
import os
from pathlib import Path

import pytest
from rich.console import Console

from flaxnets import InputError
from flaxnets.figures import draw_errors
from flaxnets.study import (
    SUMMARY,
    Run,
    check_place,
    check_study,
    group_runs,
    open_study,
    read_runs,
    write_summary,
)
from flaxnets.tables import results_table
from flaxnets.training.loop import METRICS, RunResult


def made_run(kind, depth, seed, status="finished", errors=(80.0, 40.0, 20.0, 19.5), block="basic"):
    rows = [
        {
            **dict.fromkeys(METRICS, 0.5),
            "epoch": i + 1,
            "step": 10 * (i + 1),
            "train_error": error,
            "test_error": error + 5,
        }
        for i, error in enumerate(errors)
    ]
    config = {
        "kind": kind,
        "depth": depth,
        "seed": seed,
        "parameters": 75_290,
        "blocks": [1, 1, 1],
        "block": block,
        "model": {"name": f"cifar_{kind}{depth}"},
    }
    diverged_step = 17 if status == "diverged" else None
    return Run(config, RunResult(status, rows, 10 * len(rows), 12.5, diverged_step))


DEFINITION = {"family": "cifar", "recipe": {"epochs": 20}}


def test_summary_has_a_row_a_run(tmp_path):
    runs = [made_run("plain", 8, 0), made_run("plain", 8, 1, "diverged")]
    runs.append(made_run("residual", 8, 0, "unfinished"))
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
        made_run("plain", 8, 0, errors=(30.0, 10.0)),
        made_run("plain", 8, 1, errors=(30.0, 14.0)),
        made_run("plain", 8, 2, "diverged", errors=(90.0,)),
    ]
    (network,) = group_runs(runs)
    assert network.mean("train_error") == 12
    assert network.spread("train_error") == pytest.approx(math.sqrt(8))
    assert network.status == "2 of 3 (1 diverged)"
    assert group_runs(runs[:2])[0].status == "2 finished"
    assert math.isnan(group_runs(runs[2:])[0].mean("train_error"))
    assert results_table([network]).row_count == 1


def test_the_table_fits_80_columns():
    runs = [made_run("resnet", 1202, s, "diverged" if s == 2 else "finished") for s in range(3)]
    console = Console(width=80, file=io.StringIO())
    console.print(results_table(group_runs(runs)))
    printed = console.file.getvalue()
    assert "…" not in printed
    for text in ("cifar_resnet1202", "1-1-1, 0.08 M", "19.50 ± 0.00", "2 of 3 (1", "diverged)"):
        assert text in printed


def test_the_figure_takes_whatever_there_is(tmp_path):
    runs = [made_run("plain", 8, seed) for seed in range(3)]
    runs += [made_run("plain", 20, 0, "diverged", (90.0, 100.0)), made_run("mine:build", 8, 0)]
    runs += [made_run("residual", 8, 0, "unfinished", ())]
    draw_errors(group_runs(runs), tmp_path / "figure.png", "title")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_is_its_definition(tmp_path):
    out = tmp_path / "new" / "study"
    with open_study(out, DEFINITION):
        stored = json.loads((out / "study.json").read_text())
    assert stored["study"] == DEFINITION
    (environment,) = stored["environments"]
    assert {"packages", "platform", "device_kind", "device_count"} <= set(environment)
    with open_study(out, DEFINITION):
        pass
    changed = {"family": "imagenet", "recipe": {"epochs": 5}}
    message = 'family is "cifar" there and "imagenet" here; recipe.epochs is 20 there and 5 here'
    with pytest.raises(InputError, match=message) as raised:
        check_study(out, changed, [])
    assert str(raised.value).endswith(f"use --out {out}-2")


def test_free_names_are_free(tmp_path):
    for name in ("s", "s-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").touch()
    with pytest.raises(InputError, match="something that is not a study") as raised:
        check_place(tmp_path / "s")
    assert str(raised.value).endswith("s-3")


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    for out in ("file", "file/below"):
        with pytest.raises(InputError, match="is a file"):
            check_place(tmp_path / out)


def test_paths_that_cannot_be(tmp_path):
    with pytest.raises(InputError, match="too long"):
        check_place(tmp_path / ("x" * 300))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="give a"):
        check_place(tmp_path / "dangling")


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    # Asked of the system, because root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        check_place(tmp_path / "out")


def test_one_process_at_a_time(tmp_path):
    with (
        open_study(tmp_path, DEFINITION),
        pytest.raises(InputError, match=f"pid {os.getpid()} on"),
        open_study(tmp_path, DEFINITION),
    ):
        pass
    with (tmp_path / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again


def test_runs_are_read_back(study):
    runs = read_runs(study.out)
    names = [(run.kind, run.depth, run.seed) for run in runs]
    assert names == [("plain", 8, 0), ("residual", 8, 0)]
    assert {run.result.status for run in runs} == {"finished"}
    assert {run.config["parameters"] for run in runs} == {75_002}
