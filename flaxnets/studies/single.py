"""A run outside a study: one network on any images, with validation and initial weights."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from flaxnets.data import Augmentation, Dataset, Preprocess, Split, inspect_dataset
from flaxnets.data.batches import imagenet_statistics
from flaxnets.data.opening import Storage
from flaxnets.data.stream import StreamedDataset, Subset, hold_out
from flaxnets.decoding import encode
from flaxnets.errors import InputError
from flaxnets.files import storage_errors, write_atomic
from flaxnets.models import create_model, published_image_shape
from flaxnets.models.cost import Cost, count_cost, count_depth
from flaxnets.models.resnet import ResNet
from flaxnets.parallel import data_mesh
from flaxnets.studies.directory import begin_run, check_run, lock_directory
from flaxnets.studies.init_from import (
    HEAD,
    InitialWeights,
    begin_from,
    read_initial_weights,
)
from flaxnets.studies.own_data import describe_dataset, num_images
from flaxnets.text import duration
from flaxnets.training import Checkpoints, Recipe, RunConfig, RunResult, TrainSetup, TrainState
from flaxnets.training.checkpoints import read_newest
from flaxnets.training.config import DTYPES, ModelConfig, Precision
from flaxnets.training.recipes import check_batch_size
from flaxnets.training.result import best_epoch


@dataclass(frozen=True)
class RunSettings:
    """Settings that define a run.

    Attributes:
      model: name for `create_model`.
      dataset: `digits`, a prepared TFDS data set or `folder:PATH`.
      validation: number of training images to hold out; None for a tenth where they are needed.
      patience: epochs without a lower validation error after which the run ends, or None.
      evaluate_every: number of epochs from one evaluation to the next.
      init_from: run directory or PyTorch file with initial weights, or None.
      freeze_backbone: train only the classifier.
      storage: see `flaxnets.data.open_dataset`.
      skip_unreadable: leave out pictures that cannot be read.
    """

    model: str
    dataset: str
    recipe: Recipe
    data_dir: Path | None = None
    seed: int = 0
    validation: int | None = None
    patience: int | None = None
    evaluate_every: int = 1
    init_from: Path | None = None
    freeze_backbone: bool = False
    precision: Precision = "float32"
    storage: Storage = "auto"
    skip_unreadable: bool = False


@dataclass(frozen=True)
class RunData:
    """The images of a run: a data set, and the training images to train and to validate on.

    Attributes:
      train_rows, validation_rows: indices among the training images, without overlap.
    """

    dataset: Dataset | StreamedDataset
    train_rows: np.ndarray
    validation_rows: np.ndarray


@dataclass(frozen=True)
class PlannedRun:
    """A run before it starts; `begin` puts its initial weights into its first state."""

    config: RunConfig
    data: RunData
    model: nn.Module
    cost: Cost
    begin: Callable[[TrainState], TrainState]


def plan_run(
    settings: RunSettings,
    out: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PlannedRun:
    """Open the data, read the initial weights and build the network of the run in `out`.

    `on_progress` is called while pictures of a folder are checked, see `inspect_dataset`.

    Raises:
      InputError: the data or the weights cannot be read, or do not fit the network or the recipe.
    """
    recipe, name = settings.recipe, settings.model
    dataset = _open_data(settings, on_progress)
    validates = recipe.schedule == "plateau" or settings.patience is not None
    data = split_off_validation(dataset, settings.validation, validates)
    num_train = len(data.train_rows)
    if settings.evaluate_every > 1 and len(data.validation_rows):
        raise InputError(
            f"--evaluate-every {settings.evaluate_every} is for runs without validation images, "
            "whose error decides after every epoch; leave out --evaluate-every, or --validation, "
            "--patience and a plateau schedule"
        )
    check_batch_size(recipe.batch_size, num_train)
    if not 0 < recipe.total_steps(num_train) < 2**31:
        raise InputError("--epochs and --steps: a run must have 1 to 2147483647 updates")
    start = None
    if settings.init_from is not None:
        classes, begun = tuple(dataset.class_names), read_begun(out)
        start = read_initial_weights(settings.init_from, name, classes, begun)
    preprocess = choose_preprocess(name, dataset, recipe, start)
    model = create_model(name, dataset.num_classes, dtype=DTYPES[settings.precision])
    try:
        cost = count_cost(model, preprocess.input_shape, dataset.num_classes)
    except InputError as error:
        raise InputError(f"{error}; give a larger --image-size") from error
    config = RunConfig(
        kind=name,
        depth=count_depth(create_model(name), published_image_shape(name)),
        seed=settings.seed,
        model=ModelConfig(dataset.num_classes, name),
        blocks=tuple(model.stage_sizes) if isinstance(model, ResNet) else (),
        block=model.block if isinstance(model, ResNet) else None,
        parameters=cost.parameters,
        precision=settings.precision,
        class_names=tuple(dataset.class_names),
        preprocess=preprocess,
        dataset=describe_dataset(settings.dataset, dataset, num_train, len(data.validation_rows)),
        augmentation=dataset.augmentation if isinstance(dataset, Dataset) else Augmentation(),
        recipe=recipe,
        freeze_backbone=settings.freeze_backbone,
        patience=settings.patience,
        evaluate_every=settings.evaluate_every,
        total_steps=recipe.total_steps(num_train),
        init_from=None if start is None else start.origin,
    )
    begin = (lambda state: state) if start is None else begin_from(start, model, preprocess)
    return PlannedRun(config, data, model, cost, begin)


def _open_data(
    settings: RunSettings, on_progress: Callable[[int, int], None]
) -> Dataset | StreamedDataset:
    unread = inspect_dataset(
        settings.dataset, settings.data_dir, settings.skip_unreadable, on_progress
    )
    size = settings.recipe.image_size
    if size is None and unread.image_shape is None:
        size = published_image_shape(settings.model)[0]
    return unread.open(size, settings.storage)


def split_off_validation(
    dataset: Dataset | StreamedDataset, count: int | None, needed: bool
) -> RunData:
    """Hold out `count` training images to validate on, evenly over the classes.

    If `count` is None, a tenth of the images is held out where validation is `needed`.

    Raises:
      InputError: no image would be left to train on.
    """
    images, labels = num_images(dataset.train), dataset.train.labels
    if count is None:
        count = images // 10 if needed else 0
    if count >= images:
        raise InputError(f"--validation {count}: there are {images} training images; give fewer")
    if not count:
        return RunData(dataset, np.arange(images), np.arange(0))
    return RunData(dataset, *hold_out(images if labels is None else labels, count))


def choose_preprocess(
    model: str, dataset: Dataset | StreamedDataset, recipe: Recipe, start: InitialWeights | None
) -> Preprocess:
    """Choose image sizes by the data, and the statistics for normalisation by the initial weights.

    Without initial weights the statistics are the data's own. A stream is not read for them, and
    gets ImageNet's, as in torchvision's references.
    """
    if isinstance(dataset, StreamedDataset):
        size = recipe.image_size or published_image_shape(model)[0]
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


def make_setup(run: PlannedRun, data_workers: int = 0, skip_unreadable: bool = False) -> TrainSetup:
    """Set up the data pipeline and the train and evaluation steps."""
    config, data, mesh = run.config, run.data, data_mesh()
    dataset, train, validation = data.dataset, data.train_rows, data.validation_rows
    more: dict[str, Any] = {
        "optimizer": choose_optimizer(config),
        "frozen": config.freeze_backbone,
        "patience": config.patience,
        "evaluate_every": config.evaluate_every,
    }
    if isinstance(dataset, StreamedDataset):
        splits: dict[str, Any] = {"test": dataset.test}
        if len(validation):
            splits = {"validation": Subset(dataset.train, validation), **splits}
        return TrainSetup.stream(
            run.model,
            config.depth,
            config.recipe,
            Subset(dataset.train, train),
            config.preprocess,
            mesh,
            config.seed,
            splits,
            workers=data_workers,
            skip_unreadable=skip_unreadable,
            **more,
        )
    rows = Split(*(array[train] for array in dataset.train))
    part = replace(dataset, train=rows, preprocess=config.preprocess)
    splits = {"test": dataset.test}
    if len(validation):
        held_out = Split(*(array[validation] for array in dataset.train))
        splits = {"validation": held_out, **splits}
    return TrainSetup.create(run.model, config.depth, config.recipe, part, mesh, splits, **more)


def choose_optimizer(config: RunConfig) -> optax.GradientTransformation:
    """Make the recipe's optimizer, for the classifier only if the backbone is frozen."""
    optimizer = config.recipe.make_optimizer(config.total_steps, config.depth)
    if not config.freeze_backbone:
        return optimizer

    def labels(params: Any) -> Any:
        return {
            name: jax.tree.map(lambda _, name=name: "train" if name == HEAD else "freeze", child)
            for name, child in params.items()
        }

    return optax.multi_transform({"train": optimizer, "freeze": optax.set_to_zero()}, labels)


@contextmanager
def open_run(out: Path, config: RunConfig) -> Iterator[None]:
    """Create and lock `out`, the directory of this run."""
    with storage_errors(out / "config.json", 0):
        out.mkdir(parents=True, exist_ok=True)
    with lock_directory(out):
        check_run(out, config)
        begin_run(out, config)
        yield


def read_begun(out: Path) -> RunConfig | None:
    """Read the config of the run in `out`, if it has a checkpoint."""
    return read_newest(
        out, lambda newest: newest.read_config() if newest.step is not None else None
    )


def write_environments(out: Path) -> None:
    """Write `environment.json`: the environments in which the run was trained, in order."""
    with Checkpoints(out, read_only=True) as checkpoints:
        environments = checkpoints.read_environments() if checkpoints.step is not None else []
    if environments:  # early runs did not record them
        write_atomic(out / "environment.json", json.dumps(encode(environments), indent=2) + "\n")


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
