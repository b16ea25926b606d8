"""The images that a run is trained on: described in its config, and found again from it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flaxnets.data import Dataset, Split, StreamedDataset, inspect_dataset
from flaxnets.data.opening import folder_of
from flaxnets.data.stream import hold_out, load_source
from flaxnets.errors import InputError
from flaxnets.studies.restore import Restored
from flaxnets.training.config import DatasetConfig
from flaxnets.training.evaluation import evaluation_fraction


def describe_dataset(
    name: str,
    dataset: Dataset | StreamedDataset,
    train_examples: int,
    validation_examples: int = 0,
) -> DatasetConfig:
    """Describe the data of a run for its config; `name` is the name as it was typed."""
    folder = folder_of(name)
    return DatasetConfig(
        name=name,
        # The next command may run in another directory.
        path=None if folder is None else os.path.abspath(folder),
        version=dataset.version,
        streamed=isinstance(dataset, StreamedDataset),
        train_examples=train_examples,
        validation_examples=validation_examples,
        test_examples=num_images(dataset.test),
        sha256=dataset.fingerprint(),
    )


def num_images(split: Any) -> int:
    return len(split.labels) if isinstance(split, Split) else len(split)


def load_own_split(
    run: Restored,
    where: object,
    split: Literal["train", "test"],
    data_dir: str | Path | None = None,
    on_folder: Callable[[str], None] = lambda folder: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[str, Split]:
    """Load a split of a run's own data set; `train` leaves out images held out for validation.

    Args:
      where: name of the run in error messages.
      on_folder: called with the folder that the run names before it is read, because the config of
        an untrusted run may name any folder of this machine.
      on_progress: see `inspect_dataset`.

    Returns:
      The name of the data set, and its images and labels.

    Raises:
      InputError: the config names no data set, or the data set has changed or is gone.
    """
    name, dataset = open_own_dataset(run, where, data_dir, on_folder, on_progress)
    own = run.config.dataset
    if dataset.fingerprint() != own.sha256:
        raise InputError(
            f"{name} is no longer the data this run was trained on (sha256 differs); "
            f"to evaluate it on the present data, give --dataset {name}"
        )
    found: Any = dataset.train if split == "train" else dataset.test
    if isinstance(dataset, StreamedDataset):
        side, _, channels = run.preprocess.image_shape
        found = load_source(found, side, channels, evaluation_fraction(run.config))
    if split == "train" and own.validation_examples:
        labels = dataset.train.labels
        rows: Any
        rows, _ = hold_out(
            len(dataset.train) if labels is None else labels, own.validation_examples
        )
        found = Split(found.images[rows], found.labels[rows])
    return name, found


def open_own_dataset(
    run: Restored,
    where: object,
    data_dir: str | Path | None = None,
    on_folder: Callable[[str], None] = lambda folder: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[str, Dataset | StreamedDataset]:
    """Open the data set that a run names, and return its name too; see `load_own_split`.

    Its sha256 is not checked.
    """
    own = run.config.dataset
    if not own.can_be_opened:
        raise InputError(f"the config of {where} names no data set; give --dataset")
    name = own.name
    if own.is_folder:
        folder = _find_own_folder(own, where)
        name = f"folder:{folder}"
        on_folder(folder)
    # Training may have skipped unreadable pictures; the sha256 reveals any further ones.
    unread = inspect_dataset(name, data_dir, own.is_folder, on_progress)
    require_classes(name, unread.class_names, run.class_names)
    is_part = (
        not own.streamed and not own.validation_examples and own.train_examples < unread.num_train
    )
    dataset = unread.open(
        size=run.preprocess.image_shape[0] if unread.image_shape is None else None,
        storage="stream" if own.streamed else "memory",
        train_examples=own.train_examples if is_part else None,
    )
    return name, dataset


def require_classes(name: str, found: tuple[str, ...], expected: tuple[str, ...]) -> None:
    """Refuse the data set `name` if its classes are not those of the network.

    Raises:
      InputError: the message has the first difference.
    """
    if found == expected:
        return
    if len(found) != len(expected):
        differ = f"{len(found)} classes, but the network has {len(expected)}"
    else:
        number = int(np.argmax([a != b for a, b in zip(found, expected, strict=True)]))
        differ = f"{found[number]!r} as class {number}, but the network has {expected[number]!r}"
    raise InputError(f"{name} has {differ}; give a --dataset of the classes it was trained on")


def _find_own_folder(own: DatasetConfig, where: object) -> str:
    typed = own.name.removeprefix("folder:")
    folder = own.path or typed
    if not os.path.isdir(folder) and os.path.isdir(typed):
        folder = typed  # the whole project has moved; the sha256 decides
    if not os.path.isdir(folder):
        raise InputError(
            f"the pictures that {where} was trained on were in {folder}, which is gone; "
            "put them back, or evaluate the run with --dataset folder:NEW"
        )
    return folder
