"""Batches that worker processes hand over in memory that is used again and again.

Worker processes need names for what they share: of memory and, in Grain, of semaphores. A process
that is killed cannot remove them. So they have the owner's process in them, and the next one to
start workers removes those of owners that are gone.
"""

import contextlib
import math
import os
import re
import secrets
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import current_process, parent_process
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxnets.errors import InputError

# Where Linux shows names of shared memory and, after `sem.`, of semaphores.
SHARED_MEMORY = Path("/dev/shm")
OWNED_NAME = re.compile(r"(?:sem\.)?flaxnets-(\d+)-(\d+)-(\d+)-.*")
# Of a worker process: its number, and how many there are.
_worker = (0, 1)

# Index in the source of each picture that could not be read, and the reason.
Unreadable = tuple[tuple[int, str], ...]


class Example(NamedTuple):
    """A picture uint8 `(height, width, channels)`, its label, and what was skipped for it."""

    image: np.ndarray
    label: int
    unreadable: Unreadable = ()


class Batch(NamedTuple):
    """Images and labels as in `flaxnets.data.Split`, and what was skipped for them.

    In transit from a worker, `labels` is bytes, and `images` is bytes or a slot's number.
    """

    images: Any
    labels: Any
    unreadable: Unreadable


def stack_batch(examples: Sequence[Example], images: np.ndarray) -> Batch:
    """A batch in `images`, which is filled up with zeros where it takes more than `examples`."""
    count = len(examples)
    labels = np.zeros(len(images), np.int32)
    labels[:count] = [example.label for example in examples]
    np.stack([example.image for example in examples], out=images[:count])
    images[count:] = 0
    return Batch(images, labels, tuple(each for some in examples for each in some.unreadable))


@dataclass(frozen=True)
class Slots:
    """Memory that workers share with the first process, for the images of some batches.

    Each worker has slots of its own, and uses them again when they have been emptied: new shared
    memory, which Grain takes for each batch, costs a tenth of the time of decoding.
    """

    memory: SharedMemory
    shape: tuple[int, ...]
    number: int

    @classmethod
    def create(cls, shape: tuple[int, ...], number: int) -> "Slots":
        try:
            size = number + number * math.prod(shape)
            memory = SharedMemory(_memory_name(), create=True, size=size)
        except OSError as error:
            raise InputError(
                f"there is no shared memory for workers ({error.strerror}); use fewer, or 0"
            ) from error
        return cls(memory, shape, number)

    def send(self, examples: Sequence[Example]) -> Batch:
        """A batch, in a worker; a slot's number takes the place of images if one is free.

        Arrays become bytes: Grain would put each of them into shared memory with a name, which
        stays for ever when the processes are killed.
        """
        full = self._full
        for slot in range(_worker[0], self.number, _worker[1]):
            if not full[slot]:
                batch = stack_batch(examples, self._images(slot))
                full[slot] = True
                return batch._replace(images=slot, labels=batch.labels.tobytes())
        batch = stack_batch(examples, np.empty(self.shape, np.uint8))
        return batch._replace(images=batch.images.tobytes(), labels=batch.labels.tobytes())

    def receive(self, batch: Batch) -> Batch:
        """The batch that was sent, in memory of this process alone."""
        labels = np.frombuffer(batch.labels, np.int32).copy()
        if isinstance(batch.images, int):
            images = self._images(batch.images).copy()
            self._full[batch.images] = False
        else:
            images = np.frombuffer(batch.images, np.uint8).reshape(self.shape).copy()
        return batch._replace(images=images, labels=labels)

    # Views are made for each use, since memory with any on it cannot be closed.

    @property
    def _full(self) -> np.ndarray:
        return np.ndarray(self.number, bool, self.memory.buf)

    def _images(self, slot: int) -> np.ndarray:
        offset = self.number + slot * math.prod(self.shape)
        return np.ndarray(self.shape, np.uint8, self.memory.buf, offset)


def _owner(process: int | str = "self") -> str | None:
    """A process, told from all others of this machine since it was started: its number, the time it
    was started at, and the namespace in which its number counts; None for one that is gone."""
    try:
        fields = (
            Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
        )
        number = os.getpid() if process == "self" else process
        return f"{number}-{fields[19]}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _memory_name() -> str | None:
    """A new name with the owner in it, or None, for any, where there is no /proc."""
    owner = _owner() if sys.platform == "linux" else None
    return owner and f"flaxnets-{owner}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def own_semaphores() -> Iterator[None]:
    """Have multiprocessing give semaphores names with the owner in them."""
    config: Any = current_process()._config  # pyright: ignore[reportAttributeAccessIssue]
    before, owner = config["semprefix"], _owner() if sys.platform == "linux" else None
    config["semprefix"] = before if owner is None else f"/flaxnets-{owner}"
    try:
        yield
    finally:
        config["semprefix"] = before


def remove_leftovers() -> None:
    """Remove what killed processes of this user have left in shared memory.

    Only names of this library whose owner is gone: another namespace's processes are not seen from
    here, so that theirs stay.
    """
    if sys.platform != "linux" or not SHARED_MEMORY.is_dir():
        return
    namespace = os.stat("/proc/self/ns/pid").st_ino
    for entry in SHARED_MEMORY.iterdir():
        found = OWNED_NAME.fullmatch(entry.name)
        if not found or int(found[3]) != namespace:
            continue
        if _owner(found[1]) != "-".join(found.groups()):
            # Another process may be removing it, or it is another user's.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                entry.unlink()


def begin_worker(index: int, count: int) -> None:
    """What a worker does first."""
    global _worker
    _worker = (index, count)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """A process that is killed cannot stop its workers, which would wait for ever."""
    parent: Any = parent_process()
    parent.join()
    os._exit(1)
