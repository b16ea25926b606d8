"""The degradation problem and its cure: plain and residual networks at several depths.

    python experiments/degradation.py --depths 18,34,56

Trains each network once per seed, by default on the real handwritten digits that come with
scikit-learn, and ends with a table, summary.csv and a figure like Figure 6 of He et al. (2015),
"Deep Residual Learning for Image Recognition". Rerun the same command to resume, or add kinds,
depths or seeds to extend the study.
"""

import signal

if __name__ == "__main__":
    # Importing takes seconds: until `run_command`, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

import flaxnets
from flaxnets.cli.arguments import (
    ArgumentParser,
    check_choice,
    checkpoint_every,
    positive,
    process_group,
    whole_numbers,
    words,
)
from flaxnets.cli.interruption import Interruption
from flaxnets.cli.main import run_command
from flaxnets.cli.memory import keep_memory
from flaxnets.cli.progress import plain_console
from flaxnets.errors import InputError, SettingError
from flaxnets.parallel import (
    is_primary,
    make_deterministic,
    raise_on_all_processes,
    start_processes,
)
from flaxnets.reporting.tables import differences_table, plan_table, results_table
from flaxnets.studies.directory import check_output_dir, check_processes_agree, run_directory
from flaxnets.studies.estimate import estimate_study
from flaxnets.studies.grid import Plan
from flaxnets.studies.results import Run, check_study, curves
from flaxnets.study import StudyResults, check_workers, default_recipe, default_workers, train_plan
from flaxnets.text import duration, plural
from flaxnets.training import RECIPES, CheckpointEvery, Recipe


@dataclass(frozen=True)
class Options:
    """The command line: a study, and how to run it."""

    study: flaxnets.Study
    out: Path
    workers: int | None
    checkpoint_every: CheckpointEvery
    log_gradients: bool
    deterministic: bool
    distributed: tuple[str | None, int | None, int | None] | None
    dry_run: bool


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    keep_memory()
    if options.deterministic:
        make_deterministic()
    if options.distributed is not None:
        start_processes(*options.distributed)
    console = plain_console(quiet=not is_primary())

    # Everything that can be refused is refused before the slow part.
    with raise_on_all_processes(), name_options():
        check_output_dir(options.out)
        check_workers(options.workers)
        plan = options.study.plan()
    check_processes_agree(
        {
            "--dry-run": options.dry_run,
            "--deterministic": options.deterministic,
            "--log-gradients": options.log_gradients,
            "--checkpoint-every": options.checkpoint_every,
            "runs": [str(run_directory(options.out, *config.key)) for config in plan.configs],
            **{"-".join(map(str, config.key)): config for config in plan.configs},
        }
    )
    if options.dry_run:
        stored = check_study(options.out, plan.config, plan.configs)
        print_plan(console, plan, stored, options.workers or default_workers())
        return 0

    command = shlex.join(["python", *sys.argv]) if arguments is None else "the same command"
    with Interruption(command) as interruption:
        results = train_plan(
            plan,
            options.out,
            options.workers,
            options.checkpoint_every,
            options.log_gradients,
            interruption.requested,
            console,
            interruption.unsaved,
        )
        interrupted = interruption.requested()
    if interrupted:
        interruption.print_resume_hint()
        return interruption.exit_status
    print_results(console, results)
    return 0


def print_results(console: Console, results: StudyResults) -> None:
    """Print the tables, the conclusion, and where to look further."""
    console.print(results_table(results.networks))
    differences = differences_table(curves(results.networks).values())
    if differences is not None:
        console.print(differences)
    console.print(results.conclusion, soft_wrap=True)
    place = shlex.quote(str(results.out))
    console.print(f"figure:      {results.out / 'degradation.png'}", soft_wrap=True)
    console.print(f"report:      python experiments/report.py {place}", soft_wrap=True)
    console.print(f"diagnostics: python experiments/diagnostics.py {place}", soft_wrap=True)


@contextmanager
def name_options() -> Iterator[None]:
    """Report an invalid setting by the name of its option."""
    try:
        yield
    except SettingError as error:
        name, _, problem = str(error).partition(" ")
        raise InputError(f"--{name.replace('_', '-')} {problem}") from error


def parse_arguments(arguments: list[str] | None) -> Options:
    parser = ArgumentParser(description=__doc__)
    add_study_options(parser)
    add_run_options(parser)
    args = parser.parse(arguments)
    with name_options():
        study = flaxnets.Study(
            args.depths,
            kinds=args.kinds,
            seeds=args.seeds,
            family=args.family,
            shortcut=args.shortcut,
            stem=args.stem,
            dataset=args.dataset,
            data_dir=args.data_dir,
            train_examples=args.train_examples,
            recipe=choose_recipe(args),
            precision=args.precision,
            evaluate_every=args.evaluate_every,
        )
    if args.workers and args.workers > 1 and args.distributed is not None:
        raise InputError("--workers is for one process: with --distributed, leave it out")
    return Options(
        study=study,
        out=args.out or study.default_out,
        workers=args.workers,
        checkpoint_every=args.checkpoint_every,
        log_gradients=args.log_gradients,
        deterministic=args.deterministic,
        distributed=args.distributed,
        dry_run=args.dry_run,
    )


