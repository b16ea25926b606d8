"""Evaluate a trained network on a whole split, class by class, and draw its worst mistakes.

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

import re
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from flaxnets.cli.arguments import ArgumentParser, check_choice
from flaxnets.cli.main import run_command
from flaxnets.cli.progress import CheckProgress, plain_console, print_folder
from flaxnets.data import UnreadDataset, inspect_dataset
from flaxnets.errors import InputError
from flaxnets.files import check_writable, storage_errors
from flaxnets.models import create_model
from flaxnets.reporting.evaluation_figures import draw_confusion, draw_mistakes
from flaxnets.reporting.evaluation_tables import (
    evaluation_tables,
    write_confusion,
    write_evaluation,
)
from flaxnets.studies.own_data import load_own_split, require_classes
from flaxnets.studies.restore import restore
from flaxnets.studies.subject import Subject, load_weights
from flaxnets.text import shorten
from flaxnets.training.evaluation import (
    MOST_CONFUSED,
    Evaluation,
    compute_logits,
    evaluate_logits,
    evaluation_batch,
    evaluation_fraction,
    require_logits,
)

WEIGHTS = (".safetensors", ".pth", ".pt", ".th")
FILES = ("evaluation.json", "confusion.csv", "confusion.png", "wrong.png")


@dataclass(frozen=True)
class Options:
    """Options of the command line.

    Attributes:
      source: a run directory, or PyTorch weights of the network `model`.
      dataset: a TFDS data set or `folder:PATH`; None for the run's own.
    """

    source: Path
    model: str | None
    dataset: str | None
    data_dir: Path | None
    skip_unreadable: bool
    split: Literal["test", "train"]
    best: bool
    out: Path


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = plain_console()
    if options.model is None:
        subject = read_run(options)
    else:
        inspect = partial(find_data, options)
        subject = load_weights(options.source, options.model, inspect, options.split)
    images, labels = subject.split
    batch_size = evaluation_batch(subject.preprocess.input_shape)
    logits = compute_logits(
        subject.model, subject.variables, subject.preprocess, images, batch_size
    )
    require_logits(logits, subject.class_names, options.source)
    evaluation = evaluate_logits(logits, labels)

    title = f"{subject.name} on {subject.dataset} ({options.split})"
    print_evaluation(console, evaluation, subject.class_names, title)
    files = write_files(options, subject, evaluation, logits)
    if evaluation.confusion is None:
        console.print(f"no confusion matrix: there are more than {MOST_CONFUSED:,} classes")
    console.print(f"{', '.join(files)}: {options.out}", soft_wrap=True)
    return 0


def read_run(options: Options) -> Subject:
    """Restore a run, and load images of its own data set or of --dataset."""
    run = restore(options.source, which="best" if options.best else "latest")
    if options.dataset is None:
        name, split = load_own_split(
            run, options.source, options.split, options.data_dir, print_folder, CheckProgress()
        )
    else:
        name, unread = options.dataset, find_data(options)
        require_classes(name, unread.class_names, run.class_names)
        fraction = evaluation_fraction(run.config)
        split = unread.load_split(options.split, run.preprocess.image_shape, fraction)
    return Subject.from_run(run, options.source, options.best, name, split)


def find_data(options: Options) -> UnreadDataset:
    assert options.dataset is not None
    return inspect_dataset(
        options.dataset, options.data_dir, options.skip_unreadable, CheckProgress()
    )


def print_evaluation(
    console: Console, evaluation: Evaluation, class_names: tuple[str, ...], title: str
) -> None:
    console.print(shorten(f"{title}, {evaluation.count:,} images", 1000), soft_wrap=True)
    for table in evaluation_tables(evaluation, class_names):
        console.print(table)


def write_files(
    options: Options, subject: Subject, evaluation: Evaluation, logits: np.ndarray
) -> tuple[str, ...]:
    """Write the files of an evaluation to --out, and return their names."""
    paths = [options.out / name for name in FILES]
    with storage_errors(paths[0], 0):
        options.out.mkdir(parents=True, exist_ok=True)
    about = {**subject.origin, "dataset": subject.dataset, "split": options.split}
    write_evaluation(paths[0], evaluation, subject.class_names, about)
    title = f"{shorten_start(subject.name)} on {shorten_start(subject.dataset)} ({options.split})"
    title += f"\ntop-1 error {evaluation.top1_error:.2f} %"
    if evaluation.confusion is not None:
        write_confusion(paths[1], evaluation.confusion, subject.class_names)
        draw_confusion(evaluation.confusion, subject.class_names, paths[2], title)
    draw_mistakes(*subject.split, logits, subject.class_names, paths[3], title)
    return FILES if evaluation.confusion is not None else (FILES[0], FILES[3])


def shorten_start(text: str, most: int = 50) -> str:
    """Shorten a path to its end, which is more informative than its beginning."""
    return text if len(text) <= most else f"…{text[1 - most :]}"


# The command line.


def parse_arguments(arguments: list[str] | None) -> Options:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "source",
        type=Path,
        metavar="RUN_DIR|WEIGHTS",
        help=f"run directory, or file of PyTorch weights ({', '.join(WEIGHTS)})",
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
    options = Options(**vars(args))
    if options.out is None:
        options = replace(options, out=default_out(options))
    check_writable(options.out)
    return options


def default_out(options: Options) -> Path:
    dataset = options.dataset or ""
    if options.model is None:
        return options.source / f"evaluation-{options.split}"
    if dataset.startswith("folder:"):
        dataset = Path(dataset.removeprefix("folder:")).resolve().name
    dataset = re.sub(r"[^\w.+-]+", "-", dataset)
    return Path("runs/evaluate") / f"{options.source.stem}-{dataset}-{options.split}"


if __name__ == "__main__":
    sys.exit(run_command(main))
