import csv
import fcntl
import io
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from rich.console import Console

from flaxnets import InputError
from flaxnets.decoding import decode
from flaxnets.errors import DamageWarning
from flaxnets.reporting import figures
from flaxnets.reporting.figures import draw_errors, draw_run, write_png_and_svg
from flaxnets.reporting.tables import results_table
from flaxnets.studies.directory import check_output_dir, read_study_file, write_study
from flaxnets.studies.results import (
    SUMMARY,
    check_study,
    group_runs,
    open_study,
    read_runs,
    write_summary,
)
from flaxnets.training import RECIPES, StudyConfig
from flaxnets.training.environment import record_environment
from tests.factories import make_run, make_study_config

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


def test_the_figure_takes_whatever_there_is(tmp_path):
    runs = [make_run("plain", 8, seed) for seed in range(3)]
    runs += [make_run("plain", 20, 0, "diverged", (90.0, 100.0)), make_run("mine:build", 8, 0)]
    runs += [make_run("residual", 8, 0, "unfinished", ())]
    write_png_and_svg(draw_errors(group_runs(runs)), tmp_path / "figure.png", "title")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_training_error_stands_out_and_small_errors_can_be_read(tmp_path, monkeypatch):
    """It was the thin dashed line, the labels belonged to the test error, and a panel of errors
    below 5 % was crushed."""
    drawn, write = [], figures.write_figure

    def keep(figure, path, title):
        drawn.append((figure, path.name))
        write(figure, path, title)

    monkeypatch.setattr(figures, "write_figure", keep)
    runs = [
        make_run(kind, depth, seed, "finished", (90.0, last))
        for kind, last in (("plain", 50.0), ("residual", 0.0))
        for depth in (8, 14)
        for seed in (0, 1)
    ]
    networks = group_runs(runs)
    write_png_and_svg(draw_errors(networks), tmp_path / "figure.png", "title")
    first = (tmp_path / "figure.svg").read_bytes()
    write_png_and_svg(draw_errors(networks), tmp_path / "figure.png", "title")
    assert (tmp_path / "figure.svg").read_bytes() == first
    figure, _ = drawn[0]
    assert [name for _, name in drawn[:2]] == ["figure.png", "figure.svg"]
    for ax, last in zip(figure.axes, (50.0, 0.0), strict=True):
        train, test, *_ = ax.lines
        assert train.get_ydata()[-1] == last
        assert (train.get_linestyle(), test.get_linestyle()) == ("-", "--")
        assert train.get_linewidth() > 2 * test.get_linewidth()
        heights = [ax.transAxes.transform((0, text.xy[1]))[1] for text in ax.texts]
        assert heights[0] == pytest.approx(ax.transData.transform((0, last))[1])  # at its end
        assert heights[1] - heights[0] >= 0.049 * ax.bbox.height
    pixels = figure.axes[1].transData.transform([(0, 0), (0, 1), (0, 100)])[:, 1]
    assert pixels[1] - pixels[0] > 0.1 * (pixels[2] - pixels[0])
    texts = [text.get_text() for text in figure.legends[1].get_texts()]
    assert texts == ["training error", "test error", "lowest to highest seed"]
    assert len(figure.legends[0].get_texts()) == 2  # a line a depth


def test_colours_can_be_seen_on_white():
    for colour in figures.COLOURS:
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        assert 1.05 / (linear @ (0.2126, 0.7152, 0.0722) + 0.05) >= 3, colour


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


def test_free_names_are_free(tmp_path):
    for name in ("s", "s-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").touch()
    with pytest.raises(InputError, match="something that is not a study") as raised:
        check_output_dir(tmp_path / "s")
    assert str(raised.value).endswith("s-3")


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    for out in ("file", "file/below"):
        with pytest.raises(InputError, match="is a file"):
            check_output_dir(tmp_path / out)


def test_paths_that_cannot_be(tmp_path):
    with pytest.raises(InputError, match="too long"):
        check_output_dir(tmp_path / ("x" * 300))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="give a"):
        check_output_dir(tmp_path / "dangling")


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    # Asked of the system, because root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        check_output_dir(tmp_path / "out")


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
    assert {run.config.parameters for run in runs} == {75_002}


def test_dollars_and_underscores_in_names_are_no_formulas(tmp_path):
    kind = "my$x^{$:build"
    networks = group_runs([make_run(kind, 8, 0), make_run("plain", 8, 0)])
    title = "$x^{$" + 40 * " \x1b long"
    write_png_and_svg(draw_errors(networks), tmp_path / "figure.png", title)
    draw_run(networks[0].runs[0].result.rows, tmp_path / "errors.png", "$x^{$")
    for name in ("figure.png", "errors.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
