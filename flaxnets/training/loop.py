"""One run: one network trained once from one seed, in a directory of its own."""

import csv
import io
import json
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from flaxnets.data.batches import epoch_order
from flaxnets.data.datasets import Dataset, Split
from flaxnets.errors import InputError, StorageError
from flaxnets.files import write_atomic
from flaxnets.parallel import greatest, is_primary, replicate
from flaxnets.training.checkpoints import Checkpoints
from flaxnets.training.recipes import Recipe
from flaxnets.training.steps import (
    TrainState,
    create_state,
    evaluate,
    make_eval_step,
    make_train_step,
)

Status = Literal["finished", "diverged", "unfinished"]
METRICS: tuple[str, ...] = (
    "epoch",
    "step",
    "learning_rate",
    "running_train_loss",
    "running_train_error",
    "train_loss",
    "train_error",
    "test_loss",
    "test_error",
    "seconds",
)

EVAL_BATCH = 256
# Steps handed to the device ahead of the host: enough to keep it busy, few enough to stop quickly.
IN_FLIGHT = 2
STEPS_BETWEEN_AGREEMENTS = 10


@dataclass(frozen=True)
class CheckpointEvery:
    """How often a run is saved: every so many `seconds`, or `steps` where that is given."""

    seconds: float = 60.0
    steps: int | None = None

    def due(self, step: int, seconds: float) -> bool:
        """Whether to save at `step`, `seconds` after the last time. All processes say the same."""
        if self.steps is not None:
            return step % self.steps == 0
        if jax.process_count() == 1:
            return seconds > self.seconds
        # Clocks differ, and asking the others takes time.
        return step % STEPS_BETWEEN_AGREEMENTS == 0 and bool(greatest(seconds > self.seconds))


