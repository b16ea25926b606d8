import importlib.util
import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.splits import SplitDict

import flaxnets
from flaxnets import InputError
from flaxnets.data import Split, load_dataset
from flaxnets.data.datasets import channel_statistics, find_dataset, refuse_nothing_to_learn
from flaxnets.data.stream import stream_dataset
from flaxnets.parallel import data_mesh
from flaxnets.training import RECIPES, TrainSetup


def make_dataset(directory, images, labels, name="made", features=None, **file_format):
    """Prepare a data set of `images` and `labels` the way TFDS does, without TensorFlow."""
    keys: dict[str, Any] = features or {
        "image": tfds.features.Image(shape=(None, None, images[0].shape[-1])),
        "label": tfds.features.ClassLabel(names=["cat", "dog", "eel"]),
    }

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(keys))

        def _split_generators(self, dl_manager):
            return {"train": self._examples(), "test": self._examples()}

        def _generate_examples(self):
            yield from ()

        def _examples(self):
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                png = io.BytesIO()
                Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
                    png, "png"
                )
                png.seek(0)
                example = {"image": png, "label": int(label)}
                yield i, {key: example[key] for key in keys}

    Made.name = name
    Made(data_dir=str(directory), file_format="array_record").download_and_prepare()


def random_images(*shapes):
    rng = np.random.RandomState(0)
    return [rng.randint(0, 256, shape).astype(np.uint8) for shape in shapes]


def test_digits(digits):
    assert digits.train.images.shape == (1437, 8, 8, 1)
    assert digits.test.images.shape == (360, 8, 8, 1)
    assert digits.train.images.dtype == np.uint8
    assert digits.class_names == tuple("0123456789")
    assert not digits.augmentation.flip
    # Stratified: each class has its share of both splits.
    for split in (digits.train, digits.test):
        shares = np.bincount(split.labels) / len(split.labels)
        assert (abs(shares - 0.1) < 0.005).all()
    assert len(np.unique(digits.train.images)) == 17
    # Fixed for ever: studies are compared by this.
    assert digits.fingerprint()[:16] == "2d40a71db5c00a19"


def test_digits_are_prepared_once(data_dir, digits):
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    load_dataset("digits", data_dir)
    assert before == {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    assert not list(data_dir.rglob("*incomplete*"))


def test_a_notebook_shows_a_data_set_in_a_line(data_dir):
    """Neither all of its images nor advice about OpenCV, which TFDS logs once in a process."""
    code = f"from flaxnets.data import load_dataset; print(load_dataset('digits', '{data_dir}'))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == (
        "Dataset('digits', 10 classes, 1,437 training and 360 test images of 8x8x1)\n"
    )
    assert not shown.stderr


def test_a_split_is_shown_without_its_arrays(digits):
    assert repr(digits.test) == "Split(uint8 images (360, 8, 8, 1), 360 labels)"


def test_a_subset_is_fixed_and_part_of_the_whole(data_dir, digits):
    subset, again = (load_dataset("digits", data_dir, train_examples=100) for _ in range(2))
    assert (subset.train.images == again.train.images).all()
    assert len(subset.train.labels) == 100
    assert len(np.unique(subset.train.labels)) == 10
    whole = {image.tobytes() for image in digits.train.images}
    assert all(image.tobytes() in whole for image in subset.train.images)
    assert (subset.test.images == digits.test.images).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_any_prepared_data_set_by_name(tmp_path, channels):
    images = random_images(*[(5, 7, channels)] * 6)
    labels = [0, 1, 2, 0, 1, 2]
    make_dataset(tmp_path, images, labels)
    dataset = load_dataset("made", tmp_path)
    assert dataset.class_names == ("cat", "dog", "eel")
    assert dataset.preprocess.image_shape == (5, 7, channels)
    pairs = {(image.tobytes(), int(label)) for image, label in zip(*dataset.train, strict=True)}
    assert pairs == {(i.tobytes(), n) for i, n in zip(images, labels, strict=True)}


def test_public_data_sets_through_tfds(tmp_path):
    # The metadata that preparing CIFAR-100 would have written; `mock_data` makes up the images.
    builder = tfds.builder("cifar100", data_dir=str(tmp_path), file_format="array_record")
    directory = builder.data_path
    directory.mkdir(parents=True)
    splits = [
        tfds.core.SplitInfo(
            name=name,
            shard_lengths=[20],
            num_bytes=0,
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=directory, dataset_name="cifar100", filetype_suffix="array_record"
            ),
        )
        for name in ("train", "test")
    ]
    builder.info.set_splits(SplitDict(splits))
    builder.info.write_to_directory(directory)
    with tfds.testing.mock_data(num_examples=20, data_dir=str(tmp_path)):
        dataset = load_dataset("cifar100", tmp_path)
    assert dataset.train.images.shape == (20, 32, 32, 3)
    assert dataset.num_classes == 100
    assert dataset.augmentation.pad == 4
    assert dataset.augmentation.flip


