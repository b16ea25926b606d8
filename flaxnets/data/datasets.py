"""TFDS image-classification data sets as arrays in memory."""

import contextlib
import hashlib
import importlib.util
import io
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from flaxnets.data.batches import Augmentation, Preprocess
from flaxnets.data.digits import Digits
from flaxnets.errors import InputError, nearest

# Data sets whose classes survive mirroring. Letters, digits and unknown data are not flipped.
FLIPPED = {"cifar10", "cifar100", "fashion_mnist", "imagenette", "stl10", "cats_vs_dogs"}


# Version of a data set that was made of arrays, which no name opens again.
ARRAYS = "arrays"


class Split(NamedTuple):
    """Images uint8 `(n, height, width, channels)` and labels int32 `(n,)`."""

    images: Any
    labels: Any

    def __repr__(self) -> str:
        # Printing the arrays would fill a notebook.
        return f"Split({self.images.dtype} images {self.images.shape}, {len(self.labels)} labels)"


@dataclass(frozen=True, repr=False)
class Dataset:
    """A data set in memory, with the preprocessing and default augmentation of its images."""

    name: str
    version: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    preprocess: Preprocess
    augmentation: Augmentation

    def __repr__(self) -> str:
        height, width, channels = self.preprocess.input_shape
        return (
            f"Dataset({self.name!r}, {self.num_classes} classes, {len(self.train.labels):,} "
            f"training and {len(self.test.labels):,} test images of {height}x{width}x{channels})"
        )

    @classmethod
    def from_splits(
        cls,
        name: str,
        version: str,
        class_names: tuple[str, ...],
        train: Split,
        test: Split,
        flip: bool = False,
    ) -> "Dataset":
        """Make a data set with the statistics of its training images, padded by an eighth."""
        height, width, channels = train.images.shape[1:]
        preprocess = Preprocess((height, width, channels), *channel_statistics(train.images))
        # He et al. (2015), section 4.2, pad images of 32 pixels by 4.
        augmentation = Augmentation(pad=min(height, width) // 8, flip=flip)
        return cls(name, version, class_names, train, test, preprocess, augmentation)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def resized(self, size: int | None) -> "Dataset":
        """Return a copy for networks that take `size` x `size` images; None keeps the size."""
        if size is None or self.preprocess.image_shape[:2] == (size, size):
            return self
        return replace(self, preprocess=replace(self.preprocess, size=size))

    def fingerprint(self) -> str:
        """Return a sha256 over every image and label, by which a study detects changed data."""
        digest = hashlib.sha256()
        for array in (*self.train, *self.test):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class DatasetInfo:
    """A prepared TFDS data set whose images have not been read yet."""

    name: str
    builder: Any  # a TFDS builder; its annotations lack `as_data_source(split=...)`
    image_key: str
    label_key: str
    test_split: str
    class_names: tuple[str, ...]
    num_train: int

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Height, width and channels, or None if images may differ in size."""
        shape = self.builder.info.features[self.image_key].shape
        return None if None in shape[:2] else shape

    def load(self, train_examples: int | None = None) -> Dataset:
        """Read all images; see `load_dataset`."""
        rows = choose_rows(self.name, self.num_train, train_examples)
        train, test = self.load_split("train"), self.load_split(self.test_split)
        if train.images.shape[1:] != test.images.shape[1:]:
            raise InputError(f"{self.name} has training and test images of different sizes")
        return Dataset.from_splits(
            self.name,
            str(self.builder.version),
            self.class_names,
            Split(train.images[rows], train.labels[rows]),
            test,
            flip=self.builder.name in FLIPPED,
        )

    def load_split(self, split: str) -> Split:
        """Read all images of the split that TFDS calls `split`.

        Raises:
          InputError: the data set is damaged, images are not uint8 or differ in size, or labels are
            missing.
        """
        name, source = self.builder.name, self.builder.as_data_source(split=split)
        try:
            with _without_advice():
                examples = [source[i] for i in range(len(source))]
        except (RuntimeError, IndexError, OSError) as error:  # raised by array_record and Pillow
            raise InputError(
                f"{name} in {self.builder.data_path} is damaged ({error}); "
                "delete it and prepare it again"
            ) from error
        images = [example[self.image_key] for example in examples]
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise InputError(
                f"{name} has images of {len(shapes)} different sizes; all must have the same size"
            )
        if images[0].dtype != np.uint8:
            raise InputError(f"{name} has {images[0].dtype} images, not uint8")
        labels = np.array([example[self.label_key] for example in examples], np.int32)
        for label in (labels.min(), labels.max()):
            check_label(int(label), len(self.class_names), f"{name} ({split} split)")
        return Split(np.stack(images), labels)


def find_dataset(
    name: str, data_dir: str | Path | None = None, **builder_kwargs: Any
) -> DatasetInfo:
    """Look up a prepared data set, with the arguments of `load_dataset`.

    Raises:
      InputError: the data set does not exist, is not prepared, lacks images or labels, or has
        another format.
    """
    builder = _builder(name, data_dir, builder_kwargs)
    image_key, label_key = _supervised_keys(builder)
    splits = builder.info.splits
    test_split = "test" if "test" in splits else "validation"
    for split in ("train", test_split):
        if split not in splits or not splits[split].num_examples:
            has = ", ".join(splits) or "none"
            raise InputError(f"{name} needs non-empty train and test splits (its splits: {has})")
        try:
            source = builder.as_data_source(split=split)
        except NotImplementedError as error:
            raise InputError(
                f"{name} in {builder.data_path} is in a format that cannot be read without "
                'TensorFlow; prepare it again with file_format="array_record"'
            ) from error
        if len(source) != splits[split].num_examples:
            raise InputError(
                f"{name} in {builder.data_path} has {len(source)} {split} examples, but "
                f"{splits[split].num_examples} were prepared; delete it and prepare it again"
            )
    features: Any = builder.info.features
    return DatasetInfo(
        name=name,
        builder=builder,
        image_key=image_key,
        label_key=label_key,
        test_split=test_split,
        class_names=tuple(features[label_key].names),
        num_train=splits["train"].num_examples,
    )


def load_dataset(
    name: str = "digits",
    data_dir: str | Path | None = None,
    train_examples: int | None = None,
    **builder_kwargs: Any,
) -> Dataset:
    """Read a whole image-classification data set through TFDS, without TensorFlow.

    `digits` is prepared on first use. Any other data set must have been prepared as array_record,
    or is prepared now if TensorFlow is installed. The test split is `test`, or `validation` if
    there is no `test`.

    Args:
      name: name of the data set in TFDS, such as `cifar10`.
      data_dir: directory of TFDS's data sets; None for its default, `~/tensorflow_datasets`.
      train_examples: keep this many training images, always the same random ones.
      builder_kwargs: passed on to `tfds.builder`.

    Raises:
      InputError: the data set does not exist, is not prepared, or does not consist of labelled
        images of one size.
    """
    return find_dataset(name, data_dir, **builder_kwargs).load(train_examples)


def choose_rows(name: str, num_train: int, train_examples: int | None) -> Any:
    """Choose training rows at random, always the same ones, in ascending order; None keeps all.

    Raises:
      InputError: there are fewer than `train_examples` rows.
    """
    if train_examples is None:
        return slice(None)
    if not 0 < train_examples <= num_train:
        raise InputError(f"{name} has {num_train} training examples, not {train_examples}")
    return np.sort(np.random.RandomState(0).permutation(num_train)[:train_examples])


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute the mean and standard deviation per channel of uint8 images, on a scale of 0 to 1.

    They come from a histogram of the 256 values, so they are exact and the same on every machine. A
    constant channel gets standard deviation 1.
    """
    means, stds = [], []
    values = np.arange(256) / 255
    for channel in np.moveaxis(images, -1, 0):
        shares = np.bincount(channel.ravel(), minlength=256) / channel.size
        mean = float(shares @ values)
        means.append(mean)
        stds.append(float(shares @ (values - mean) ** 2) ** 0.5 or 1.0)
    return tuple(means), tuple(stds)


def _builder(name: str, data_dir: str | Path | None, kwargs: dict) -> Any:
    try:
        if data_dir is not None and Path(data_dir).exists() and not Path(data_dir).is_dir():
            raise InputError(f"--data-dir {data_dir} is a file; give a directory")
    except OSError as error:
        raise InputError(f"--data-dir {data_dir}: {error.strerror}") from error
    if name.startswith("folder:"):
        raise InputError(
            f"{name}: a folder of pictures is read by experiments/train.py, and from Python by "
            "flaxnets.data.folder.find_folder; give the name of a TFDS data set here"
        )
    where = None if data_dir is None else str(data_dir)
    if name == "digits":
        builder = Digits(data_dir=where, file_format="array_record")
        if not builder.is_prepared():
            try:
                # TFDS would announce a download, but there is none.
                with contextlib.redirect_stdout(io.StringIO()):
                    builder.download_and_prepare()
            except OSError as error:
                if builder.is_prepared():  # by another process at the same time
                    return builder
                raise InputError(
                    f"cannot write the digits to {builder.data_path} ({error.strerror}); "
                    "give a directory you can write to with --data-dir"
                ) from error
        return builder
    try:
        builder = tfds.builder(name, data_dir=where, **kwargs)
    except ImportError as error:
        raise InputError(f"{name} needs a package that is not installed ({error})") from error
    except (ValueError, AssertionError) as error:  # unknown or malformed name
        known = ["digits", *tfds.list_builders(with_community_datasets=False)]
        raise InputError(f"TFDS has no data set {name!r}{nearest(name, known)}") from error
    if re.split("[/:]", name)[0] != builder.name:
        # TFDS ignores case, but a study needs one name for its data.
        raise InputError(f"there is no data set {name!r}; did you mean {builder.name}?")
    if not builder.is_prepared():
        if importlib.util.find_spec("tensorflow") is None:
            raise InputError(
                f"{name} is not prepared in {builder.data_path}: either "
                "pip install 'flaxnets[tfds]' and run this again to download and prepare it, "
                "or point --data-dir at a directory where it is prepared as array_record"
            )
        builder = tfds.builder(name, data_dir=where, file_format="array_record", **kwargs)
        builder.download_and_prepare()
    return builder


def _supervised_keys(builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
    features = builder.info.features
    items = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    images = [k for k, v in items.items() if isinstance(v, tfds.features.Image)]
    labels = [k for k, v in items.items() if isinstance(v, tfds.features.ClassLabel)]
    # Some data sets have several labels; TFDS says which one to use.
    preferred = builder.info.supervised_keys or ("image", "label")
    image_key = preferred[0] if preferred[0] in images else next(iter(images), None)
    label_key = preferred[1] if preferred[1] in labels else next(iter(labels), None)
    if image_key is None or label_key is None:
        missing = "images" if image_key is None else "class labels"
        raise InputError(
            f"{builder.name} has no {missing}; choose an image-classification data set"
        )
    return image_key, label_key


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Drop TFDS's advice to install OpenCV, which it logs as a warning."""
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return "OpenCV is not installed" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def check_label(label: int, num_classes: int, name: str) -> None:
    """Refuse a label that is not one of the classes; `name` says where it was found.

    Raises:
      InputError: the label is missing (TFDS stores -1) or too large.
    """
    if label < 0:
        raise InputError(f"{name} has no label; choose a data set that has labels")
    if label >= num_classes:
        raise InputError(
            f"{name} has label {label}, but there are only {num_classes} classes (0 to "
            f"{num_classes - 1}); delete the data set and prepare it again"
        )


def refuse_nothing_to_learn(name: str, train: Split) -> None:
    """Refuse training images that all have the same class or are all the same.

    Raises:
      InputError: either is the case; the message says which.
    """
    if train.labels.min() == train.labels.max():
        raise InputError(
            f"all {len(train.labels):,} training images of {name} have label {train.labels[0]}; "
            "choose a data set with images of at least two classes"
        )
    # `all` stops at the first difference, usually between the first two images.
    if len(train.images) > 1 and all(np.array_equal(i, train.images[0]) for i in train.images):
        raise InputError(
            f"all {len(train.images):,} training images of {name} are the same; "
            "choose a data set with different images"
        )
