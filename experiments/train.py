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

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from rich import box
from rich.table import Table

import flaxnets
from flaxnets.cli.arguments import (
    ArgumentParser,
    check_batch_size,
    check_choice,
    checkpoint_every,
    positive,
)
from flaxnets.cli.interruption import Interruption
from flaxnets.cli.main import run_command
from flaxnets.cli.memory import keep_memory
from flaxnets.cli.progress import CheckProgress, StudyProgress, plain_console
from flaxnets.data import Augmentation, Dataset, Preprocess, Split, find_dataset, load_dataset
from flaxnets.data.batches import imagenet_statistics
from flaxnets.data.folder import find_folder
from flaxnets.data.slots import remove_leftovers
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
from flaxnets.models.cost import count_cost, count_depth
from flaxnets.models.resnet import ResNet
from flaxnets.parallel import data_mesh, make_deterministic, replicate
from flaxnets.reporting.figures import draw_run
from flaxnets.studies.directory import begin_run, check_output_dir, check_run, lock_directory
from flaxnets.studies.restore import preprocess_of, restore
from flaxnets.text import duration, millions, shorten
from flaxnets.training import (
    RECIPES,
    Checkpoints,
    Progress,
    Recipe,
    RunResult,
    TrainSetup,
    TrainState,
    train_run,
)
from flaxnets.training.checkpoints import read_newest
from flaxnets.training.config import DEEPEST, DTYPES, check_config, is_network
from flaxnets.training.loop import best_epoch
from flaxnets.training.recipes import CHOICES, PRESETS, describe_fields
from flaxnets.training.tensorboard import open_tensorboard

DEFAULT_RECIPE = "adam"
# Bytes of decoded images to keep in memory; larger data sets are read again each epoch.
IN_MEMORY = 2**31
HEAD = "head"


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    keep_memory()
    console = plain_console()
    if args.list_recipes:
        console.print(recipes_table())
        return 0
    if args.deterministic:
        make_deterministic()

    remove_leftovers()

    # Everything that can be refused is refused before the slow part.
    recipe = choose_recipe(args)
    out = args.out or default_place(args)
    check_output_dir(out, "run")
    dataset = open_data(args, recipe)
    train_rows, validation_rows = split_off_validation(args, dataset, recipe)
    num_train = len(train_rows)
    check_batch(recipe, num_train)
    start = read_start(args, dataset, read_begun(out))
    preprocess = choose_preprocess(args, dataset, recipe, start)
    model, cost, config = plan_run(
        args, dataset, recipe, preprocess, num_train, len(validation_rows)
    )
    config["init_from"] = start and start.origin
    begin = begin_from(start, args, model, preprocess)
    check_run(out, config)
    total_steps = recipe.total_steps(num_train)
    height, width, channels = preprocess.input_shape
    validation = ""
    if len(validation_rows):
        default = " (a tenth, by default)" if args.validation is None else ""
        validation = f"{len(validation_rows):,} to validate{default}, "
    console.print(
        f"{args.model}, {millions(cost.parameters)} parameters, on {shorten(args.dataset, 200)} "
        f"({'streamed' if isinstance(dataset, StreamedDataset) else 'in memory'}): "
        f"{len(dataset.class_names)} classes, {num_train:,} images of {height}x{width}x{channels} "
        f"to train, {validation}{num_images(dataset.test):,} to test; recipe {recipe.name}, "
        f"{total_steps:,} updates of {recipe.batch_size} images",
        soft_wrap=True,
    )
    if args.dry_run:
        return 0

    command = shlex.join(["python", *sys.argv]) if arguments is None else "the same command"
    name = f"{args.model} seed {args.seed}"
    with (
        Interruption(command) as interruption,
        open_run(out, config),
        contextlib.ExitStack() as stack,
    ):
        setup = make_program(args, dataset, recipe, preprocess, model, train_rows, validation_rows)
        write = None
        if args.tensorboard:
            write = stack.enter_context(open_tensorboard(out))
        progress = stack.enter_context(StudyProgress(console, 0, 1, float(cost.work)))
        run = progress.start_run(
            name, cost.work, total_steps, setup.steps_per_epoch, recipe.batch_size
        )

        def on_progress(now: Progress) -> None:
            interruption.unsaved.add(name)
            run.update(now)
            if write is not None:
                write(now.rows)

        result = train_run(
            setup,
            args.seed,
            out,
            on_progress,
            interruption.requested,
            args.checkpoint_every,
            config,
            begin,
        )
        if write is not None:
            write(result.rows)
        if result.rows:
            title = f"{args.model} on {args.dataset}, recipe {recipe.name}, seed {args.seed}"
            draw_run(result.rows, out / "errors.png", title)
        interruption.unsaved.discard(name)
        write_environments(out)
        with Checkpoints(out, read_only=True, name="best") as best:
            run.end(f"{name}: {describe(result, best.step)}")
    if interruption.signal is not None and result.status == "unfinished":
        interruption.print_resume_hint()
        return interruption.exit_status
    console.print(f"figure: {out / 'errors.png'}", soft_wrap=True)
    console.print(f"use it: python experiments/evaluate.py {shlex.quote(str(out))}", soft_wrap=True)
    return 0


