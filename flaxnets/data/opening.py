"""Opening of data sets of any kind: in memory, or as a stream if they are too big for that."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from flaxnets.data.datasets import (
    ARRAYS,
    Dataset,
    DatasetInfo,
    Split,
    choose_rows,
    find_dataset,
    refuse_nothing_to_learn,
)
from flaxnets.data.folder import find_folder
from flaxnets.data.stream import (
    StreamedDataset,
    Subset,
    load_in_memory,
    load_source,
    stream_dataset,
)
from flaxnets.errors import InputError

Storage = Literal["auto", "memory", "stream"]
# Bytes of decoded images to keep in memory; larger data sets are read again each epoch.
IN_MEMORY = 2**31


def folder_of(name: str) -> str | None:
    """Return PATH of a data set called `folder:PATH`, or None for any other."""
    return name.removeprefix("folder:") if name.startswith("folder:") else None


def short_name(name: str) -> str:
    """Return the name of a data set for directories: of a folder, the last part of its path."""
    folder = folder_of(name)
    return name if folder is None else Path(folder).resolve().name or "folder"


def open_dataset(
    name: str = "digits",
    *,
    data_dir: str | Path | None = None,
    size: int | None = None,
    storage: Storage = "auto",
    train_examples: int | None = None,
    skip_unreadable: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset | StreamedDataset:
    """Open a data set for training; see `inspect_dataset` and `UnreadDataset.open`."""
    unread = inspect_dataset(name, data_dir, skip_unreadable, on_progress)
    return unread.open(size, storage, train_examples)


def inspect_dataset(
    name: str,
    data_dir: str | Path | None = None,
    skip_unreadable: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> "UnreadDataset":
    """Look up a data set; pictures of a folder are checked, but no images are read.

    Args:
      name: `digits`, another TFDS data set, or `folder:PATH` (see `find_folder`).
      data_dir: directory of TFDS's data sets; None for its default, `~/tensorflow_datasets`.
      skip_unreadable: leave out pictures of a folder that cannot be read.
      on_progress: called now and then with the number of checked pictures and the total.

    Raises:
      InputError: there is no such data set, or it cannot be used; see `find_dataset` and
        `find_folder`.
    """
    if name.startswith("folder:"):
        path = name.removeprefix("folder:")
        return UnreadDataset(name, find_folder(path, skip_unreadable, on_progress=on_progress))
    if skip_unreadable:
        raise InputError("--skip-unreadable is for --dataset folder:PATH")
    return UnreadDataset(name, find_dataset(name, data_dir))


@dataclass(frozen=True)
class UnreadDataset:
    """A data set whose images have not been read yet.

    Attributes:
      name: as given to `inspect_dataset`.
      source: the pictures of a folder, or a prepared data set.
    """

    name: str
    source: StreamedDataset | DatasetInfo

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def num_train(self) -> int:
        """Number of training images."""
        source = self.source
        return source.num_train if isinstance(source, DatasetInfo) else len(source.train)

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Height, width and channels, or None if images may differ in size."""
        return self.source.image_shape if isinstance(self.source, DatasetInfo) else None

    def open(
        self,
        size: int | None = None,
        storage: Storage = "auto",
        train_examples: int | None = None,
    ) -> Dataset | StreamedDataset:
        """Read the images into memory, or make a stream that reads them in each epoch.

        `auto` streams a data set of more than `IN_MEMORY` bytes, and a prepared one whose images
        differ in size.

        Args:
          size: height and width that a network takes. Images of one size keep theirs in memory, and
            are resized by the preprocessing; pictures of different sizes are cropped and resized
            when they are read, and need a size to be in memory.
          train_examples: keep this many training images, always the same random ones.

        Raises:
          InputError: images cannot be read or do not fit in this machine's memory, or an argument
            is invalid.
        """
        if storage not in get_args(Storage):
            known = ", ".join(get_args(Storage))
            raise InputError(f"storage must be one of {known}, not {storage!r}")
        prepared, mixed = isinstance(self.source, DatasetInfo), self.image_shape is None
        if storage == "stream" or (storage == "auto" and prepared and mixed):
            return self.stream(train_examples)
        if mixed and size is None:
            raise InputError(f"{self.name} has pictures of different sizes; give an --image-size")
        needed = self._decoded_bytes(size or 0)
        if storage == "auto" and needed > IN_MEMORY:
            return self.stream(train_examples)
        if needed > (limit := _memory_limit()):
            raise InputError(
                f"the images of {self.name} take {needed / 1e9:,.1f} GB, but there are only "
                f"{limit / 1e9:,.1f} GB of memory; give a smaller --image-size, or train with "
                "experiments/train.py --stream"
            )
        if isinstance(self.source, DatasetInfo) and not mixed:
            return self.source.load(train_examples).resized(size)
        loaded = load_in_memory(self.stream(train_examples), size or 0, 1.0)
        return replace(loaded, name=self.name)

    def stream(self, train_examples: int | None = None) -> StreamedDataset:
        """Make a stream of the images; see `open`."""
        source = self.source
        streamed = stream_dataset(source) if isinstance(source, DatasetInfo) else source
        if train_examples is None:
            return streamed
        rows = choose_rows(self.name, self.num_train, train_examples)
        return replace(streamed, train=Subset(streamed.train, rows))

    def load_split(
        self, split: Literal["train", "test"], image_shape: tuple[int, int, int], fraction: float
    ) -> Split:
        """Read one split for evaluation.

        Images of one size keep theirs. Pictures of different sizes become images of `image_shape`,
        the centre that covers `fraction` of the shorter side.
        """
        if isinstance(self.source, DatasetInfo) and self.image_shape is not None:
            return self.source.load_split("train" if split == "train" else self.source.test_split)
        height, width, channels = image_shape
        if height != width:
            raise InputError(
                f"the network takes images of {'x'.join(map(str, image_shape))}, but pictures are "
                "made square; give a --dataset of such images"
            )
        streamed = self.stream()
        source = streamed.train if split == "train" else streamed.test
        return load_source(source, height, channels, fraction)

    def _decoded_bytes(self, size: int) -> int:
        if self.image_shape is not None:
            return self.num_train * prod(self.image_shape)
        streamed = self.stream()
        return (len(streamed.train) + len(streamed.test)) * size * size * streamed.channels