def test_channel_statistics_are_those_of_the_pixels():
    images = np.stack(random_images((4, 4, 3), (4, 4, 3)))
    images[..., 2] = 7
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], (images / 255).std((0, 1, 2))[:2], rtol=1e-12)
    assert std[2] == 1.0


def test_fingerprint_sees_one_pixel(digits):
    from dataclasses import replace

    images = digits.test.images.copy()
    images[3, 4, 5, 0] ^= 1
    changed = replace(digits, test=Split(images, digits.test.labels))
    assert changed.fingerprint() != digits.fingerprint()


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow would prepare it"
)
def test_unprepared_data_names_both_ways_out(tmp_path):
    with pytest.raises(InputError, match=r"flaxnets\[tfds\].*--data-dir"):
        load_dataset("cifar10", tmp_path)


def test_unknown_name_suggests_the_nearest(tmp_path):
    with pytest.raises(InputError, match=r"did you mean cifar10\?"):
        load_dataset("cifar-10", tmp_path)


def test_images_of_different_sizes_are_refused(tmp_path):
    make_dataset(tmp_path, random_images((4, 4, 1), (5, 4, 1)), [0, 1])
    with pytest.raises(InputError, match="2 different sizes"):
        load_dataset("made", tmp_path)


@pytest.mark.parametrize(("missing", "key"), [("images", "image"), ("class labels", "label")])
def test_data_without_images_or_labels_is_refused(tmp_path, missing, key):
    features = {
        "image": tfds.features.Image(shape=(4, 4, 1)),
        "label": tfds.features.ClassLabel(num_classes=3),
    }
    del features[key]
    make_dataset(tmp_path, random_images((4, 4, 1)), [0], features=features)
    with pytest.raises(InputError, match=f"made has no {missing}"):
        load_dataset("made", tmp_path)


def test_hidden_labels_are_refused(tmp_path):
    make_dataset(tmp_path, random_images((4, 4, 1), (4, 4, 1)), [0, -1])
    with pytest.raises(InputError, match=r"made \(train split\) has no label; choose"):
        load_dataset("made", tmp_path)


def test_labels_beyond_the_classes_are_refused(tmp_path):
    features = {
        "image": tfds.features.Image(shape=(4, 4, 1)),
        "label": tfds.features.ClassLabel(num_classes=13),
    }
    make_dataset(tmp_path, random_images((4, 4, 1), (4, 4, 1)), [0, 12], features=features)
    for path in tmp_path.rglob("features.json"):
        path.write_text(path.read_text().replace('"13"', '"3"'))
    message = r"has label 12, but there are only 3 classes \(0 to 2\); delete the data set"
    with pytest.raises(InputError, match=rf"made \(train split\) {message}"):
        load_dataset("made", tmp_path)
    with pytest.raises(InputError, match=rf"example \d of .* {message}"):
        [stream_dataset(find_dataset("made", tmp_path)).train[i] for i in range(2)]


def test_training_images_must_differ_and_be_of_two_classes(digits):
    from dataclasses import replace

    def refuse(images, labels):
        refuse_nothing_to_learn(digits.name, Split(images, labels))

    images, labels = digits.train
    refuse(images, labels)
    with pytest.raises(InputError, match="all 1,437 training images of digits have label 3"):
        refuse(images, np.full_like(labels, 3))
    with pytest.raises(InputError, match="all 1,437 training images of digits are the same"):
        refuse(np.zeros_like(images), labels)
    same = replace(digits, train=Split(np.zeros_like(images), labels))
    model = flaxnets.create_model("cifar_resnet8")
    with pytest.raises(InputError, match="are the same"):
        TrainSetup.create(model, 8, RECIPES["digits"], same, data_mesh())


def test_lost_examples_are_noticed(tmp_path):
    make_dataset(tmp_path, random_images(*[(4, 4, 1)] * 5), [0] * 5)
    info = next(tmp_path.rglob("dataset_info.json"))
    info.write_text(info.read_text().replace('"5"', '"6"'))
    with pytest.raises(InputError, match="damaged"):
        load_dataset("made", tmp_path)


def test_a_format_that_needs_tensorflow_is_refused(tmp_path):
    make_dataset(tmp_path, random_images((4, 4, 1)), [0])
    for path in tmp_path.rglob("dataset_info.json"):
        path.write_text(path.read_text().replace("array_record", "tfrecord"))
    for path in list(tmp_path.rglob("*.array_record*")):
        path.rename(str(path).replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match=r'file_format="array_record"'):
        load_dataset("made", tmp_path)