# Data.


def open_data(args: argparse.Namespace, recipe: Recipe) -> Dataset | StreamedDataset:
    """Open the images in memory or as a stream, by their size unless an option forces it."""
    size = recipe.image_size
    if args.dataset.startswith("folder:"):
        streamed = find_folder(
            args.dataset.removeprefix("folder:"), args.skip_unreadable, on_progress=CheckProgress()
        )
        size = size or published_image_shape(args.model)[0]
        pixels = size * size * streamed.channels
        count = len(streamed.train) + len(streamed.test)
        if args.stream or (pixels * count > IN_MEMORY and not args.in_memory):
            return streamed
        return load_in_memory(streamed, size, 1.0)
    if args.skip_unreadable:
        raise InputError("--skip-unreadable is for --dataset folder:PATH")
    info = find_dataset(args.dataset, args.data_dir)
    shape = info.builder.info.features[info.image_key].shape
    mixed = None in shape[:2]
    bytes_in_all = 0 if mixed else info.num_train * shape[0] * shape[1] * shape[2]
    if args.stream or ((mixed or bytes_in_all > IN_MEMORY) and not args.in_memory):
        return find_tfds_stream(args.dataset, args.data_dir)
    if mixed:
        streamed = find_tfds_stream(args.dataset, args.data_dir)
        return load_in_memory(streamed, size or published_image_shape(args.model)[0], 1.0)
    return load_dataset(args.dataset, args.data_dir).resized(size)


def split_off_validation(
    args: argparse.Namespace, dataset: Dataset | StreamedDataset, recipe: Recipe
) -> tuple[Any, Any]:
    """Split the rows of the training images into those to train on and those to validate on."""
    labels, images = dataset.train.labels, num_images(dataset.train)
    count = args.validation or 0
    if args.validation is None and (recipe.schedule == "plateau" or args.patience is not None):
        count = images // 10
    if count >= images:
        raise InputError(f"--validation {count}: there are {images} training images; give fewer")
    if not count:
        return np.arange(images), np.arange(0)
    return hold_out(images if labels is None else labels, count)


def num_images(split: Any) -> int:
    return len(split.labels) if isinstance(split, Split) else len(split)


def make_program(
    args: argparse.Namespace,
    dataset: Dataset | StreamedDataset,
    recipe: Recipe,
    preprocess: Preprocess,
    model: nn.Module,
    train_rows: Any,
    validation_rows: Any,
) -> TrainSetup:
    """Set up the data pipeline and the train and evaluation steps."""
    mesh = data_mesh()
    more: dict[str, Any] = {
        "optimizer": choose_optimizer(args, recipe, recipe.total_steps(len(train_rows))),
        "frozen": args.freeze_backbone,
        "patience": args.patience,
    }
    if isinstance(dataset, StreamedDataset):
        splits = {"test": dataset.test}
        if len(validation_rows):
            splits = {"validation": Subset(dataset.train, validation_rows), **splits}
        return TrainSetup.stream(
            model,
            args.depth,
            recipe,
            Subset(dataset.train, train_rows),
            preprocess,
            mesh,
            args.seed,
            splits,
            workers=args.data_workers,
            skip_unreadable=args.skip_unreadable,
            **more,
        )
    rows = Split(*(array[train_rows] for array in dataset.train))
    part = replace(dataset, train=rows, preprocess=preprocess)
    splits = {"test": dataset.test}
    if len(validation_rows):
        held_out = Split(*(array[validation_rows] for array in dataset.train))
        splits = {"validation": held_out, **splits}
    return TrainSetup.create(model, args.depth, recipe, part, mesh, splits, **more)


