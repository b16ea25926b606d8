"""Real processes of the study command, stopped in every way; afterwards nothing shows of it."""

import json
import random
import signal
import sys
import time

import pytest

from tests.commands.dying import PLACES
from tests.processes import COMMAND, assert_same_study, finish, start, without_seconds

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def _nothing_cached():
    """As on a fresh machine: a compilation is long enough to die in, and oneDNN is used, which a
    compilation cache rules out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
        yield


@pytest.fixture(scope="module")
def arguments(data_dir):
    """Two runs of 44 updates, 11 an epoch, saved every 7."""
    schedule = ["--epochs", "4", "--checkpoint-every", "7steps"]
    return ["--depths", "8", *schedule, "--data-dir", str(data_dir)]


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    status, _, err = finish(*COMMAND, *arguments, "--out", out)
    assert status == 0, err
    return out


def test_killed_at_every_place_one_after_the_other(arguments, uninterrupted, tmp_path):
    out = tmp_path / "out"
    for place in PLACES:
        status, _, err = finish(
            *(sys.executable, "-m", "tests.commands.dying", place, *arguments, "--out", out)
        )
        assert status == -signal.SIGKILL, (place, status, err)
        assert "Traceback" not in err, (place, err)
    status, _, err = finish(*COMMAND, *arguments, "--out", out)
    assert status == 0, err
    assert_same_study(out, uninterrupted)


def test_killed_at_random_moments(arguments, uninterrupted, tmp_path):
    out, moments = tmp_path / "out", random.Random(0)
    for _ in range(4):
        process = start(*COMMAND, *arguments, "--out", out)
        # From the first sign of life on, which is a fresh study.json.
        began = time.time()
        while not (out / "study.json").exists() or (out / "study.json").stat().st_mtime < began:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 4))
        process.kill()
        process.communicate()
    status, _, err = finish(*COMMAND, *arguments, "--out", out)
    assert status == 0, err
    assert_same_study(out, uninterrupted)


def wait_for_an_epoch(process, out):
    while not (out / "plain-8" / "seed-0" / "metrics.csv").exists():
        assert process.poll() is None
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
def test_stopped_by_a_signal(arguments, uninterrupted, tmp_path, number, status):
    out = tmp_path / "out"
    process = start(*COMMAND, *arguments, "--out", out)
    wait_for_an_epoch(process, out)
    began = time.perf_counter()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert time.perf_counter() - began < 15
    continuation = f"stopped and saved; continue with: python {COMMAND[1]} --depths 8"
    assert err.splitlines()[-1].startswith(continuation)
    assert str(out) in err.splitlines()[-1]
    row = without_seconds(out / "summary.csv")[0]
    assert row["status"] == "unfinished"
    assert 11 <= int(row["steps"]) < 44
    status, _, err = finish(*COMMAND, *arguments, "--out", out)
    assert status == 0, err
    assert_same_study(out, uninterrupted)


def test_stopped_while_compiling(data_dir, tmp_path):
    """Nothing is lost, so there is no wait for a compilation of many seconds."""
    arguments = ["--depths", "56", "--kinds", "residual", "--data-dir", data_dir]
    process = start(*COMMAND, *arguments, "--out", tmp_path / "out")
    while not (tmp_path / "out" / "residual-56" / "seed-0" / "config.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    began = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "continue with: python" in err
    assert time.perf_counter() - began < 2


def test_a_second_signal_leaves_at_once(arguments, uninterrupted, tmp_path):
    out = tmp_path / "out"
    process = start(*COMMAND, *arguments, "--out", out)
    wait_for_an_epoch(process, out)
    began = time.perf_counter()
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.perf_counter() - began < 5
    status, _, err = finish(*COMMAND, *arguments, "--out", out)
    assert status == 0, err
    assert_same_study(out, uninterrupted)


def test_output_that_nobody_reads_on(arguments, uninterrupted, tmp_path):
    """As `| head -1` has it."""
    out = tmp_path / "out"
    process = start(*COMMAND, *arguments, "--out", out)
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert_same_study(out, uninterrupted)


def test_one_process_at_a_time(data_dir, tmp_path):
    """The second is refused with the first one's name; a killed one holds nothing."""
    out = tmp_path / "out"
    arguments = ["--depths", "8", "--epochs", "4000", "--data-dir", data_dir, "--out", out]
    process = start(*COMMAND, *arguments)
    wait_for_an_epoch(process, out)
    status, _, err = finish(*COMMAND, *arguments)
    assert status == 2
    assert err.startswith(f"error: --out {out} is in use by another process (pid {process.pid} on ")
    assert err.count("\n") == 1
    process.kill()
    process.communicate()
    again = start(*COMMAND, *arguments)
    began = (out / "study.json").stat().st_mtime
    while (out / "study.json").stat().st_mtime == began:
        assert again.poll() is None
        time.sleep(0.05)
    again.kill()
    again.communicate()


def test_a_batch_that_does_not_divide_by_the_devices_of_now(arguments, tmp_path):
    """Stopped on one device, started on three: refused before anything is touched."""
    out = tmp_path / "out"
    process = start(*COMMAND, *arguments, "--out", out)
    wait_for_an_epoch(process, out)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    status, _, err = finish(
        *(*COMMAND, *arguments, "--out", out),
        XLA_FLAGS="--xla_force_host_platform_device_count=3",
    )
    assert status == 2
    assert "--batch-size 128 is not divisible by the 3 devices; give a multiple of 3" in err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    # On as many as it does divide by, the run goes on.
    status, _, err = finish(
        *(*COMMAND, *arguments, "--out", out, "--deterministic"),
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    assert status == 0, err
    environments = json.loads((out / "study.json").read_text())["environments"]
    counts = [each["device_count"] for each in environments]
    assert counts == [1, 2]
    assert "--xla_gpu_deterministic_ops=true" in environments[1]["xla_flags"]
