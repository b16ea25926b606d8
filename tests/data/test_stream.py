import contextlib
import csv
import dataclasses
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import closing
from typing import Any

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import flaxnets
from flaxnets import InputError
from flaxnets.cli.main import run_command
from flaxnets.data import Batch
from flaxnets.data.crops import Crop
from flaxnets.data.datasets import channel_statistics, find_dataset
from flaxnets.data.folder import find_folder
from flaxnets.data.slots import Example, Slots, _owner, remove_leftovers
from flaxnets.data.stream import (
    Source,
    Subset,
    TfdsSource,
    TrainStream,
    eval_batches,
    hold_out,
    load_in_memory,
    stream_dataset,
)
from flaxnets.errors import FallbackWarning
from tests.conftest import ROOT
from tests.data.test_datasets import make_dataset, random_images
from tests.data.test_images import decode_image, fit


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """23 to train and 7 to test, of several formats and sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.RandomState(0)
    for i in range(30):
        size = rng.randint(12, 40, 2)
        pixels = rng.randint(0, 256, (*size, 3)).astype(np.uint8)
        suffix, options = [("jpg", {"quality": 95}), ("png", {}), ("webp", {"lossless": True})][
            i % 3
        ]
        path = folder / ("train" if i < 23 else "test") / "abc"[i % 3] / f"{i}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, **options)
    return find_folder(folder)


def make_stream(source, workers=0, **changes):
    settings: dict[str, Any] = {"image_size": 8, "channels": 3, "crop": "resized", "flip": True}
    settings |= {"batch_size": 5, "seed": 3} | changes
    return TrainStream(source, **settings, workers=workers)


def same(batches, others) -> bool:
    batches, others = list(batches), list(others)
    assert len(batches) == len(others)
    return all(
        (a.images == b.images).all() and (a.labels == b.labels).all()
        for a, b in zip(batches, others, strict=True)
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", Crop)
def test_batches_have_the_shapes_that_were_asked_for(pictures, crop, channels):
    stream = make_stream(pictures.train, crop=crop, channels=channels)
    assert stream.steps_per_epoch == 4
    batches = list(stream.batches(0, 6))
    assert len(batches) == 6
    for batch in batches:
        assert isinstance(batch, Batch)
        assert batch.images.shape == (5, 8, 8, channels)
        assert (batch.images.dtype, batch.labels.dtype) == (np.uint8, np.int32)
        assert batch.labels.shape == (5,)
        assert len({image.tobytes() for image in batch.images}) == 5


def test_a_run_continues_anywhere_bit_for_bit(pictures):
    stream = make_stream(pictures.train)
    whole = list(stream.batches(0, 11))
    for step in (1, 3, 4, 5, 9, 10):
        assert same(stream.batches(step, 11), whole[step:])
    assert same(make_stream(pictures.train).batches(2, 7), whole[2:7])
    assert list(stream.batches(11, 11)) == list(stream.batches(12, 11)) == []


def test_seeds_and_epochs_differ(pictures):
    first = list(make_stream(pictures.train).batches(0, 8))
    other = list(make_stream(pictures.train, seed=4).batches(0, 8))
    assert not same(first[:4], first[4:])
    assert not same(first, other)
    # Nor is an epoch of one seed that of another.
    assert not same(first[4:], other[:4])


def test_each_epoch_takes_each_example_at_most_once(pictures):
    class Counting:
        """The place in the source is the label."""

        def __len__(self):
            return len(pictures.train)

        def __getitem__(self, index):
            return pictures.train[index][0], index

        def name(self, index):
            return ""

    batches = list(make_stream(Counting(), flip=False).batches(0, 40))
    epochs = [
        [label for batch in batches[start : start + 4] for label in batch.labels.tolist()]
        for start in range(0, 40, 4)
    ]
    for epoch in epochs:
        assert len(set(epoch)) == 20
    assert len(set(map(tuple, epochs))) == 10
    # It is not always the same three that are left over.
    assert set().union(*epochs) == set(range(23))


def test_crops_and_mirrors_are_random_for_each_example_and_epoch(pictures):
    one = Subset(pictures.train, np.array([4]))
    for settings, least in [
        ({"crop": "resized", "flip": False}, 30),
        ({"crop": "scaled", "flip": False}, 30),
        ({"crop": "fixed", "flip": False}, 30),
        ({"crop": "none", "flip": True}, 2),
        ({"crop": "none", "flip": False}, 1),
    ]:
        batches = make_stream(one, batch_size=1, **settings).batches(0, 40)
        seen = {batch.images.tobytes() for batch in batches}
        assert least <= len(seen) <= (40 if least > 2 else least)
    centre = fit(decode_image(one[0][0], 3), 8, 8)
    batches = make_stream(one, batch_size=1, crop="none").batches(0, 40)
    mirrored = [(batch.images[0] == centre[:, ::-1]).all() for batch in batches]
    assert 8 < sum(mirrored) < 32


def grain_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "grain" in thread.name]


def test_closing_in_the_middle_is_quick_and_leaves_nothing(pictures):
    batches = make_stream(pictures.train).batches(0, 10**6)
    next(batches)
    assert grain_threads()
    begun = time.monotonic()
    batches.close()
    while grain_threads() and time.monotonic() < begun + 30:
        time.sleep(0.01)
    assert not grain_threads()
    with pytest.raises(StopIteration):
        next(batches)


def test_worker_processes_change_nothing(pictures):
    expected = list(make_stream(pictures.train).batches(2, 11))
    before = set(multiprocessing.active_children())
    with closing(make_stream(pictures.train, workers=2).batches(2, 10**6)) as batches:
        received = [next(batches) for _ in range(9)]
        workers = set(multiprocessing.active_children()) - before
        assert len(workers) == 2
        begun = time.monotonic()
    assert time.monotonic() - begun < 30
    assert not any(worker.is_alive() for worker in workers)
    assert not grain_threads()
    assert same(received, expected)
    # Not a view of memory that is shared with a process that has ended.
    assert all(type(array) is np.ndarray for batch in received for array in batch)


def test_workers_have_shared_memory_of_their_own(monkeypatch):
    examples = [Example(np.full((2, 2, 1), i, np.uint8), i) for i in range(3)]
    slots = Slots.create((4, 2, 2, 1), 6)
    try:
        sent = []
        for worker in (0, 1):
            monkeypatch.setattr("flaxnets.data.slots._worker", (worker, 2))
            sent += [slots.send(examples) for _ in range(4)]
        numbers = [batch.images for batch in sent if isinstance(batch.images, int)]
        assert sorted(numbers) == list(range(6))
        assert len(sent) == 8  # the others came without a slot, since there was none free
        for batch in sent:
            received = slots.receive(batch)
            assert received.images[:, 0, 0, 0].tolist() == received.labels.tolist() == [0, 1, 2, 0]
        assert isinstance(slots.send(examples).images, int)
    finally:
        slots.memory.close()
        slots.memory.unlink()


def test_only_leftovers_of_our_own_dead_are_removed(monkeypatch, tmp_path):
    monkeypatch.setattr("flaxnets.data.slots.SHARED_MEMORY", tmp_path)
    owner = _owner()
    assert owner
    number, started, namespace = owner.split("-")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    kept = [
        f"flaxnets-{owner}-0",
        f"sem.flaxnets-{owner}-0",
        f"flaxnets-{dead.pid}-{started}-{int(namespace) + 1}-0",
        "psm_0123abcd",
        "sem.mp-0123abcd",
    ]
    removed = [
        f"flaxnets-{dead.pid}-{started}-{namespace}-0",
        f"sem.flaxnets-{dead.pid}-{started}-{namespace}-0",
        f"flaxnets-{number}-{int(started) - 1}-{namespace}-0",
    ]
    for name in (*kept, *removed):
        (tmp_path / name).touch()
    remove_leftovers()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
def test_killed_processes_leave_nothing_for_long(request, pictures, tmp_path):
    """The memory goes at once, and the names of semaphores when the next one starts."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    folder = os.path.dirname(os.path.dirname(os.path.dirname(pictures.train.name(0))))
    before = set(os.listdir("/dev/shm"))
    left: list[set[str]] = []
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, script, folder, "2", "for _ in batches: print(flush=True)"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        request.addfinalizer(lambda process=process: stop_group(process))
        assert process.stdout
        for _ in range(4):
            process.stdout.readline()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        left.append(set(os.listdir("/dev/shm")) - before)
    for names in left:
        assert names
        assert all(name.startswith("sem.flaxnets-") for name in names)
    assert not left[0] & left[1]
    remove_leftovers()
    assert not left[1] & set(os.listdir("/dev/shm"))


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 5])
def test_any_number_of_workers_changes_nothing(pictures, monkeypatch, slots):
    monkeypatch.setattr("flaxnets.data.stream.SLOTS_OF_A_WORKER", slots)
    expected = list(make_stream(pictures.train).batches(0, 11))
    assert same(make_stream(pictures.train, workers=1).batches(0, 11), expected)
    assert same(make_stream(pictures.train, workers=3).batches(6, 11), expected[6:])
    assert same(make_stream(pictures.train, workers=3).batches(9, 11), expected[9:])
    settings = (pictures.test, 8, 3, 0.875, 3)
    for (a, weights), (b, expected_weights) in zip(
        eval_batches(*settings, workers=2), eval_batches(*settings), strict=True
    ):
        assert same([a], [b])
        assert (weights == expected_weights).all()


