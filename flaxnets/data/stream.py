"""Streaming of data bigger than memory: pictures are read, decoded and cropped during training.

Worker processes import the main script again, so it must guard its work with
`if __name__ == "__main__":`.
"""

import atexit
import hashlib
import os
import signal
import warnings
import weakref
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import resource_tracker
from typing import Any, Protocol

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import flags

from flaxnets.data.batches import Batch
from flaxnets.data.crops import Crop, fit_box
from flaxnets.data.datasets import Dataset, DatasetInfo, Split, check_label
from flaxnets.data.images import decode_crop
from flaxnets.data.slots import (
    Example,
    Examples,
    Slots,
    Unreadable,
    begin_worker,
    own_semaphores,
    remove_leftovers,
    stack_examples,
)
from flaxnets.errors import FallbackWarning, InputError
from flaxnets.text import plural

LOADED_TOGETHER = 64
# Number of batches that Grain keeps in flight from a worker.
SLOTS_OF_A_WORKER = 5
# This many unreadable pictures in a row mean a missing or unreachable folder, not damaged pictures.
TOO_MANY_IN_A_ROW = 100


class DamagedDatasetError(InputError):
    """A prepared data set is damaged. It is never skipped: its other examples are suspect too."""


class Source(Protocol):
    """Encoded pictures with labels, in a fixed order. Sources can be pickled.

    Attributes:
      labels: int32 `(n,)`, or None if that would mean reading every example.
    """

    @property
    def labels(self) -> np.ndarray | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """Return a picture as it is stored, and its label.

        Raises:
          InputError: the picture cannot be read.
          DamagedDatasetError: the data set as a whole is damaged.
        """
        ...

    def name(self, index: int) -> str:
        """Say where the user finds an example."""
        ...

    def fingerprint(self) -> str:
        """Return a sha256 that changes with the examples, without reading all of them."""
        ...


@dataclass(frozen=True)
class StreamedDataset:
    """A data set of encoded pictures of any sizes, which is not held in memory.

    Attributes:
      channels: 1 if all pictures are grey, else 3.
      skipped: names of the unreadable pictures that were left out.
    """

    name: str
    version: str
    class_names: tuple[str, ...]
    train: Source
    test: Source
    channels: int
    skipped: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def fingerprint(self) -> str:
        """Return a sha256 by which a study detects changed data.

        It covers the names, sizes and labels of all files, or a TFDS data set's version and counts.
        """
        parts = (*self.class_names, self.train.fingerprint(), self.test.fingerprint())
        return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()


