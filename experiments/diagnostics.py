"""Why plain networks degrade: diagnostics of the finished runs of a study.

    python experiments/diagnostics.py runs/degradation/digits-cifar

Measures the plain and residual networks of one seed. For each diagnostic it writes numbers, and a
figure, a paragraph and a table made from them, to STUDY_DIR/diagnostics. Names for --only:
gradients, responses, residuals, construction, landscape, and gradient-log for runs trained with
--log-gradients. --redraw regenerates the rest from stored numbers, without the networks.
"""

import signal

if __name__ == "__main__":
    # Importing takes seconds: until `run_command`, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from flaxnets.cli.arguments import ArgumentParser, check_choice, positive, words
from flaxnets.cli.interruption import Interruption
from flaxnets.cli.main import run_command
from flaxnets.cli.memory import keep_memory
from flaxnets.cli.progress import StudyProgress, plain_console
from flaxnets.data import Dataset, Split, load_dataset
from flaxnets.diagnostics import (
    DIAGNOSTICS,
    Finding,
    Images,
    Network,
    NotPossibleError,
    Options,
    Study,
    TrainingPlan,
    read_numbers,
    write_finding,
    write_numbers,
)
from flaxnets.errors import InputError
from flaxnets.files import storage_errors
from flaxnets.models.resnet import ResNet
from flaxnets.parallel import data_mesh, replicate
from flaxnets.reporting.html_report import parse_number
from flaxnets.studies.directory import lock_directory, run_directory
from flaxnets.studies.restore import restore
from flaxnets.studies.results import Run, read_runs
from flaxnets.text import duration
from flaxnets.training import Progress
from flaxnets.training.config import DATASET_NAME


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    console = plain_console()
    if args.redraw:
        return redraw(args, console)
    keep_memory()
    study = read_study(args)
    with storage_errors(study.out, 0):
        study.out.mkdir(exist_ok=True)
    names = ", ".join(network.name for network in study.networks)
    console.print(f"finished networks of seed {study.setting.seed}: {names}", soft_wrap=True)
    command = shlex.join(["python", *sys.argv]) if arguments is None else "the same command"
    with Interruption(command) as interruption, lock_directory(study.out):
        watch = partial(show_training, console, interruption)
        options = Options(args.batch, args.epochs, interruption.requested, watch)
        for name in args.only or DIAGNOSTICS:
            start = time.perf_counter()
            try:
                numbers = DIAGNOSTICS[name].measure(study, options)
            except NotPossibleError as reason:
                console.print(f"{name}: skipped, {reason}", soft_wrap=True)
                continue
            if numbers is not None:
                write_numbers(study.out / f"{name}.json", numbers)
                found = make_finding(study.out, name)
                show(console, found, f" ({duration(time.perf_counter() - start)})")
            if numbers is None or interruption.requested():
                interruption.print_resume_hint()
                return interruption.exit_status
    console.print(f"\nfigures and numbers: {study.out}", soft_wrap=True)
    return 0


def redraw(args: argparse.Namespace, console: Console) -> int:
    """Redraw the figures and print the findings from the stored numbers."""
    out = args.study / "diagnostics"
    names = args.only or [name for name in DIAGNOSTICS if (out / f"{name}.json").exists()]
    if not names or not out.is_dir():
        raise InputError(f"{out} holds no diagnostic numbers; leave out --redraw")
    with lock_directory(out):
        for name in names:
            try:
                found = make_finding(out, name)
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                if isinstance(error, InputError):
                    raise
                # Numbers that fit together one by one may still not fit one another.
                problem = f"{type(error).__name__}: {error}"
                raise InputError(f"{out / name}.json is damaged ({problem})") from error
            show(console, found)
    console.print(f"\nfigures: {out}", soft_wrap=True)
    return 0


def make_finding(out: Path, name: str) -> Finding:
    """Draw and describe the stored numbers of a diagnostic."""
    numbers = read_numbers(out / f"{name}.json", DIAGNOSTICS[name])
    numbers.draw(out / f"{name}.png")
    found = numbers.describe()
    write_finding(out, name, found, list(DIAGNOSTICS))
    return found


# Printing.


