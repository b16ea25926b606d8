"""Contenders of the stream benchmark: infinite iterators over batches of JPEGs from a source."""

import io
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from flaxnets.data.crops import Crop, resized_box
from flaxnets.data.images import decode_crop
from flaxnets.data.stream import Source, TrainStream


@dataclass(frozen=True)
class ReaderSettings:
    image_size: int
    batch_size: int
    workers: int


def our_batches(source: Source, settings: ReaderSettings, seed: int) -> Generator[Any]:
    size, batch_size, workers = settings.image_size, settings.batch_size, settings.workers
    stream = TrainStream(source, size, 3, Crop.RESIZED, True, batch_size, seed, workers)
    return stream.batches(0, 10**9)


def their_batches(
    source: Source, decode: Callable[..., np.ndarray], settings: ReaderSettings, seed: int
) -> Generator[Any]:
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        TorchPictures(source, settings.image_size, seed, decode),  # pyright: ignore[reportArgumentType]
        settings.batch_size,
        shuffle=True,
        num_workers=settings.workers,
        drop_last=True,
        # Forking a process with JAX's threads may hang.
        multiprocessing_context="spawn" if settings.workers else None,
        persistent_workers=settings.workers > 0,
    )
    while True:
        yield from loader


@dataclass
class TorchPictures:
    """Data set for DataLoader, of uint8 images `(size, size, 3)` and their labels."""

    source: Source
    size: int
    seed: int
    decode: Callable[..., np.ndarray]
    rng: np.random.Generator | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import torch

        if self.rng is None:
            self.rng = np.random.default_rng([self.seed, os.getpid()])
        data, label = self.source[index]
        return torch.from_numpy(self.decode(self.rng, data, self.size)), label


def decode_as_torchvision(rng: np.random.Generator, data: bytes, size: int) -> np.ndarray:
    image: Image.Image = Image.open(io.BytesIO(data)).convert("RGB")
    left, top, right, bottom = map(round, resized_box(rng, *image.size))
    image = image.crop((left, top, right, bottom))
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)


def decode_as_ours(rng: np.random.Generator, data: bytes, size: int) -> np.ndarray:
    return decode_crop(data, 3, size, size, partial(resized_box, rng), rng.random() < 0.5)
