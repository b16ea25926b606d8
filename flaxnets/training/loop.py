"""The training loop of a run: one network trained from one seed, in its own directory."""

import json
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from flaxnets.data.batches import Augmentation, Batch, Preprocess, epoch_order
from flaxnets.data.datasets import Dataset, Split, refuse_nothing_to_learn
from flaxnets.data.stream import TrainStream, eval_batches
from flaxnets.errors import DamageWarning, FallbackWarning, InputError, StorageError
from flaxnets.parallel import is_primary, process_max, replicate, split_batch
from flaxnets.training.checkpoints import Checkpoints
from flaxnets.training.config import RunConfig, comparable
from flaxnets.training.environment import Environment, describe_change, record_environment
from flaxnets.training.recipes import Recipe, observe_plateau, plateau_scale
from flaxnets.training.result import (
    Row,
    RunResult,
    Status,
    best_epoch,
    metrics_of,
    write_metrics,
)
from flaxnets.training.steps import (
    TrainState,
    create_state,
    evaluate,
    evaluate_batches,
    make_eval_step,
    make_stream_step,
    make_train_step,
)

EVAL_BATCH = 256
SMALL_IMAGE = 32 * 32  # pixels
STEPS_BETWEEN_AGREEMENTS = 10


@dataclass(frozen=True)
class CheckpointEvery:
    """Interval between checkpoints: `steps` if given, otherwise `seconds`."""

    seconds: float = 60.0
    steps: int | None = None

    def due(self, step: int, seconds: float) -> bool:
        """Return whether to save at `step`, `seconds` after the last save; all processes agree."""
        if self.steps is not None:
            return step % self.steps == 0
        if jax.process_count() == 1:
            return seconds > self.seconds
        # Clocks differ between processes, and agreeing takes time.
        return step % STEPS_BETWEEN_AGREEMENTS == 0 and bool(process_max(seconds > self.seconds))