def show(console: Console, found: Finding, note: str = "") -> None:
    console.print(f"\n{found.title}{note}\n{found.paragraph}", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading, *cells in zip(found.table.headings, *found.table.rows, strict=True):
        numeric = any(parse_number(cell) is not None for cell in cells)
        table.add_column(heading, justify="right" if numeric else "left")
    for row in found.table.rows:
        table.add_row(*row)
    console.print(table)


@contextmanager
def show_training(
    console: Console, interruption: Interruption, plan: TrainingPlan
) -> Iterator[Callable[[Progress], None]]:
    """Show the progress of a training run; signals wait while it has unsaved work."""
    with StudyProgress(console, 0, 1, plan.work) as progress:
        run = progress.start_run(*plan)
        done = Progress(0, 0.0, [])

        def on_progress(now: Progress) -> None:
            nonlocal done
            done = now
            interruption.unsaved.add(plan.name)
            run.update(now)

        yield on_progress
        interruption.unsaved.discard(plan.name)
        updates = (
            f"{done.step:,} of {plan.total_steps:,} updates" if done.step else "already trained"
        )
        run.end(f"{plan.name}: {updates}")


# Networks and images.


def read_study(args: argparse.Namespace) -> Study:
    """Restore the finished plain and residual networks of one seed, and sample their images."""
    path = args.study
    if not path.is_dir():
        raise InputError(f"{path} is not a study directory; train one with degradation.py")
    runs = read_runs(path)
    networks = [restore_network(path, run) for run in choose_runs(path, runs, args.seed)]
    dataset = load_images(networks[0], args.data_dir)
    return Study(
        path,
        networks,
        tuple(sorted({run.depth for run in runs})),
        dataset,
        sample(networks[0], dataset.train, args.images),
        sample(networks[0], dataset.test, args.images),
    )


def choose_runs(path: Path, runs: list[Run], seed: int | None) -> list[Run]:
    """Choose the finished runs of plain and residual networks with `seed`.

    The default is the seed that most networks have, the lowest if there are several.
    """
    kinds = ("plain", "residual")
    finished = [run for run in runs if run.kind in kinds and run.result.status == "finished"]
    seeds = [run.seed for run in finished]
    if not seeds:
        raise InputError(
            f"{path} has no finished run of a plain or residual network; "
            "train some with python experiments/degradation.py --depths 18,34,56"
        )
    known = sorted(set(seeds))
    if seed is None:
        seed = max(known, key=seeds.count)
    if seed not in known:
        raise InputError(f"--seed must be one of {', '.join(map(str, known))}, not {seed}")
    return [run for run in finished if run.seed == seed]


def restore_network(path: Path, run: Run) -> Network:
    restored = restore(run_directory(path, *run.key))
    model = restored.model
    if not isinstance(model, ResNet) or model.preactivation:
        raise InputError(f"{path}: {run.kind}-{run.depth} is not a version 1 ResNet")
    # Values that `remat` recomputes cannot be captured.
    return Network(run, restored, model.clone(remat=False))


def load_images(network: Network, data_dir: Path | None) -> Dataset:
    """Load the data set that the study was trained on."""
    own: Any = network.run.config.get("dataset")
    known = isinstance(own, dict) and DATASET_NAME.fullmatch(str(own.get("name")))
    if not known or type(own.get("train_examples")) is not int:
        raise InputError(f"the config of {network.name} names no data set")
    dataset = load_dataset(own["name"], data_dir, own["train_examples"])
    dataset = dataset.resized(network.restored.preprocess.size)
    if dataset.fingerprint() != own.get("sha256"):
        raise InputError(
            f"{own['name']} is not the data this study was trained on (sha256 differs)"
        )
    return dataset


def sample(network: Network, split: Split, count: int) -> Images:
    """Draw a fixed sample of images, normalised, in the order of the split."""
    rows = np.arange(len(split.labels))
    if count < len(rows):
        rows = np.sort(np.random.default_rng(0).choice(rows, count, replace=False))
    images = network.restored.preprocess(split.images[rows])
    return Images(*replicate((images, jnp.asarray(split.labels[rows])), data_mesh()))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY_DIR", help="study directory written by degradation.py")
    add("--only", type=words, help="run only these diagnostics, such as gradients,landscape")
    add("--seed", type=int, help="seed of the networks (default: the one that most have)")
    add(
        "--images",
        type=positive(int),
        default=512,
        help="images of each split (default: %(default)s)",
    )
    batch = "training images for the gradients (default: %(default)s)"
    add("--batch", type=positive(int), default=128, help=batch)
    add(
        "--epochs",
        type=positive(int),
        help="epochs of `construction` (default: the study's, at most 20)",
    )
    add("--data-dir", type=Path, help="TFDS data directory (default: TFDS's own)")
    add(
        "--redraw", action="store_true", help="regenerate figures and texts from the stored numbers"
    )
    args = parser.parse(arguments)
    for name in args.only or ():
        check_choice("--only", name, tuple(DIAGNOSTICS))
    return args


if __name__ == "__main__":
    sys.exit(run_command(main))
