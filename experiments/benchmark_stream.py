"""Benchmark reading pictures for training against PyTorch's DataLoader.

    python experiments/benchmark_stream.py --workers 2

The timing covers everything from JPEG files to batches of uint8 in the training process: reading,
decoding, random-resized crops and flips. Contenders take turns, one round each, so that other load
on the machine affects all of them. Each round restarts the contender and excludes its first
batches. The JPEGs are generated once, random but smooth, with noise, at quality 90.

Contenders:

  ours               flaxnets.data.stream.TrainStream
  dataloader         DataLoader with Pillow's decoder, and torchvision's crop and resize
  dataloader-ours    DataLoader with this library's decoder, which decodes big JPEGs at reduced
                     size; the two differ for pictures of more than 4 times the --image-size

Finally, prints the memory of this process and its workers after each of 5 epochs.
"""

import signal

if __name__ == "__main__":
    # Importing takes seconds: until `run_command`, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import importlib.util
import io
import itertools
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from rich import box
from rich.table import Table

from flaxnets.cli.arguments import ArgumentParser, positive
from flaxnets.cli.main import run_command
from flaxnets.cli.progress import plain_console
from flaxnets.data.crops import Crop, resized_box
from flaxnets.data.folder import find_folder
from flaxnets.data.images import decode_crop
from flaxnets.data.stream import Source, Subset, TrainStream
from flaxnets.errors import InputError

