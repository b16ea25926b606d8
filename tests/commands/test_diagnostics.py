"""experiments/diagnostics.py, as a user types it."""

import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace

import pytest

from flaxnets.cli.main import run_command
from flaxnets.diagnostics import construction as construction_module
from flaxnets.diagnostics.finding import write_numbers
from flaxnets.diagnostics.study import Setting
from tests.diagnostics.test_figures import MADE


@pytest.fixture(scope="module")
def two_depths(degradation, data_dir, tmp_path_factory):
    """A small finished study that has logged its gradients."""
    out = tmp_path_factory.mktemp("study") / "out"
    arguments = ["--depths", "8,10", "--epochs", "2", "--data-dir", str(data_dir)]
    assert run_command(degradation.main, [*arguments, "--log-gradients", "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_every_diagnostic(diagnostics, two_depths, data_dir, capsys, tmp_path):
    arguments = [str(two_depths), "--data-dir", str(data_dir), "--images", "64"]
    assert run_command(diagnostics.main, arguments) == 0
    printed = capsys.readouterr().out
    out = two_depths / "diagnostics"
    entries = json.loads((out / "diagnostics.json").read_text())
    assert [entry["name"] for entry in entries] == list(diagnostics.DIAGNOSTICS)
    for entry in entries:
        assert (out / entry["figure"]).read_bytes().startswith(b"\x89PNG")
        assert (out / entry["figure"]).with_suffix(".svg").is_file()
        assert entry["paragraph"] in printed
        for cell in entry["table"]["rows"][-1]:
            assert cell in printed
        assert (out / f"{entry['name']}.json").is_file()
    assert len((two_depths / "plain-8" / "seed-0" / "gradients.csv").read_text().splitlines()) == 3
    built = json.loads((out / "construction.json").read_text())
    assert built["largest_difference_of_logits"] <= 1e-4
    assert built["train_error_constructed"] == built["train_error_shallow"]
    rows = (two_depths / "plain-8" / "seed-0" / "metrics.csv").read_text().splitlines()
    final = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
    assert built["train_error_shallow"] == pytest.approx(float(final["train_error"]))
    # Those that are there stay; what is trained is not trained again.
    assert run_command(diagnostics.main, [*arguments, "--only", "construction,responses"]) == 0
    assert json.loads((out / "diagnostics.json").read_text()) == entries
    again = json.loads((out / "construction.json").read_text())
    assert again == built  # to the seconds
    # The numbers are enough to make everything else again, wherever they are.
    shutil.copytree(out, tmp_path / "study" / "diagnostics", ignore=shutil.ignore_patterns("*-*"))
    for path in (tmp_path / "study" / "diagnostics").iterdir():
        if path.suffix != ".json" or path.name == "diagnostics.json":
            path.unlink()
    assert run_command(diagnostics.main, [str(tmp_path / "study"), "--redraw"]) == 0
    for path in (tmp_path / "study" / "diagnostics").iterdir():
        if path.name not in (".lock", "diagnostics.json"):
            assert path.read_bytes() == (out / path.name).read_bytes(), path
    redrawn = json.loads((tmp_path / "study" / "diagnostics" / "diagnostics.json").read_text())
    assert redrawn == [entry for entry in entries if entry["name"] != "gradient-log"]


@pytest.mark.slow
def test_a_construction_goes_on_where_it_was_stopped(
    diagnostics, two_depths, data_dir, capsys, tmp_path, monkeypatch
):
    def construct(name):
        if not (tmp_path / name).exists():
            without = shutil.ignore_patterns("diagnostics")
            shutil.copytree(two_depths, tmp_path / name, ignore=without)
        arguments = ["--data-dir", str(data_dir), "--only", "construction", "--images", "64"]
        return run_command(diagnostics.main, [str(tmp_path / name), *arguments])

    def continued(name):
        found = json.loads((tmp_path / name / "diagnostics" / "construction.json").read_text())
        return [{**row, "seconds": None} for row in found["continued"]]

    train, steps = construction_module.train_run, []

    def signalled(program, seed, directory, on_progress, stop, **more):
        def on_progress_then_signal(now):
            on_progress(now)
            steps.append(now.step)
            if len(steps) > 1:
                return
            os.kill(os.getpid(), signal.SIGINT)
            deadline = time.monotonic() + 10
            while not stop() and time.monotonic() < deadline:
                time.sleep(0.01)

        return train(program, seed, directory, on_progress_then_signal, stop, **more)

    monkeypatch.setattr(construction_module, "train_run", signalled)
    assert construct("stopped") == 130
    stopped_at = len(steps)
    assert "stopped and saved; continue with" in capsys.readouterr().err
    assert not (tmp_path / "stopped" / "diagnostics" / "construction.json").exists()
    assert construct("stopped") == 0
    assert construct("whole") == 0
    assert continued("stopped") == continued("whole")
    assert steps[stopped_at] > steps[0] > 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("nowhere", "nowhere is not a study directory"),
        ("{study} --only landscpe", "--only must be one of .* did you mean landscape"),
        ("{study} --seed 3", "--seed must be one of 0, not 3"),
        ("{empty}", "has no finished run of a plain or residual network"),
        ("{study} --images 0", "--images"),
        ("{empty} --redraw", "holds no diagnostic numbers; leave out --redraw"),
        ("{numbers} --redraw", r"gradients\.json is damaged, or of an earlier version"),
        ("{numbers} --redraw --only responses", r"responses\.json cannot be read"),
        ("{foreign} --redraw", r"construction\.json is damaged .*plain-14 is not of the study's"),
    ],
)
def test_bad_input_gives_one_line(diagnostics, study, capsys, tmp_path, arguments, line):
    numbers = tmp_path / "numbers"
    (numbers / "diagnostics").mkdir(parents=True)
    (numbers / "diagnostics" / "gradients.json").write_text('{"at the start": {}}')
    foreign = tmp_path / "foreign"
    (foreign / "diagnostics").mkdir(parents=True)
    setting = Setting("digits", 220, 0, (6, 8))
    stored = replace(MADE["construction"], study=setting)
    write_numbers(foreign / "diagnostics" / "construction.json", stored)
    arguments = arguments.format(study=study.out, empty=tmp_path, numbers=numbers, foreign=foreign)
    assert run_command(diagnostics.main, arguments.split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(line, err)


def test_stored_numbers_are_shown_without_the_networks(diagnostics, tmp_path, capsys):
    out = tmp_path / "diagnostics"
    out.mkdir()
    names = ("gradients", "construction")
    for name in names:
        write_numbers(out / f"{name}.json", MADE[name])
    assert run_command(diagnostics.main, [str(tmp_path), "--redraw"]) == 0
    printed = capsys.readouterr().out
    entries = json.loads((out / "diagnostics.json").read_text())
    assert [entry["name"] for entry in entries] == list(names)
    for name, entry in zip(names, entries, strict=True):
        assert (out / f"{name}.svg").is_file()
        assert entry["paragraph"] in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["plain-8", "start", "0.500", "640", "1,280"] in lines
    assert ["plain-14", "from", "scratch", "22", "59.36"] in lines


def test_the_depths_are_those_of_the_whole_study(diagnostics, study, data_dir, tmp_path):
    """Colours go by them, whichever runs have finished."""
    shutil.copytree(study.out, tmp_path / "study")
    config = json.loads((study.out / "plain-8" / "seed-0" / "config.json").read_text())
    started = tmp_path / "study" / "plain-6" / "seed-0"
    started.mkdir(parents=True)
    (started / "config.json").write_text(json.dumps({**config, "depth": 6}))
    arguments = ["--only", "responses", "--images", "16", "--data-dir", str(data_dir)]
    assert run_command(diagnostics.main, [str(tmp_path / "study"), *arguments]) == 0
    stored = json.loads((tmp_path / "study" / "diagnostics" / "responses.json").read_text())
    setting = {"dataset": "digits", "updates": 22, "seed": 0, "depths": [6, 8]}
    assert stored["study"] == setting
    assert list(stored["spreads"]) == ["plain-8", "residual-8"]