@dataclass(frozen=True)
class TrainSetup:
    """Data and compiled steps, which all seeds of one network share.

    Attributes:
      schedule: learning rate of each update, before `plateau` lowers it.
      image_shape: height, width and channels of the network's input.
      feed: `feed(key, step)` yields, for each step from `step` on, the arguments of `train_step`
        after the state; `key` is the run's.
      train_step: `train_step(state, *fed) -> (state, loss)`.
      splits: splits to evaluate: name -> `evaluate(variables, stop)`, which returns
        `(loss, error)`, or None if `stop()` became true. A split called `validation` decides which
        epoch is the best.
      patience: number of epochs without a lower validation error after which the run ends; None
        for no such limit.
      evaluate_every: number of epochs from one evaluation to the next; the first and the last
        epoch are always evaluated. 1 if there is a split called `validation`.
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    total_steps: int
    steps_per_epoch: int
    image_shape: tuple[int, int, int]
    feed: Callable[[jax.Array, int], Iterator[tuple[Any, ...]]]
    train_step: Callable
    splits: dict[str, Callable[[dict, Callable[[], bool]], tuple[float, float] | None]]
    mesh: Mesh
    plateau: optax.GradientTransformationExtraArgs | None = None
    patience: int | None = None
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        if self.evaluate_every > 1 and "validation" in self.splits:
            raise InputError("with a split called validation, every epoch must be evaluated")

    @classmethod
    def create(
        cls,
        model: nn.Module,
        depth: int,
        recipe: Recipe,
        dataset: Dataset,
        mesh: Mesh,
        splits: dict[str, Split] | None = None,
        optimizer: optax.GradientTransformation | None = None,
        frozen: bool = False,
        patience: int | None = None,
        evaluate_every: int = 1,
    ) -> "TrainSetup":
        """Put `dataset` on the devices of `mesh` and make the steps that train `model` on it.

        Args:
          splits: splits to evaluate; train and test by default.
          optimizer: defaults to the recipe's.
          frozen: see `make_train_step`.

        Raises:
          InputError: all training images have the same label, or are identical.
        """
        refuse_nothing_to_learn(dataset.name, dataset.train)
        shared = _shared(
            model, depth, recipe, len(dataset.train.labels), dataset.preprocess, mesh, optimizer
        )
        eval_step = make_eval_step(model, dataset.preprocess, mesh)
        train = replicate(dataset.train, mesh)
        if splits is None:
            splits = {"train": train, "test": dataset.test}
        height, width, _ = dataset.preprocess.input_shape
        small = height * width <= SMALL_IMAGE
        lengths = [len(split.labels) for split in splits.values()]
        batch_size = eval_batch(mesh, lengths if small else ())

        def evaluation(split: Split) -> Callable:
            on_devices = train if split is train else replicate(split, mesh)
            return lambda variables, stop: evaluate(
                eval_step, variables, on_devices, batch_size, stop
            )

        return cls(
            **shared,
            feed=partial(feed_from_memory, train, shared["steps_per_epoch"]),
            train_step=make_train_step(
                model,
                shared["optimizer"],
                dataset.preprocess,
                recipe.augmentation(dataset.augmentation, dataset.preprocess.image_shape[0]),
                recipe.batch_size,
                mesh,
                recipe.label_smoothing,
                frozen,
            ),
            splits={name: evaluation(split) for name, split in splits.items()},
            patience=patience,
            evaluate_every=evaluate_every,
        )

    @classmethod
    def stream(
        cls,
        model: nn.Module,
        depth: int,
        recipe: Recipe,
        train: Any,
        preprocess: Preprocess,
        mesh: Mesh,
        seed: int,
        splits: dict[str, Any],
        workers: int = 0,
        optimizer: optax.GradientTransformation | None = None,
        frozen: bool = False,
        patience: int | None = None,
        evaluate_every: int = 1,
        skip_unreadable: bool = False,
    ) -> "TrainSetup":
        """Make the steps that train `model` on pictures streamed from storage; see `create`.

        Args:
          train, splits: sources of encoded pictures, see `flaxnets.data.stream`.
          seed: seed of the order, crops and flips.
          workers: number of processes that read training pictures; 0 for threads of this process.
          skip_unreadable: whether to replace unreadable pictures in training and leave them out of
            evaluation, with one warning each. Otherwise the first one raises an `InputError`.
        """
        shared = _shared(model, depth, recipe, len(train), preprocess, mesh, optimizer)
        crops = recipe.augmentation(Augmentation(), preprocess.image_shape[0])
        eval_step = make_eval_step(model, preprocess, mesh)
        size, _, channels = preprocess.image_shape
        stream = TrainStream(
            train,
            size,
            channels,
            crops.crop,
            crops.flip,
            recipe.batch_size,
            seed,
            workers,
            skip_unreadable,
        )
        skipped: set[str] = set()
        # Read with threads: processes would take seconds to start for each evaluation.
        read = partial(
            eval_batches,
            image_size=size,
            channels=channels,
            fraction=crops.crop.evaluation_fraction,
            batch_size=eval_batch(mesh),
            skip_unreadable=skip_unreadable,
            skipped=skipped,
        )
        return cls(
            **shared,
            feed=partial(feed_from_stream, stream, shared["total_steps"], mesh, skipped),
            train_step=make_stream_step(
                model,
                shared["optimizer"],
                preprocess,
                crops.without_crops(),
                shared["steps_per_epoch"],
                mesh,
                recipe.label_smoothing,
                frozen,
            ),
            splits={
                name: partial(evaluate_stream, eval_step, partial(read, source))
                for name, source in splits.items()
            },
            patience=patience,
            evaluate_every=evaluate_every,
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of `metrics.csv`."""
        return metrics_of(self.splits)


def _shared(
    model: nn.Module,
    depth: int,
    recipe: Recipe,
    examples: int,
    preprocess: Preprocess,
    mesh: Mesh,
    optimizer: optax.GradientTransformation | None,
) -> dict[str, Any]:
    """Return the fields of a `TrainSetup` that do not depend on where its data are."""
    total_steps = recipe.total_steps(examples)
    return {
        "model": model,
        "optimizer": optimizer or recipe.make_optimizer(total_steps, depth),
        "schedule": recipe.make_schedule(total_steps, depth),
        "total_steps": total_steps,
        "steps_per_epoch": examples // recipe.batch_size,
        "image_shape": preprocess.input_shape,
        "mesh": mesh,
        "plateau": recipe.plateau,
    }


