"""A run moves from any number of devices and processes to any other."""

import signal
import socket
import sys
import time

import numpy as np
import pytest

from tests.processes import COMMAND, ROOT, assert_same_study, finish, start, without_seconds

pytestmark = pytest.mark.slow

RUN = (sys.executable, ROOT / "tests" / "commands" / "float64_run.py")


def devices(count):
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}


def start_two(*command, more=((), ()), places=(ROOT, ROOT)):
    """The command twice, as process 0 and 1 of a group; `more` has arguments of each alone."""
    for place in places:
        place.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flag = ("--distributed",) if COMMAND[1] in command else ()
    return [
        start(
            *(*command, *more[index], *flag, f"{address},2,{index}"),
            place=places[index],
            **devices(1),
        )
        for index in (0, 1)
    ]


def finish_two(processes):
    """Exit status and stderr of each."""
    errors = [process.communicate(timeout=300)[1] for process in processes]
    return [(process.returncode, err) for process, err in zip(processes, errors, strict=True)]


def float64_run(directory, stop_at, count):
    status, out, err = finish(*RUN, directory, stop_at, **devices(count))
    assert status == 0, err
    assert f"{count} devices: {'finished' if stop_at == 20 else 'unfinished'}" in out


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one")
    float64_run(directory, 20, 1)
    return directory


def assert_equal(directory, reference):
    with np.load(directory / "state.npz") as ours, np.load(reference / "state.npz") as theirs:
        assert set(ours) == set(theirs)
        assert len(set(ours)) > 50
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(("first", "then"), [(1, 8), (8, 1)])
def test_resumed_on_another_number_of_devices(one_device, tmp_path, first, then):
    float64_run(tmp_path, 10, first)
    float64_run(tmp_path, 20, then)
    assert_equal(tmp_path, one_device)


def test_two_processes_equal_one(one_device, tmp_path):
    """The second half: they take over from one process with one device."""
    float64_run(tmp_path / "moved", 10, 1)
    for directory in (tmp_path / "whole", tmp_path / "moved"):
        for status, err in finish_two(start_two(*RUN, directory, 20)):
            assert status == 0, err
        assert_equal(directory, one_device)


@pytest.fixture(scope="module")
def arguments(data_dir):
    schedule = ["--epochs", "12", "--checkpoint-every", "10steps"]
    return ["--depths", "8", "--kinds", "plain", *schedule, "--data-dir", str(data_dir)]


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory):
    """The study, by two processes."""
    out = tmp_path_factory.mktemp("two") / "out"
    processes = start_two(*COMMAND, *arguments, "--out", out)
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "plain-8 seed 0: train error" in printed[0]
    assert "plain-8" not in printed[1]  # one of them speaks
    return out


def wait_for_an_epoch(processes, out):
    while not (out / "plain-8" / "seed-0" / "metrics.csv").exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other(arguments, uninterrupted, tmp_path, victim):
    out = tmp_path / "out"
    processes = start_two(*COMMAND, *arguments, "--out", out)
    wait_for_an_epoch(processes, out)
    processes[victim].kill()
    began = time.perf_counter()
    survivor = processes[1 - victim]
    _, err = survivor.communicate(timeout=60)
    processes[victim].communicate()
    assert time.perf_counter() - began < 60
    # Where the primary process dies, JAX may end the others before a word of ours.
    assert survivor.returncode in ((1,) if victim else (1, -signal.SIGABRT))
    assert "another process is lost" in err or "another task died" in err
    assert "Traceback" not in err
    for status, err in finish_two(start_two(*COMMAND, *arguments, "--out", out)):
        assert status == 0, err
    assert_same_study(out, uninterrupted)


def test_a_signal_to_one_stops_both(arguments, uninterrupted, tmp_path):
    out = tmp_path / "out"
    processes = start_two(*COMMAND, *arguments, "--out", out)
    wait_for_an_epoch(processes, out)
    processes[1].send_signal(signal.SIGTERM)
    for status, err in finish_two(processes):
        assert status == 143, err
        assert "stopped and saved; continue with: python" in err
    (row,) = without_seconds(out / "summary.csv")
    assert row["status"] == "unfinished"
    for status, err in finish_two(start_two(*COMMAND, *arguments, "--out", out)):
        assert status == 0, err
    assert_same_study(out, uninterrupted)


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        (("--learning-rate", "0.5"), "recipe.learning_rate is 0.01 there and 0.5 here"),
        (("--kinds", "residual"), "runs is "),
        (("--dry-run",), "--dry-run is false there and true here"),
    ],
)
def test_different_commands_are_refused(arguments, tmp_path, more, difference):
    out = tmp_path / "out"
    processes = start_two(*COMMAND, *arguments, "--out", out, more=((), more))
    for status, err in finish_two(processes):
        assert status == 2, err
        assert difference in err
        assert "'there' is process 0, 'here' is process 1" in err
    assert not out.exists()


def test_another_directory_for_each_is_refused(arguments, tmp_path):
    """The same name in two places, as a local disk has it."""
    processes = start_two(*COMMAND, *arguments, "--out", "out", places=(tmp_path / "a", tmp_path))
    for status, err in finish_two(processes):
        assert status == 2, err
        assert "--out out is not the same directory for process 1 as for process 0" in err


def test_what_one_refuses_all_refuse(arguments, tmp_path):
    out = tmp_path / "out"
    more = ((), ("--train-examples", "5000"))
    for status, err in finish_two(start_two(*COMMAND, *arguments, "--out", out, more=more)):
        assert status == 2, err
        assert "--train-examples 5000: digits has 1437" in err
    assert not out.exists()


def test_workers_are_for_one_device():
    status, _, err = finish(*COMMAND, "--depths", "8", "--workers", "2", **devices(2))
    assert status == 2
    assert err.startswith("error: --workers 2 is for a single device, but there are 2")
    assert err.count("\n") == 1


def test_no_cluster():
    status, _, err = finish(*COMMAND, "--depths", "8", "--distributed")
    assert status == 2
    assert err.startswith("error: --distributed: no cluster was found")
    assert err.count("\n") == 1