def choose_recipe(args: argparse.Namespace) -> Recipe:
    """Return the requested recipe, with the overrides of the command line."""
    name = args.recipe or default_recipe(args.dataset)
    check_choice("--recipe", name, tuple(RECIPES))
    recipe = RECIPES[name]
    if args.epochs:
        recipe = replace(recipe, epochs=args.epochs, steps=None)
    if args.batch_size:
        recipe = replace(recipe, batch_size=args.batch_size)
    if args.learning_rate:
        recipe = replace(recipe, learning_rate=args.learning_rate)
    return recipe


def add_study_options(parser: ArgumentParser) -> None:
    """Add the options that define the study."""
    add = parser.add_argument
    add("--depths", required=True, type=whole_numbers, help="weighted layers, such as 18,34,56")
    add(
        "--kinds",
        default="plain,residual",
        type=words,
        help="plain, residual or a custom module:function (default: %(default)s)",
    )
    add("--family", default="cifar", help="cifar (default) or imagenet")
    add("--shortcut", default="A", help="A (default), B or C, as in section 3.3 of the paper")
    add("--stem", help="imagenet or small (default: the family's own)")
    add(
        "--dataset",
        default="digits",
        help="digits (default), any prepared TFDS data set, or folder:PATH",
    )
    add("--data-dir", type=Path, help="TFDS data directory (default: TFDS's own)")
    add(
        "--train-examples",
        type=positive(int),
        help="number of training images to use (default: all)",
    )
    add("--seeds", default="0", type=whole_numbers, help="one run from each, such as 0,1,2 (0)")
    add("--recipe", help="name (default: digits for the digits, otherwise he2015-cifar)")
    add("--epochs", type=positive(int), help="length of a run; the schedule scales with it")
    add("--batch-size", type=positive(int), help="images per step, over all devices")
    add("--learning-rate", type=positive(float), help="learning rate after warm-up")
    add("--precision", default="float32", help="float32 (default) or bfloat16")


def add_run_options(parser: ArgumentParser) -> None:
    """Add the options that do not change the results."""
    add = parser.add_argument
    add(
        "--evaluate-every",
        default=1,
        type=positive(int),
        metavar="N",
        help="evaluate every N epochs, and the first and the last (default: %(default)s)",
    )
    add(
        "--checkpoint-every",
        default="60s",
        type=checkpoint_every,
        help="time or steps between checkpoints, such as 500s or 2000steps (default: %(default)s)",
    )
    add(
        "--log-gradients",
        action="store_true",
        help="log the norm of each layer's gradient after every epoch, to gradients.csv",
    )
    add(
        "--workers",
        type=positive(int),
        help="networks to train at a time; results do not change "
        "(default: 2 on one CPU device, else 1)",
    )
    add(
        "--deterministic",
        action="store_true",
        help="on a GPU, use only algorithms that give the same bits each time",
    )
    add(
        "--distributed",
        nargs="?",
        const="",
        type=process_group,
        metavar="HOST:PORT,PROCESSES,INDEX",
        help="run as one of several processes, all started with this command; "
        "without a value, ask the cluster (SLURM, Cloud TPU, ...)",
    )
    add("--out", type=Path, help="directory (default: runs/degradation/<dataset>-<family>)")
    add("--dry-run", action="store_true", help="print grid, steps and a time estimate, then exit")


# Plan and time estimate.


def print_plan(console: Console, plan: Plan, stored: list[Run], workers: int) -> None:
    """Print the grid, what is left to train, and a time estimate from small networks."""
    steps, data = plan.total_steps, plan.config.dataset
    console.print(plan_table(plan))
    height, width, channels = plan.dataset.preprocess.input_shape
    console.print(
        f"{data.name}: {data.train_examples:,} training and {data.test_examples:,} "
        f"test images of {height}x{width}x{channels}; recipe {plan.config.recipe.name}"
    )
    runs, unfinished = len(plan.configs), len(plan.unfinished(stored))
    of_length = f"{plural(runs, 'run')} of {steps:,} updates"
    if not unfinished:
        console.print(f"{of_length}, all finished: nothing is left to train")
        return
    if unfinished < runs:
        of_length += f", {unfinished} of them not finished"
    seconds = estimate_study(plan, stored, workers)
    console.print(
        f"{of_length}; about {duration(seconds)} here, judging by a few steps of small networks"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
