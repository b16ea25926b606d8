"""Comparison of contenders: one workload, the same weights and images, timed in turns."""

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from experiments.contenders.inputs import describe_architecture, make_data
from experiments.contenders.pool import Contender, WorkerError, WorkerPool
from experiments.contenders.report import (
    FailedMeasurement,
    Failure,
    Measurement,
    Timing,
    speed_ratios,
)
from experiments.contenders.workload import TASKS, Workload

TOLERANCES = {"float32": 1e-3, "bfloat16": 3e-2}  # loss differences, relative for losses above 1
SECONDS_A_ROUND = 0.75


class DisagreementError(Exception):
    """Raised when contenders compute different losses; the message is one line."""


def compare(
    workload: Workload,
    contenders: Mapping[str, Contender],
    rounds: int,
    deadline: float,
    show: Callable[[str], None],
) -> tuple[Measurement | FailedMeasurement, str | None]:
    """Measure one workload; failed contenders are reported with the reason.

    Args:
      contenders: by name, `ours` first.
      rounds: number of rounds.
      deadline: time at which the last round may start, on the clock `time.monotonic`.
      show: receives a line whenever there is progress.

    Returns:
      The measurement, and the name of the GPU if there is one.

    Raises:
      DisagreementError: their losses differ.
    """
    # Reserve time for the rounds, at most half of what is left.
    rounds_seconds = rounds * len(contenders) * SECONDS_A_ROUND
    ready_by = deadline - min(rounds_seconds, (deadline - time.monotonic()) / 2)
    gpu, measured = None, FailedMeasurement(workload, {})
    with (
        tempfile.TemporaryDirectory(prefix="flaxnets-benchmark-") as directory,
        WorkerPool(contenders, Path(directory), ready_by) as pool,
        contextlib.suppress(WorkerError),  # ours failed, and the others need its weights
    ):
        device, gpu = start_contenders(workload, pool)
        measured = measure(workload, device, pool, rounds, deadline, show)
    reason = "ours failed, so there is nothing to compare with"
    failures = {
        name: Failure(pool.failures.get(name, reason))
        for name in contenders
        if name not in measured.contenders
    }
    return replace(measured, contenders={**measured.contenders, **failures}), gpu


def start_contenders(workload: Workload, pool: WorkerPool) -> tuple[str, str | None]:
    """Make the contenders; return the device, `"cpu"` or `"gpu"`, and the name of the GPU.

    Raises:
      WorkerError: ours fails.
    """
    data, weights = pool.directory / "data.npz", pool.directory / "weights.npz"
    arrays: Any = make_data(workload)
    np.savez(data, **arrays)
    common: dict[str, Any] = {
        "data": str(data),
        "batch_size": workload.batch_size,
        "bfloat16": workload.precision == "bfloat16",
        "task": workload.task,
    }
    model, ours = workload.model, pool.contenders["ours"].arguments
    device = pool.call_ours("start", model=model, device=None, weights=None, **common, **ours)
    pool.call_ours("save_weights", path=str(weights))
    gpu = pool.call_ours("device_kind") if device == "gpu" else None
    common |= {"device": device, "weights": str(weights)}
    for name, contender in list(pool.contenders.items())[1:]:
        network = model if contender.module == "ours" else describe_architecture(model)
        pool.call("start", [name], model=network, **common, **contender.arguments)
    return device, gpu


def measure(
    workload: Workload,
    device: str,
    pool: WorkerPool,
    rounds: int,
    deadline: float,
    show: Callable[[str], None],
) -> Measurement:
    """Check the contenders' losses and time their steps.

    Raises:
      WorkerError: ours fails.
      DisagreementError: losses differ.
    """
    first_step = pool.call("time", steps=1)
    pool.deadline = math.inf  # the remaining steps are short
    show(f"{workload.name}: first step {listed(first_step, '{:.1f} s')}")
    losses = pool.call("loss")
    check_losses(workload, losses)
    show(f"{workload.name}: loss {listed(losses, '{:.5f}')}")

    warm_up = pool.call("time", steps=2)
    steps = max(1, round(SECONDS_A_ROUND / (median(warm_up.values()) / 2)))
    rates = run_rounds(pool, steps * workload.images_per_step, steps, rounds, deadline)
    show(f"{workload.name}: {len(rates['ours'])} rounds of {steps} steps")
    peak_bytes = pool.call("peak_bytes")
    # Products of bfloat16 matrices are fast only in PyTorch on some CPUs.
    matmul_flops = max(pool.call("matmul_flops").values())
    multiply_adds = pool.call_ours("multiply_adds")
    host_seconds = None
    if workload.task == "train":
        host_seconds = pool.call_ours("host_seconds", steps=max(5, steps))

    timings = {}
    for name in pool.contenders:
        operations = 2 * TASKS[workload.task] * multiply_adds  # of each image
        timings[name] = Timing(
            images_per_second=median(rates[name]),
            slowest_round=min(rates[name]),
            fastest_round=max(rates[name]),
            ours_over_this=median(speed_ratios(rates["ours"], rates[name])),
            first_step_seconds=first_step[name],
            peak_bytes=peak_bytes[name],
            share_of_matmul_peak=operations * median(rates[name]) / matmul_flops,
            loss=losses[name],
            rounds=rates[name],
        )
    step_seconds = workload.images_per_step / timings["ours"].images_per_second
    return Measurement(
        workload=workload,
        device=device,
        steps_per_round=steps,
        multiply_adds=multiply_adds,
        matmul_flops_per_second=matmul_flops,
        host_seconds_per_step=host_seconds,
        host_share_of_step=host_seconds and host_seconds / step_seconds,
        contenders=timings,
    )


def run_rounds(
    pool: WorkerPool, images: int, steps: int, rounds: int, deadline: float
) -> dict[str, list[float]]:
    """Time the contenders in turn; return images per second in each round, by contender.

    Args:
      images: number of images in a round's `steps`.
    """
    times: list[dict[str, float]] = []
    while len(times) < rounds and (time.monotonic() < deadline or not times):
        times.append(pool.call("time_round", steps=steps))
    return {
        name: [images * contender.networks / seconds[name] for seconds in times]
        for name, contender in pool.contenders.items()
    }


def check_losses(workload: Workload, losses: Mapping[str, float]) -> None:
    """Check that all losses equal ours.

    Raises:
      DisagreementError: a loss differs by more than the precision's tolerance.
    """
    ours, tolerance = losses["ours"], TOLERANCES[workload.precision]
    for contender, loss in losses.items():
        difference = abs(loss - ours) / max(1.0, abs(ours))
        if not difference <= tolerance:  # also refuses NaN
            raise DisagreementError(
                f"{workload.name}: {contender} computes a different function: its loss is "
                f"{loss:.6g}, ours is {ours:.6g}, a difference of {difference:.2g}, "
                f"which is more than {tolerance:g}"
            )


def listed(answers: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{name} {form.format(value)}" for name, value in answers.items())