CLASSES = 10
WARM_UP_BATCHES = 4
EPOCHS_FOR_MEMORY = 5


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    console = plain_console()
    folder = make_pictures(args.data_dir, args.images, args.picture_size)
    source = find_folder(folder).train
    size = sum(os.stat(source.name(i)).st_size for i in range(len(source))) / len(source)
    console.print(
        f"{len(source)} JPEGs of about {args.picture_size[0]}x{args.picture_size[1]}, "
        f"{size / 1000:.0f} kB each; crops of {args.image_size}, batch {args.batch_size}, "
        f"{args.workers} workers, {len(os.sched_getaffinity(0))} cores",
        soft_wrap=True,
    )
    contenders: dict[str, Callable[[int], Iterator[Any]]] = {
        "ours": partial(our_batches, source, args),
        "dataloader": partial(their_batches, source, args, decode_as_torchvision),
        "dataloader-ours": partial(their_batches, source, args, decode_as_ours),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for seed in range(args.rounds):
        for name, begin in contenders.items():
            rates[name].append(images_per_second(begin(seed), args))
        console.print(
            f"round {seed + 1}: {', '.join(f'{n} {r[-1]:.0f} images/s' for n, r in rates.items())}",
            soft_wrap=True,
        )
    console.print(results_table(rates))
    load = os.getloadavg()[0]
    console.print(f"load average {load:.1f}; ours / dataloader in each round: {ratios(rates)}")

    few = Subset(source, np.arange(min(len(source), args.batches * args.batch_size)))
    for workers in (0, args.workers):
        args.workers = workers
        used = ", ".join(f"{number / 1e6:.0f} MB" for number in memory_by_epoch(few, args))
        console.print(f"memory after each epoch with {workers} workers: {used}", soft_wrap=True)
    return 0


# Contenders: infinite iterators over batches.


def our_batches(source: Source, args: argparse.Namespace, seed: int) -> Iterator[Any]:
    stream = TrainStream(
        source, args.image_size, 3, Crop.RESIZED, True, args.batch_size, seed, args.workers
    )
    return stream.batches(0, 10**9)


def their_batches(
    source: Source, args: argparse.Namespace, decode: Any, seed: int
) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        TorchPictures(source, args.image_size, seed, decode),  # pyright: ignore[reportArgumentType]
        args.batch_size,
        shuffle=True,
        num_workers=args.workers,
        drop_last=True,
        # Forking a process with JAX's threads may hang.
        multiprocessing_context="spawn" if args.workers else None,
        persistent_workers=args.workers > 0,
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


# Measurements.


def images_per_second(batches: Iterator[Any], args: argparse.Namespace) -> float:
    with closing(batches) as batches:  # pyright: ignore[reportArgumentType]
        for _ in range(WARM_UP_BATCHES * max(1, args.workers)):
            next(batches)
        begun = time.perf_counter()
        for _ in range(args.batches):
            next(batches)
        return args.batches * args.batch_size / (time.perf_counter() - begun)


def memory_by_epoch(source: Source, args: argparse.Namespace) -> list[int]:
    """Measure the bytes in memory of this process and its workers after each epoch."""
    used = []
    with closing(our_batches(source, args, 0)) as batches:  # pyright: ignore[reportArgumentType]
        for _ in range(EPOCHS_FOR_MEMORY):
            for _ in itertools.islice(batches, len(source) // args.batch_size):
                pass
            processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            used.append(sum(resident_bytes(process) for process in processes if process))
    return used


def resident_bytes(process: int) -> int:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def ratios(rates: dict[str, list[float]]) -> str:
    pairs = zip(rates["ours"], rates["dataloader"], strict=True)
    return ", ".join(f"{ours / theirs:.2f}" for ours, theirs in pairs)


def results_table(rates: dict[str, list[float]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("contender", no_wrap=True)
    for heading in ("images/s", "min - max", "ours / it"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, seen in rates.items():
        ratio = median(ours / it for ours, it in zip(rates["ours"], seen, strict=True))
        spread = f"{min(seen):,.0f} - {max(seen):,.0f}"
        table.add_row(name, f"{median(seen):,.0f}", spread, f"{ratio:.2f}")
    return table


# Pictures.


def make_pictures(directory: Path, count: int, size: tuple[int, int]) -> Path:
    """Make a folder of `count` training JPEGs and a few test JPEGs, unless it exists."""
    folder = directory / f"{count}-{size[0]}x{size[1]}"
    if folder.exists():
        return folder
    unfinished = folder.with_name(f"{folder.name}-unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        paths = [unfinished / "train" / str(i % CLASSES) / f"{i}.jpg" for i in range(count)]
        paths += [unfinished / "test" / str(i) / "0.jpg" for i in range(CLASSES)]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor() as executor:
            for _ in executor.map(partial(make_picture, size=size), paths, range(len(paths))):
                pass
        unfinished.rename(folder)
    except OSError as error:
        raise InputError(f"--data-dir {directory}: {error.strerror}") from error
    return folder


def make_picture(path: Path, seed: int, size: tuple[int, int]) -> None:
    """Draw smooth fields at three scales plus noise.

    Sides vary by a fifth, and one picture in four is in portrait format.
    """
    rng = np.random.default_rng(seed)
    width, height = (round(side * rng.uniform(0.8, 1.2)) for side in size)
    if rng.random() < 0.25:
        width, height = height, width
    pixels = np.zeros((height, width, 3), np.float32)
    for cells, share in ((4, 0.5), (16, 0.3), (64, 0.2)):
        field = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        pixels += share * np.asarray(field.resize((width, height), Image.Resampling.BICUBIC))
    pixels += rng.normal(0, 4, (height, width, 1))
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=90)


def picture_size(text: str) -> tuple[int, int]:
    """Parse an argument such as `500x375`."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 500x375")
    return int(found[1]), int(found[2])


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = partial(parser.add_argument, metavar="N", type=positive(int))
    add("--images", default=10_000, help="JPEGs to read (%(default)s)")
    add("--image-size", default=224, help="side of the crops in pixels (%(default)s)")
    add("--batch-size", default=128, help="images per batch (%(default)s)")
    add("--workers", default=2, help="reader processes per contender (%(default)s)")
    add("--rounds", default=5, help="rounds per contender (%(default)s)")
    add("--batches", default=20, help="timed batches per round (%(default)s)")
    parser.add_argument(
        "--picture-size",
        type=picture_size,
        default=(500, 375),
        metavar="WxH",
        help="average size of the JPEGs (500x375)",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "flaxnets-pictures",
        metavar="DIR",
        help="directory for the generated JPEGs (%(default)s)",
    )
    args = parser.parse(arguments)
    if not importlib.util.find_spec("torch"):
        raise InputError("PyTorch is not installed: pip install -e '.[benchmark]'")
    if args.images < max(args.batch_size, CLASSES):
        raise InputError(f"--images {args.images} is less than a batch of {args.batch_size}")
    return args


if __name__ == "__main__":
    sys.exit(run_command(main))
