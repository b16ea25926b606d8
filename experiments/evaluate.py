"""Evaluate a trained network on a whole split, class by class, and show its worst mistakes.

    python experiments/evaluate.py runs/degradation/digits-cifar/residual-18/seed-0
    python experiments/evaluate.py resnet50.pth --model resnet50 --dataset folder:pictures

A run is evaluated on its own data set, unless --dataset names another one of the same classes.
PyTorch weights are evaluated on images of the network's published size, normalised with ImageNet's
mean and standard deviation, as in torchvision.
"""

import signal

if __name__ == "__main__":
    # Importing takes seconds: until `run_command`, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import csv
import io
import json
import math
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from flaxnets.cli.arguments import ArgumentParser, check_choice
from flaxnets.cli.main import run_command
from flaxnets.cli.progress import CheckProgress, plain_console
from flaxnets.data import Dataset, Preprocess, Split, find_dataset, load_dataset
from flaxnets.data.batches import imagenet_statistics
from flaxnets.data.datasets import DatasetInfo
from flaxnets.data.folder import find_folder
from flaxnets.data.stream import (
    StreamedDataset,
    Subset,
    find_tfds_stream,
    hold_out,
    load_in_memory,
)
from flaxnets.errors import InputError
from flaxnets.files import storage_errors, write_atomic
from flaxnets.models import create_model, published_image_shape
from flaxnets.models.torch_weights import load_torch
from flaxnets.reporting.evaluation_figures import draw_confusion, draw_contact_sheet
from flaxnets.studies.restore import Restored, restore
from flaxnets.text import shorten, spreadsheet_text
from flaxnets.training.config import DATASET_NAME
from flaxnets.training.evaluation import (
    MOST_CONFUSED,
    Evaluation,
    compute_logits,
    compute_probabilities,
    evaluate_logits,
    evaluation_batch,
    evaluation_fraction,
    most_confidently_wrong,
)

WEIGHTS = (".safetensors", ".pth", ".pt", ".th")
# Crop size relative to a picture's shorter side in torchvision's evaluation: 224 of 256.
IMAGENET_FRACTION = 0.875

MOST_WRONG = 25  # images on the contact sheet
MOST_CLASSES = 20  # in the table; with more, it shows the worst and the best 10
FILES = ("evaluation.json", "confusion.csv", "confusion.png", "wrong.png")


@dataclass(frozen=True)
class Subject:
    """A trained network, and the images to evaluate it on."""

    name: str
    origin: dict[str, Any]  # for evaluation.json
    model: nn.Module
    variables: dict[str, Any]
    preprocess: Preprocess
    class_names: tuple[str, ...]
    dataset: str
    split: Split


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    console = plain_console()
    subject = read_run(args) if args.model is None else read_weights(args)

    batch_size = evaluation_batch(subject.preprocess.input_shape)
    logits = compute_logits(
        subject.model, subject.variables, subject.preprocess, subject.split.images, batch_size
    )
    if logits.shape[1] != len(subject.class_names):
        raise InputError(
            f"the network of {args.source} has {logits.shape[1]} classes, but its config names "
            f"{len(subject.class_names)}; it is damaged or was not written by this library"
        )
    evaluation = evaluate_logits(logits, subject.split.labels)

    what = f"{subject.name} on {subject.dataset} ({args.split})"
    print_evaluation(console, evaluation, subject.class_names, what)
    with storage_errors(args.out / FILES[0], 0):
        args.out.mkdir(parents=True, exist_ok=True)
    write_numbers(args.out, evaluation, subject, args.split)
    title = f"{ending(subject.name)} on {ending(subject.dataset)} ({args.split})"
    title += f"\ntop-1 error {evaluation.top1_error:.2f} %"
    files = FILES
    if evaluation.confusion is not None:
        write_confusion(args.out / "confusion.csv", evaluation.confusion, subject.class_names)
        draw_confusion(evaluation.confusion, subject.class_names, args.out / "confusion.png", title)
    else:
        files = tuple(name for name in FILES if not name.startswith("confusion"))
        console.print(f"no confusion matrix: there are more than {MOST_CONFUSED:,} classes")
    draw_wrong(args.out / "wrong.png", logits, subject, title)
    console.print(f"{', '.join(files)}: {args.out}", soft_wrap=True)
    return 0


# Networks, and images to evaluate them on.


