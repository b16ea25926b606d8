"""One run: one network trained once from one seed, in a directory of its own."""

import csv
import io
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from flaxnets.data.batches import epoch_order
from flaxnets.data.datasets import Dataset, Split
from flaxnets.files import write_atomic
from flaxnets.parallel import replicate
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

SECONDS_BETWEEN_CHECKPOINTS = 60
EVAL_BATCH = 256
# Steps handed to the device ahead of the host: enough to keep it busy, few enough to stop quickly.
IN_FLIGHT = 2


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

    def final(self, metric: str) -> float:
        """The metric at the end of the run; NaN for a run that has not got there."""
        return self.rows[-1][metric] if self.rows and self.status != "unfinished" else float("nan")


def read_result(directory: Path) -> RunResult | None:
    """What the run in `directory` has come to, or None where nothing was saved."""
    if not (directory / "checkpoints").is_dir():
        return None
    with Checkpoints(directory, read_only=True) as checkpoints:
        if checkpoints.latest_step() is None:
            return None
        return RunResult(**checkpoints.read_progress())


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    """`metrics.csv`: a row an epoch, floats in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, METRICS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def train_run(
    program: Program,
    seed: int,
    directory: Path,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> RunResult:
    """Train from `seed`, or from where `directory` left off, to the end of the recipe.

    Writes `metrics.csv` and `checkpoints/` below `directory`. A loss that is not finite ends the
    run as `diverged`; `stop()` becoming true ends it, saved, as `unfinished`.
    """
    start = time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    state = create_state(program.model, program.optimizer, seed, program.image_shape, program.mesh)
    with Checkpoints(directory) as checkpoints:
        result = RunResult("unfinished", [], 0, 0.0, None)
        if checkpoints.latest_step() is not None:
            state, saved = checkpoints.restore(state)
            result = RunResult(**saved)
        if result.status != "unfinished":
            write_metrics(directory / "metrics.csv", result.rows)
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
            result = RunResult(status, list(rows), step, seconds(), diverged_step)
            checkpoints.save(state, vars(result))
            return result

        while True:
            ends_epoch = step > 0 and (step % per_epoch == 0 or step == total)
            if ends_epoch and (not rows or rows[-1]["step"] < step):
                row = _measure_epoch(program, state, step, stop)
                if row is None:
                    break  # stopped in the middle; measured anew when the run goes on
                rows.append({**row, "seconds": seconds()})
                write_metrics(directory / "metrics.csv", rows)
                diverged_step = _diverged_step(state, row)
                if diverged_step is not None:
                    status = "diverged"
                elif step == total:
                    status = "finished"
                on_progress(Progress(step, seconds(), rows))
            if status != "unfinished" or stop():
                break

            if time.perf_counter() - last_save > SECONDS_BETWEEN_CHECKPOINTS:
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
    """The first step whose loss was not finite, or None where all is well."""
    step = state.running.diverged_step.item()
    if step >= 0:
        return step
    return None if math.isfinite(row["train_loss"]) else row["step"]
