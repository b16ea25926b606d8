"""The training loop of a run: one network trained from one seed, in its own directory."""

import csv
import io
import json
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from flaxnets.data.batches import Augmentation, Batch, Preprocess, epoch_order
from flaxnets.data.datasets import Dataset, Split, refuse_nothing_to_learn
from flaxnets.data.stream import TrainStream, eval_batches
from flaxnets.errors import DamageWarning, FallbackWarning, InputError, StorageError
from flaxnets.files import write_atomic
from flaxnets.parallel import is_primary, process_max, replicate, split_batch
from flaxnets.training.checkpoints import Checkpoints, comparable
from flaxnets.training.environment import describe_change, record_environment
from flaxnets.training.recipes import Recipe, observe_plateau, plateau_scale
from flaxnets.training.steps import (
    TrainState,
    create_state,
    evaluate,
    evaluate_batches,
    make_eval_step,
    make_stream_step,
    make_train_step,
)

Status = Literal["finished", "diverged", "unfinished"]


def metrics_of(splits: Iterable[str]) -> tuple[str, ...]:
    """Return the columns of `metrics.csv` if these splits are evaluated every epoch."""
    return (
        *("epoch", "step", "learning_rate", "running_train_loss", "running_train_error"),
        *(f"{split}_{metric}" for split in splits for metric in ("loss", "error")),
        "seconds",
    )


METRICS = metrics_of(("train", "test"))  # columns for the runs of a study

