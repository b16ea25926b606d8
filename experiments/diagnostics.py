"""Why plain networks degrade: diagnostics of the finished runs of a study.

    python experiments/diagnostics.py runs/degradation/digits-cifar

Measures the plain and residual networks of one seed. For each diagnostic it writes numbers, and a
figure, a paragraph and a table made from them, to STUDY_DIR/diagnostics. Names for --only:
gradients, responses, residuals, construction, landscape, and gradient-log for runs trained with
--log-gradients. --redraw regenerates figures, paragraphs and tables from the stored numbers.
"""

import signal

if __name__ == "__main__":
    # Importing takes seconds: until `run_command`, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from flaxnets.cli.arguments import ArgumentParser, check_choice, positive, words
from flaxnets.cli.interruption import Interruption
from flaxnets.cli.main import run_command
from flaxnets.cli.memory import keep_memory
from flaxnets.cli.progress import StudyProgress, plain_console, print_folder
from flaxnets.diagnostics import DIAGNOSTICS
from flaxnets.diagnostics.finding import (
    MeasureOptions,
    NotPossibleError,
    TrainingPlan,
    read_numbers,
    write_numbers,
)
from flaxnets.diagnostics.study import read_study
from flaxnets.errors import InputError
from flaxnets.files import storage_errors
from flaxnets.reporting.findings import Finding, write_finding
from flaxnets.reporting.html_report import parse_number
from flaxnets.studies.directory import lock_directory
from flaxnets.text import duration
from flaxnets.training import Progress


@dataclass(frozen=True)
class Options:
    """Options of the command; without `only`, all diagnostics are run."""

    study: Path
    only: list[str] | None
    seed: int | None
    images: int
    batch: int
    epochs: int | None
    data_dir: Path | None
    redraw: bool


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    console = plain_console()
    if options.redraw:
        return redraw(options, console)
    keep_memory()
    study = read_study(options.study, options.seed, options.images, options.data_dir, print_folder)
    with storage_errors(study.out, 0):
        study.out.mkdir(exist_ok=True)
    names = ", ".join(network.name for network in study.networks)
    console.print(f"finished networks of seed {study.setting.seed}: {names}", soft_wrap=True)
    command = shlex.join(["python", *sys.argv]) if arguments is None else "the same command"
    with Interruption(command) as interruption, lock_directory(study.out):
        watch = partial(show_training, console, interruption)
        measure = MeasureOptions(options.batch, options.epochs, interruption.requested, watch)
        for name in options.only or DIAGNOSTICS:
            start = time.perf_counter()
            try:
                numbers = DIAGNOSTICS[name].measure(study, measure)
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


def redraw(options: Options, console: Console) -> int:
    """Redraw the figures and print the findings from the stored numbers."""
    out = options.study / "diagnostics"
    names = options.only or [name for name in DIAGNOSTICS if (out / f"{name}.json").exists()]
    if not names or not out.is_dir():
        raise InputError(f"{out} holds no diagnostic numbers; leave out --redraw")
    with lock_directory(out):
        for name in names:
            try:
                found = make_finding(out, name)
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                if isinstance(error, InputError):
                    raise
                # Numbers that are valid one by one may still not fit one another.
                problem = f"{type(error).__name__}: {error}"
                raise InputError(f"{out / name}.json is damaged ({problem})") from error
            show(console, found)
    console.print(f"\nfigures: {out}", soft_wrap=True)
    return 0


def make_finding(out: Path, name: str) -> Finding:
    """Describe and draw the stored numbers of a diagnostic."""
    numbers = read_numbers(out / f"{name}.json", DIAGNOSTICS[name])
    found = numbers.describe()
    numbers.draw(out / f"{name}.png")
    write_finding(out, name, found, list(DIAGNOSTICS))
    return found


# Printing.


def show(console: Console, found: Finding, note: str = "") -> None:
    console.print(f"\n{found.title}{note}\n{found.paragraph}", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rows = [tuple(map(str, row)) for row in found.table.rows]
    for heading, *cells in zip(found.table.headings, *rows, strict=True):
        numeric = any(parse_number(cell) is not None for cell in cells)
        table.add_column(heading, justify="right" if numeric else "left")
    for row in rows:
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


def parse_options(arguments: list[str] | None) -> Options:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY_DIR", help="study directory written by degradation.py")
    add("--only", type=words, help="run only these diagnostics, such as gradients,landscape")
    add("--seed", type=int, help="seed of the networks (default: the one that most have)")
    count = positive(int)
    add("--images", type=count, default=512, help="images to sample from each split (%(default)s)")
    batch = "training images for the gradients (default: %(default)s)"
    add("--batch", type=count, default=128, help=batch)
    add("--epochs", type=count, help="epochs of `construction` (default: the study's, at most 20)")
    add("--data-dir", type=Path, help="TFDS data directory (default: TFDS's own)")
    again = "regenerate figures and texts from the stored numbers"
    add("--redraw", action="store_true", help=again)
    options = Options(**vars(parser.parse(arguments)))
    for name in options.only or ():
        check_choice("--only", name, tuple(DIAGNOSTICS))
    return options


if __name__ == "__main__":
    sys.exit(run_command(main))