def feed_from_memory(
    train: Split, steps_per_epoch: int, key: jax.Array, step: int
) -> Iterator[tuple[Split, jax.Array]]:
    """Yield, for each step, the training split on the devices and the order of its epoch."""
    key = jax.random.clone(key)  # the state's key is donated with the state
    while True:
        order = epoch_order(key, step // steps_per_epoch, len(train.labels))
        for _ in range(steps_per_epoch - step % steps_per_epoch):
            yield train, order
            step += 1


def feed_from_stream(
    stream: TrainStream, total_steps: int, mesh: Mesh, skipped: set[str], key: jax.Array, step: int
) -> Iterator[tuple[Batch]]:
    """Yield, for each step, its batch on the devices; `skipped` collects unreadable pictures."""
    batches: Any = stream.batches(step, total_steps, skipped)
    with closing(batches):
        for batch in batches:
            yield (jax.device_put(batch, split_batch(mesh)),)


def evaluate_stream(
    eval_step: Callable,
    read: Callable[[], Any],
    variables: dict[str, Any],
    stop: Callable[[], bool],
) -> tuple[float, float] | None:
    """Evaluate on the batches that `read()` yields; see `TrainSetup.splits`."""
    with closing(read()) as batches:
        return evaluate_batches(eval_step, variables, batches, stop)


def eval_batch(mesh: Mesh, lengths: Sequence[int] = ()) -> int:
    """Return the batch size for evaluation, a multiple of the number of devices.

    For splits of small images, of these `lengths`, it is the size from `EVAL_BATCH` to its double
    that needs the least padding, and the largest of several such sizes.
    """
    unit = 8 * mesh.size
    least = -(-EVAL_BATCH // unit) * unit
    if not lengths:
        return least
    sizes = range(2 * least, least - 1, -unit)
    return min(sizes, key=lambda size: sum(-(-length // size) * size for length in lengths))


def steps_in_flight() -> int:
    """Return how many steps to have in flight: enough to keep the device busy, few enough to stop
    quickly.

    On CPUs each one takes memory for its activations, 0.28 GB for cifar_resnet20 at batch 128, and
    a second one saves no time.
    """
    return 1 if jax.default_backend() == "cpu" else 2


class Progress(NamedTuple):
    """Progress of a run; `rows` has one entry per finished epoch, as in `RunResult`."""

    step: int
    seconds: float
    rows: list[Row]


def train_run(
    setup: TrainSetup,
    seed: int,
    directory: Path,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
    checkpoint_every: CheckpointEvery = CheckpointEvery(),
    config: RunConfig | None = None,
    begin: Callable[[TrainState], TrainState] = lambda state: state,
    on_epoch: Callable[[TrainState, Row], None] | None = None,
) -> RunResult:
    """Train from `seed`, or resume from `directory`, until the end of the recipe.

    Writes `metrics.csv` and `checkpoints/` below `directory`; each checkpoint has a copy of
    `config`. With a split called `validation`, the state with the lowest validation error is kept
    in `best/`. Damaged checkpoints are replaced, with a warning. A non-finite loss or gradient ends
    the run as `diverged` at the end of its epoch. Once `stop()` is true, the run is saved and ends
    as `unfinished`. With several processes, all of them must call this together.

    Args:
      begin: transforms the initial state, for example to load pretrained weights.
      on_epoch: called with the state at the end of each epoch and the epoch's row.

    Raises:
      InputError: `directory` holds a run of another `config`, or something that is not a run.
      StorageError: something cannot be written; earlier checkpoints are intact.
    """
    with ExitStack() as stack:
        run = _Run.open(stack, setup, seed, directory, config, begin)
        if run.status != "unfinished":
            return run.saved
        feed: Any = setup.feed(run.state.key, run.step)
        batches = stack.enter_context(closing(feed))
        in_flight, most = deque[jax.Array](), steps_in_flight()
        while True:
            if run.has_unmeasured_epoch():
                if not run.end_epoch(stop, on_epoch):
                    break  # stopped during evaluation, which is repeated on resuming
                on_progress(run.progress())
            if run.status != "unfinished" or stop():
                break
            run.save_if_due(checkpoint_every)
            run.state, loss = setup.train_step(run.state, *next(batches))
            run.step += 1
            in_flight.append(loss)
            if len(in_flight) > most:
                in_flight.popleft().block_until_ready()
            on_progress(run.progress())
        return run.close()


@dataclass
class _Run:
    """A run in training.

    Attributes:
      saved: the result in the checkpoint that the run was opened from.
      best: holds the state with the lowest validation error; None without a validation split.
      start, last_save: times of `time.perf_counter`.
    """

    setup: TrainSetup
    directory: Path
    config: RunConfig | None
    environments: list[Environment]
    checkpoints: Checkpoints
    best: Checkpoints | None
    state: TrainState
    saved: RunResult
    start: float
    last_save: float

    def __post_init__(self) -> None:
        self.status: Status = self.saved.status
        self.rows, self.step = list(self.saved.rows), self.saved.step
        self.diverged_step, self.earlier = self.saved.diverged_step, self.saved.seconds

    @classmethod
    def open(
        cls,
        stack: ExitStack,
        setup: TrainSetup,
        seed: int,
        directory: Path,
        config: RunConfig | None,
        begin: Callable[[TrainState], TrainState],
    ) -> "_Run":
        """Initialise the run, or restore it from `directory`; `stack` closes its checkpoints."""
        start = time.perf_counter()
        state = create_state(setup.model, setup.optimizer, seed, setup.image_shape, setup.mesh)
        checkpoints = stack.enter_context(Checkpoints(directory))
        checkpoints.warn_of_damage("the run restarts from scratch")
        best: Checkpoints | None = None
        if "validation" in setup.splits:
            best = stack.enter_context(Checkpoints(directory, name="best", kept=1))
        saved = RunResult("unfinished", [], 0, 0.0, None)
        if checkpoints.step is None:
            state = begin(state)
        else:
            if config is not None and _differs(checkpoints, config):
                raise InputError(f"{directory} holds another run; move it away")
            saved = checkpoints.read_result().check_splits(setup.columns)
            state = checkpoints.restore(state)
            # A crash may have come between the row of an epoch and its checkpoint.
            write_metrics(directory, saved.rows, setup.columns)
        if best is not None:
            _check_best(best, saved, config)
        environments = _environments(directory, checkpoints) if saved.status == "unfinished" else []
        now = time.perf_counter()
        return cls(
            setup, directory, config, environments, checkpoints, best, state, saved, start, now
        )

    def seconds(self) -> float:
        return round(self.earlier + time.perf_counter() - self.start, 2)

    def progress(self) -> Progress:
        return Progress(self.step, self.seconds(), self.rows)

    def has_unmeasured_epoch(self) -> bool:
        """Return whether an epoch has just ended and is not in the rows yet."""
        total, per_epoch = self.setup.total_steps, self.setup.steps_per_epoch
        ends_epoch = self.step > 0 and (self.step % per_epoch == 0 or self.step == total)
        return ends_epoch and (not self.rows or self.rows[-1]["step"] != self.step)

    def end_epoch(
        self,
        stop: Callable[[], bool],
        on_epoch: Callable[[TrainState, Row], None] | None,
    ) -> bool:
        """Measure the epoch, record it and decide how to continue; False if `stop()` came first."""
        setup = self.setup
        row = _measure_epoch(setup, self.state, self.step, stop)
        if row is None:
            return False
        self.rows.append({**row, "seconds": self.seconds()})
        try:
            write_metrics(self.directory, self.rows, setup.columns)
        except StorageError:
            self.checkpoints.wait()  # if it fails too, its error reports more missing space
            raise
        if on_epoch is not None:
            on_epoch(self.state, self.rows[-1])
        self.diverged_step = _diverged_step(self.state, row)
        if self.diverged_step is not None:
            self.status = "diverged"
        elif self.step == setup.total_steps or _lost_patience(setup, self.rows):
            self.status = "finished"
        elif setup.plateau is not None:
            loss: Any = row["validation_loss"]
            opt_state = observe_plateau(setup.plateau, self.state.opt_state, loss)
            self.state = self.state.replace(opt_state=opt_state)
        if self.best is not None and best_epoch(self.rows) == len(self.rows) - 1:
            self.save(self.best)
        return True

    def save_if_due(self, every: CheckpointEvery) -> None:
        self.checkpoints.check()
        now = time.perf_counter()
        if self.step > self.saved.step and every.due(self.step, now - self.last_save):
            self.save(self.checkpoints)
            self.last_save = time.perf_counter()

    def save(self, where: Checkpoints) -> RunResult:
        """Save the run unless the checkpoint that it was opened from holds the same."""
        result = RunResult(
            self.status, list(self.rows), self.step, self.seconds(), self.diverged_step
        )
        before = self.saved
        if (self.status, self.step, len(self.rows)) != (
            before.status,
            before.step,
            len(before.rows),
        ):
            where.save(self.state, result, self.config, self.environments)
        return result

    def close(self) -> RunResult:
        """Save the run and wait until everything is on disk."""
        if self.best is not None:
            self.best.wait()
        result = self.save(self.checkpoints)
        self.checkpoints.wait()
        return result


def _differs(checkpoints: Checkpoints, config: RunConfig) -> bool:
    try:
        return comparable(checkpoints.read_config()) != comparable(config)
    except InputError:  # it has no config, or that of another version
        return True


def _environments(directory: Path, checkpoints: Checkpoints) -> list[Environment]:
    """List the environments of the run, with this one last; warn if its results change."""
    stored = checkpoints.read_environments() if checkpoints.step is not None else []
    now = record_environment()
    if stored and is_primary() and (change := describe_change(stored[-1], now)):
        warnings.warn(
            f"{directory} is resumed in another environment: {change}",
            FallbackWarning,
            stacklevel=4,
        )
    return [*(each for each in stored if each != now), now]


def _check_best(best: Checkpoints, result: RunResult, config: RunConfig | None) -> None:
    """Set aside a best state that does not belong to this run, and warn if its own is lost.

    The best state may be newer than the newest checkpoint, if a crash came between the two saves.
    """
    best.warn_of_damage("it is not used")
    if best.step is not None:
        try:
            reason = find_mismatch(best, config, result.rows)
        except InputError as error:
            reason = str(error)
        # All processes must have read it before the primary process renames it.
        if process_max(reason is not None):
            best.set_aside(reason or "its record is another run's")
    epoch = best_epoch(result.rows)
    if best.step is None and epoch is not None and is_primary():
        row = result.rows[epoch]
        instead = (
            "train with another --out to recreate it"
            if result.status != "unfinished"
            else "a later epoch is kept only if it is better"
        )
        warnings.warn(
            f"{best.directory}: the state with the lowest validation error, "
            f"{row['validation_error']:.2f} % after epoch {row['epoch']}, is lost; {instead}",
            DamageWarning,
            stacklevel=3,
        )


def find_mismatch(best: Checkpoints, config: RunConfig | None, rows: list[Row]) -> str | None:
    """Return why `best` is not the best state of the run of `config` and `rows`, or None."""
    if config is None:
        if best.has_config():
            return "its config is another run's"
    elif comparable(best.read_config()) != comparable(config):
        return "its config is another run's"
    stored = best.read_result().rows
    # In text, NaN equals NaN. Times are ignored: they differ if an epoch was trained twice.
    own, other = (
        [json.dumps({**row, "seconds": 0}, sort_keys=True) for row in each]
        for each in (rows, stored)
    )
    shared = min(len(own), len(other))
    if own[:shared] != other[:shared]:
        return "its record is another run's"
    longer = max(rows, stored, key=len)
    epoch = best_epoch(longer)
    if epoch is not None and longer[epoch]["step"] != best.step:
        return "it is not the state with this run's lowest validation error"
    return None


def _lost_patience(setup: TrainSetup, rows: list[Row]) -> bool:
    """Return whether `patience` epochs have passed since the best one."""
    best = best_epoch(rows)
    since = len(rows) if best is None else len(rows) - 1 - best
    return setup.patience is not None and since >= setup.patience


def _measure_epoch(
    setup: TrainSetup, state: TrainState, step: int, stop: Callable[[], bool]
) -> Row | None:
    """Return a row of `metrics.csv` without its seconds, or None if `stop()` became true."""
    running = jax.device_get(state.running)
    rate = setup.schedule(step - 1) * plateau_scale(state.opt_state)
    row: Row = {
        "epoch": -(-step // setup.steps_per_epoch),
        "step": step,
        "learning_rate": float(f"{rate:.6g}"),
        "running_train_loss": running.loss_sum.item() / running.examples.item(),
        "running_train_error": 100 * running.errors.item() / running.examples.item(),
    }
    due = _must_evaluate(setup, step) or _diverged_step(state, row) is not None
    for name, evaluate_split in setup.splits.items():
        measured = evaluate_split(state.variables, stop) if due else (None, None)
        if measured is None:
            return None
        row[f"{name}_loss"], row[f"{name}_error"] = measured
    return row


def _must_evaluate(setup: TrainSetup, step: int) -> bool:
    """Return whether the epoch that ends at `step` is to be evaluated, diverged or not."""
    epoch = -(-step // setup.steps_per_epoch)
    return epoch == 1 or epoch % setup.evaluate_every == 0 or step == setup.total_steps


def _diverged_step(state: TrainState, row: Row) -> int | None:
    """Return the first step with a non-finite loss or gradient, or None."""
    step = state.running.diverged_step.item()
    if step >= 0:
        return step
    losses = (value for name, value in row.items() if name.endswith("train_loss"))
    finite = all(math.isfinite(loss) for loss in losses if loss is not None)
    return None if finite else cast(int, row["step"])
