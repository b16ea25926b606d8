"""Batches that worker processes hand over in memory that is used again and again."""

import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from flaxnets.data.datasets import Split
from flaxnets.errors import InputError

# Of a worker process: its number, and how many there are.
_worker = (0, 1)


def stack_batch(examples: Sequence[Split], images: np.ndarray) -> Split:
    """A batch in `images`, which is filled up with zeros where it takes more than `examples`."""
    count = len(examples)
    labels = np.zeros(len(images), np.int32)
    labels[:count] = [example.labels for example in examples]
    np.stack([example.images for example in examples], out=images[:count])
    images[count:] = 0
    return Split(images, labels)


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
            memory = SharedMemory(create=True, size=number + number * math.prod(shape))
        except OSError as error:
            raise InputError(
                f"there is no shared memory for workers ({error.strerror}); use fewer, or 0"
            ) from error
        return cls(memory, shape, number)

    def send(self, examples: Sequence[Split]) -> Split:
        """A batch, in a worker; a slot's number takes the place of images if one is free."""
        full = self._full
        for slot in range(_worker[0], self.number, _worker[1]):
            if not full[slot]:
                batch = stack_batch(examples, self._images(slot))
                full[slot] = True
                return Split(slot, batch.labels)
        return stack_batch(examples, np.empty(self.shape, np.uint8))

    def receive(self, batch: Split) -> Split:
        """The batch that was sent, in memory of this process alone."""
        if not isinstance(batch.images, int):
            return Split(np.array(batch.images), np.array(batch.labels))
        images = self._images(batch.images).copy()
        self._full[batch.images] = False
        return Split(images, np.array(batch.labels))

    # Views are made for each use, since memory with any on it cannot be closed.

    @property
    def _full(self) -> np.ndarray:
        return np.ndarray(self.number, bool, self.memory.buf)

    def _images(self, slot: int) -> np.ndarray:
        offset = self.number + slot * math.prod(self.shape)
        return np.ndarray(self.shape, np.uint8, self.memory.buf, offset)


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