@dataclass(frozen=True, eq=False)
class Subset:
    """A subset of a source: the examples at the indices `rows`."""

    source: Source
    rows: np.ndarray

    @property
    def labels(self) -> np.ndarray | None:
        return None if self.source.labels is None else self.source.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return self.source[int(self.rows[index])]

    def name(self, index: int) -> str:
        return self.source.name(int(self.rows[index]))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.source.fingerprint().encode())
        digest.update(np.asarray(self.rows, np.int64).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class TfdsSource:
    """A split of a data set that TFDS prepared as array_record in `directory`."""

    directory: str
    split: str
    image_key: str
    label_key: str
    size: int
    num_classes: int

    @property
    def labels(self) -> None:
        return None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        try:
            example = self._records[index]
        except (RuntimeError, IndexError, OSError) as error:
            raise DamagedDatasetError(
                f"{self.directory} is damaged ({error}); delete it and prepare it again"
            ) from error
        data, label = example[self.image_key], example[self.label_key]
        if data is None or label is None:
            raise DamagedDatasetError(
                f"{self.name(index)} is damaged; delete the data set and prepare it again"
            )
        try:
            check_label(int(label), self.num_classes, self.name(index))
        except InputError as error:
            raise DamagedDatasetError(*error.args) from None
        return data, int(label)

    def name(self, index: int) -> str:
        return f"example {index} of {self.split} in {self.directory}"

    def fingerprint(self) -> str:
        builder = tfds.builder_from_directory(self.directory)
        words = (builder.name, str(builder.version), self.split, str(self.size))
        return hashlib.sha256("\0".join(words).encode()).hexdigest()

    @cached_property
    def _records(self) -> Any:
        # Built from the directory: another process may not find the original builder's class.
        builder: Any = tfds.builder_from_directory(self.directory)
        decoders = {self.image_key: tfds.decode.SkipDecoding()}
        return builder.as_data_source(split=self.split, decoders=decoders)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_records"}


def stream_dataset(info: DatasetInfo) -> StreamedDataset:
    """Make a stream of a prepared data set, with pictures of any sizes.

    Raises:
      InputError: images are not uint8, or there are no labels or only one class.
    """
    builder, name = info.builder, info.name
    train, test = (
        TfdsSource(
            str(builder.data_path),
            split,
            info.image_key,
            info.label_key,
            builder.info.splits[split].num_examples,
            len(info.class_names),
        )
        for split in ("train", info.test_split)
    )
    feature = builder.info.features[info.image_key]
    dtype = np.dtype(feature.np_dtype)
    if dtype.kind == "f":  # floats are stored as PNGs whose pixels are their bytes
        raise InputError(f"{name} has {dtype} images; choose a data set of uint8 images")
    if len(info.class_names) < 2:
        raise InputError(f"{name} has one class; choose a data set with at least two classes")
    for split in (train, test):
        split[0]  # raises if labels are missing, as they then are for all examples
    return StreamedDataset(
        name=name,
        version=str(builder.version),
        class_names=info.class_names,
        train=train,
        test=test,
        channels=1 if feature.shape[-1] == 1 else 3,
    )


def hold_out(labels: np.ndarray | int, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Split rows at random into training rows and `count` validation rows, each in ascending order.

    Args:
      labels: labels of all rows, for a stratified split; or the number of rows.
      seed: seed that fixes the split.

    Raises:
      InputError: one of the two parts would be empty.
    """
    total = labels if isinstance(labels, int) else len(labels)
    if not 0 < count < total:
        raise InputError(
            f"{count} of {total} training examples cannot be held out; "
            f"hold out between 1 and {total - 1}"
        )
    order = np.random.RandomState(seed).permutation(total)
    if not isinstance(labels, int):
        # Sort by the place within the class, from 0 to 1, so that every class gets its share.
        place = np.empty(total)
        for label in np.unique(labels):
            members = np.flatnonzero(labels[order] == label)
            place[members] = (np.arange(len(members)) + 0.5) / len(members)
        order = order[np.argsort(place, kind="stable")]
    return np.sort(order[count:]), np.sort(order[:count])


@dataclass(frozen=True)
class TrainStream:
    """Batches of randomly cropped pictures, each a function of the seed and the step alone.

    Attributes:
      image_size: height and width of the crops in pixels.
      channels: 1 or 3.
      crop: random crop, or its name.
      flip: mirror each crop left to right with probability 1/2.
      workers: number of processes that prepare batches; 0 uses threads of this process.
      skip_unreadable: replace a picture that cannot be read with the next readable one of `source`
        (wrapping around at its end), cropped with the same random numbers, and warn.

    Raises:
      InputError: a setting is out of range, or there are fewer examples than a batch takes.
    """

    source: Source
    image_size: int
    channels: int
    crop: Crop
    flip: bool
    batch_size: int
    seed: int
    workers: int = 0
    skip_unreadable: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop", Crop(self.crop))
        if min(self.image_size, self.batch_size) < 1 or min(self.seed, self.workers) < 0:
            raise InputError(
                f"image_size {self.image_size} and batch_size {self.batch_size} must be above "
                f"0, seed {self.seed} and workers {self.workers} at least 0"
            )
        if self.batch_size > len(self.source):
            raise InputError(
                f"a batch of {self.batch_size} is larger than the {len(self.source)} training "
                f"examples; use {len(self.source)} or fewer"
            )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.source) // self.batch_size

    def batches(
        self, step: int, total_steps: int, skipped: set[str] | None = None
    ) -> Generator[Batch]:
        """Iterate over the batches of steps `step` to `total_steps - 1`, counted over all epochs.

        Images are uint8 `(batch, image_size, image_size, channels)`, labels int32 `(batch,)`. Each
        epoch has its own order, and the examples left over at its end are dropped. To stop early,
        close the iterator, which ends its threads or workers.

        Args:
          skipped: names of the pictures skipped so far, to which new ones are added. Pass the same
            set to all streams of a run to be warned of each picture once.

        Raises:
          InputError: while iterating, a picture cannot be read; the message names it. With
            `skip_unreadable`, only if TOO_MANY_IN_A_ROW pictures in a row, or all, cannot be read.
        """
        epochs = max(1, -(-total_steps // self.steps_per_epoch))
        examples = (
            grain.MapDataset.range(len(self.source))
            .seed(self.seed)
            .shuffle()
            .slice(slice(self.steps_per_epoch * self.batch_size))
            .random_map(_TrainExample(self))
            .repeat(epochs)
        )
        shape = (self.batch_size, self.image_size, self.image_size, self.channels)
        warned = set() if skipped is None else skipped

        def batches() -> Generator[Batch]:
            with closing(_read(examples, shape, step, total_steps, self.workers)) as stacked:
                for images, labels, unreadable in stacked:
                    _warn_of_skipped(self.source, unreadable, warned)
                    yield Batch(images, labels)

        return _closed_at_exit(batches())


def eval_batches(
    source: Source,
    image_size: int,
    channels: int,
    fraction: float,
    batch_size: int,
    workers: int = 0,
    skip_unreadable: bool = False,
    skipped: set[str] | None = None,
) -> Generator[tuple[Batch, np.ndarray]]:
    """Iterate over all examples once, in order, cropped by `flaxnets.data.crops.fit_box`.

    Big JPEGs are decoded only to the detail that is needed (`flaxnets.data.images.decode_crop`).
    Batches are those of `TrainStream`, with weights bool `(batch,)`. The last batch is filled up
    with zeros, whose weights are False.

    Args:
      skip_unreadable: give pictures that cannot be read the weight False, and warn of them after
        the last batch.
      skipped: see `TrainStream.batches`.

    Raises:
      InputError: while iterating, a picture cannot be read; the message names it. With
        `skip_unreadable`, only if none of the pictures can be read.
    """
    examples = grain.MapDataset.range(len(source))
    examples = examples.map(_EvalExample(source, image_size, channels, fraction, skip_unreadable))
    shape = (batch_size, image_size, image_size, channels)
    steps = -(-len(source) // batch_size)

    def weighted() -> Generator[tuple[Batch, np.ndarray]]:
        unreadable: Unreadable = ()
        with closing(_read(examples, shape, 0, steps, workers)) as stacked:
            for i, (images, labels, without) in enumerate(stacked):
                start = i * batch_size
                weights = np.arange(batch_size) < len(source) - start
                weights[[index - start for index, _ in without]] = False
                unreadable += without
                yield Batch(images, labels), weights
        # Warn last, so that a missing folder is one error instead of a warning per picture.
        if unreadable and len(unreadable) == len(source):
            index, reason = unreadable[0]
            raise InputError(
                f"none of {plural(len(source), 'picture')} can be read, for example "
                f"{source.name(index)} ({reason}); check that they still exist"
            )
        _warn_of_skipped(source, unreadable, set() if skipped is None else skipped)

    return _closed_at_exit(weighted())


def load_source(source: Source, image_size: int, channels: int, fraction: float) -> Split:
    """Load all pictures into memory, cropped by `flaxnets.data.crops.fit_box`.

    Raises:
      InputError: a picture cannot be read; the message names it.
    """
    shape = (len(source), image_size, image_size, channels)
    split = Split(np.empty(shape, np.uint8), np.empty(len(source), np.int32))
    start = 0
    for batch, weights in eval_batches(source, image_size, channels, fraction, LOADED_TOGETHER):
        stop = start + int(weights.sum())
        for all_of, some in zip(split, batch, strict=True):
            all_of[start:stop] = some[: stop - start]
        start = stop
    return split


def load_in_memory(streamed: StreamedDataset, image_size: int, fraction: float) -> Dataset:
    """Load both splits by `load_source`.

    Images are not flipped in training, as their classes may not survive mirroring.
    """
    train, test = (
        load_source(source, image_size, streamed.channels, fraction)
        for source in (streamed.train, streamed.test)
    )
    return Dataset.from_splits(streamed.name, streamed.version, streamed.class_names, train, test)


@dataclass(frozen=True)
class _TrainExample:
    """Map from an index to its example, cropped at random."""

    stream: TrainStream

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        source, unreadable = self.stream.source, []
        # Restored for each attempt: decoding may fail before or after the crop is drawn, and a
        # batch must only depend on which pictures are readable.
        state = rng.bit_generator.state
        while True:
            try:
                return Example(*self._crop(index, rng), tuple(unreadable))
            except InputError as error:
                reason = _reason_to_skip(error, self.stream.skip_unreadable)
                unreadable.append((int(index), reason))
            if len(unreadable) == min(len(source), TOO_MANY_IN_A_ROW):
                first, reason = unreadable[0]
                raise InputError(
                    f"{len(unreadable)} pictures in a row cannot be read, starting with "
                    f"{source.name(first)} ({reason}); check that the pictures still exist"
                )
            index = (index + 1) % len(source)
            rng.bit_generator.state = state

    def _crop(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        stream = self.stream
        mirrored = stream.flip and rng.random() < 0.5
        draw = partial(stream.crop.draw_box, rng, stream.image_size)
        return _decode(stream.source, index, stream.channels, stream.image_size, draw, mirrored)


@dataclass(frozen=True)
class _EvalExample:
    """Map from an index to its example, cropped at the centre."""

    source: Source
    image_size: int
    channels: int
    fraction: float
    skip_unreadable: bool

    def __call__(self, index: int) -> Example:
        size = self.image_size
        draw = partial(fit_box, new_height=size, new_width=size, fraction=self.fraction)
        try:
            return Example(*_decode(self.source, index, self.channels, size, draw))
        except InputError as error:
            reason = _reason_to_skip(error, self.skip_unreadable)
            nothing = np.zeros((size, size, self.channels), np.uint8)
            return Example(nothing, 0, ((int(index), reason),))


def _decode(
    source: Source, index: int, channels: int, size: int, draw: Any, mirrored: bool = False
) -> tuple[np.ndarray, int]:
    data, label = source[index]
    try:
        return decode_crop(data, channels, size, size, draw, mirrored), label
    except ValueError as error:
        raise InputError(
            f"{source.name(index)} cannot be read ({error}); replace or remove it"
        ) from error


def _reason_to_skip(error: InputError, skip_unreadable: bool) -> str:
    """Return the reason for a warning, or re-raise `error` if its picture must not be skipped."""
    if not skip_unreadable or isinstance(error, DamagedDatasetError):
        raise error
    # The file system's or decoder's own words, without the name and the advice around them.
    cause = error.__cause__ or error
    return str(getattr(cause, "strerror", None) or cause)


def _warn_of_skipped(source: Source, unreadable: Unreadable, skipped: set[str]) -> None:
    """Warn of pictures that are not in `skipped` yet, and add them."""
    for index, reason in unreadable:
        name = source.name(index)
        if name not in skipped:
            skipped.add(name)
            warnings.warn(
                f"{name} cannot be read ({reason}) and is skipped; "
                f"{plural(len(skipped), 'picture')} skipped so far",
                FallbackWarning,
                stacklevel=3,
            )


def _read(
    examples: grain.MapDataset, shape: tuple[int, ...], start: int, stop: int, workers: int
) -> Generator[Examples]:
    """Read ahead batches `start` to `stop - 1` of `examples`; `shape` is that of their images."""
    if start >= stop:
        return
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its flags, which are hardly ever set
    read = _read_with_workers if workers else _read_with_threads
    try:
        yield from read(examples, shape, start, stop, workers)
    except InputError as error:
        raise InputError(*error.args) from error.__cause__  # drop Grain's notes


def _read_with_threads(
    examples: grain.MapDataset, shape: tuple[int, ...], start: int, stop: int, _: int
) -> Generator[Examples]:
    def stack(examples: Sequence[Example]) -> Examples:
        return stack_examples(examples, np.empty(shape, np.uint8))

    # Threads take one picture at a time: the first batch comes soon, and closing is fast.
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4
    ahead = grain.ReadOptions(threads, prefetch_buffer_size=max(2 * shape[0], threads))
    examples = examples.slice(slice(start * shape[0], stop * shape[0]))
    batches = iter(examples.to_iter_dataset(ahead).batch(shape[0], batch_fn=stack))
    try:
        yield from batches
    finally:
        batches.close()


def _read_with_workers(
    examples: grain.MapDataset, shape: tuple[int, ...], start: int, stop: int, workers: int
) -> Generator[Examples]:
    workers = min(workers, stop - start)
    remove_leftovers()
    slots, received = Slots.create(shape, SLOTS_OF_A_WORKER * workers), 0
    # Workers take turns at whole batches, so their number does not change the batches.
    batches = iter(
        examples.batch(shape[0], batch_fn=slots.send)
        .slice(slice(start, stop))
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        .mp_prefetch(grain.MultiprocessingOptions(workers), worker_init_fn=begin_worker)
    )
    try:
        # Workers start with the first batch and inherit this mask. Ctrl-C reaches every process of
        # the terminal, but only the main process decides what to stop.
        resource_tracker.ensure_running()  # starting it later would unblock SIGINT
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with own_semaphores():
                batch = next(batches, None)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while batch is not None:
            batch = slots.receive(batch)
            received += 1
            if received == workers:
                # All workers have opened it. Without a name, it is freed once the last one exits.
                slots.memory.unlink()
            yield batch
            batch = next(batches, None)
    except RuntimeError as error:
        if "exit code" not in str(error):
            raise
        raise InputError(
            f"a worker exited before its work was done ({' '.join(str(error).split())}); "
            "use fewer workers, more shared memory (/dev/shm), or 0 workers, which need none"
        ) from error
    finally:
        batches.close()
        slots.memory.close()
        if received < workers:
            slots.memory.unlink()


def _closed_at_exit(batches: Generator[Any]) -> Generator[Any]:
    """Close leftover iterators at exit, before interpreter teardown breaks them."""
    atexit.register(_close, weakref.ref(batches))
    return batches


def _close(reference: Any) -> None:
    batches = reference()
    if batches is not None:
        batches.close()
