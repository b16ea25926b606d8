"""What the commands print, where it goes wrong: wrong terminals, closed and full outputs."""

import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from flaxnets.cli import progress as progress_module
from flaxnets.cli.arguments import ArgumentParser
from flaxnets.cli.main import run_command
from flaxnets.cli.progress import StudyProgress, plain_console
from flaxnets.errors import InputError
from flaxnets.studies.directory import check_output_dir, lock_directory
from flaxnets.text import duration
from flaxnets.training import Progress
from tests.processes import COMMAND, ROOT

# A command that prints, fails or is interrupted, as a real process of its own.
TINY = """
import sys
from flaxnets.cli.main import run_command
from flaxnets.cli.progress import plain_console
from flaxnets.errors import InputError

def main(arguments):
    for _ in range(2000):
        plain_console().print("0.07 ± 0.01 █")
    print("printed")
    print("to stderr ±", file=sys.stderr)
    if "bad" in sys.argv:
        raise InputError("bad ±")
    if "interrupted" in sys.argv:
        raise KeyboardInterrupt
    open("done", "w").close()
    return 0

sys.exit(run_command(main))
"""


def tiny(line, place, **environment):
    """Run a shell's line with the command in it: status, stdout, stderr."""
    (place / "tiny.py").write_text(TINY)
    command = f"{sys.executable} {place / 'tiny.py'}"
    finished = subprocess.run(
        ["bash", "-c", line.format(command)],
        cwd=place,
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
    )
    return finished.returncode, finished.stdout.decode(), finished.stderr.decode()


@pytest.mark.parametrize(
    ("line", "status"),
    [
        pytest.param("{} > /dev/full 2>&1", 0, marks=pytest.mark.slow),
        ("{} >&- 2>&- <&-", 0),
        pytest.param("{} bad > /dev/full 2>&1", 2, marks=pytest.mark.slow),
        ("{} interrupted > /dev/full 2>&-", 130),
        pytest.param(
            "({}; echo $? > status) 2>&1 | true; exit $(cat status)", 0, marks=pytest.mark.slow
        ),
    ],
)
def test_no_failure_to_print_changes_the_exit_status(tmp_path, line, status):
    assert tiny(line, tmp_path) == (status, "", "")
    assert (tmp_path / "done").exists() == (status == 0)


def test_an_encoding_without_a_character(tmp_path):
    status, out, err = tiny("{}", tmp_path, PYTHONIOENCODING="ascii")
    assert (status, err) == (0, "to stderr ?\n")
    assert out == "0.07 ? 0.01 ?\n" * 2000 + "printed\n"


def test_a_path_that_is_not_utf8(tmp_path):
    with pytest.raises(InputError, match="need a path in UTF-8; give another directory"):
        check_output_dir(tmp_path / os.fsdecode(b"na\xefve"))


def test_a_lock_that_is_not_utf8(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff\xfe")
    with (tmp_path / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused = pytest.raises(InputError, match="is in use by another process")
        with refused, lock_directory(tmp_path):
            pass


def test_platforms_that_are_not_there(monkeypatch, capsys):
    """As JAX_PLATFORMS=cuda has it, with and without a plugin."""
    import jax

    for error in (AssertionError(), RuntimeError("Unable to initialize backend 'cuda'")):

        def devices(error=error):
            raise error

        monkeypatch.setattr(jax, "devices", devices)
        assert run_command(lambda _: len(jax.devices()), []) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: JAX finds no device for JAX_PLATFORMS=")
        assert err.count("\n") == 1


def test_another_error_keeps_its_traceback():
    def main(_):
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run_command(main, [])


SCRIPTS = sorted(
    path for path in (ROOT / "experiments").glob("*.py") if "run_command(main)" in path.read_text()
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_ctrl_c_in_the_imports_is_left_to_the_system(script):
    """The shell then says 130; nothing slow is imported before."""
    head, _, _ = script.read_text().partition("signal.signal(signal.SIGINT, signal.SIG_DFL)")
    imported = [line for line in head.splitlines() if line.startswith(("import ", "from "))]
    assert imported == ["import signal"]


def test_ctrl_c_in_the_imports():
    process = subprocess.Popen([*COMMAND, "--help"], stderr=subprocess.PIPE)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (-signal.SIGINT, b"")


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(progress_module.time, "perf_counter", lambda: self.now)


def test_compilation_is_not_taken_for_training(monkeypatch):
    """The time left of a study once began at 2:41:06 for one of two minutes."""
    clock = Clock(monkeypatch)
    progress = StudyProgress(plain_console(quiet=True), finished=0, unfinished=2, work=300.0)
    small = progress.start_run("small", 100.0, total_steps=100, steps_per_epoch=10, batch=8)
    large = progress.start_run("large", 200.0, total_steps=100, steps_per_epoch=10, batch=8)
    clock.now = 60.0
    small.update(Progress(1, 0.0, []))
    assert progress.time_left() == small.time_left() == "?"
    for step in range(2, 12):
        clock.now += 1.0
        small.update(Progress(step, 0.0, []))
    # A unit of work a second: 89 are left of this run, and 200 of the other.
    assert small.time_left() == "1:29"
    assert progress.time_left() == "4:49"
    # The other one is resumed: what it restores took no time.
    clock.now += 1.0
    large.update(Progress(51, 0.0, []))
    assert progress.time_left() == duration((300 - 11 - 102) / (12 / 11))


def test_the_loss_that_is_shown_is_that_of_training(monkeypatch):
    """Evaluation's is 1e5 in the first epochs of a deep plain network that is sound."""
    progress = StudyProgress(plain_console(quiet=True), 0, 1, 1.0)
    run = progress.start_run("plain-56", 1.0, total_steps=20, steps_per_epoch=10, batch=8)
    row = {"running_train_loss": 2.302, "train_loss": 356263.46, "train_error": 90.0}
    run.update(Progress(10, 0.0, [{**row, "test_error": 89.0}]))
    assert run.facts() == "epoch 2 of 2  running loss 2.302  train error 90.0 %  test error 89.0 %"


def test_what_comes_after_two_dashes_is_no_option():
    parser = ArgumentParser()
    parser.add_argument("--best", action="store_true")
    parser.add_argument("images", nargs="+")
    assert parser.parse(["--best", "--", "--odd.jpg"]).images == ["--odd.jpg"]
    with pytest.raises(InputError, match=r"unknown argument --bset; did you mean --best\?"):
        parser.parse(["--bset", "--", "--odd.jpg"])