def read_run(args: argparse.Namespace) -> Subject:
    """Restore a run, and load images of its own data set or of --dataset."""
    run = restore(args.source, which="best" if args.best else "latest")
    expected = run.preprocess.input_shape
    if args.dataset is None:
        name, split = load_own_split(run, args)
    else:
        name, source = args.dataset, find_named_source(args)
        check_classes(name, source.class_names, run.class_names)
        fraction = evaluation_fraction(run.config)
        split = load_split(source, args, name, run.preprocess.image_shape, fraction)
    # With a `size`, preprocessing resizes images of any size to the network's.
    preprocess = replace(run.preprocess, image_shape=split.images.shape[1:])
    if preprocess.input_shape != expected:
        raise InputError(
            f"{name} has images of {times(preprocess.image_shape)}, but the network takes "
            f"{times(expected)}; give a --dataset of such images, or folder:PATH"
        )
    return Subject(
        name=f"{args.source}, checkpoint {run.step},",
        origin={"run": str(args.source), "best": args.best, "step": run.step},
        model=run.model,
        variables=run.variables,
        preprocess=preprocess,
        class_names=run.class_names,
        dataset=name,
        split=split,
    )


def load_own_split(run: Restored, args: argparse.Namespace) -> tuple[str, Split]:
    """Load name and split of a run's own data set; of the training images, those it saw."""
    own: Any = run.config.get("dataset")
    if not is_dataset(own):
        raise InputError(f"the config of {args.source} names no data set; give --dataset")
    name, streamed = own["name"], own.get("streamed") is True
    if name.startswith("folder:"):
        typed = name.removeprefix("folder:")
        folder = own.get("path", typed)
        if not os.path.isdir(folder) and os.path.isdir(typed):
            folder = typed  # the whole project has moved; the sha256 decides
        name = f"folder:{folder}"
        if not os.path.isdir(folder):
            raise InputError(
                f"the pictures that {args.source} was trained on were in {folder}, which is gone; "
                "give the folder where they are now: --dataset folder:NEW"
            )
        # An untrusted run may name any folder of this machine.
        print(f"reading the folder that the run names: {shorten(folder, 1000)}", flush=True)
    validation = own.get("validation_examples")
    # Training may have skipped unreadable pictures; the fingerprint reveals any further ones.
    source = find_source(name, args.data_dir, streamed, skip_unreadable=True)
    check_classes(name, source.class_names, run.class_names)
    shape, fraction = run.preprocess.image_shape, evaluation_fraction(run.config)
    dataset: Dataset | StreamedDataset
    if isinstance(source, DatasetInfo):
        keep = own["train_examples"] if validation is None else None
        dataset = load_dataset(name, args.data_dir, keep)
    else:
        dataset = source if streamed else load_pictures(source, shape, fraction)
    if dataset.fingerprint() != own.get("sha256"):
        raise InputError(
            f"{name} is no longer the data this run was trained on (sha256 differs); "
            f"to evaluate it on the present data, give --dataset {name}"
        )
    labels = dataset.train.labels
    if isinstance(dataset, Dataset):
        split = dataset.test if args.split == "test" else dataset.train
    else:
        split = load_split(dataset, args, name, shape, fraction)
    if args.split == "train" and validation:
        rows, _ = hold_out(len(dataset.train) if labels is None else labels, validation)
        split = Split(split.images[rows], split.labels[rows])
    return name, split