@dataclass(frozen=True)
class Program:
    """What all seeds of one network share: the data on the devices and the compiled steps."""

    model: nn.Module
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    total_steps: int
    steps_per_epoch: int
    image_shape: tuple[int, int, int]
    train: Split
    test: Split
    train_step: Callable
    eval_step: Callable
    eval_batch: int
    mesh: Mesh

    @classmethod
    def create(
        cls, model: nn.Module, depth: int, recipe: Recipe, dataset: Dataset, mesh: Mesh
    ) -> "Program":
        """Put `dataset` on the devices of `mesh` and make the steps that train `model` on it."""
        examples = len(dataset.train.labels)
        total_steps = recipe.total_steps(examples)
        optimizer = recipe.optimizer(total_steps, depth)
        augmentation = dataset.augmentation if recipe.augment else None
        return cls(
            model=model,
            optimizer=optimizer,
            schedule=recipe.schedule(total_steps, depth),
            total_steps=total_steps,
            steps_per_epoch=examples // recipe.batch_size,
            image_shape=dataset.preprocess.image_shape,
            train=replicate(dataset.train, mesh),
            test=replicate(dataset.test, mesh),
            train_step=make_train_step(
                model, optimizer, dataset.preprocess, augmentation, recipe.batch_size, mesh
            ),
            eval_step=make_eval_step(model, dataset.preprocess, mesh),
            eval_batch=-(-EVAL_BATCH // mesh.size) * mesh.size,
            mesh=mesh,
        )


class Progress(NamedTuple):
    """Where a run is: `rows` are its finished epochs, keyed by `METRICS`."""

    step: int
    seconds: float
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class RunResult:
    """What a run has come to. `rows` has an epoch each, keyed by `METRICS`."""

    status: Status
    rows: list[dict[str, Any]]
    step: int
    seconds: float
    diverged_step: int | None

    @classmethod
    def from_json(cls, value: Any) -> "RunResult":
        """What a checkpoint has stored.

        Raises:
          InputError: it is not the record of a run.
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
                and row.keys() == set(METRICS)
                and all(type(entry) in number for entry in row.values())
            )

        if not isinstance(value, dict) or value.keys() != expected.keys():
            raise InputError("a checkpoint's progress is not the record of a run")
        for name, is_valid in expected.items():
            if not is_valid(value[name]):
                raise InputError(f"a checkpoint's progress has no valid {name}")
        return cls(**value)

    def final(self, metric: str) -> float:
        """The metric at the end of the run; NaN for a run that has not got there."""
        return self.rows[-1][metric] if self.rows and self.status != "unfinished" else float("nan")


def write_metrics(directory: Path, rows: list[dict[str, Any]]) -> None:
    """`metrics.csv` in a run directory: a row an epoch, floats in full."""
    if not is_primary():
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, METRICS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(directory / "metrics.csv", text.getvalue())


def train_run(
    program: Program,
    seed: int,
    directory: Path,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
    checkpoint_every: CheckpointEvery = CheckpointEvery(),
    config: dict[str, Any] | None = None,
) -> RunResult:
    """Train from `seed`, or from where `directory` left off, to the end of the recipe.

    Writes `metrics.csv` and `checkpoints/` below `directory`; each checkpoint has a copy of
    `config`. Damaged checkpoints are warned of and replaced. A loss or gradient that is not finite
    ends the run, when its epoch is measured, as `diverged`; `stop()` becoming true ends it, saved,
    as `unfinished`. With several processes, all of them call this together.

    Raises:
      InputError: `directory` holds another run than `config` says, or what is no run.
      StorageError: something cannot be written; the checkpoints from before are intact.
    """
    start = time.perf_counter()
    state = create_state(program.model, program.optimizer, seed, program.image_shape, program.mesh)
    with Checkpoints(directory) as checkpoints:
        checkpoints.warn_of_damage("the run starts anew")
        result = RunResult("unfinished", [], 0, 0.0, None)
        if checkpoints.step is not None:
            if config is not None and checkpoints.read_config() != json.loads(json.dumps(config)):
                raise InputError(f"{directory} holds another run; move it away")
            result = RunResult.from_json(checkpoints.read_progress())
            state = checkpoints.restore(state)
            # A crash may have come after the row of an epoch and before its checkpoint.
            write_metrics(directory, result.rows)
        if result.status != "unfinished":
            return result

        rows, step = list(result.rows), result.step
        earlier, last_save = result.seconds, time.perf_counter()
        total, per_epoch = program.total_steps, program.steps_per_epoch
        order, order_epoch = None, -1
        in_flight: deque[jax.Array] = deque()
        status: Status = "unfinished"
        diverged_step: int | None = None

        def seconds() -> float:
            return round(earlier + time.perf_counter() - start, 2)

        def save() -> RunResult:
            now = RunResult(status, list(rows), step, seconds(), diverged_step)
            if (status, step, len(rows)) != (result.status, result.step, len(result.rows)):
                checkpoints.save(state, vars(now), config)
            return now

        while True:
            ends_epoch = step > 0 and (step % per_epoch == 0 or step == total)
            if ends_epoch and (not rows or rows[-1]["step"] < step):
                row = _measure_epoch(program, state, step, stop)
                if row is None:
                    break  # stopped in the middle; measured anew when the run goes on
                rows.append({**row, "seconds": seconds()})
                try:
                    write_metrics(directory, rows)
                except StorageError:
                    checkpoints.wait()  # it needs more space, and says how much
                    raise
                diverged_step = _diverged_step(state, row)
                if diverged_step is not None:
                    status = "diverged"
                elif step == total:
                    status = "finished"
                on_progress(Progress(step, seconds(), rows))
            if status != "unfinished" or stop():
                break

            checkpoints.check()
            if step > result.step and checkpoint_every.due(step, time.perf_counter() - last_save):
                save()
                last_save = time.perf_counter()
            if order is None or order_epoch != step // per_epoch:
                order_epoch = step // per_epoch
                order = epoch_order(state.key, order_epoch, len(program.train.labels))
            state, loss = program.train_step(state, program.train, order)
            step += 1
            in_flight.append(loss)
            if len(in_flight) > IN_FLIGHT:
                in_flight.popleft().block_until_ready()
            on_progress(Progress(step, seconds(), rows))

        result = save()
        checkpoints.wait()
        return result


def _measure_epoch(
    program: Program, state: TrainState, step: int, stop: Callable[[], bool]
) -> dict[str, Any] | None:
    """A row of `metrics.csv` but for the seconds, or None if `stop()` became true."""
    running = jax.device_get(state.running)
    row: dict[str, Any] = {
        "epoch": -(-step // program.steps_per_epoch),
        "step": step,
        "learning_rate": float(f"{program.schedule(step - 1):.6g}"),
        "running_train_loss": running.loss_sum.item() / running.examples.item(),
        "running_train_error": 100 * running.errors.item() / running.examples.item(),
    }
    for name, split in (("train", program.train), ("test", program.test)):
        measured = evaluate(program.eval_step, state.variables, split, program.eval_batch, stop)
        if measured is None:
            return None
        row[f"{name}_loss"], row[f"{name}_error"] = measured
    return row


def _diverged_step(state: TrainState, row: dict[str, Any]) -> int | None:
    """The first step whose loss or gradient was not finite, or None where all is well."""
    step = state.running.diverged_step.item()
    if step >= 0:
        return step
    return None if math.isfinite(row["train_loss"]) else row["step"]