EVAL_BATCH = 256
# Steps in flight on the device: enough to keep it busy, few enough to stop quickly.
IN_FLIGHT = 2
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
      splits: splits evaluated after every epoch: name -> `evaluate(variables, stop)`, which returns
        `(loss, error)`, or None if `stop()` became true. A split called `validation` decides which
        epoch is the best.
      patience: number of epochs without a lower validation error after which the run ends; None
        for no such limit.
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

        def evaluation(split: Split) -> Callable:
            on_devices = train if split is train else replicate(split, mesh)
            return lambda variables, stop: evaluate(
                eval_step, variables, on_devices, eval_batch(mesh), stop
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

        def feed(key: jax.Array, step: int) -> Iterator[tuple[Batch]]:
            batches: Any = stream.batches(step, shared["total_steps"], skipped)
            with closing(batches):
                for batch in batches:
                    yield (jax.device_put(batch, split_batch(mesh)),)

        def evaluation(source: Any) -> Callable:
            def evaluate_source(variables: dict, stop: Callable[[], bool]):
                # Read with threads: processes would take seconds to start for each evaluation.
                batches: Any = eval_batches(
                    source,
                    size,
                    channels,
                    crops.crop.evaluation_fraction,
                    eval_batch(mesh),
                    skip_unreadable=skip_unreadable,
                    skipped=skipped,
                )
                with closing(batches):
                    return evaluate_batches(eval_step, variables, batches, stop)

            return evaluate_source

        return cls(
            **shared,
            feed=feed,
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
            splits={name: evaluation(source) for name, source in splits.items()},
            patience=patience,
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


def eval_batch(mesh: Mesh) -> int:
    """Return the batch size for evaluation, a multiple of the number of devices."""
    return -(-EVAL_BATCH // mesh.size) * mesh.size


class Progress(NamedTuple):
    """Progress of a run; `rows` has one entry per finished epoch, keyed by `METRICS`."""

    step: int
    seconds: float
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class RunResult:
    """Outcome of a run; `rows` has one entry per finished epoch, keyed by `METRICS`."""

    status: Status
    rows: list[dict[str, Any]]
    step: int
    seconds: float
    diverged_step: int | None

    @classmethod
    def from_json(cls, value: Any, columns: Sequence[str] = METRICS) -> "RunResult":
        """Validate and convert the record in a checkpoint, whose rows have these `columns`.

        Raises:
          InputError: `value` is not the record of a run.
        """
        number = (int, float)
        expected = {
            "status": lambda v: v in get_args(Status),
            "step": lambda v: type(v) is int and v >= 0,
            "seconds": lambda v: type(v) in number,
            "diverged_step": lambda v: v is None or type(v) is int,
            "rows": lambda v: isinstance(v, list) and all(map(is_row, v)),
        }

        def is_row(row: Any) -> bool:
            return (
                isinstance(row, dict)
                and row.keys() == set(columns)
                and all(type(entry) in number for entry in row.values())
            )

        if not isinstance(value, dict) or value.keys() != expected.keys():
            raise InputError("a checkpoint's progress is not the record of a run")
        for name, is_valid in expected.items():
            if not is_valid(value[name]):
                raise InputError(f"a checkpoint's progress has no valid {name}")
        return cls(**value)

    def final(self, metric: str) -> float:
        """Return the metric at the end of the run; NaN if the run has not ended."""
        return self.rows[-1][metric] if self.rows and self.status != "unfinished" else float("nan")


def write_metrics(
    directory: Path, rows: list[dict[str, Any]], columns: Sequence[str] = METRICS
) -> None:
    """Write `metrics.csv` to a run directory: one row per epoch, floats in full precision."""
    if not is_primary():
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(directory / "metrics.csv", text.getvalue())


def best_epoch(rows: list[dict[str, Any]]) -> int | None:
    """Return the index of the first finite row with the lowest validation error, or None."""
    errors = [row.get("validation_error", math.nan) for row in rows]
    losses = [row.get("validation_loss", math.nan) for row in rows]
    finite = [i for i in range(len(rows)) if math.isfinite(errors[i]) and math.isfinite(losses[i])]
    return min(finite, key=lambda i: errors[i], default=None)


def train_run(
    setup: TrainSetup,
    seed: int,
    directory: Path,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
    checkpoint_every: CheckpointEvery = CheckpointEvery(),
    config: dict[str, Any] | None = None,
    begin: Callable[[TrainState], TrainState] = lambda state: state,
    on_epoch: Callable[[TrainState, dict[str, Any]], None] | None = None,
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
    start = time.perf_counter()
    state = create_state(setup.model, setup.optimizer, seed, setup.image_shape, setup.mesh)
    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(directory))
        checkpoints.warn_of_damage("the run restarts from scratch")
        best: Checkpoints | None = None
        if "validation" in setup.splits:
            best = stack.enter_context(Checkpoints(directory, name="best", kept=1))
        result = RunResult("unfinished", [], 0, 0.0, None)
        if checkpoints.step is None:
            state = begin(state)
        else:
            if config is not None and comparable(checkpoints.read_config()) != comparable(config):
                raise InputError(f"{directory} holds another run; move it away")
            result = RunResult.from_json(checkpoints.read_progress(), setup.columns)
            state = checkpoints.restore(state)
            # A crash may have come between the row of an epoch and its checkpoint.
            write_metrics(directory, result.rows, setup.columns)
        if best is not None:
            _check_best(best, result, config)
        if result.status != "unfinished":
            return result
        environments = _environments(directory, checkpoints)

        rows, step = list(result.rows), result.step
        earlier, last_save = result.seconds, time.perf_counter()
        total, per_epoch = setup.total_steps, setup.steps_per_epoch
        feed: Any = setup.feed(state.key, step)
        batches = stack.enter_context(closing(feed))
        in_flight: deque[jax.Array] = deque()
        status: Status = "unfinished"
        diverged_step: int | None = None

        def seconds() -> float:
            return round(earlier + time.perf_counter() - start, 2)

        def save(where: Checkpoints) -> RunResult:
            now = RunResult(status, list(rows), step, seconds(), diverged_step)
            if (status, step, len(rows)) != (result.status, result.step, len(result.rows)):
                where.save(state, vars(now), config, environments)
            return now

        while True:
            ends_epoch = step > 0 and (step % per_epoch == 0 or step == total)
            if ends_epoch and (not rows or rows[-1]["step"] < step):
                row = _measure_epoch(setup, state, step, stop)
                if row is None:
                    break  # stopped during evaluation, which is repeated on resuming
                rows.append({**row, "seconds": seconds()})
                try:
                    write_metrics(directory, rows, setup.columns)
                except StorageError:
                    checkpoints.wait()  # if it fails too, its error reports more missing space
                    raise
                if on_epoch is not None:
                    on_epoch(state, rows[-1])
                diverged_step = _diverged_step(state, row)
                if diverged_step is not None:
                    status = "diverged"
                elif step == total or _lost_patience(setup, rows):
                    status = "finished"
                elif setup.plateau is not None:
                    opt_state = observe_plateau(
                        setup.plateau, state.opt_state, row["validation_loss"]
                    )
                    state = state.replace(opt_state=opt_state)
                if best is not None and best_epoch(rows) == len(rows) - 1:
                    save(best)
                on_progress(Progress(step, seconds(), rows))
            if status != "unfinished" or stop():
                break

            checkpoints.check()
            if step > result.step and checkpoint_every.due(step, time.perf_counter() - last_save):
                save(checkpoints)
                last_save = time.perf_counter()
            state, loss = setup.train_step(state, *next(batches))
            step += 1
            in_flight.append(loss)
            if len(in_flight) > IN_FLIGHT:
                in_flight.popleft().block_until_ready()
            on_progress(Progress(step, seconds(), rows))

        if best is not None:
            best.wait()
        result = save(checkpoints)
        checkpoints.wait()
        return result


def _environments(directory: Path, checkpoints: Checkpoints) -> list[dict[str, Any]]:
    """List the environments of the run, with this one last; warn if its results change."""
    stored = checkpoints.read_environments() if checkpoints.step is not None else []
    now = record_environment()
    if stored and is_primary() and (change := describe_change(stored[-1], now)):
        warnings.warn(
            f"{directory} is resumed in another environment: {change}",
            FallbackWarning,
            stacklevel=3,
        )
    return [*(each for each in stored if each != now), now]


def _check_best(best: Checkpoints, result: RunResult, config: dict[str, Any] | None) -> None:
    """Set aside a best state that does not belong to this run, and warn if its own is lost.

    The best state may be newer than the newest checkpoint, if a crash came between the two saves.
    """
    best.warn_of_damage("it is not used")
    if best.step is not None:
        try:
            reason = find_mismatch(best, config or {}, result.rows)
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


def find_mismatch(best: Checkpoints, config: Any, rows: list[dict[str, Any]]) -> str | None:
    """Return why `best` is not the best state of the run of `config` and `rows`, or None."""
    if comparable(best.read_config()) != comparable(config):
        return "its config is another run's"
    stored = read_rows(best)
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


def read_rows(checkpoints: Checkpoints) -> list[dict[str, Any]]:
    """Read the rows of `metrics.csv` from the newest good checkpoint, whatever their splits.

    Raises:
      InputError: the checkpoint's record is not that of a run.
    """
    progress = checkpoints.read_progress()
    rows = progress.get("rows") if isinstance(progress, dict) else None
    first = rows[0] if isinstance(rows, list) and rows else {}
    columns = tuple(first) if isinstance(first, dict) else ()
    return RunResult.from_json(progress, columns).rows


def _lost_patience(setup: TrainSetup, rows: list[dict[str, Any]]) -> bool:
    """Return whether `patience` epochs have passed since the best one."""
    best = best_epoch(rows)
    since = len(rows) if best is None else len(rows) - 1 - best
    return setup.patience is not None and since >= setup.patience


def _measure_epoch(
    setup: TrainSetup, state: TrainState, step: int, stop: Callable[[], bool]
) -> dict[str, Any] | None:
    """Return a row of `metrics.csv` without its seconds, or None if `stop()` became true."""
    running = jax.device_get(state.running)
    rate = setup.schedule(step - 1) * plateau_scale(state.opt_state)
    row: dict[str, Any] = {
        "epoch": -(-step // setup.steps_per_epoch),
        "step": step,
        "learning_rate": float(f"{rate:.6g}"),
        "running_train_loss": running.loss_sum.item() / running.examples.item(),
        "running_train_error": 100 * running.errors.item() / running.examples.item(),
    }
    for name, evaluate_split in setup.splits.items():
        measured = evaluate_split(state.variables, stop)
        if measured is None:
            return None
        row[f"{name}_loss"], row[f"{name}_error"] = measured
    return row


def _diverged_step(state: TrainState, row: dict[str, Any]) -> int | None:
    """Return the first step with a non-finite loss or gradient, or None."""
    step = state.running.diverged_step.item()
    if step >= 0:
        return step
    losses = [value for name, value in row.items() if name.endswith("train_loss")]
    return None if all(map(math.isfinite, losses)) else row["step"]