def choose_preprocess(
    args: argparse.Namespace,
    dataset: Dataset | StreamedDataset,
    recipe: Recipe,
    start: "Start | None",
) -> Preprocess:
    """Choose image sizes by the data, and the statistics for normalisation by the initial weights.

    Without initial weights the statistics are the data's own. A stream is not read for them, and
    gets ImageNet's, as in torchvision's references.
    """
    if isinstance(dataset, StreamedDataset):
        size = recipe.image_size or published_image_shape(args.model)[0]
        shape = (size, size, dataset.channels)
        own = Preprocess(shape, *imagenet_statistics(dataset.channels))
    else:
        own = dataset.preprocess
    if start is None:
        return own
    if start.preprocess is not None:
        return replace(own, mean=start.preprocess.mean, std=start.preprocess.std)
    mean, std = imagenet_statistics(own.image_shape[2])
    return replace(own, mean=mean, std=std)


# Arguments, recipe, network and initial weights.


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
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
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--validation", type=positive(int), metavar="N", help="hold out N training images")
    add(
        "--patience",
        type=positive(int),
        metavar="N",
        help="stop N epochs after the lowest validation error; "
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
    add("--stream", action="store_true", help="read the pictures again every epoch")
    add("--in-memory", action="store_true", help="read all pictures once and keep them in memory")
    add("--data-workers", type=int, default=0, metavar="N", help="reader processes (0)")
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
    group = parser.add_argument_group("overrides of the recipe's fields")
    descriptions = describe_fields()
    for field in recipe_fields():
        flag = f"--{field.name.replace('_', '-')}"
        group.add_argument(
            flag, metavar="X", help=descriptions.get(field.name, "").replace("%", "%%")
        )
    args = parser.parse(arguments)
    if args.list_recipes:
        return args
    if args.model is None:
        raise InputError("--model is required, such as --model resnet18 (--help lists the options)")
    create_model(args.model)
    check_choice("--precision", args.precision, tuple(DTYPES))
    check_choice("--recipe", args.recipe, tuple(RECIPES))
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
    args.depth = count_depth(create_model(args.model), published_image_shape(args.model))
    return args


def recipe_fields() -> list[Any]:
    return [field for field in fields(Recipe) if field.name != "name"]


def choose_recipe(args: argparse.Namespace) -> Recipe:
    """Return the requested recipe, with the fields given on the command line."""
    hints = typing.get_type_hints(Recipe)
    given = {
        field.name: parse_field(field.name, hints[field.name], getattr(args, field.name))
        for field in recipe_fields()
        if getattr(args, field.name) is not None
    }
    # A recipe has either `epochs` or `steps`: giving one unsets the other.
    if "epochs" in given and "steps" not in given:
        given["steps"] = None
    if "steps" in given and "epochs" not in given:
        given["epochs"] = None
    return replace(RECIPES[args.recipe], **given)


def parse_field(name: str, kind: Any, text: str) -> Any:
    """Parse the value of a recipe's field by its annotated type."""
    flag = f"--{name.replace('_', '-')}"
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if name in CHOICES:
        check_choice(flag, text, CHOICES[name])
        return text
    if bool in kinds:
        check_choice(flag, text, ("true", "false"))
        return text == "true"
    listed = [k for k in kinds if typing.get_origin(k) is tuple]
    with contextlib.suppress(ValueError):
        if listed and ("," in text or float not in kinds):
            return tuple(float(part) for part in text.split(",") if part)
        value = (int if int in kinds else float)(text)
        if value != value or abs(value) == float("inf"):
            raise ValueError
        return value
    example = "0.5,0.75" if listed else "3" if int in kinds else "0.1"
    raise InputError(f"{flag} {text!r} is not a number such as {example}")


def recipes_table() -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("recipe", no_wrap=True)
    for heading in ("length", "batch", "optimizer", "schedule", "source"):
        table.add_column(heading)
    for recipe, source in PRESETS:
        length = f"{recipe.steps:,} steps" if recipe.steps else f"{recipe.epochs} epochs"
        rule = f"{recipe.optimizer} {recipe.learning_rate:g}"
        table.add_row(recipe.name, length, str(recipe.batch_size), rule, recipe.schedule, source)
    return table


def check_batch(recipe: Recipe, num_train: int) -> None:
    check_batch_size(recipe.batch_size, num_train)
    if not 0 < recipe.total_steps(num_train) < 2**31:
        raise InputError("--epochs and --steps: a run must have 1 to 2147483647 updates")


def default_place(args: argparse.Namespace) -> Path:
    dataset = args.dataset
    if dataset.startswith("folder:"):
        dataset = Path(dataset.removeprefix("folder:")).resolve().name or "folder"
    return Path("runs/train") / f"{dataset}-{args.model}-{args.recipe}" / f"seed-{args.seed}"


def plan_run(
    args: argparse.Namespace,
    dataset: Dataset | StreamedDataset,
    recipe: Recipe,
    preprocess: Preprocess,
    num_train: int,
    num_validation: int,
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Build the network, count its cost and make the config that can rebuild everything."""
    model = create_model(args.model, dataset.num_classes, dtype=DTYPES[args.precision])
    streamed = isinstance(dataset, StreamedDataset)
    augmentation = Augmentation() if streamed else dataset.augmentation
    try:
        cost = count_cost(model, preprocess.input_shape, dataset.num_classes)
    except InputError as error:
        raise InputError(f"{error}; give a larger --image-size") from error
    folder = args.dataset.removeprefix("folder:")
    # The name is as typed, and the next command may run in another directory.
    place = {} if folder == args.dataset else {"path": os.path.abspath(folder)}
    config = {
        "kind": args.model,
        "depth": args.depth,
        "seed": args.seed,
        "model": {"name": args.model, "num_classes": dataset.num_classes, "overrides": {}},
        "blocks": list(model.stage_sizes) if isinstance(model, ResNet) else [],
        "block": model.block if isinstance(model, ResNet) else None,
        "parameters": cost.parameters,
        "precision": args.precision,
        "class_names": list(dataset.class_names),
        "preprocess": asdict(preprocess),
        "dataset": {
            "name": args.dataset,
            **place,
            "version": dataset.version,
            "streamed": streamed,
            "train_examples": num_train,
            "validation_examples": num_validation,
            "test_examples": num_images(dataset.test),
            "sha256": dataset.fingerprint(),
        },
        "augmentation": asdict(augmentation),
        "recipe": asdict(recipe),
        "freeze_backbone": args.freeze_backbone,
        "patience": args.patience,
        "total_steps": recipe.total_steps(num_train),
    }
    return model, cost, config


def choose_optimizer(
    args: argparse.Namespace, recipe: Recipe, total_steps: int
) -> optax.GradientTransformation:
    optimizer = recipe.make_optimizer(total_steps, args.depth)
    if not args.freeze_backbone:
        return optimizer

    def labels(params: Any) -> Any:
        return {
            name: jax.tree.map(lambda _, name=name: "train" if name == HEAD else "freeze", child)
            for name, child in params.items()
        }

    return optax.multi_transform({"train": optimizer, "freeze": optax.set_to_zero()}, labels)


class Start(NamedTuple):
    """Initial weights, from --init-from."""

    variables: dict[str, Any] | None  # None if their source is gone and no longer needed
    keeps_head: bool
    preprocess: Preprocess | None  # None for PyTorch weights, which do not record it
    origin: dict[str, str]  # recorded in the config


def read_start(
    args: argparse.Namespace, dataset: Dataset | StreamedDataset, begun: dict[str, Any] | None
) -> Start | None:
    """Read the weights of --init-from.

    `begun` is the config of a run that has a checkpoint, and so no longer needs them.
    """
    path = args.init_from
    if path is None:
        return None
    origin = begun.get("init_from") if begun is not None else None
    no_longer_needed = None
    if begun is not None and isinstance(origin, dict) and origin.get("path") == str(path):
        no_longer_needed = Start(None, True, preprocess_of(begun), origin)
    if no_longer_needed is not None and not path.exists():
        return no_longer_needed
    if path.is_dir():
        try:
            run = restore(path)
        except InputError:  # it may have lost its checkpoints
            if no_longer_needed is None:
                raise
            return no_longer_needed
        # Older runs recorded the step instead of a digest.
        former = {"path": str(path), "digest": f"step {run.step}"}
        return Start(
            jax.device_get(run.variables),
            run.class_names == tuple(dataset.class_names),
            run.preprocess,
            former if origin == former else {"path": str(path), "digest": digest(run.variables)},
        )
    if not path.is_file():
        raise InputError(f"--init-from {path}: there is no such run directory or file")
    _, variables = flaxnets.load_torch(args.model, path, num_classes=dataset.num_classes)
    of_file = hashlib.sha256(path.read_bytes()).hexdigest()
    # `load_torch` has made a new head if the classes differ.
    return Start(variables, True, None, {"path": str(path), "digest": of_file})


def digest(variables: dict[str, Any]) -> str:
    """Compute the sha256 of the names and values of all arrays."""
    sha256 = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(variables):
        sha256.update(jax.tree_util.keystr(path).encode())
        sha256.update(np.ascontiguousarray(leaf).data)
    return sha256.hexdigest()


def begin_from(
    start: Start | None, args: argparse.Namespace, model: nn.Module, preprocess: Preprocess
) -> Callable[[TrainState], TrainState]:
    """Make a function that puts the initial weights into the first state of a run."""
    if start is None:
        return lambda state: state
    weights = start.variables
    if weights is None:

        def refuse(state: TrainState) -> TrainState:
            raise InputError(
                f"--init-from {args.init_from} is gone, but this run has to restart from it"
            )

        return refuse

    def fitted(params: Any, stats: Any) -> tuple[Any, Any]:
        return (
            require_matching_params(params, weights["params"], start.keeps_head, args.init_from),
            require_matching_params(stats, weights.get("batch_stats", {}), True, args.init_from),
        )

    def begin(state: TrainState) -> TrainState:
        params, stats = replicate(fitted(state.params, state.batch_stats), data_mesh())
        return state.replace(params=params, batch_stats=stats)

    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jax.numpy.zeros((1, *preprocess.input_shape)))
    )
    fitted(shapes["params"], shapes.get("batch_stats", {}))
    return begin


def require_matching_params(own: Any, other: Any, keeps_head: bool, path: Path) -> Any:
    """Return the arrays of `other`, which must match `own` in names and shapes.

    Without `keeps_head`, the head comes from `own`.
    """
    if not keeps_head:
        other = {**other, HEAD: own[HEAD]}
    shapes = [
        {jax.tree_util.keystr(p): leaf.shape for p, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (own, other)
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        there, here = shapes[1].get(name), shapes[0].get(name)
        if there != here:
            raise InputError(
                f"--init-from {path} does not fit this network: {name} is {there} there and "
                f"{here} here; give weights of the same network and kind of images"
            )
    return other


@contextlib.contextmanager
def open_run(out: Path, config: dict[str, Any]) -> Iterator[None]:
    """Create and lock `out`, the directory of this run."""
    with storage_errors(out / "config.json", 0):
        out.mkdir(parents=True, exist_ok=True)
    with lock_directory(out):
        check_run(out, config)
        begin_run(out, config)
        yield


def read_begun(out: Path) -> dict[str, Any] | None:
    """Read the config of the run in `out`, if it has a checkpoint."""

    def read(newest: Checkpoints) -> dict[str, Any] | None:
        if newest.step is None:
            return None
        config = newest.read_config()
        check_config(config)
        return config

    return read_newest(out, read)


def write_environments(out: Path) -> None:
    """Write `environment.json`: the environments in which the run was trained, in order."""
    with Checkpoints(out, read_only=True) as checkpoints:
        environments = checkpoints.read_environments() if checkpoints.step is not None else []
    if environments:  # older runs did not record them
        write_atomic(out / "environment.json", json.dumps(environments, indent=2) + "\n")


def describe(result: RunResult, best_step: int | None) -> str:
    """Describe a run in a few words; `best_step` is the step of the best state, if it is kept."""
    if result.status == "unfinished":
        return f"stopped at step {result.step}"
    if result.status == "diverged":
        return (
            f"diverged at step {result.diverged_step}, {duration(result.seconds)}; "
            "try a lower --learning-rate"
        )
    last = result.rows[-1]
    words = f"test error {last['test_error']:.2f} %, test loss {last['test_loss']:.4f}"
    best = best_epoch(result.rows)
    if best is not None:
        row = result.rows[best]
        words += (
            f"; at the lowest validation error, {row['validation_error']:.2f} % after epoch "
            f"{row['epoch']}, test error {row['test_error']:.2f} %"
        )
        if row["step"] != best_step:
            words += " (that state is lost)"
    return f"{words}; {duration(result.seconds)}"


if __name__ == "__main__":
    sys.exit(run_command(main))
