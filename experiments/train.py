"""Train one network on any images.

    python experiments/train.py --model cifar_resnet20 --dataset cifar10 --recipe modern-cifar
    python experiments/train.py --model resnet18 --dataset folder:pictures --init-from resnet18.pth

A data set is any prepared TFDS data set or `folder:PATH`, with a folder of pictures for each class
in PATH/train and PATH/test, or in PATH itself. A recipe (--list-recipes) sets optimizer, schedule,
length and augmentation, and each of its fields can be overridden. Rerun the same command to resume.
"""

import signal

if __name__ == "__main__":
    # Importing takes seconds: until `run_command`, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import importlib.util
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from flaxnets.cli.arguments import ArgumentParser, check_choice, checkpoint_every, positive
from flaxnets.cli.interruption import Interruption
from flaxnets.cli.main import run_command
from flaxnets.cli.memory import keep_memory
from flaxnets.cli.progress import CheckProgress, StudyProgress, plain_console
from flaxnets.cli.recipe_options import add_recipe_options, choose_recipe
from flaxnets.data.opening import short_name
from flaxnets.data.slots import remove_leftovers
from flaxnets.errors import InputError
from flaxnets.models import create_model
from flaxnets.parallel import make_deterministic
from flaxnets.reporting.figures import draw_run
from flaxnets.reporting.tables import recipes_table
from flaxnets.studies.directory import check_output_dir, check_run
from flaxnets.studies.single import (
    PlannedRun,
    RunSettings,
    describe,
    make_setup,
    open_run,
    plan_run,
    write_environments,
)
from flaxnets.text import millions, shorten
from flaxnets.training import CheckpointEvery, Checkpoints, Progress, RunResult, train_run
from flaxnets.training.config import DEEPEST, DTYPES, is_network
from flaxnets.training.tensorboard import open_tensorboard

DEFAULT_RECIPE = "adam"


@dataclass(frozen=True)
class Options:
    """The command line: a run, and how to run it."""

    settings: RunSettings
    out: Path
    data_workers: int
    tensorboard: bool
    checkpoint_every: CheckpointEvery
    deterministic: bool
    dry_run: bool


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    keep_memory()
    console = plain_console()
    if options is None:
        console.print(recipes_table())
        return 0
    if options.deterministic:
        make_deterministic()
    remove_leftovers()

    # Everything that can be refused is refused before the slow part.
    check_output_dir(options.out, "run")
    run = plan_run(options.settings, options.out, CheckProgress())
    check_run(options.out, run.config)
    print_plan(console, options.settings, run)
    if options.dry_run:
        return 0

    command = shlex.join(["python", *sys.argv]) if arguments is None else "the same command"
    with Interruption(command) as interruption, open_run(options.out, run.config):
        result = train(options, run, console, interruption)
    if interruption.signal is not None and result.status == "unfinished":
        interruption.print_resume_hint()
        return interruption.exit_status
    place = shlex.quote(str(options.out))
    console.print(f"figure: {options.out / 'errors.png'}", soft_wrap=True)
    console.print(f"use it: python experiments/evaluate.py {place}", soft_wrap=True)
    return 0


def train(
    options: Options,
    run: PlannedRun,
    console: Console,
    interruption: Interruption,
) -> RunResult:
    """Train with progress on the console; write the events, the figure and the environments."""
    settings, recipe = options.settings, options.settings.recipe
    name = f"{settings.model} seed {settings.seed}"
    setup = make_setup(run, options.data_workers, settings.skip_unreadable)
    with contextlib.ExitStack() as stack:
        write = stack.enter_context(open_tensorboard(options.out)) if options.tensorboard else None
        progress = stack.enter_context(
            StudyProgress(console, 0, 1, float(run.cost.work), interruption.unsaved)
        )
        shown = progress.start_run(
            name,
            run.cost.work,
            setup.total_steps,
            setup.steps_per_epoch,
            settings.recipe.batch_size,
        )

        def on_progress(now: Progress) -> None:
            shown.update(now)
            if write is not None:
                write(now.rows)

        result = train_run(
            setup,
            settings.seed,
            options.out,
            on_progress,
            interruption.requested,
            options.checkpoint_every,
            run.config,
            run.begin,
        )
        if write is not None:
            write(result.rows)
        if result.rows:
            title = f"{settings.model} on {settings.dataset}, recipe {recipe.name}, "
            draw_run(result.rows, options.out / "errors.png", f"{title}seed {settings.seed}")
        write_environments(options.out)
        with Checkpoints(options.out, read_only=True, name="best") as best:
            shown.end(f"{name}: {describe(result, best.step)}")
    return result


