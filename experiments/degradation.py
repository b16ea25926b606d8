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
import importlib
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from flaxnets.cli.arguments import (
    ArgumentParser,
    check_batch_size,
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
from flaxnets.cli.progress import RunProgress, StudyProgress, plain_console
from flaxnets.data import Dataset, find_dataset, load_dataset
from flaxnets.diagnostics import GradientLog
from flaxnets.errors import InputError
from flaxnets.models.cost import Cost, count_cost, count_depth
from flaxnets.models.resnet import IMAGENET_STAGES, ResNet
from flaxnets.parallel import (
    data_mesh,
    is_primary,
    make_deterministic,
    raise_on_all_processes,
    replicate,
    start_processes,
)
from flaxnets.reporting.conclusion import conclude, count_seeds
from flaxnets.reporting.figures import draw_errors
from flaxnets.reporting.tables import blocks, differences_table, network_name, results_table
from flaxnets.studies.config import DEEPEST, DTYPES
from flaxnets.studies.directory import (
    begin_run,
    check_output_dir,
    check_processes_agree,
    run_directory,
    run_key,
    write_study,
)
from flaxnets.studies.restore import build_model
from flaxnets.studies.study import (
    Run,
    check_study,
    curves,
    group_runs,
    open_study,
    sort_runs,
    write_summary,
)
from flaxnets.text import duration, millions, plural
from flaxnets.training import (
    RECIPES,
    CheckpointEvery,
    Progress,
    Recipe,
    RunResult,
    TrainSetup,
    train_run,
)
from flaxnets.training.environment import record_environment
from flaxnets.training.estimate import Probe, estimate_seconds, measure

# Deeper cifar networks are scanned: unrolled, they take minutes to compile and much memory.
DEEPEST_UNROLLED = 110
# Approximate speed-up from concurrent runs on a CPU; measured: 1.3 to 1.5.
GAIN_OF_WORKERS = 1.4


@dataclass(frozen=True)
class Planned:
    """A network of the grid, to be trained once for each of `configs` (one per seed)."""

    kind: str
    depth: int
    model: nn.Module
    cost: Cost
    configs: list[dict[str, Any]]


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    keep_memory()
    if args.deterministic:
        make_deterministic()
    if args.distributed is not None:
        start_processes(*args.distributed)
    console = plain_console(quiet=not is_primary())

    # Everything that can be refused is refused before the slow part.
    recipe = choose_recipe(args)
    out = args.out or Path("runs/degradation") / f"{args.dataset}-{args.family}"
    with raise_on_all_processes():
        check_output_dir(out)
        check_workers(args)
        builders = {kind: import_builder(kind) for kind in args.kinds if ":" in kind}
        info = find_dataset(args.dataset, args.data_dir)
        check_batch(recipe, info.num_train, args)
        dataset = load_dataset(args.dataset, args.data_dir, args.train_examples)
        dataset = dataset.resized(recipe.image_size)
        definition = define_study(args, dataset, recipe)
        plan = [
            plan_network(args, kind, depth, definition, dataset, recipe, builders)
            for kind in args.kinds
            for depth in args.depths
        ]
    configs = [config for planned in plan for config in planned.configs]
    check_processes_agree(
        {
            "--dry-run": args.dry_run,
            "--deterministic": args.deterministic,
            "--log-gradients": args.log_gradients,
            "--checkpoint-every": asdict(args.checkpoint_every),
            "runs": [str(run_directory(out, *run_key(config))) for config in configs],
            **{"-".join(map(str, run_key(config))): config for config in configs},
        }
    )
    workers = args.workers or default_workers()
    if args.dry_run:
        print_plan(console, plan, dataset, recipe, check_study(out, definition, configs), workers)
        return 0

    command = shlex.join(["python", *sys.argv]) if arguments is None else "the same command"
    with Interruption(command) as interruption, open_study(out, definition, configs) as runs:
        runs = train_study(
            console,
            plan,
            dataset,
            recipe,
            out,
            runs,
            args.checkpoint_every,
            workers,
            interruption,
            args.log_gradients,
            definition,
        )

        # Table and figure cover every run in the directory, not only those of this command.
        write_summary(out, runs)
        networks = group_runs(runs)
        updates = recipe.total_steps(len(dataset.train.labels))
        figure = out / "degradation.png"
        title = (
            f"{args.dataset}, {args.family} family, {updates:,} updates, {count_seeds(networks)}"
        )
        if is_primary():
            draw_errors(networks, figure, title)
        interrupted = interruption.requested()
    if interrupted:
        interruption.print_resume_hint()
        return interruption.exit_status
    console.print(results_table(networks))
    differences = differences_table(curves(networks).values())
    if differences is not None:
        console.print(differences)
    console.print(conclude(networks, updates), soft_wrap=True)
    place = shlex.quote(str(out))
    console.print(f"figure:      {figure}", soft_wrap=True)
    console.print(f"report:      python experiments/report.py {place}", soft_wrap=True)
    console.print(f"diagnostics: python experiments/diagnostics.py {place}", soft_wrap=True)
    return 0


def train_study(
    console: Console,
    plan: list[Planned],
    dataset: Dataset,
    recipe: Recipe,
    out: Path,
    runs: list[Run],
    checkpoint_every: CheckpointEvery,
    workers: int,
    interruption: Interruption,
    log_gradients: bool,
    definition: dict[str, Any],
) -> list[Run]:
    """Train the unfinished runs, `workers` networks at a time, and return all runs of the study.

    Workers are threads: the device is busy with one network while another compiles or leaves cores
    free. Each run has the same bits as when trained alone.
    """
    mesh = data_mesh()
    known = {run.key: run for run in runs}
    unfinished, finished = [], []
    for planned in plan:
        for config in planned.configs:
            run = known.get(run_key(config))
            if run is None or run.result.status == "unfinished":
                unfinished.append((planned, config))
            else:
                finished.append(run_directory(out, *run_key(config)))
    examples = len(dataset.train.labels)
    total_steps, batch_size = recipe.total_steps(examples), recipe.batch_size
    work = sum(float(planned.cost.work) for planned, _ in unfinished)
    if log_gradients:
        without = [str(path) for path in finished if not (path / "gradients.csv").exists()]
        if without:
            line = f"already finished, so no gradients are logged: {', '.join(without)}"
            console.print(line, soft_wrap=True)
    failed, writing = threading.Event(), threading.Lock()

    def stop() -> bool:
        return failed.is_set() or interruption.requested()

    def train_seeds(planned: Planned) -> None:
        configs = [config for other, config in unfinished if other is planned]
        setup = None
        gradients = (
            log_of(planned.model, dataset, batch_size, mesh) if log_gradients and configs else None
        )
        for config in configs:
            if stop():
                return
            directory = run_directory(out, *run_key(config))
            begin_run(directory, config)
            name = f"{planned.kind}-{planned.depth} seed {config['seed']}"
            run = progress.start_run(
                name, planned.cost.work, total_steps, examples // batch_size, batch_size
            )

            def on_progress(now: Progress, run: RunProgress = run) -> None:
                interruption.unsaved.add(run)
                run.update(now)

            if gradients is not None:
                gradients.check(directory)
            # Until its first step a run compiles and has nothing to save: a signal exits at once.
            setup = setup or TrainSetup.create(planned.model, planned.depth, recipe, dataset, mesh)
            result = train_run(
                setup,
                config["seed"],
                directory,
                on_progress,
                stop,
                checkpoint_every,
                config,
                on_epoch=gradients and partial(gradients.write, directory),
            )
            interruption.unsaved.add(run)
            with writing:
                run.end(f"{name}: {describe(result)}")
                known[run_key(config)] = Run(config, result)
                write_summary(out, sort_runs(known.values()))
                write_study(out, definition, [record_environment()])
            interruption.unsaved.discard(run)

    def train(planned: Planned) -> None:
        try:
            train_seeds(planned)
        except BaseException:
            failed.set()  # the other workers save their state and start no new run
            raise

    with (
        StudyProgress(console, len(finished), len(unfinished), work) as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        for future in [pool.submit(train, planned) for planned in plan]:
            future.result()
    interruption.unsaved.add("the table and the figure")
    return sort_runs(known.values())


def log_of(model: nn.Module, dataset: Dataset, batch_size: int, mesh: Mesh) -> GradientLog:
    """Make a log of the gradient on the first `batch_size` training images."""
    images, labels = (array[:batch_size] for array in dataset.train)
    return GradientLog(model, *replicate((dataset.preprocess(images), jnp.asarray(labels)), mesh))


def default_workers() -> int:
    """Return 2 for a single CPU device, whose cores a small network does not fill, else 1.

    Faster devices need no second network, and several processes must do the same at the same time.
    """
    return 2 if jax.default_backend() == "cpu" and jax.device_count() == 1 else 1


def describe(result: RunResult) -> str:
    """Describe a run in a few words."""
    if result.status == "diverged":
        return f"diverged at step {result.diverged_step}, {duration(result.seconds)}"
    if result.status == "unfinished":
        return f"stopped at step {result.step}"
    return (
        f"train error {result.final('train_error'):.2f} %, "
        f"test error {result.final('test_error'):.2f} %, {duration(result.seconds)}"
    )


# Arguments, networks and recipe.


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--depths", required=True, type=whole_numbers, help="weighted layers, such as 18,34,56")
    add(
        "--kinds",
        default="plain,residual",
        type=words,
        help="plain, residual or a custom module:function (default: %(default)s)",
    )
    add("--family", default="cifar", help="cifar (default) or imagenet")
    add("--shortcut", help="A (default), B or C, as in section 3.3 of the paper")
    add("--stem", help="imagenet or small (default: the family's own)")
    add("--dataset", default="digits", help="digits (default) or any prepared TFDS data set")
    add("--data-dir", type=Path, help="TFDS data directory (default: TFDS's own)")
    add(
        "--train-examples",
        type=positive(int),
        help="number of training images to use (default: all)",
    )
    add("--seeds", default="0", type=whole_numbers, help="such as 0,1,2 (default: %(default)s)")
    add("--recipe", help="default: digits for digits, he2015-cifar otherwise")
    add("--epochs", type=positive(int), help="length of a run; the schedule scales with it")
    add("--batch-size", type=positive(int), help="images per step, over all devices")
    add("--learning-rate", type=positive(float), help="learning rate after warm-up")
    add("--precision", default="float32", help="float32 (default) or bfloat16")
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
        help="networks to train at a time; results do not change (default: 2 on a CPU, else 1)",
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
    add("--out", type=Path, help="default: runs/degradation/<dataset>-<family>")
    add("--dry-run", action="store_true", help="print grid, steps and a time estimate, then exit")
    args = parser.parse(arguments)

    check_choice("--family", args.family, ("cifar", "imagenet"))
    check_choice("--shortcut", args.shortcut or "A", ("A", "B", "C"))
    check_choice("--stem", args.stem or "small", ("imagenet", "small"))
    check_choice("--precision", args.precision, tuple(DTYPES))
    check_choice("--recipe", args.recipe or "digits", tuple(RECIPES))
    for kind in args.kinds:
        if ":" not in kind:
            if found := re.fullmatch(r"([\w.]+)\.(\w+)", kind):
                raise InputError(
                    f"--kinds {kind}: separate module and function with a colon; "
                    f"did you mean {found[1]}:{found[2]}?"
                )
            check_choice("--kinds", kind, ("plain", "residual"), " or a custom module:function")
    for flag, values in (
        ("--depths", args.depths),
        ("--kinds", args.kinds),
        ("--seeds", args.seeds),
    ):
        repeated = sorted({str(value) for value in values if values.count(value) > 1})
        if repeated:
            raise InputError(f"{flag} repeats {', '.join(repeated)}; name each once")
    check_depths(args.depths, args.family)
    if min(args.seeds) < 0 or max(args.seeds) >= 2**31:
        raise InputError("--seeds must be from 0 to 2147483647")
    if args.workers and args.workers > 1 and args.distributed is not None:
        raise InputError("--workers is for one process: with --distributed, leave it out")
    args.depths.sort()
    return args


def check_depths(depths: list[int], family: str) -> None:
    for depth in depths:
        if family == "cifar" and (depth % 2 or not 8 <= depth <= DEEPEST):
            raise InputError(
                f"--depths {depth}: the cifar family has even depths from 8 to {DEEPEST} "
                "(the paper's are 20, 32, 44, 56, 110)"
            )
        if family == "imagenet" and depth not in IMAGENET_STAGES:
            valid = ", ".join(map(str, IMAGENET_STAGES))
            raise InputError(f"--depths {depth}: the imagenet family has depths {valid}")


def choose_recipe(args: argparse.Namespace) -> Recipe:
    """Return the requested recipe, with the overrides of the command line."""
    default = "digits" if args.dataset == "digits" else "he2015-cifar"
    recipe = RECIPES[args.recipe or default]
    if args.epochs:
        recipe = replace(recipe, epochs=args.epochs, steps=None)
    if args.batch_size:
        recipe = replace(recipe, batch_size=args.batch_size)
    if args.learning_rate:
        recipe = replace(recipe, learning_rate=args.learning_rate)
    if recipe.schedule == "plateau":
        raise InputError(
            f"--recipe {recipe.name} needs validation images, which a study does not have; "
            "choose another"
        )
    return recipe


def check_batch(recipe: Recipe, num_train: int, args: argparse.Namespace) -> None:
    if args.train_examples and args.train_examples > num_train:
        raise InputError(f"--train-examples {args.train_examples}: {args.dataset} has {num_train}")
    examples = args.train_examples or num_train
    check_batch_size(recipe.batch_size, examples)
    if recipe.total_steps(examples) >= 2**31:
        raise InputError("--epochs: a run must have at most 2147483647 updates")


def check_workers(args: argparse.Namespace) -> None:
    if args.workers and args.workers > 1 and jax.device_count() > 1:
        # Devices could receive the programs of two threads in different orders, and programs that
        # communicate across devices would then deadlock.
        raise InputError(
            f"--workers {args.workers} is for a single device, but there are "
            f"{jax.device_count()}, which train one network together; leave it out"
        )


def import_builder(kind: str) -> Callable[..., nn.Module]:
    """Import the user's `build(depth, num_classes, dtype)`, also from the working directory."""
    module_name, _, function = kind.partition(":")
    sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        build = getattr(importlib.import_module(module_name), function)
    except Exception as error:  # the user's code may raise anything
        raise InputError(f"--kinds {kind}: {type(error).__name__}: {error}") from error
    return build


def plan_network(
    args: argparse.Namespace,
    kind: str,
    depth: int,
    definition: dict[str, Any],
    dataset: Dataset,
    recipe: Recipe,
    builders: dict[str, Callable],
) -> Planned:
    """Build a network, count its cost and make the config of each of its runs.

    Network, preprocessing and recipe can be rebuilt from a config alone.
    """
    if kind in builders:
        model_config = {"build": kind, "num_classes": dataset.num_classes}
    else:
        name = {"plain": "plain", "residual": "resnet"}[kind]
        prefix = "cifar_" if args.family == "cifar" else ""
        model_config = {
            "name": f"{prefix}{name}{depth}",
            "num_classes": dataset.num_classes,
            "overrides": {"shortcut": definition["shortcut"], "stem": definition["stem"]},
        }
        if args.family == "cifar" and depth > DEEPEST_UNROLLED:
            model_config["overrides"] |= {"scan_blocks": True, "remat": True}
    config = {"kind": kind, "depth": depth, "model": model_config, **definition}
    try:
        model = build_model(config, builders.get(kind))
        cost = count_cost(model, dataset.preprocess.input_shape, dataset.num_classes)
    except Exception as error:
        if kind not in builders:
            raise
        raise InputError(
            f"--kinds {kind} at depth {depth}: {type(error).__name__}: {error}"
        ) from error
    config |= {
        "blocks": list(model.stage_sizes) if isinstance(model, ResNet) else [],
        "block": model.block if isinstance(model, ResNet) else None,
        "parameters": cost.parameters,
        "class_names": list(dataset.class_names),
        "preprocess": asdict(dataset.preprocess),
        "total_steps": recipe.total_steps(len(dataset.train.labels)),
    }
    return Planned(kind, depth, model, cost, [{**config, "seed": seed} for seed in args.seeds])


def define_study(args: argparse.Namespace, dataset: Dataset, recipe: Recipe) -> dict[str, Any]:
    """Collect every setting that affects the results, apart from the grid itself."""
    return {
        "family": args.family,
        "shortcut": args.shortcut or "A",
        "stem": args.stem or ("small" if args.family == "cifar" else "imagenet"),
        "precision": args.precision,
        "dataset": {
            "name": dataset.name,
            "version": dataset.version,
            "train_examples": len(dataset.train.labels),
            "test_examples": len(dataset.test.labels),
            "sha256": dataset.fingerprint(),
        },
        "augmentation": asdict(dataset.augmentation),
        "recipe": asdict(recipe),
    }


# Plan and time estimate.


def print_plan(
    console: Console,
    plan: list[Planned],
    dataset: Dataset,
    recipe: Recipe,
    stored: list[Run],
    workers: int,
) -> None:
    """Print the grid, what is left to train, and a time estimate from small networks."""
    steps = recipe.total_steps(len(dataset.train.labels))
    table = Table("kind", "network", "blocks", "parameters", "multiply-adds", "seeds", "steps")
    for planned in plan:
        config = planned.configs[0]
        table.add_row(
            planned.kind,
            network_name(config),
            blocks(config),
            millions(planned.cost.parameters),
            millions(planned.cost.multiply_adds),
            ",".join(str(config["seed"]) for config in planned.configs),
            f"{steps:,}",
        )
    console.print(table)
    height, width, channels = dataset.preprocess.input_shape
    console.print(
        f"{dataset.name}: {len(dataset.train.labels):,} training and {len(dataset.test.labels):,} "
        f"test images of {height}x{width}x{channels}; recipe {recipe.name}"
    )
    done = {run.key: run.result for run in stored}
    left = [
        (planned, [steps_left(done.get(run_key(config)), steps) for config in planned.configs])
        for planned in plan
    ]
    runs = sum(len(planned.configs) for planned in plan)
    of_length = f"{plural(runs, 'run')} of {steps:,} updates"
    unfinished = sum(count > 0 for _, counts in left for count in counts)
    if not unfinished:
        console.print(f"{of_length}, all finished: nothing is left to train")
        return
    probes = measure_probes(plan[0], dataset, recipe)
    epochs = steps / (len(dataset.train.labels) // recipe.batch_size)
    evaluated = epochs * (len(dataset.train.labels) + len(dataset.test.labels))
    # An evaluated image costs a forward pass, a trained one three.
    evaluation = 1 + evaluated / 3 / recipe.batch_size / steps
    seconds = sum(
        estimate_seconds(probes, planned.depth, planned.cost.work, evaluation * sum(counts))
        for planned, counts in left
        if sum(counts)
    )
    if min(workers, sum(any(counts) for _, counts in left)) > 1:
        seconds /= GAIN_OF_WORKERS
    if unfinished < runs:
        of_length += f", {unfinished} of them not finished"
    console.print(
        f"{of_length}; about {duration(seconds)} here, judging by a few steps of small networks"
    )


def steps_left(result: RunResult | None, steps: int) -> int:
    """Count the updates that a run still needs."""
    if result is None:
        return steps
    return max(steps - result.step, 0) if result.status == "unfinished" else 0


def measure_probes(planned: Planned, dataset: Dataset, recipe: Recipe) -> list[Probe]:
    """Time networks of one and three blocks a stage, or the user's own network."""
    model = planned.model
    if not isinstance(model, ResNet):
        return [measure(model, planned.depth, planned.cost.work, dataset, recipe)]
    probes = []
    for blocks_a_stage in (1, 3):
        small = model.clone(stage_sizes=(blocks_a_stage,) * len(model.stage_sizes), remat=False)
        cost = count_cost(small, dataset.preprocess.input_shape, dataset.num_classes)
        depth = count_depth(small, dataset.preprocess.input_shape)
        probes.append(measure(small, depth, cost.work, dataset, recipe))
    return probes


if __name__ == "__main__":
    sys.exit(run_command(main))
