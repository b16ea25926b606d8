"""Full disks and vanished directories: one clear line, nothing lost, and on from there."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flaxnets.cli.main import run_command
from flaxnets.cli.progress import RunProgress
from flaxnets.studies.results import read_runs
from tests.processes import COMMAND, finish

# Orbax's tasks go on for a moment after an error that has been raised.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

EVERY = ["--checkpoint-every", "5steps"]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1.5 MB, with room for one checkpoint and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("this machine does not let us mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def command(degradation, study, capsys):
    """Run the study's command with another --out: status and stderr."""

    def run(out):
        capsys.readouterr()
        arguments = [*study.arguments[:-4], *EVERY, "--out", str(out)]
        status = run_command(degradation.main, arguments)
        return status, capsys.readouterr().err

    return run


def numbers(out):
    """What the runs have come to, but for the times."""
    return [
        (run.key, run.result.status, [{**row, "seconds": 0} for row in run.result.rows])
        for run in read_runs(out)
    ]


@pytest.mark.slow
def test_a_full_disk(study, command, small_disk):
    """In a process of its own, so that nothing is said on the way out either."""
    out = small_disk / "out"
    alone = ["--workers", "1"]
    status, _, err = finish(*COMMAND, *study.arguments[:-4], *EVERY, *alone, "--out", out)
    assert status == 1
    assert err.startswith(f"error: {out}/plain-8/seed-0/checkpoints/")
    assert "cannot be written: it needs about 0.9 MB, and" in err
    assert "B is free; free up space; everything saved before is intact" in err
    assert err.count("\n") == 1
    (run,) = read_runs(out)
    assert run.result.status == "unfinished"
    assert run.result.step >= 5
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    status, err = command(out)
    assert (status, err) == (0, "")
    assert numbers(out) == numbers(study.out)


def test_a_disk_that_is_full_from_the_start(command, small_disk):
    (small_disk / "other").write_bytes(bytes(1_535_000))
    status, err = command(small_disk / "out")
    assert status == 1
    assert err.startswith(f"error: {small_disk}/out/")
    assert "is free; free up space" in err
    assert err.count("\n") == 1


def test_no_permission():
    """In a process of its own, which gives up being root where it is."""
    place = Path(tempfile.mkdtemp())  # below no directory of root's alone, as `tmp_path` is
    script = f"""
import os
from pathlib import Path
from flaxnets.files import write_atomic
if os.geteuid() == 0:
    os.setuid(65534)
write_atomic(Path({str(place / "file")!r}), "content")
"""
    place.chmod(0o555)
    status, _, err = finish(sys.executable, "-c", script)
    assert status == 1
    assert f"StorageError: {place}/file cannot be written: no permission to write in" in err
    place.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["plain-8/seed-0/checkpoints", "plain-8", "."])
def test_a_directory_that_vanishes(study, command, degradation, tmp_path, monkeypatch, what):
    out = tmp_path / "out"
    at_step(monkeypatch, 8, lambda: (out / what).rename(tmp_path / "elsewhere"))
    status, err = command(out)
    monkeypatch.undo()
    assert status == 1
    assert err.startswith(f"error: {out}/plain-8/seed-0/")
    assert "is gone" in err
    assert err.count("\n") == 1
    status, err = command(out)
    assert (status, err) == (0, "")
    assert numbers(out) == numbers(study.out)


def at_step(monkeypatch, step, happens):
    """Let something happen to the disk at a step of the first run."""
    update, happened = RunProgress.update, []

    def watch(self, progress, force=False):
        if progress.step == step and not happened:
            happened.append(True)
            happens()
        update(self, progress, force)

    monkeypatch.setattr(RunProgress, "update", watch)