def _memory_limit() -> float:
    """Return the bytes of memory of this machine or container; infinity if unknown."""
    limits = []
    with suppress(AttributeError, OSError, ValueError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=float("inf"))


def from_arrays(
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    class_names: Sequence[str] | None = None,
    name: str = "arrays",
) -> Dataset:
    """Make a data set from arrays; its images are not flipped in training.

    Args:
      train, test: images uint8 `(n, height, width, channels)` and integer labels `(n,)` from 0 on.
      class_names: names of the classes; by default their numbers.
      name: name in tables and figures.

    Raises:
      InputError: an array has another shape or dtype, a label is out of range, or the training
        images all have the same label or are all the same.
    """
    splits = [_check_arrays(*train, f"train of {name}"), _check_arrays(*test, f"test of {name}")]
    shapes = [split.images.shape[1:] for split in splits]
    if shapes[0] != shapes[1]:
        raise InputError(f"{name} has images of {shapes[0]} in train, but {shapes[1]} in test")
    lowest = min(int(split.labels.min()) for split in splits)
    highest = max(int(split.labels.max()) for split in splits)
    names = tuple(map(str, range(highest + 1)) if class_names is None else class_names)
    if len(set(names)) < len(names) or not all(isinstance(each, str) for each in names):
        raise InputError(f"the class_names of {name} must be different strings")
    if lowest < 0 or highest >= len(names):
        raise InputError(
            f"labels of {name} must be from 0 to {len(names) - 1}, the number of its last class, "
            f"not from {lowest} to {highest}"
        )
    refuse_nothing_to_learn(name, splits[0])
    train_split, test_split = (Split(s.images, s.labels.astype(np.int32)) for s in splits)
    return Dataset.from_splits(name, ARRAYS, names, train_split, test_split)


def _check_arrays(images: Any, labels: Any, name: str) -> Split:
    images, labels = np.ascontiguousarray(images), np.asarray(labels)
    if images.dtype != np.uint8:
        raise InputError(f"images in {name} must be uint8 (0 to 255), not {images.dtype}")
    if images.ndim != 4 or not images.size:
        hint = "; add a channel axis with images[..., None]" if images.ndim == 3 else ""
        raise InputError(
            f"images in {name} must be (n, height, width, channels), not {images.shape}{hint}"
        )
    if labels.dtype.kind not in "iu":
        raise InputError(f"labels in {name} must be integers, not {labels.dtype}")
    if labels.shape != images.shape[:1]:
        raise InputError(
            f"labels in {name} must be ({len(images)},), one for each image, not {labels.shape}"
        )
    return Split(images, labels)