def print_plan(console: Console, settings: RunSettings, run: PlannedRun) -> None:
    config, data = run.config, run.config.dataset
    height, width, channels = config.preprocess.input_shape
    validation = ""
    if data.validation_examples:
        default = " (a tenth, by default)" if settings.validation is None else ""
        validation = f"{data.validation_examples:,} to validate{default}, "
    console.print(
        f"{settings.model}, {millions(config.parameters)} parameters, "
        f"on {shorten(settings.dataset, 200)} "
        f"({'streamed' if data.streamed else 'in memory'}): {len(config.class_names)} classes, "
        f"{data.train_examples:,} images of {height}x{width}x{channels} to train, {validation}"
        f"{data.test_examples:,} to test; recipe {config.recipe.name}, "
        f"{config.total_steps:,} updates of {config.recipe.batch_size} images",
        soft_wrap=True,
    )


def parse_arguments(arguments: list[str] | None) -> Options | None:
    """Parse the command line; None if the recipes are to be listed."""
    parser = ArgumentParser(description=__doc__)
    add_options(parser)
    add_recipe_options(parser)
    args = parser.parse(arguments)
    if args.list_recipes:
        return None
    if args.model is None:
        raise InputError("--model is required, such as --model resnet18 (--help lists the options)")
    create_model(args.model)
    check_choice("--precision", args.precision, tuple(DTYPES))
    recipe = choose_recipe(args)
    if not 0 <= args.seed < 2**31:
        raise InputError("--seed must be from 0 to 2147483647")
    if args.stream and args.in_memory:
        raise InputError("--stream and --in-memory exclude each other; give one")
    if args.data_workers < 0:
        raise InputError("--data-workers must be 0 (threads of this process) or more")
    if args.tensorboard and not importlib.util.find_spec("tensorboardX"):
        raise InputError("--tensorboard needs tensorboardX: pip install -e '.[tensorboard]'")
    if args.freeze_backbone and args.init_from is None:
        raise InputError(
            "--freeze-backbone needs --init-from: freezing a randomly initialised backbone is "
            "pointless"
        )
    if not is_network(args.model):
        raise InputError(
            f"--model {args.model}: only networks of up to {DEEPEST} layers can be restored"
        )
    settings = RunSettings(
        model=args.model,
        dataset=args.dataset,
        recipe=recipe,
        data_dir=args.data_dir,
        seed=args.seed,
        validation=args.validation,
        patience=args.patience,
        evaluate_every=args.evaluate_every,
        init_from=args.init_from,
        freeze_backbone=args.freeze_backbone,
        precision=args.precision,
        storage="stream" if args.stream else "memory" if args.in_memory else "auto",
        skip_unreadable=args.skip_unreadable,
    )
    return Options(
        settings=settings,
        out=args.out or default_out(settings),
        data_workers=args.data_workers,
        tensorboard=args.tensorboard,
        checkpoint_every=args.checkpoint_every,
        deterministic=args.deterministic,
        dry_run=args.dry_run,
    )


def default_out(settings: RunSettings) -> Path:
    name = f"{short_name(settings.dataset)}-{settings.model}-{settings.recipe.name}"
    return Path("runs/train") / name / f"seed-{settings.seed}"


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="a network of flaxnets.list_models(), such as resnet18")
    add("--dataset", default="digits", help="a TFDS data set or folder:PATH (%(default)s)")
    add("--data-dir", type=Path, help="TFDS data directory (default: TFDS's own)")
    add("--recipe", default=DEFAULT_RECIPE, metavar="NAME", help="see --list-recipes (%(default)s)")
    add(
        "--list-recipes",
        action="store_true",
        help="print all recipes with their sources, then exit",
    )
    add("--seed", type=int, default=0, help="initialisation, batches, augmentation (%(default)s)")
    add("--validation", type=positive(int), metavar="N", help="hold out N training images")
    add(
        "--patience",
        type=positive(int),
        metavar="N",
        help="end after N epochs without a lower validation error; "
        "holds out a tenth of the training images unless --validation is given",
    )
    add(
        "--init-from",
        type=Path,
        metavar="PATH",
        help="initial weights: a run directory or a PyTorch file",
    )
    add("--freeze-backbone", action="store_true", help="train only the classifier (head)")
    add("--precision", default="float32", help="float32 (default) or bfloat16")
    add(
        "--evaluate-every",
        default=1,
        type=positive(int),
        metavar="N",
        help="evaluate every N epochs, and the first and the last (%(default)s)",
    )
    add("--stream", action="store_true", help="read the pictures again every epoch")
    add("--in-memory", action="store_true", help="read all pictures once and keep them in memory")
    add("--data-workers", type=int, default=0, metavar="N", help="reader processes (0: threads)")
    add("--skip-unreadable", action="store_true", help="leave out pictures that cannot be read")
    add("--tensorboard", action="store_true", help="also write the metrics as TensorBoard events")
    add(
        "--checkpoint-every",
        default="60s",
        type=checkpoint_every,
        metavar="INTERVAL",
        help="time or steps between checkpoints, such as 500s or 2000steps (%(default)s)",
    )
    add("--deterministic", action="store_true", help="on a GPU, give the same bits each time")
    add("--out", type=Path, help="default: runs/train/<dataset>-<model>-<recipe>/seed-<seed>")
    add("--dry-run", action="store_true", help="print the plan, then exit")


if __name__ == "__main__":
    sys.exit(run_command(main))
