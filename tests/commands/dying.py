"""Run the study command and die of SIGKILL at a named place.

python tests/commands/dying.py PLACE ARGUMENTS...
"""

import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import flaxnets.cli.main
import flaxnets.cli.progress
import flaxnets.files
import flaxnets.studies.grid as grid
import flaxnets.training.checkpoints as checkpoints
import flaxnets.training.loop as loop
from tests.conftest import load_script

degradation = load_script("degradation")


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(owner: Any, name: str, count: int = 1, after: bool = False):
    """Die when `owner.name` is called for the `count`-th time, or when that call is done."""
    original, calls = getattr(owner, name), [0]

    def dying(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count and not after:
            die()
        result = original(*args, **kwargs)
        if calls[0] == count:
            die()
        return result

    setattr(owner, name, dying)


def in_the_first_compilation():
    start_run = flaxnets.cli.progress.StudyProgress.start_run

    def dying(*args: Any, **kwargs: Any):
        threading.Timer(0.7, die).start()
        return start_run(*args, **kwargs)

    flaxnets.cli.progress.StudyProgress.start_run = dying


def while_orbax_writes():
    die_at_call(checkpoints.Checkpoints, "_complete", 2)


def before_the_manifest():
    die_at_call(checkpoints, "write_manifest")


def while_a_file_is_written(name):
    """The new content is in a temporary file, the old one still in place."""
    original = Path.replace

    def replace(self: Path, target):
        if Path(target).name == name:
            die()
        return original(self, target)

    Path.replace = replace


def while_an_old_checkpoint_is_removed():
    def remove_half(path):
        shutil.rmtree(Path(path) / "training")
        die()

    checkpoints._remove = remove_half


def in_the_middle_of_an_epoch():
    update = flaxnets.cli.progress.RunProgress.update

    def dying(self, progress, force=False):
        update(self, progress, force)
        if progress.step % 11 == 5 and not force:
            die()

    flaxnets.cli.progress.RunProgress.update = dying


def between_metrics_and_checkpoint():
    die_at_call(loop, "write_metrics", 2, after=True)


def between_two_runs():
    die_at_call(grid, "write_summary", after=True)


PLACES = {
    "in the first compilation": in_the_first_compilation,
    "while Orbax writes": while_orbax_writes,
    "before the manifest": before_the_manifest,
    "in the middle of an epoch": in_the_middle_of_an_epoch,
    "while the manifest is written": lambda: while_a_file_is_written("manifest.sha256"),
    "while an old checkpoint is removed": while_an_old_checkpoint_is_removed,
    "while metrics.csv is written": lambda: while_a_file_is_written("metrics.csv"),
    "between metrics.csv and checkpoint": between_metrics_and_checkpoint,
    "between two runs": between_two_runs,
    "while config.json is written": lambda: while_a_file_is_written("config.json"),
    "while study.json is written": lambda: while_a_file_is_written("study.json"),
    "while summary.csv is written": lambda: while_a_file_is_written("summary.csv"),
}

if __name__ == "__main__":
    PLACES[sys.argv[1]]()
    sys.exit(flaxnets.cli.main.run_command(degradation.main, sys.argv[2:]))