@pytest.mark.slow
def test_workers_read_prepared_data_sets(tmp_path):
    make_dataset(tmp_path, random_images(*[(5 + i, 7, 3) for i in range(6)]), [0, 1, 2] * 2)
    source = stream_dataset(find_dataset("made", tmp_path)).train
    expected = make_stream(source, batch_size=3).batches(0, 3)
    assert same(make_stream(source, 1, batch_size=3).batches(0, 3), expected)


@pytest.mark.slow
def test_a_worker_that_dies_is_told_in_a_line(pictures):
    with closing(make_stream(pictures.train, workers=1).batches(0, 10**6)) as batches:
        before = set(multiprocessing.active_children())
        next(batches)
        for worker in set(multiprocessing.active_children()) - before:
            worker.kill()
        with pytest.raises(InputError, match=r"a worker exited .*exit code -9.*use fewer workers"):
            list(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_decoded_is_named(tmp_path, workers):
    noise = np.random.RandomState(0).randint(0, 256, (40, 40, 3)).astype(np.uint8)
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(6):
            Image.fromarray(noise).save(tmp_path / label / f"{i}.jpg")
    dataset = find_folder(tmp_path)
    path = dataset.train.name(2)
    with open(path, "r+b") as file:
        file.truncate(1500)
    expected = rf"^{path} cannot be read \(image file is truncated.*\); replace or remove it$"
    with pytest.raises(InputError, match=expected):
        list(make_stream(dataset.train, workers).batches(0, 2))
    if not workers:
        with pytest.raises(InputError, match=expected):
            list(eval_batches(dataset.train, 8, 3, 1.0, 3))
        with pytest.raises(InputError, match=expected):
            load_in_memory(dataset, 8, 1.0)
        os.remove(path)
        with pytest.raises(InputError, match=rf"^{path} cannot be read \(No such file"):
            list(make_stream(dataset.train).batches(0, 2))


@pytest.fixture
def damaged(pictures, tmp_path):
    """`pictures`, of which some training pictures were damaged after they had been checked: two in
    a row, of which the first has a good header, and the last one."""
    shutil.copytree(pictures.train.root, tmp_path / "pictures")
    dataset = find_folder(tmp_path / "pictures")
    os.truncate(dataset.train.name(2), os.path.getsize(dataset.train.name(2)) // 2)
    os.remove(dataset.train.name(3))
    with open(dataset.train.name(9), "wb") as file:
        file.write(b"no picture")
    os.remove(dataset.train.name(22))
    return dataset


REASONS = {
    2: r"image file is truncated.*",
    3: "No such file or directory",
    9: "not a JPEG, PNG, WebP or BMP picture",
    22: "No such file or directory",
}


def replace_unreadable(source: Source) -> Subset:
    """The training pictures of `damaged` after the replacements that its reader is to make."""
    replacements = {2: 4, 3: 4, 9: 10, 22: 0}
    return Subset(source, np.array([replacements.get(row, row) for row in range(len(source))]))


def check_reports(warned, source, reasons=REASONS):
    """One warning for each unreadable picture, in any order, which count them."""
    messages = [str(warning.message) for warning in warned]
    assert {warning.category for warning in warned} == {FallbackWarning}
    found = set()
    for number, message in enumerate(messages, 1):
        for index, reason in reasons.items():
            pictures = "picture" if number == 1 else "pictures"
            expected = (
                rf"{re.escape(source.name(index))} cannot be read \({reason}\) and is skipped; "
                rf"{number} {pictures} skipped so far"
            )
            if re.fullmatch(expected, message):
                found.add(index)
    assert found == set(reasons)
    assert len(messages) == len(reasons)
    return messages


@pytest.mark.parametrize("crop", Crop)
def test_unreadable_pictures_are_replaced_by_the_next_readable_ones(damaged, crop):
    """With the same crops, however much of the unreadable picture could be read."""
    expected = list(make_stream(replace_unreadable(damaged.train), crop=crop).batches(0, 8))
    stream = make_stream(damaged.train, crop=crop, skip_unreadable=True)
    with pytest.warns(FallbackWarning) as warned:
        assert same(stream.batches(0, 8), expected)
    check_reports(warned, damaged.train)
    with pytest.warns(FallbackWarning):
        assert same(stream.batches(5, 8), expected[5:])


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_workers_pass_on_what_they_skipped(damaged, workers):
    expected = list(make_stream(replace_unreadable(damaged.train)).batches(0, 8))
    with pytest.warns(FallbackWarning) as by_threads:
        list(make_stream(damaged.train, skip_unreadable=True).batches(0, 8))
    stream = make_stream(damaged.train, workers, skip_unreadable=True)
    with pytest.warns(FallbackWarning) as by_workers:
        assert same(stream.batches(0, 8), expected)
    assert check_reports(by_workers, damaged.train) == check_reports(by_threads, damaged.train)
    if workers == 1:
        settings = (damaged.train, 8, 3, 1.0, 5)
        with pytest.warns(FallbackWarning):
            batches = list(eval_batches(*settings, workers, skip_unreadable=True))
        with pytest.warns(FallbackWarning):
            others = list(eval_batches(*settings, skip_unreadable=True))
        for (batch, weights), (other, other_weights) in zip(batches, others, strict=True):
            assert same([batch], [other])
            assert (weights == other_weights).all()


def test_nothing_that_workers_send_takes_named_shared_memory():
    examples = [Example(np.zeros((2, 2, 1), np.uint8), 3, ((7, "gone"), (8, "broken")))] * 2
    slots = Slots.create((4, 2, 2, 1), 1)
    try:
        for _ in range(2):  # with a slot, and without one
            sent = slots.send(examples)
            assert {type(leaf) for leaf in jax.tree.leaves(sent)} <= {int, str, bytes}
            assert slots.receive(sent).unreadable == ((7, "gone"), (8, "broken")) * 2
    finally:
        slots.memory.close()
        slots.memory.unlink()


def test_an_unreadable_picture_is_reported_once_in_a_run(damaged):
    skipped: set[str] = set()
    stream = make_stream(damaged.train, skip_unreadable=True)
    settings = (damaged.train, 8, 3, 1.0, 5)
    reads = [
        stream.batches(0, 1, skipped),
        eval_batches(*settings, skip_unreadable=True, skipped=skipped),
        stream.batches(1, 20, skipped),
        eval_batches(*settings, skip_unreadable=True, skipped=skipped),
    ]
    with pytest.warns(FallbackWarning) as warned:
        assert [len(list(batches)) for batches in reads] == [1, 5, 19, 5]
    check_reports(warned, damaged.train)
    assert skipped == {damaged.train.name(index) for index in REASONS}


def test_unreadable_pictures_have_no_weight_in_evaluation(damaged):
    expected = list(eval_batches(replace_unreadable(damaged.train), 8, 3, 1.0, 5))
    with pytest.warns(FallbackWarning) as warned:
        batches = list(eval_batches(damaged.train, 8, 3, 1.0, 5, skip_unreadable=True))
    check_reports(warned, damaged.train)
    weights = np.concatenate([weights for _, weights in batches])
    assert np.flatnonzero(~weights).tolist() == [2, 3, 9, 22, 23, 24]
    for (batch, weights), (other, _) in zip(batches, expected, strict=True):
        assert (batch.images[weights] == other.images[weights]).all()
        assert (batch.labels[weights] == other.labels[weights]).all()
        assert not batch.images[~weights].any()


class Gaps:
    """100 readable pictures after `gap` others."""

    def __init__(self, picture, gap):
        self.picture, self.gap = picture, gap

    def __len__(self):
        return self.gap + 100

    def __getitem__(self, index):
        if index < self.gap:
            raise InputError(f"{index} is missing")
        return self.picture, 1

    def name(self, index):
        return f"picture {index}"


def test_too_many_unreadable_pictures_in_a_row_end_training(pictures):
    picture = pictures.train[0][0]
    with pytest.warns(FallbackWarning) as warned:
        list(make_stream(Gaps(picture, 99), skip_unreadable=True).batches(0, 39))
    assert len(warned) == 99
    expected = (
        r"^100 pictures in a row cannot be read, starting with picture 0 \(0 is missing\); check "
        r"that the pictures still exist$"
    )
    with pytest.raises(InputError, match=expected), warnings.catch_warnings(action="ignore"):
        list(make_stream(Gaps(picture, 100), skip_unreadable=True).batches(0, 40))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_that_is_gone_is_one_error(damaged, workers, recwarn):
    shutil.rmtree(damaged.train.root)
    with pytest.raises(InputError, match=r"^23 pictures in a row cannot be read, starting with /"):
        list(make_stream(damaged.train, workers, skip_unreadable=True).batches(0, 4))
    with pytest.raises(InputError, match=r"^none of 7 pictures can be read, for example /.*/test/"):
        list(eval_batches(damaged.test, 8, 3, 1.0, 3, workers, skip_unreadable=True))
    assert not [warning for warning in recwarn if warning.category is FallbackWarning]


def test_damaged_records_are_not_skipped(tmp_path):
    make_dataset(tmp_path, random_images((4, 4, 1), (4, 4, 1)), [0, 1])
    train = stream_dataset(find_dataset("made", tmp_path)).train
    assert isinstance(train, TfdsSource)
    source = Subset(dataclasses.replace(train, num_classes=1), np.arange(2))
    settings = {"batch_size": 2, "channels": 1, "skip_unreadable": True}
    for message in ("has label 1, but", "is damaged"):
        with pytest.raises(InputError, match=message):
            list(make_stream(source, **settings).batches(0, 1))
        with pytest.raises(InputError, match=message):
            list(eval_batches(source, 8, 1, 1.0, 2, skip_unreadable=True))
        for path in tmp_path.rglob("*.array_record*"):
            path.write_bytes(bytes(100))


@pytest.mark.slow
@pytest.mark.parametrize("skip", [True, False])
def test_a_run_whose_pictures_are_damaged_on_the_way(
    train, pictures, tmp_path, monkeypatch, capsys, skip
):
    """Pictures to train with, to validate with and to test with."""
    root, out = tmp_path / "pictures", tmp_path / "out"
    shutil.copytree(pictures.train.root, root)
    make_setup, damaged = train.make_setup, []

    def damage_pictures(run, *args, **kwargs):
        data = run.data
        sources = (
            Subset(data.dataset.train, data.train_rows),
            Subset(data.dataset.train, data.validation_rows),
            data.dataset.test,
        )
        for source in sources:
            damaged.append(source.name(1))
            os.remove(damaged[-1])
        return make_setup(run, *args, **kwargs)

    monkeypatch.setattr(train, "make_setup", damage_pictures)
    arguments = ["--model", "cifar_resnet8", "--dataset", f"folder:{root}", "--stream"]
    arguments += ["--image-size", "8", "--batch-size", "6", "--validation", "4", "--epochs", "3"]
    arguments += ["--augment", "resized-crop", "--out", str(out)]
    status = run_command(train.main, [*arguments, *(["--skip-unreadable"] if skip else [])])
    lines = capsys.readouterr().err.splitlines()
    if not skip:
        assert status == 2
        assert len(lines) == 1
        assert lines[0].startswith(f"error: {damaged[0]} cannot be read (No such file")
        return
    assert status == 0
    assert len(lines) == 3
    for number, line in enumerate(lines, 1):
        assert "cannot be read (No such file or directory) and is skipped" in line
        assert f"; {number} picture" in line
    assert {line.split(" cannot")[0] for line in lines} == {f"warning: {name}" for name in damaged}
    # The last error is that of all test pictures but one.
    run = flaxnets.restore(out)
    read = [i for i in range(7) if i != 1]
    seen = [fit(decode_image(pictures.test[i][0], 3), 8, 8, 0.875) for i in read]
    logits: Any = run.model.apply(run.variables, run.preprocess(np.stack(seen)), train=False)
    wrong = (np.argmax(logits, -1) != pictures.test.labels[read]).sum()
    with open(out / "metrics.csv", newline="") as file:
        row = list(csv.DictReader(file))[-1]
    assert float(row["test_error"]) == pytest.approx(100 * wrong / 6)
    log_odds = np.asarray(jax.nn.log_softmax(logits))
    loss = -log_odds[np.arange(6), pictures.test.labels[read]].mean()
    assert float(row["test_loss"]) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": "random"}, "crop must be one of resized, scaled, fixed, none, not 'random'"),
        ({"batch_size": 24}, "a batch of 24 is larger than the 23 training examples"),
        ({"batch_size": 0}, "batch_size 0 must be above 0"),
        ({"image_size": 0}, "image_size 0 and"),
        ({"seed": -1}, "seed -1 and"),
        ({"workers": -1}, "workers -1 at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(pictures, changes, message):
    with pytest.raises(InputError, match=message):
        make_stream(pictures.train, **changes)


def test_any_seed(pictures):
    for seed in (0, 2**32 - 1, 2**32, 2**63 - 1):
        assert len(list(make_stream(pictures.train, seed=seed).batches(3, 5))) == 2


@pytest.mark.parametrize("batch_size", [1, 3, 7, 8])
def test_evaluation_sees_all_in_order(pictures, batch_size):
    batches = list(eval_batches(pictures.test, 9, 3, 0.875, batch_size))
    weights = np.concatenate([weights for _, weights in batches])
    assert weights.dtype == bool
    assert weights.tolist() == [True] * 7 + [False] * (-7 % batch_size)
    assert all(len(batch.images) == len(batch.labels) == batch_size for batch, _ in batches)
    images = np.concatenate([batch.images for batch, _ in batches])
    assert not images[7:].any()
    expected = [fit(decode_image(pictures.test[i][0], 3), 9, 9, 0.875) for i in range(7)]
    assert (images[:7] == np.stack(expected)).all()
    labels = np.concatenate([batch.labels for batch, _ in batches])
    assert (labels.dtype, labels[:7].tolist()) == (np.int32, pictures.test.labels.tolist())


def test_load_in_memory(pictures):
    dataset = load_in_memory(pictures, 16, 1.0)
    assert (dataset.name, dataset.class_names) == (pictures.name, ("a", "b", "c"))
    assert dataset.train.images.shape == (23, 16, 16, 3)
    assert (dataset.train.labels == pictures.train.labels).all()
    expected = fit(decode_image(pictures.test[6][0], 3), 16, 16)
    assert (dataset.test.images[6] == expected).all()
    assert dataset.preprocess.image_shape == (16, 16, 3)
    statistics = dataset.preprocess.mean, dataset.preprocess.std
    assert statistics == channel_statistics(dataset.train.images)
    assert (dataset.augmentation.pad, dataset.augmentation.flip) == (2, False)


def test_load_in_memory_in_several_batches(pictures, monkeypatch):
    whole = load_in_memory(pictures, 8, 1.0)
    monkeypatch.setattr("flaxnets.data.stream.LOADED_TOGETHER", 5)
    assert load_in_memory(pictures, 8, 1.0).fingerprint() == whole.fingerprint()


def test_subsets(pictures):
    train, validation = hold_out(pictures.train.labels, 6)
    subset = Subset(pictures.train, validation)
    assert len(subset) == 6
    assert (subset.labels == pictures.train.labels[validation]).all()
    assert subset[2] == pictures.train[int(validation[2])]
    assert subset.name(2) == pictures.train.name(int(validation[2]))
    prints = {subset.fingerprint(), pictures.train.fingerprint()}
    prints.add(Subset(pictures.train, train).fingerprint())
    assert len(prints) == 3
    again = pickle.loads(pickle.dumps(subset))
    assert again.fingerprint() == subset.fingerprint()
    assert again[0] == subset[0]
    assert len(list(make_stream(subset).batches(0, 2))) == 2


def test_hold_out():
    labels = np.repeat(np.arange(4), (400, 40, 60, 100))
    np.random.RandomState(1).shuffle(labels)
    train, validation = hold_out(labels, 60)
    assert sorted([*train, *validation]) == list(range(600))
    for rows in (train, validation):
        assert (np.diff(rows) > 0).all()
    assert np.bincount(labels[validation]).tolist() == [40, 4, 6, 10]
    again, other = hold_out(labels, 60), hold_out(labels, 60, seed=1)
    assert (again[1] == validation).all()
    assert (other[1] != validation).any()
    # Without labels: all alike, and spread over the whole.
    train, validation = hold_out(600, 60)
    assert sorted([*train, *validation]) == list(range(600))
    assert validation.min() < 50
    assert validation.max() > 550
    assert len(validation) == 60
    # Fixed for ever: runs are continued with it.
    assert hold_out(10, 3)[1].tolist() == [2, 4, 8]
    assert hold_out(np.arange(10) % 2, 4)[1].tolist() == [1, 2, 8, 9]


@pytest.mark.parametrize("count", [-1, 0, 10, 11])
def test_hold_out_of_nothing_or_all_is_refused(count):
    for labels in (10, np.zeros(10, np.int32)):
        with pytest.raises(InputError, match=f"{count} of 10 .*hold out between 1 and 9"):
            hold_out(labels, count)


@pytest.mark.parametrize("channels", [1, 3])
def test_prepared_data_sets(tmp_path, channels):
    images = random_images(*[(5 + i, 7, channels) for i in range(6)])
    make_dataset(tmp_path, images, [0, 1, 2, 0, 1, 2])
    dataset = stream_dataset(find_dataset("made", tmp_path))
    assert (dataset.name, dataset.version) == ("made", "1.0.0")
    assert dataset.class_names == ("cat", "dog", "eel")
    assert dataset.channels == channels
    assert (len(dataset.train), len(dataset.test)) == (6, 6)
    assert dataset.train.labels is None
    pairs = set()
    for source in (dataset.train, pickle.loads(pickle.dumps(dataset.train))):
        for i in range(6):
            data, label = source[i]
            pixels = np.asarray(decode_image(data, channels))
            pairs.add((pixels.tobytes(), label))
    assert pairs == {(i.tobytes(), n) for i, n in zip(images, [0, 1, 2] * 2, strict=True)}
    assert dataset.fingerprint() == stream_dataset(find_dataset("made", tmp_path)).fingerprint()
    make_dataset(tmp_path / "more", images[:5], [0, 1, 2, 0, 1])
    assert (
        dataset.fingerprint()
        != stream_dataset(find_dataset("made", tmp_path / "more")).fingerprint()
    )
    settings = {"channels": channels, "batch_size": 3}
    expected = list(make_stream(dataset.train, **settings).batches(0, 3))
    assert {batch.images.shape for batch in expected} == {(3, 8, 8, channels)}


def test_prepared_data_sets_without_labels_are_refused(tmp_path):
    make_dataset(tmp_path, random_images((4, 4, 1), (4, 4, 1)), [-1, -1])
    with pytest.raises(
        InputError, match=r"example 0 of train in .* has no label; choose a data set"
    ):
        stream_dataset(find_dataset("made", tmp_path))


def test_prepared_data_sets_of_one_class_or_of_floats_are_refused(tmp_path):
    image, label = tfds.features.Image(shape=(4, 4, 1)), tfds.features.ClassLabel(names=["cat"])
    make_dataset(tmp_path, random_images((4, 4, 1)), [0], features={"image": image, "label": label})
    with pytest.raises(InputError, match="made has one class; choose a data set with at least two"):
        stream_dataset(find_dataset("made", tmp_path))
    for path in tmp_path.rglob("features.json"):
        path.write_text(path.read_text().replace('"uint8"', '"float32"'))
    with pytest.raises(InputError, match="made has float32 images; choose a data set of uint8"):
        stream_dataset(find_dataset("made", tmp_path))


def test_prepared_data_sets_that_are_damaged_are_refused(tmp_path):
    make_dataset(tmp_path, random_images((4, 4, 1), (4, 4, 1)), [0, 1])
    dataset = stream_dataset(find_dataset("made", tmp_path))
    for path in tmp_path.rglob("*.array_record*"):
        path.write_bytes(bytes(100))
    with pytest.raises(InputError, match=r"is damaged.*prepare it again"):
        dataset.train[1]


def test_prepared_data_sets_of_one_size_are_those_in_memory(data_dir, digits):
    dataset = load_in_memory(stream_dataset(find_dataset("digits", data_dir)), 8, 1.0)
    assert dataset.fingerprint() == digits.fingerprint()
    assert dataset.preprocess == digits.preprocess


SCRIPT = """
import multiprocessing
import os
import sys

from flaxnets.data.folder import find_folder
from flaxnets.data.stream import TrainStream

if __name__ == "__main__":
    source = find_folder(sys.argv[1]).train
    stream = TrainStream(source, 8, 3, "resized", True, 5, 0, workers=int(sys.argv[2]))
    batches = stream.batches(0, 10**6)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    exec(sys.argv[3])
"""


def stop_group(process):
    """Where the test has failed: what would run on for ever."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("workers", "end", "status"),
    [
        (0, "pass", 0),
        pytest.param(2, "pass", 0, marks=pytest.mark.slow),
        pytest.param(2, "raise SystemExit(3)", 3, marks=pytest.mark.slow),
        pytest.param(2, "for _ in batches: pass", -signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(2, "for _ in batches: pass", -signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(2, "os._exit(4)", 4, marks=pytest.mark.slow),
    ],
)
def test_a_process_ends_at_once_with_all_its_workers(
    request, pictures, tmp_path, workers, end, status
):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    folder = os.path.dirname(os.path.dirname(os.path.dirname(pictures.train.name(0))))
    process = subprocess.Popen(
        [sys.executable, str(script), folder, str(workers), end],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Jobs in the background of a shell ignore it, and so do their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    request.addfinalizer(lambda: stop_group(process))
    assert process.stdout
    line = process.stdout.readline()
    children = [int(child) for child in line.split()]
    assert len(children) == workers
    begun = time.monotonic()
    if status == -signal.SIGINT:
        os.killpg(process.pid, signal.SIGINT)
    elif status == -signal.SIGKILL:
        process.kill()
    _, words = process.communicate(timeout=60)
    assert time.monotonic() - begun < 30
    assert process.returncode == status
    assert words.count("Traceback") == (status == -signal.SIGINT)
    if status in (0, 3):
        assert not words  # in the other cases multiprocessing may tell that it has cleaned up
    deadline = time.monotonic() + 30
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, children))


def is_running(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