def is_dataset(value: Any) -> bool:
    """Return whether `value` is a valid `dataset` entry of a config, which may be untrusted."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return False
    name = value["name"]
    known = len(name) > len("folder:") and name.startswith("folder:")
    known = known or DATASET_NAME.fullmatch(name) is not None
    known = known and isinstance(value.get("path", ""), str)
    counts = [value.get("train_examples"), value.get("validation_examples", 0)]
    return known and all(type(count) is int and count >= 0 for count in counts)


def read_weights(args: argparse.Namespace) -> Subject:
    """Load PyTorch weights, and images of --dataset."""
    model: Any
    model, variables = load_torch(args.model, args.source)
    size = published_image_shape(args.model)[0]
    stem = "stage1_conv1" if args.model.startswith("vgg") else "conv1"
    channels = variables["params"][stem]["kernel"].shape[2]
    if channels not in (1, 3):
        raise InputError(f"{args.source} takes {channels} channels; give weights for 1 or 3")
    source = find_named_source(args)
    if len(source.class_names) != model.num_classes:
        raise InputError(
            f"{args.dataset} has {len(source.class_names)} classes, but {args.source} has "
            f"{model.num_classes}; give a --dataset of the classes it was trained on"
        )
    split = load_split(source, args, args.dataset, (size, size, channels), IMAGENET_FRACTION)
    if split.images.shape[3] == 1 and channels == 3:
        split = Split(np.repeat(split.images, 3, axis=3), split.labels)
    shape = split.images.shape[1:]
    if shape[2] != channels:
        raise InputError(
            f"{args.dataset} has images of {shape[2]} channels, but {args.source} takes "
            f"{channels}; give a --dataset of such images, or folder:PATH"
        )
    mean, std = imagenet_statistics(channels)
    return Subject(
        name=str(args.source),
        origin={"weights": str(args.source), "model": args.model},
        model=model,
        variables=variables,
        preprocess=Preprocess(shape, mean, std, size=None if shape[:2] == (size, size) else size),
        class_names=source.class_names,
        dataset=args.dataset,
        split=split,
    )


def find_source(
    name: str, data_dir: Path | None, streamed: bool = False, skip_unreadable: bool = False
) -> DatasetInfo | StreamedDataset:
    """Find a data set without reading its images; those of differing sizes come as a stream."""
    if name.startswith("folder:"):
        path = name.removeprefix("folder:")
        return find_folder(path, skip_unreadable, on_progress=CheckProgress())
    info = find_dataset(name, data_dir)
    mixed = None in info.builder.info.features[info.image_key].shape[:2]
    return find_tfds_stream(name, data_dir) if mixed or streamed else info


def find_named_source(args: argparse.Namespace) -> DatasetInfo | StreamedDataset:
    return find_source(args.dataset, args.data_dir, skip_unreadable=args.skip_unreadable)


def load_split(
    source: DatasetInfo | StreamedDataset,
    args: argparse.Namespace,
    name: str,
    image_shape: tuple[int, int, int],
    fraction: float,
) -> Split:
    """Load the requested split, with pictures as images of `image_shape`."""
    if isinstance(source, DatasetInfo):
        dataset = load_dataset(name, args.data_dir)
        return dataset.test if args.split == "test" else dataset.train
    wanted = source.test if args.split == "test" else source.train
    # The other split may not fit in memory.
    alone = replace(source, train=wanted, test=Subset(wanted, np.arange(1)))
    return load_pictures(alone, image_shape, fraction).train


def load_pictures(
    source: StreamedDataset, image_shape: tuple[int, int, int], fraction: float
) -> Dataset:
    height, width, channels = image_shape
    if height != width:
        raise InputError(
            f"the network takes images of {times(image_shape)}, but pictures are made square; "
            "give a --dataset of such images"
        )
    return load_in_memory(replace(source, channels=channels), height, fraction)


def check_classes(name: str, found: tuple[str, ...], expected: tuple[str, ...]) -> None:
    if found == expected:
        return
    if len(found) != len(expected):
        differ = f"{len(found)} classes, but the network has {len(expected)}"
    else:
        pairs = zip(found, expected, strict=True)
        number, (ours, theirs) = next(
            (i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1]
        )
        differ = f"{ours!r} as class {number}, but the network has {theirs!r}"
    raise InputError(f"{name} has {differ}; give a --dataset of the classes it was trained on")


def times(shape: tuple[int, ...]) -> str:
    """Format a shape as `32x32x3`."""
    return "x".join(map(str, shape))


# Output.


def print_evaluation(
    console: Console, evaluation: Evaluation, class_names: tuple[str, ...], what: str
) -> None:
    """Print loss and errors, then the accuracy of each class or of the worst and the best."""
    console.print(shorten(f"{what}, {evaluation.count:,} images", 1000), soft_wrap=True)
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_row("loss", f"{evaluation.loss:.4f}")
    table.add_row("top-1 error, %", f"{evaluation.top1_error:.2f}")
    if evaluation.top5_error is not None:
        table.add_row("top-5 error, %", f"{evaluation.top5_error:.2f}")
    if evaluation.undecided:
        table.add_row("images with NaN logits", f"{evaluation.undecided:,}")
    console.print(table)
    if len(class_names) <= MOST_CLASSES:
        console.print(classes_table(evaluation, class_names, range(len(class_names))))
        return
    accuracy = evaluation.class_accuracy
    order = [i for i in np.argsort(accuracy, kind="stable") if not math.isnan(accuracy[i])]
    half = MOST_CLASSES // 2
    console.print("\nthe worst classes")
    console.print(classes_table(evaluation, class_names, order[:half]))
    console.print("the best classes")
    console.print(classes_table(evaluation, class_names, order[half:][-half:]))


def classes_table(evaluation: Evaluation, class_names: tuple[str, ...], rows: Any) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("class", no_wrap=True)
    for heading in ("images", "accuracy, %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for i in rows:
        accuracy = evaluation.class_accuracy[i]
        shown = "-" if math.isnan(accuracy) else f"{accuracy:.2f}"
        table.add_row(shorten(class_names[i], 60), f"{evaluation.class_counts[i]:,}", shown)
    return table


def write_numbers(out: Path, evaluation: Evaluation, subject: Subject, split: str) -> None:
    """Write `evaluation.json`."""
    classes = [
        {"class": name, "images": int(count), "accuracy": finite(accuracy)}
        for name, count, accuracy in zip(
            subject.class_names, evaluation.class_counts, evaluation.class_accuracy, strict=True
        )
    ]
    content = {
        **subject.origin,
        "dataset": subject.dataset,
        "split": split,
        "images": evaluation.count,
        "loss": finite(evaluation.loss),
        "top1_error": evaluation.top1_error,
        "top5_error": evaluation.top5_error,
        "undecided": evaluation.undecided,
        "classes": classes,
    }
    write_atomic(out / "evaluation.json", json.dumps(content, indent=2) + "\n")


def write_confusion(path: Path, confusion: np.ndarray, class_names: tuple[str, ...]) -> None:
    """Write `confusion.csv`, with a row for each true class."""
    names = [spreadsheet_text(name) for name in class_names]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true", *names])
    for name, row in zip(names, confusion.tolist(), strict=True):
        writer.writerow([name, *row])
    write_atomic(path, text.getvalue())


def finite(number: float) -> float | None:
    """Replace NaN and infinity by None, because JSON has neither."""
    return float(number) if math.isfinite(number) else None


def ending(text: str, most: int = 50) -> str:
    """Shorten a path to its end, which is more informative than its beginning."""
    return text if len(text) <= most else f"…{text[1 - most :]}"


def draw_wrong(path: Path, logits: np.ndarray, subject: Subject, title: str) -> None:
    """Draw the images that were misclassified with the greatest confidence."""
    images, labels = subject.split
    shown = drop_copies(images, most_confidently_wrong(logits, labels, len(labels)), MOST_WRONG)
    probabilities = compute_probabilities(logits[shown])
    captions = []
    for index, row in zip(shown, probabilities, strict=True):
        true, predicted = (
            shorten(subject.class_names[i], 24) for i in (labels[index], logits[index].argmax())
        )
        separator = " → " if len(true) + len(predicted) <= 20 else "\n→ "
        captions.append(f"{true}{separator}{predicted}\n{100 * row.max():.1f} %")
    found = f"the {len(shown)} most confident mistakes" if len(shown) else "no mistakes to show"
    draw_contact_sheet(list(images[shown]), captions, path, f"{title}; {found}")


def drop_copies(images: np.ndarray, rows: np.ndarray, most: int) -> np.ndarray:
    """Return the first rows, at most `most`, whose images all differ.

    A data set may have one picture several times.
    """
    different: dict[bytes, int] = {}
    for row in rows:
        different.setdefault(images[row].tobytes(), row)
        if len(different) == most:
            break
    return np.array(list(different.values()), int)


# The command line.


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "source",
        type=Path,
        metavar="RUN_DIR|WEIGHTS",
        help=f"run directory, or {', '.join(WEIGHTS)}",
    )
    add("--model", metavar="NAME", help="network of the PyTorch weights, such as resnet50")
    add("--dataset", help="a prepared TFDS data set or folder:PATH (default: the run's own)")
    add("--data-dir", type=Path, help="TFDS data directory (default: TFDS's own)")
    add("--skip-unreadable", action="store_true", help="leave out pictures that cannot be read")
    add("--split", default="test", help="test (default) or train")
    add("--best", action="store_true", help="use the state at the run's lowest validation error")
    add(
        "--out",
        type=Path,
        help="default: RUN_DIR/evaluation-<split>, "
        "for weights runs/evaluate/<file>-<dataset>-<split>",
    )
    args = parser.parse(arguments)
    check_choice("--split", args.split, ("test", "train"))
    if args.skip_unreadable and not (args.dataset or "").startswith("folder:"):
        raise InputError("--skip-unreadable is for --dataset folder:PATH")
    if args.source.suffix in WEIGHTS and not args.source.is_dir():
        for flag, value in (("--model", args.model), ("--dataset", args.dataset)):
            if value is None:
                raise InputError(
                    f"{args.source} needs {flag}: a weights file records neither network nor data"
                )
        if args.best:
            raise InputError("--best is for runs; a weights file has only one state")
        create_model(args.model)
    elif args.source.is_file():
        raise InputError(f"{args.source} is neither a run directory nor {', '.join(WEIGHTS)}")
    elif args.model is not None:
        raise InputError("--model is for weights files; a run records its own network")
    args.out = args.out or default_out(args)
    check_out(args.out)
    return args


def default_out(args: argparse.Namespace) -> Path:
    if args.model is None:
        return args.source / f"evaluation-{args.split}"
    dataset = args.dataset
    if dataset.startswith("folder:"):
        dataset = Path(dataset.removeprefix("folder:")).resolve().name
    dataset = re.sub(r"[^\w.+-]+", "-", dataset)
    return Path("runs/evaluate") / f"{args.source.stem}-{dataset}-{args.split}"


def check_out(out: Path) -> None:
    """Check before the slow part that `out` can be written."""
    try:
        existing = out
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise InputError(f"--out {out}: {existing} is a file; give a directory")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(f"--out {out}: {existing} cannot be written; give another directory")
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}; give another directory") from error


if __name__ == "__main__":
    sys.exit(run_command(main))
