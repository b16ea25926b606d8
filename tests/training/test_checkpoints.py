"""Damage to checkpoints is found, named and mended, and costs no bit."""

import errno
import json
import os
import shutil
import stat
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest

from flaxnets.decoding import encode
from flaxnets.errors import DamageWarning, FallbackWarning, InputError, StorageError
from flaxnets.training import CheckpointEvery, Checkpoints, RunResult, checkpoints, train_run
from flaxnets.training.checkpoints import read_newest
from flaxnets.training.manifest import MANIFEST, find_damage, write_manifest
from tests.factories import make_run_config
from tests.helpers import stop_at


@pytest.fixture(scope="module")
def stopped(setup, tmp_path_factory):
    """A run stopped at step 23 that has the checkpoints 20 and 23. Not to be changed."""
    directory = tmp_path_factory.mktemp("stopped")
    train_run(setup, 0, directory, *stop_at(23), CheckpointEvery(steps=5))
    return directory


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of it to do harm to."""
    return shutil.copytree(stopped, tmp_path / "run")


def newest(directory):
    with Checkpoints(directory, read_only=True) as checkpoints:
        return checkpoints.step, " ".join(checkpoints.damage)


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def flip_a_bit(path, random):
    data = bytearray(path.read_bytes())
    data[random.randint(len(data))] ^= 1 << random.randint(8)
    path.write_bytes(data)


def truncate(path, random):
    os.truncate(path, random.randint(path.stat().st_size))


def empty(path, _):
    os.truncate(path, 0)


def delete(path, _):
    path.unlink()


def grow(path, _):
    path.write_bytes(path.read_bytes() + b"\0")


def test_the_newest_two_are_kept(stopped):
    names = sorted(path.name for path in (stopped / "checkpoints").iterdir())
    assert names == ["20", "23"]
    assert newest(stopped) == (23, "")


@pytest.mark.parametrize("harm", [flip_a_bit, truncate, empty, delete, grow])
def test_damage_to_any_file_is_found_and_named(run, harm):
    random = np.random.RandomState(0)
    checkpoint = run / "checkpoints" / "23"
    paths = files(checkpoint)
    assert len(paths) > 20
    for path in paths:
        before = path.read_bytes()
        harm(path, random)
        damage = find_damage(checkpoint)
        assert damage is not None, path
        if path.name != MANIFEST:
            assert path.relative_to(checkpoint).as_posix() in damage
        path.write_bytes(before)
    assert find_damage(checkpoint) is None


def test_what_does_not_belong_is_damage(run, tmp_path):
    checkpoint = run / "checkpoints" / "23"
    outside = tmp_path / "outside"
    outside.write_text("secret")
    metadata = checkpoint / "_CHECKPOINT_METADATA"
    content = metadata.read_bytes()
    metadata.unlink()
    metadata.symlink_to(outside)
    assert find_damage(checkpoint) == "_CHECKPOINT_METADATA is not a file"
    metadata.unlink()
    os.mkfifo(metadata)  # would never be read to its end
    assert stat.S_ISFIFO(metadata.stat().st_mode)
    assert find_damage(checkpoint) == "_CHECKPOINT_METADATA is not a file"
    metadata.unlink()
    metadata.write_bytes(content)
    (checkpoint / "training" / "more").symlink_to(tmp_path)
    assert find_damage(checkpoint) == "training/more is not in the manifest"


def test_every_character_of_the_manifest_counts(run):
    checkpoint = run / "checkpoints" / "23"
    text = (checkpoint / MANIFEST).read_text()
    for changed in (
        text[:-1],
        text.replace("\n", "\v", 1),
        text + "\n",
        text.replace("\n", "\r\n"),
    ):
        (checkpoint / MANIFEST).write_bytes(changed.encode())
        assert find_damage(checkpoint) is not None


def test_a_checkpoint_under_another_name_is_damage(run):
    (run / "checkpoints" / "23").rename(run / "checkpoints" / "999")
    step, damage = newest(run)
    assert step == 20
    assert "checkpoint 999" in damage
    assert "it holds step 23" in damage
    (run / "checkpoints" / "999").rename(run / "checkpoints" / "023")
    assert newest(run) == (20, "")


def test_sha256sum_reads_the_manifest(run):
    lines = (run / "checkpoints" / "23" / MANIFEST).read_text().splitlines()
    assert all(len(line.split("  ")[0]) == 64 for line in lines)
    if shutil.which("sha256sum"):
        assert os.system(f"cd {run}/checkpoints/23 && sha256sum --quiet -c {MANIFEST}") == 0


@pytest.mark.parametrize("harm", [flip_a_bit, truncate, delete], ids=lambda f: f.__name__)
def test_training_goes_on_from_the_newest_good_one(setup, assert_same_run, run, harm):
    arrays = max(files(run / "checkpoints" / "23"), key=lambda path: path.stat().st_size)
    harm(arrays, np.random.RandomState(1))
    assert newest(run)[0] == 20
    with pytest.warns(DamageWarning, match=rf"checkpoint 23 .*{arrays.name}.*checkpoint 20 is use"):
        result = train_run(setup, 0, run)
    assert result.status == "finished"
    assert_same_run(run)


def test_nothing_good_is_a_start_from_the_seed(setup, assert_same_run, run):
    for step in (20, 23):
        (run / "checkpoints" / str(step) / "training" / "_METADATA").unlink()
    with pytest.warns(DamageWarning, match="the run restarts from scratch"):
        train_run(setup, 0, run)
    assert_same_run(run)


def test_what_a_crash_leaves_is_no_checkpoint(setup, assert_same_run, run):
    """An empty directory, one that was not completed, one half removed, one being written."""
    checkpoints = run / "checkpoints"
    (checkpoints / "27").mkdir()
    shutil.copytree(checkpoints / "23", checkpoints / "26")
    (checkpoints / "26" / MANIFEST).unlink()
    shutil.copytree(checkpoints / "20" / "training", checkpoints / "15" / "training")
    shutil.copytree(checkpoints / "23", checkpoints / "25.orbax-checkpoint-tmp")
    (checkpoints / "notes.txt").write_text("mine")
    step, damage = newest(run)
    assert step == 23
    assert "checkpoint 27" in damage
    assert f"checkpoint 26 of {run} is damaged (it has no {MANIFEST}" in damage
    with pytest.warns(DamageWarning, match="checkpoint 23 is used"):
        train_run(setup, 0, run)
    assert_same_run(run)
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {"23", "28", "notes.txt"}


def test_a_checkpoint_that_finds_no_space_leaves_none_behind(
    setup, assert_same_run, run, monkeypatch
):
    """Not even one that is whole but for its manifest; those from before stay."""

    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("flaxnets.training.checkpoints.write_manifest", fail)
    with pytest.raises(
        StorageError, match=r"checkpoints/25 cannot be written: it needs about 0\.9"
    ):
        train_run(setup, 0, run, checkpoint_every=CheckpointEvery(steps=25))
    monkeypatch.undo()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["20", "23"]
    train_run(setup, 0, run)
    assert_same_run(run)


def test_replacing_a_checkpoint_keeps_it_until_the_new_one_is_whole(
    setup, assert_same_run, tmp_path, monkeypatch
):
    """Stopped in the last step, before its epoch was measured: the same step is saved twice."""
    train_run(setup, 0, tmp_path, *stop_at(28))
    assert newest(tmp_path) == (28, "")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("Checkpoints._complete", "write_manifest"):
        with monkeypatch.context() as patch:
            patch.setattr(f"flaxnets.training.checkpoints.{name}", fail)
            with pytest.raises(OSError, match="space"):
                train_run(setup, 0, tmp_path)
        assert newest(tmp_path) == (28, "")
    # The moment between the two names, as a crash may leave it.
    (tmp_path / "checkpoints" / "28").rename(tmp_path / "checkpoints" / "28.replaced")
    seen = []
    result = train_run(setup, 0, tmp_path, seen.append)
    assert result.status == "finished"
    assert {progress.step for progress in seen} == {28}  # nothing was trained again
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["28"]
    assert_same_run(tmp_path)


def test_damaged_checkpoints_are_set_aside_and_nothing_else_is_touched(setup, run, tmp_path):
    checkpoints = run / "checkpoints"
    (checkpoints / "23" / "commit_success.txt").write_text("changed")
    (checkpoints / "2019").mkdir()
    (checkpoints / "2019" / "photo.jpg").write_text("mine")
    with pytest.warns(DamageWarning, match="checkpoint 20 is used"):
        train_run(setup, 0, run, stop=lambda: True)
    assert (checkpoints / "23.damaged" / "commit_success.txt").read_text() == "changed"
    assert (checkpoints / "2019" / "photo.jpg").exists()
    checkpoints.rename(tmp_path / "elsewhere")
    checkpoints.symlink_to(tmp_path / "elsewhere")
    for read_only in (True, False):
        with pytest.raises(InputError, match="is a link"):
            Checkpoints(run, read_only=read_only)


def test_the_run_of_another_config_is_refused(setup, tmp_path):
    train_run(setup, 0, tmp_path, *stop_at(1), config=make_run_config(seed=0))
    with pytest.raises(InputError, match="holds another run; move it away"):
        train_run(setup, 1, tmp_path, config=make_run_config(seed=1))


def test_metrics_are_those_of_the_checkpoint(setup, run):
    """A crash may come between the two; the rows are those up to the checkpoint again."""
    rows = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(rows + "99,999,0,0,0,0,0,0,0,0\n1,1\0")
    train_run(setup, 0, run, stop=lambda: True)
    assert (run / "metrics.csv").read_text() == rows


def test_a_manifest_lists_what_is_there(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").write_text("content")
    assert find_damage(tmp_path) is not None
    write_manifest(tmp_path)
    assert find_damage(tmp_path) is None
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe")
    assert find_damage(tmp_path) == f"{MANIFEST} is damaged"


@pytest.fixture
def writer(tmp_path):
    """A thread that completes and removes small checkpoints without a pause, as a run does."""
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    started, done = threading.Event(), threading.Event()

    def write():
        for step in range(1, 1_000_000):
            new = directory / f"{step}.orbax-checkpoint-tmp"
            for item, content in (
                ("variables", {}),
                ("progress", encode(RunResult("unfinished", [], step, 0.0, None))),
                ("config", {}),
            ):
                (new / item).mkdir(parents=True)
                (new / item / "metadata").write_text(json.dumps(content))
            path = new.rename(directory / str(step))
            write_manifest(path)
            if step > 2:
                checkpoints._remove(directory / str(step - 2))
                started.set()
            if done.is_set():
                return

    thread = threading.Thread(target=write)
    thread.start()
    assert started.wait(60)
    yield tmp_path
    done.set()
    thread.join()


def test_a_run_that_is_being_saved_is_read_without_false_alarms(writer):
    for _ in range(60):
        with Checkpoints(writer, read_only=True) as found:
            assert found.damage == []
            assert found.step is not None
        step, result = read_newest(writer, lambda found: (found.step, found.read_result()))
        assert result.step == step


def test_another_number_of_cores_is_said_when_a_run_is_resumed(setup, run, monkeypatch):
    """It changes the last bits; a run from before that was recorded is resumed without a word."""
    (before,) = Checkpoints(run, read_only=True).read_environments()
    cores = before.cpu_cores
    assert cores
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: set(range(cores + 1)))
        message = (
            f"cpu_cores was {cores} and is now {cores + 1}, "
            "so it will not match an uninterrupted run bit for bit"
        )
        with pytest.warns(FallbackWarning, match=message):
            train_run(setup, 0, run, *stop_at(24))
    both = Checkpoints(run, read_only=True).read_environments()
    assert both == [before, replace(before, cpu_cores=cores + 1)]
    for step in ("23", "24"):
        shutil.rmtree(run / "checkpoints" / step / "trained_in")
        (run / "checkpoints" / step / MANIFEST).unlink()
        write_manifest(run / "checkpoints" / step)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        train_run(setup, 0, run, *stop_at(25))
