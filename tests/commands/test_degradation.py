"""The study command as a user types it."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import flaxnets
from flaxnets.cli.main import run_command
from flaxnets.errors import StorageError
from flaxnets.reporting.conclusion import conclude
from flaxnets.studies import estimate, grid
from flaxnets.studies.estimate import Probe
from flaxnets.studies.results import group_runs
from flaxnets.training import RunResult
from tests.factories import make_run
from tests.processes import assert_same_study

ROOT = Path(__file__).parents[2]

MY_NETS = """
import flax.linen as nn
from flaxnets import create_model

def build(depth, num_classes, dtype):
    return create_model(f"cifar_resnet{depth}", num_classes, shortcut="C", dtype=dtype)

class Tiny(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(16, name="hidden")(x.reshape(len(x), -1))
        x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
        return nn.Dense(self.num_classes, name="head")(x)

def tiny(depth, num_classes, dtype):
    return Tiny(num_classes)

def five(depth, num_classes, dtype):
    return Tiny(5)

def broken(depth, num_classes, dtype):
    raise RuntimeError("no such network")
"""


@pytest.fixture
def command(degradation, data_dir, tmp_path, monkeypatch, capsys):
    """Run the command in this process, in an empty working directory: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets.py").write_text(MY_NETS)
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)

    def run(*arguments):
        status = run_command(degradation.main, [*arguments, "--data-dir", str(data_dir)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def summary(out):
    with (out / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def without_time(out):
    """The rows of summary.csv that two studies must share."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in summary(out)]


def states(out):
    """What a study has, checkpoints and all: path -> time of change."""
    return {
        path.relative_to(out): path.stat().st_mtime_ns
        for path in out.glob("*/seed-*/checkpoints/*")
    }


BAD_INPUT = [
    # Depths.
    ("--depths 17", "even depths from 8 to 1202"),
    ("--depths 6", "even depths from 8 to 1202"),
    ("--depths -18", "even depths from 8 to 1202"),
    ("--depths 100000", "even depths from 8 to 1202"),
    ("--depths 8,8", "--depths repeats 8"),
    ("--depths=", "not a list of whole numbers"),
    ("--depths 8,", "not a list of whole numbers"),
    ("--depths eighteen", "not a list of whole numbers"),
    ("--depths 8.5", "not a list of whole numbers"),
    ("--depths 20 --family imagenet", "depths 18, 34, 50, 101, 152"),
    ("", "required: --depths"),
    # Names.
    ("--depths 8 --epoch 3", "unknown argument --epoch; did you mean --epochs?"),
    ("--depths 8 more", "unknown argument more"),
    ("--depths 8 --kinds residul", "did you mean residual?"),
    ("--depths 8 --kinds plain,plain", "--kinds repeats plain"),
    ("--depths 8 --kinds=", "plain, residual or a custom module:function"),
    ("--depths 8 --kinds nowhere:build", "No module named 'nowhere'"),
    ("--depths 8 --kinds my_nets:missing", "no attribute 'missing'"),
    ("--depths 8 --kinds my_nets:broken", "RuntimeError: no such network"),
    ("--depths 8 --kinds my_nets:five", "not logits (1, 10)"),
    ("--depths 8 --family cifra", "did you mean cifar?"),
    ("--depths 8 --recipe he2015", "did you mean he2015-cifar?"),
    ("--depths 8 --precision float16", "did you mean bfloat16?"),
    ("--depths 8 --shortcut D", "A, B, C"),
    ("--depths 8 --stem large", "imagenet, small"),
    # Data.
    ("--depths 8 --dataset cifar-10", "did you mean cifar10?"),
    ("--depths 8 --dataset cifar10", "is not prepared"),
    ("--depths 8 --dataset imdb_reviews", "is not prepared"),
    ("--depths 8 --train-examples 0", "not a whole number above 0"),
    ("--depths 8 --train-examples 2000", "has 1437"),
    # Numbers.
    ("--depths 8 --batch-size 1438", "more than the 1437 training images"),
    ("--depths 8 --batch-size 64 --train-examples 63", "more than the 63 training images"),
    ("--depths 8 --batch-size 0", "not a whole number above 0"),
    ("--depths 8 --batch-size -4", "not a whole number above 0"),
    ("--depths 8 --epochs 0", "not a whole number above 0"),
    ("--depths 8 --epochs 1.5", "not a whole number above 0"),
    ("--depths 8 --epochs nan", "not a whole number above 0"),
    ("--depths 8 --evaluate-every 0", "not a whole number above 0"),
    ("--depths 8 --learning-rate 0", "not a number above 0"),
    ("--depths 8 --learning-rate -0.1", "not a number above 0"),
    ("--depths 8 --learning-rate nan", "not a number above 0"),
    ("--depths 8 --learning-rate inf", "not a number above 0"),
    ("--depths 8 --seeds 1,1", "--seeds repeats 1"),
    ("--depths 8 --seeds -1", "--seeds must be from 0"),
    ("--depths 8 --workers 0", "--workers"),
    ("--depths 8 --workers 2 --distributed h:1,2,0", "--workers is for one process"),
    ("--depths 8 --seeds x", "not a list of whole numbers"),
    ("--depths 8 --seeds 0-2", "not a list of whole numbers such as 0,1,2"),
    ("--depths 8 --seeds 0-999999999", "not a list of whole numbers such as 18,34,56"),
    # What is meant.
    ("--depth 8", "unknown argument --depth; did you mean --depths?"),
    ("--depths 8 --lr 0.1", "unknown argument --lr; did you mean --learning-rate?"),
    ("--depths 8 --dataset Digits", "did you mean digits?"),
    ("--depths 8 --dataset CIFAR10", "did you mean cifar10?"),
    ("--depths 8 --dataset folder:pictures", "there is no folder pictures; give one"),
    ("--depths 8 --kinds my_nets.build", "did you mean my_nets:build?"),
    ("--depths 8 --checkpoint-every 5", "'5' is not a time or a number of steps"),
    ("--depths 8 --checkpoint-every 0s", "not a time or a number of steps"),
    ("--depths 8 --checkpoint-every 1.5steps", "not a time or a number of steps"),
    ("--depths 8 --checkpoint-every nans", "not a time or a number of steps"),
    ("--depths 8 --distributed localhost", "not HOST:PORT,PROCESSES,INDEX"),
    ("--depths 8 --distributed localhost:1234,2,2", "not HOST:PORT,PROCESSES,INDEX"),
    # Directories.
    ("--depths 8 --out my_nets.py", "is a file"),
    ("--depths 8 --out .", "not a study"),
    (f"--depths 8 --out {'x' * 300}", "File name too long"),
    ("--depths 8 --epochs 10000000000", "at most 2147483647 updates"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_is_written(command, tmp_path, arguments, message):
    before = sorted(tmp_path.rglob("*"))
    status, out, err = command(*arguments.split())
    assert status == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not out
    written = [path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts]
    assert sorted(written) == before


def test_bad_input_of_a_real_process():
    """The exit status, and that no traceback or warning joins the one line."""
    finished = subprocess.run(
        [sys.executable, ROOT / "experiments" / "degradation.py", "--depths", "18,35"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: --depths 35: the cifar family has even depths")
    assert finished.stderr.count("\n") == 1
    assert not finished.stdout


def test_batch_that_does_not_divide_by_the_devices(command, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    status, _, err = command("--depths", "8")
    assert status == 2
    assert "is not divisible by the 3 devices; give a multiple of 3" in err


def test_help_names_every_option(command, capsys):
    with pytest.raises(SystemExit) as raised:
        command("--help")
    assert raised.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--depths", "--kinds", "--train-examples", "--dry-run", "--precision"):
        assert flag in text


def test_the_study_directory(study):
    assert sorted(path.name for path in study.out.iterdir()) == [
        ".lock",
        "degradation.png",
        "degradation.svg",
        "plain-8",
        "residual-8",
        "study.json",
        "summary.csv",
    ]
    run = study.out / "plain-8" / "seed-0"
    assert {path.name for path in run.iterdir()} == {"config.json", "metrics.csv", "checkpoints"}
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["11", "22"]
    first = summary(study.out)[0]
    assert (first["kind"], first["depth"], first["status"]) == ("plain", "8", "finished")
    assert first["test_error"] == rows[-1]["test_error"]
    assert first["train_error"] == rows[-1]["train_error"]
    assert json.loads((study.out / "study.json").read_text())["study"]["family"] == "cifar"


def test_another_configuration_is_refused(study, command):
    before = states(study.out)
    arguments = [*study.arguments, "--learning-rate", "0.05", "--precision", "bfloat16"]
    status, _, err = command(*arguments)
    assert status == 2
    assert "recipe.learning_rate is 0.01 there and 0.05 here" in err
    assert 'precision is "float32" there and "bfloat16" here' in err
    assert f"use --out {study.out}-2" in err
    assert states(study.out) == before


def test_workers_change_no_number(study, command, tmp_path):
    """The study is of two runs at the same time, this is of one after the other."""
    out = tmp_path / "out"
    assert command(*study.arguments[:-1], str(out), "--workers", "1")[0] == 0
    assert_same_study(out, study.out)


def test_a_study_grows_and_trains_nothing_twice(study, command, tmp_path):
    out = tmp_path / "grown"
    shutil.copytree(study.out, out)
    before, old = states(out), summary(out)
    arguments = ["--depths", "8,10", "--epochs", "2", "--out", str(out)]
    status, printed, _ = command(*arguments, "--kinds", "plain", "--seeds", "0,1")
    assert status == 0
    assert before.items() <= states(out).items()
    rows = summary(out)
    assert [(row["kind"], row["depth"], row["seed"]) for row in rows] == [
        ("plain", "8", "0"),
        ("plain", "8", "1"),
        ("plain", "10", "0"),
        ("plain", "10", "1"),
        ("residual", "8", "0"),
    ]
    assert rows[0] == old[0]
    assert rows[4] == old[1]
    assert rows[1] != old[0]
    # The table covers what was there already.
    assert "cifar_resnet8" in printed
    assert "2 finished" in printed
    assert "After 22 updates from 1 to 2 seeds" in printed
    # Once more: nothing is left to do.
    everything = states(out)
    status, printed, _ = command(*arguments, "--kinds", "plain", "--seeds", "0,1")
    assert status == 0
    assert states(out) == everything
    assert "seed 0:" not in printed
    assert "cifar_plain10" in printed


def truncated(text):
    return text[: len(text) // 2]


def with_nul_bytes(text):
    return text[:-5] + b"\0" * 5


DAMAGE = {
    "truncated": truncated,
    "NUL bytes": with_nul_bytes,
    "emptied": lambda text: b"",
    "another JSON": lambda text: b"[1, 2]",
    "nested JSON": lambda text: b"[" * 100_000,
    "no UTF-8": lambda text: b"\xff\xfe\x00" + text,
    "a changed value": lambda text: text.replace(b"plain", b"plaim").replace(b"cifar", b"cifaz"),
}


@pytest.fixture(scope="module")
def damaged_study(study, tmp_path_factory):
    """A copy of the study, for one harm after another: each is mended."""
    return shutil.copytree(study.out, tmp_path_factory.mktemp("damaged") / "out")


def contents(out):
    """Every file of a study but its checkpoints, the lock and the figure."""
    return {
        path: path.read_bytes()
        for path in sorted(out.rglob("*.*"))
        if path.is_file() and "checkpoints" not in path.parts and path.suffix in (".json", ".csv")
    }


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_files_are_written_anew(study, damaged_study, command, damage):
    before = contents(damaged_study)
    assert len(before) == 6
    for path in before:
        path.write_bytes(damage(before[path]))
    checkpoints = states(damaged_study)
    status, _, err = command(*study.arguments[:-1], str(damaged_study))
    assert status == 0, err
    assert contents(damaged_study) == before
    assert states(damaged_study) == checkpoints  # nothing was trained again


def test_deleted_files_are_written_anew(study, damaged_study, command):
    before = contents(damaged_study)
    for path in before:
        path.unlink()
    status, _, err = command(*study.arguments[:-1], str(damaged_study))
    assert status == 0, err
    assert contents(damaged_study) == before


def test_a_damaged_study_is_still_that_study(study, damaged_study, command):
    """The checkpoints know which study it is when study.json does not."""
    study_json = damaged_study / "study.json"
    before = study_json.read_bytes()
    study_json.write_bytes(b"")
    arguments = [*study.arguments[:-1], str(damaged_study), "--learning-rate", "0.05"]
    status, _, err = command(*arguments)
    study_json.write_bytes(before)
    assert status == 2
    assert f"warning: {study_json} is damaged" in err
    assert "recipe.learning_rate is 0.01 there and 0.05 here" in err


def test_an_environment_that_trains_nothing_is_not_recorded(study, command, monkeypatch):
    before = (study.out / "study.json").read_bytes()
    assert len(json.loads(before)["environments"]) == 1
    monkeypatch.setenv("PJRT_NPROC", "99")
    assert command(*study.arguments)[0] == 0
    assert (study.out / "study.json").read_bytes() == before


def test_gradients_of_finished_runs_are_not_logged(study, command, tmp_path):
    out = shutil.copytree(study.out, tmp_path / "out")
    (out / "plain-8" / "seed-0" / "gradients.csv").touch()
    status, printed, _ = command(*study.arguments[:-1], str(out), "--log-gradients")
    assert status == 0
    line = "already finished, so no gradients are logged: "
    assert f"{line}{out / 'residual-8' / 'seed-0'}\n" in printed


def test_a_finished_run_with_a_damaged_checkpoint(study, command, tmp_path):
    """Trained again from the checkpoint before, to the same numbers."""
    out = shutil.copytree(study.out, tmp_path / "out")
    (out / "plain-8" / "seed-0" / "checkpoints" / "22" / "variables" / "_METADATA").unlink()
    before = without_time(out)
    status, printed, err = command(*study.arguments[:-1], str(out))
    assert status == 0
    assert err.startswith("warning: checkpoint 22 of ")
    assert "variables/_METADATA is missing" in err
    assert err.endswith("; checkpoint 11 is used\n")
    assert err.count("\n") == 1
    assert "plain-8 seed 0: train error" in printed
    assert without_time(out) == before


def test_runs_in_the_wrong_place_are_left_out(study, command, tmp_path):
    """A copy kept by hand is not a run of the study."""
    out = shutil.copytree(study.out, tmp_path / "out")
    shutil.copytree(out / "plain-8", out / "backup")
    status, _, err = command(*study.arguments[:-1], str(out))
    assert status == 0
    assert f"{out}/backup/seed-0 is left out: it holds the run plain 8 0" in err
    assert len(summary(out)) == 2


def test_a_copied_run_is_not_taken_for_another_seed(study, command, tmp_path):
    out = shutil.copytree(study.out, tmp_path / "out")
    shutil.copytree(out / "plain-8" / "seed-0", out / "plain-8" / "seed-1")
    before = states(out)
    status, _, err = command(*study.arguments[:-1], str(out), "--seeds", "0,1")
    assert status == 2
    assert f"{out}/plain-8/seed-1: it holds the run plain 8 0; move it away" in err
    assert states(out) == before


def test_links_in_a_study_lead_nowhere(study, command, tmp_path):
    """Nothing is written through them, and a pipe is not waited for."""
    out = shutil.copytree(study.out, tmp_path / "out")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (out / ".study.json.tmp").symlink_to(victim)
    (out / "study.json").unlink()
    os.mkfifo(out / "study.json")
    status, _, err = command(*study.arguments[:-1], str(out))
    assert status == 0
    assert f"{out}/study.json is damaged" in err
    (out / ".lock").unlink()
    (out / ".lock").symlink_to(victim)
    status, _, err = command(*study.arguments[:-1], str(out))
    assert status == 1
    assert err.startswith(f"error: {out}/.lock cannot be written: ")
    assert victim.read_text() == "mine"


def test_a_network_of_ones_own_joins(study, command, tmp_path):
    out = tmp_path / "mine"
    shutil.copytree(study.out, out)
    arguments = ["--depths", "8", "--epochs", "2", "--out", str(out)]
    status, printed, err = command(*arguments, "--kinds", "residual,my_nets:tiny")
    assert status == 0, err
    row = next(row for row in summary(out) if row["kind"] == "my_nets:tiny")
    assert row["status"] == "finished"
    assert row["parameters"] == str(64 * 16 + 16 + 16 * 10 + 10)
    assert "my_nets:tiny 8" in printed
    # Changed since: refused, not mixed.
    Path("my_nets.py").write_text(MY_NETS.replace("nn.Dense(16", "nn.Dense(17"))
    del sys.modules["my_nets"]
    status, _, err = command(*arguments, "--kinds", "my_nets:tiny")
    assert status == 2
    assert "parameters is 1210 there and 1285 here" in err


def test_dry_run_prints_the_plan_and_writes_nothing(command, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    status, out, _ = command("--depths", "8,10", "--seeds", "0,1", "--dry-run")
    assert status == 0
    assert "cifar_plain10" in out
    assert "2-1-1" in out
    assert "digits: 1,437 training and 360 test images of 8x8x1; recipe digits\n" in out
    assert "220" in out
    assert re.search(r"8 runs of 220 updates; about \d+:\d\d", out)
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_knows_what_is_finished(study, command, monkeypatch):
    def measured(model, depth, work, *_):
        return Probe(depth, work, first_step=0.75 * 10, step=1.0)

    monkeypatch.setattr(estimate, "measure", measured)
    status, out, _ = command(*study.arguments, "--dry-run")
    assert status == 0
    assert out.splitlines()[-1] == "2 runs of 22 updates, all finished: nothing is left to train"
    status, out, _ = command(*study.arguments, "--dry-run", "--seeds", "0,1", "--kinds", "plain")
    # Ten seconds to compile, and two epochs whose evaluation takes as long as 4.68 steps of each.
    assert out.splitlines()[-1] == (
        "2 runs of 22 updates, 1 of them not finished; about 0:41 here, "
        "judging by a few steps of small networks"
    )


def test_dry_run_knows_how_often_runs_are_evaluated(command, monkeypatch):
    monkeypatch.setattr(estimate, "measure", lambda _, depth, work, *__: Probe(depth, work, 0, 1.0))
    arguments = ["--depths", "8", "--kinds", "plain", "--epochs", "10", "--dry-run"]
    # 110 steps, and after each of the evaluated epochs the time of 4.68.
    for every, seconds in ((1, "2:37"), (4, "2:09"), (99, "1:59")):
        _, out, _ = command(*arguments, "--evaluate-every", str(every))
        assert f"; about {seconds} here" in out


def test_evaluation_of_some_epochs(command, tmp_path):
    """A study grows and is finished with other numbers than it was begun with."""
    arguments = ["--depths", "8", "--kinds", "my_nets:tiny", "--epochs", "4", "--out", "out"]
    assert command(*arguments, "--evaluate-every", "3")[0] == 0
    assert command(*arguments, "--seeds", "0,1")[0] == 0

    def read(seed):
        with (tmp_path / f"out/my_nets:tiny-8/seed-{seed}/metrics.csv").open() as file:
            return list(csv.DictReader(file))

    assert [row["train_error"] != "" for row in read(0)] == [True, False, True, True]
    assert all(row["running_train_error"] for row in read(0))
    assert all(row["train_error"] for row in read(1))
    assert summary(tmp_path / "out")[0]["train_error"] == read(0)[-1]["train_error"]
    # Training is the same.
    assert command(*arguments[:-1], "every", "--seeds", "0")[0] == 0
    assert summary(tmp_path / "every")[0]["test_loss"] == read(0)[-1]["test_loss"]


def test_divergence_does_not_end_the_study(command, tmp_path):
    arguments = ["--depths", "8", "--epochs", "1", "--learning-rate", "1e30", "--out", "out"]
    status, printed, _ = command(*arguments)
    assert status == 0
    rows = summary(tmp_path / "out")
    assert [row["status"] for row in rows] == ["diverged", "diverged"]
    assert all(1 < int(row["diverged_step"]) <= 11 for row in rows)
    assert "diverged at step" in printed
    assert "left out of the means: 2" in printed


class TestConclusion:
    """The sentences follow from the numbers."""

    @staticmethod
    def of(*runs):
        return conclude(group_runs(runs), 220)

    def test_degradation(self):
        text = self.of(
            make_run("plain", 18, 0, errors=(50.0, 0.3, 0.1, 0.0)),
            make_run("plain", 56, 0, errors=(90.0, 60.0, 50.0, 45.0)),
            make_run("residual", 18, 0, errors=(50.0, 0.0, 0.0, 0.0)),
            make_run("residual", 56, 0, errors=(50.0, 0.2, 0.1, 0.1)),
        )
        assert text == (
            "After 220 updates from one seed, the training error of plain networks rises with "
            "depth (0.0 % at 18, 45.0 % at 56), that of residual networks does not rise with depth "
            "(0.0 % at 18, 0.1 % at 56): the degradation problem, and residual learning curing "
            "it. Not converged: over the last quarter the training error of plain-56 moved by a "
            "point or more."
        )

    def test_a_peak_in_between_is_neither_cure_nor_rise(self):
        def text(kind, *errors):
            return self.of(
                *(
                    make_run(kind, depth, 0, errors=(90.0, error, error, error))
                    for depth, error in zip((8, 14, 20), errors, strict=True)
                ),
            )

        for last in (1.2, 0.0):
            said = text("plain", 1.0, 40.0, last)
            assert "is highest in between (1.0 % at 8, 40.0 % at 14" in said
            assert "no degradation" not in said
        both = self.of(
            *(
                make_run(kind, depth, 0, errors=(90.0, error, error, error))
                for kind, errors in (("plain", (1.0, 30.0, 60.0)), ("residual", (1.0, 9.0, 1.0)))
                for depth, error in zip((8, 14, 20), errors, strict=True)
            ),
        )
        assert ": the degradation problem." in both

    def test_no_degradation_is_said_too(self):
        text = self.of(
            make_run("plain", 18, 0, errors=(50.0, 5.0, 3.2, 3.0)),
            make_run("plain", 56, 0, errors=(90.0, 5.0, 3.6, 3.5)),
        )
        assert "no degradation in these numbers" in text
        assert "Converged" in text

    def test_degradation_that_is_not_cured(self):
        text = self.of(
            *(
                make_run(kind, depth, 0, errors=(90.0, error, error, error))
                for kind, last in (("plain", 56.5), ("residual", 21.0))
                for depth, error in ((18, 18.0), (56, last))
            ),
        )
        assert (
            "the degradation problem, in both kinds, by 38.5 points in plain networks and by "
            "3.0 in residual ones." in text
        )

    def test_any_seed_that_moves_is_not_converged(self):
        text = self.of(
            make_run("plain", 18, 0, errors=(50.0, 9.0, 9.0, 3.0)),
            make_run("plain", 18, 1, errors=(50.0, 3.0, 3.0, 3.0)),
        )
        assert "Not converged" in text

    def test_means_out_of_order(self):
        text = self.of(
            *(
                make_run("plain", d, s, errors=(50.0, e, e, e + s))
                for s in (0, 1)
                for d, e in ((18, 0.0), (34, 30.0), (56, 20.0))
            ),
        )
        assert "from 2 seeds" in text
        assert "higher at the greatest depth than at the least, though not in order" in text

    def test_blocks_of_two_types_are_two_curves(self):
        text = self.of(
            make_run("plain", 18, 0, errors=(50.0, 3.0, 3.0, 3.0)),
            make_run("plain", 34, 0, errors=(90.0, 9.0, 9.0, 9.0)),
            make_run("plain", 50, 0, errors=(90.0, 1.0, 1.0, 1.0), block="bottleneck"),
        )
        assert "plain networks of basic blocks rises with depth (3.0 % at 18, 9.0 % at 34)" in text
        assert "bottleneck blocks is known at too few depths to compare (1.0 % at 50)" in text

    def test_one_row_is_no_sign_of_convergence(self):
        text = self.of(make_run("plain", 18, 0, errors=(3.0,)))
        assert "Too few epochs to tell" in text
        assert "too few depths" in text

    @pytest.mark.parametrize(
        ("errors", "begins"),
        [
            ((66.0, 0, 0, 0, 0, 0, 0, 13.0), "Too few epochs to tell"),
            ((13.5, 0, 0, 0, 0, 0, 0, 13.0), "Converged"),
        ],
    )
    def test_an_earlier_move_is_not_the_last_quarters(self, errors, begins):
        """Only the first and the last epoch were evaluated."""
        text = self.of(make_run("plain", 18, 0, errors=errors, evaluate_every=9))
        assert f". {begins}" in text

    def test_a_move_within_the_last_quarter_counts(self):
        errors = (66.0, 0, 20.0, 0, 0, 19.0, 0, 0, 16.0, 13.0)
        text = self.of(make_run("plain", 18, 0, errors=errors, evaluate_every=3))
        assert ". Not converged" in text


@pytest.mark.parametrize(("depth", "scanned"), [(110, False), (112, True)])
def test_programs_of_very_deep_networks_do_not_grow(digits, depth, scanned):
    study = flaxnets.Study([depth], kinds=["residual"], dataset=digits)
    (planned,) = study.plan().networks
    assert (planned.model.scan_blocks, planned.model.remat) == (scanned, scanned)
    assert planned.cost.parameters == count_parameters(depth)


def count_parameters(depth):
    """Of a network with one channel and 10 classes, from the paper's table of layers."""
    blocks = (depth - 2) // 2
    first, second, third = (blocks // 3 + (blocks % 3 > i) for i in range(3))

    def stage(count, filters, before):
        layers = [(before, filters)] + [(filters, filters)] * (2 * count - 1)
        return sum(9 * a * b + 2 * b for a, b in layers)

    stem, head = 9 * 1 * 16 + 2 * 16, 64 * 10 + 10
    return stem + stage(first, 16, 16) + stage(second, 32, 16) + stage(third, 64, 32) + head


def test_a_failure_stops_the_other_networks(degradation, data_dir, tmp_path, monkeypatch, capsys):
    heard = []

    def train_run(program, seed, directory, on_progress, stop, *args, **kwargs):
        if "plain" in str(directory):
            raise StorageError("no space")
        deadline = time.monotonic() + 20
        while not stop() and time.monotonic() < deadline:
            time.sleep(0.01)
        heard.append(stop())
        return RunResult("unfinished", [], 0, 0.0, None)

    monkeypatch.setattr(grid, "train_run", train_run)
    arguments = ["--depths", "8", "--epochs", "1", "--workers", "2", "--data-dir", str(data_dir)]
    assert run_command(degradation.main, [*arguments, "--out", str(tmp_path / "out")]) == 1
    assert "no space" in capsys.readouterr().err
    assert heard == [True]
