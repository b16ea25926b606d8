"""SIGINT and SIGTERM: before a command has begun, and while it works."""

import os
import signal
import subprocess
import time
from collections.abc import Callable

import jax
import pytest

from flaxnets.cli import interruption as interruption_module
from flaxnets.cli.interruption import Interruption
from tests.processes import COMMAND, ROOT

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


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit statuses with which the process would have ended at once."""
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    return statuses


def send(number: int, heard: Callable[[], bool]) -> None:
    """Send this process a signal, and wait until it is heard: a thread listens."""
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 10
    while not heard():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.unit
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_asks_unsaved_work_to_stop(
    number: int, status: int, exits: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with Interruption("python train.py") as interruption:
        interruption.unsaved.add("a run")
        assert not interruption.requested()
        send(number, interruption.requested)
        assert interruption.exit_status == status
    assert signal.getsignal(number) is before
    assert exits == []
    assert "stopping and saving; interrupt again to exit at once" in capfd.readouterr().err


@pytest.mark.unit
def test_a_second_signal_exits_at_once(exits: list[int]) -> None:
    with Interruption("python train.py") as interruption:
        interruption.unsaved.add("a run")
        send(signal.SIGTERM, interruption.requested)
        send(signal.SIGINT, lambda: bool(exits))
    assert exits == [130]


@pytest.mark.unit
def test_with_nothing_to_save_the_first_signal_exits_at_once(
    exits: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    with Interruption("python train.py --out there"):
        send(signal.SIGINT, lambda: bool(exits))
    assert exits == [130]
    assert "continue with: python train.py --out there\n" in capfd.readouterr().err


@pytest.mark.unit
def test_processes_stop_at_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """They agree at every tenth question, and a signal to any of them is one to all."""
    others, asked = [0], []

    def process_max(number: int) -> int:
        asked.append(number)
        return max(number, *others)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(interruption_module, "process_max", process_max)
    interruption = Interruption("python train.py")
    assert not any(interruption.requested() for _ in range(5))
    interruption.signal = signal.SIGINT
    others[0] = signal.SIGTERM
    assert not any(interruption.requested() for _ in range(5))
    assert asked == [0]
    assert interruption.requested()
    assert asked == [0, signal.SIGINT]
    assert interruption.exit_status == 143  # that of the other process, as there
    assert interruption.requested()
    assert len(asked) == 2
