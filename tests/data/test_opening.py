"""Opening data sets of any kind, in memory or as a stream."""

import numpy as np
import pytest
from PIL import Image

from flaxnets import InputError
from flaxnets.data import (
    Dataset,
    Split,
    StreamedDataset,
    from_arrays,
    inspect_dataset,
    open_dataset,
    opening,
)
from flaxnets.data.datasets import channel_statistics, find_dataset
from flaxnets.data.folder import find_folder
from flaxnets.data.stream import load_in_memory, stream_dataset
from tests.data.test_datasets import make_dataset, random_images

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """16 grey pictures to train and 4 to test, of two classes."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.RandomState(0)
    for i in range(20):
        path = root / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.randint(0, 256, rng.randint(5, 20, 2)).astype(np.uint8)).save(path)
    return f"folder:{root}"


@pytest.fixture
def mixed(tmp_path):
    """The directory of a prepared data set `made`, whose images differ in size."""
    make_dataset(tmp_path, random_images(*[(5 + i, 7, 3) for i in range(6)]), [0, 1, 2] * 2)
    return tmp_path


def test_a_prepared_data_set_is_as_loaded(data_dir, digits):
    opened = open_dataset("digits", data_dir=data_dir)
    assert isinstance(opened, Dataset)
    assert opened.fingerprint() == digits.fingerprint()
    assert (opened.preprocess, opened.augmentation) == (digits.preprocess, digits.augmentation)
    resized = open_dataset("digits", data_dir=data_dir, size=16)
    assert isinstance(resized, Dataset)
    assert resized.preprocess == digits.resized(16).preprocess
    assert resized.fingerprint() == digits.fingerprint()


def test_a_folder_is_as_loaded(folder):
    opened = open_dataset(folder, size=9)
    whole = load_in_memory(find_folder(folder.removeprefix("folder:")), 9, 1.0)
    assert isinstance(opened, Dataset)
    assert opened.train.images.shape == (16, 9, 9, 1)
    assert opened.fingerprint() == whole.fingerprint()


def test_big_data_sets_are_streamed_unless_forced(data_dir, folder, monkeypatch):
    sizes = {"digits": 1437 * 8 * 8, folder: 20 * 9 * 9}
    for name, size in sizes.items():
        settings = {"data_dir": data_dir, "size": 9}
        for limit, kind in ((size, Dataset), (size - 1, StreamedDataset)):
            monkeypatch.setattr(opening, "IN_MEMORY", limit)
            assert isinstance(open_dataset(name, **settings), kind)
            assert isinstance(open_dataset(name, **settings, storage="memory"), Dataset)
            assert isinstance(open_dataset(name, **settings, storage="stream"), StreamedDataset)


def test_prepared_images_of_different_sizes_are_streamed_unless_forced(mixed):
    opened = open_dataset("made", data_dir=mixed)
    assert isinstance(opened, StreamedDataset)
    stream = stream_dataset(find_dataset("made", mixed))
    assert opened.fingerprint() == stream.fingerprint()
    forced = open_dataset("made", data_dir=mixed, size=6, storage="memory")
    assert isinstance(forced, Dataset)
    assert forced.fingerprint() == load_in_memory(stream, 6, 1.0).fingerprint()


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_a_part_of_the_training_images(data_dir, folder, storage):
    for name, total in (("digits", 1437), (folder, 16)):
        settings = {"data_dir": data_dir, "size": 8, "storage": storage}
        part = open_dataset(name, **settings, train_examples=10)
        whole = open_dataset(name, **settings)
        rows = np.sort(np.random.RandomState(0).permutation(total)[:10])
        if storage == "memory":
            assert isinstance(part, Dataset)
            assert isinstance(whole, Dataset)
            assert (part.train.images == whole.train.images[rows]).all()
            assert (part.train.labels == whole.train.labels[rows]).all()
            assert part.preprocess.mean == channel_statistics(part.train.images)[0]
        else:
            assert isinstance(part, StreamedDataset)
            assert isinstance(whole, StreamedDataset)
            names = [part.train.name(i) for i in range(len(part.train))]
            assert names == [whole.train.name(row) for row in rows]
        for count in (0, total + 1):
            with pytest.raises(InputError, match=f"has {total} training examples, not {count}"):
                open_dataset(name, **settings, train_examples=count)


def test_facts_before_reading(data_dir, folder, mixed):
    unread = inspect_dataset("digits", data_dir)
    assert (unread.num_train, unread.image_shape) == (1437, (8, 8, 1))
    assert unread.class_names == tuple("0123456789")
    unread = inspect_dataset(folder)
    assert (unread.num_train, unread.image_shape, unread.class_names) == (16, None, ("a", "b"))
    assert inspect_dataset("made", mixed).image_shape is None


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_split_alone(data_dir, digits, folder, split):
    images, labels = inspect_dataset("digits", data_dir).load_split(split, (4, 4, 1), 0.5)
    expected = getattr(digits, split)
    assert (images == expected.images).all()
    assert (labels == expected.labels).all()
    unread = inspect_dataset(folder)
    images, labels = unread.load_split(split, (6, 6, 3), 0.5)
    streamed = unread.stream()
    assert (labels == getattr(streamed, split).labels).all()
    expected = getattr(load_in_memory(streamed, 6, 0.5), split).images
    assert (images == expected.repeat(3, axis=-1)).all()
    with pytest.raises(InputError, match="takes images of 6x5x3, but pictures are made square"):
        unread.load_split(split, (6, 5, 3), 0.5)


def test_mistakes_in_opening(data_dir, folder, monkeypatch):
    with pytest.raises(InputError, match="storage must be one of auto, memory, stream, not 'ram'"):
        open_dataset(folder, storage="ram")  # pyright: ignore[reportArgumentType]
    for storage in ("auto", "memory"):
        with pytest.raises(InputError, match="pictures of different sizes; give an --image-size"):
            open_dataset(folder, storage=storage)
    with pytest.raises(InputError, match="--skip-unreadable is for --dataset folder:PATH"):
        open_dataset("digits", data_dir=data_dir, skip_unreadable=True)
    monkeypatch.setattr(opening, "_memory_limit", lambda: 2e9)
    message = "take 12.5 GB, but there are only 2.0 GB of memory; give a smaller --image-size, or"
    with pytest.raises(InputError, match=message):
        open_dataset(folder, size=25_000, storage="memory")


def test_the_memory_of_this_machine():
    assert 10**7 < opening._memory_limit() < 10**14


# Arrays.


def arrays(count=6, shape=(9, 16, 3)):
    rng = np.random.RandomState(count)
    return rng.randint(0, 256, (count, *shape)).astype(np.uint8), np.arange(count) % 3


def test_arrays():
    train, test = arrays(), arrays(4)
    dataset = from_arrays(train, test, ["cat", "dog", "eel"], "pets")
    assert (dataset.name, dataset.class_names) == ("pets", ("cat", "dog", "eel"))
    for split, (images, labels) in ((dataset.train, train), (dataset.test, test)):
        assert isinstance(split, Split)
        assert (split.images == images).all()
        assert split.labels.dtype == np.int32
        assert (split.labels == labels).all()
    assert dataset.preprocess.image_shape == (9, 16, 3)
    statistics = dataset.preprocess.mean, dataset.preprocess.std
    assert statistics == channel_statistics(train[0])
    assert (dataset.augmentation.pad, dataset.augmentation.flip) == (1, False)
    assert from_arrays(train, test).class_names == ("0", "1", "2")


def test_arrays_of_a_data_set_are_the_data_set(digits):
    dataset = from_arrays(digits.train, digits.test, name="digits")
    assert dataset.fingerprint() == digits.fingerprint()
    assert dataset.preprocess == digits.preprocess
    assert dataset.augmentation == digits.augmentation


IMAGES, LABELS = arrays()


@pytest.mark.parametrize(
    ("train", "class_names", "message"),
    [
        ((IMAGES / 255, LABELS), None, r"train of arrays must be uint8 \(0 to 255\), not float64"),
        ((IMAGES[..., 0], LABELS), None, r"not \(6, 9, 16\); add a channel axis with images"),
        ((IMAGES[0, 0], LABELS), None, r"\(n, height, width, channels\), not \(16, 3\)$"),
        ((IMAGES[:0], LABELS[:0]), None, r"\(n, height, width, channels\), not \(0, 9, 16, 3\)"),
        ((IMAGES, LABELS / 2), None, "must be integers, not float64"),
        ((IMAGES, LABELS > 0), None, "must be integers, not bool"),
        ((IMAGES, LABELS[1:]), None, r"must be \(6,\), one for each image, not \(5,\)"),
        ((IMAGES, LABELS[:, None]), None, r"must be \(6,\), one for each image, not \(6, 1\)"),
        ((IMAGES[:, 1:], LABELS), None, r"images of \(8, 16, 3\) in train, but \(9, 16, 3\) in"),
        ((IMAGES, LABELS - 1), None, "must be from 0 to 2, .*not from -1 to 2"),
        ((IMAGES, LABELS - 4), None, "must be from 0 to 2, .*not from -4 to 2"),
        ((IMAGES, LABELS), ["a", "b"], "must be from 0 to 1, .*not from 0 to 2"),
        ((IMAGES, LABELS), ["a", "b", "a"], "must be different strings"),
        ((IMAGES, LABELS), [1, 2, 3], "must be different strings"),
        ((IMAGES, 0 * LABELS), None, "all 6 training images of arrays have label 0"),
        ((0 * IMAGES, LABELS), None, "all 6 training images of arrays are the same"),
    ],
)
def test_mistakes_in_arrays(train, class_names, message):
    with pytest.raises(InputError, match=message):
        from_arrays(train, arrays(4), class_names)
