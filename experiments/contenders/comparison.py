"""Comparison of contenders: one model, the same weights and images, timed in turns."""

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
    Settings,
    Timing,
)

TOLERANCES = {"float32": 1e-3, "bfloat16": 3e-2}  # loss differences, relative for losses above 1
SECONDS_A_ROUND = 0.75


class DisagreementError(Exception):
    """Raised when contenders compute different losses; the message is one line."""


def compare(
    model: str,
    contenders: Mapping[str, Contender],
    settings: Settings,
    deadline: float,
    show: Callable[[str], None],
) -> tuple[Measurement | FailedMeasurement, str | None]:
    """Measure one model; failed contenders are reported with the reason.

    Args:
      contenders: by name, `ours` first.
      deadline: time at which the last round may start, on the clock `time.monotonic`.
      show: receives a line whenever there is progress.

    Returns:
      The measurement, and the name of the GPU if there is one.

    Raises:
      DisagreementError: their losses differ.
    """
    # Reserve time for the rounds, at most half of what is left.
    rounds_seconds = settings.rounds * len(contenders) * SECONDS_A_ROUND
    ready_by = deadline - min(rounds_seconds, (deadline - time.monotonic()) / 2)
    gpu, measured = None, FailedMeasurement(model, {})
    with (
        tempfile.TemporaryDirectory(prefix="flaxnets-benchmark-") as directory,
        WorkerPool(contenders, Path(directory), ready_by) as pool,
        contextlib.suppress(WorkerError),  # ours failed, and the others need its weights
    ):
        device, gpu = start_contenders(model, pool, settings)
        measured = measure(model, device, pool, settings, deadline, show)
    reason = "ours failed, so there is nothing to compare with"
    failures = {
        name: Failure(pool.failures.get(name, reason))
        for name in contenders
        if name not in measured.contenders
    }
    return replace(measured, contenders={**measured.contenders, **failures}), gpu


def start_contenders(model: str, pool: WorkerPool, settings: Settings) -> tuple[str, str | None]:
    """Make the contenders; return the device, `"cpu"` or `"gpu"`, and the name of the GPU.

    Raises:
      WorkerError: ours fails.
    """
    data, weights = pool.directory / "data.npz", pool.directory / "weights.npz"
    arrays: Any = make_data(settings.image_size, settings.batch_size)
    np.savez(data, **arrays)
    common: dict[str, Any] = {
        "data": str(data),
        "batch_size": settings.batch_size,
        "bfloat16": settings.precision == "bfloat16",
    }
    ours = pool.contenders["ours"].arguments
    device = pool.call_ours("start", model=model, device=None, weights=None, **common, **ours)
    pool.call_ours("save_weights", path=str(weights))
    gpu = pool.call_ours("device_kind") if device == "gpu" else None
    common |= {"device": device, "weights": str(weights)}
    for name, contender in list(pool.contenders.items())[1:]:
        network = model if contender.module == "ours" else describe_architecture(model)
        pool.call("start", [name], model=network, **common, **contender.arguments)
    return device, gpu


def measure(
    model: str,
    device: str,
    pool: WorkerPool,
    settings: Settings,
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
    show(f"{model}: first step {listed(first_step, '{:.1f} s')}")
    losses = pool.call("loss")
    check_losses(model, losses, TOLERANCES[settings.precision])
    show(f"{model}: loss {listed(losses, '{:.5f}')}")

    warm_up = pool.call("time", steps=2)
    steps = max(1, round(SECONDS_A_ROUND / (median(warm_up.values()) / 2)))
    rates = run_rounds(pool, steps, settings, deadline)
    show(f"{model}: {len(rates['ours'])} rounds of {steps} steps")
    peak_bytes = pool.call("peak_bytes")
    matmul_flops = pool.call_ours("matmul_flops")
    multiply_adds = pool.call_ours("multiply_adds")
    host_seconds = pool.call_ours("host_seconds", steps=max(5, steps))

    timings = {}
    for name in pool.contenders:
        ratios = [ours / it for ours, it in zip(rates["ours"], rates[name], strict=True)]
        timings[name] = Timing(
            images_per_second=median(rates[name]),
            slowest_round=min(rates[name]),
            fastest_round=max(rates[name]),
            ours_over_this=median(ratios),
            first_step_seconds=first_step[name],
            peak_bytes=peak_bytes[name],
            # A step costs three forward passes, a multiply-add two operations.
            share_of_matmul_peak=3 * 2 * multiply_adds * median(rates[name]) / matmul_flops,
            loss=losses[name],
            rounds=rates[name],
        )
    step_seconds = settings.batch_size / timings["ours"].images_per_second
    return Measurement(
        model=model,
        device=device,
        steps_per_round=steps,
        multiply_adds=multiply_adds,
        matmul_flops_per_second=matmul_flops,
        host_seconds_per_step=host_seconds,
        host_share_of_step=host_seconds / step_seconds,
        contenders=timings,
    )


def run_rounds(
    pool: WorkerPool, steps: int, settings: Settings, deadline: float
) -> dict[str, list[float]]:
    """Time the contenders in turn; return images per second in each round, by contender."""
    rounds: list[dict[str, float]] = []
    while len(rounds) < settings.rounds and (time.monotonic() < deadline or not rounds):
        rounds.append(pool.call("time_round", steps=steps))
    return {
        name: [steps * settings.batch_size * contender.networks / times[name] for times in rounds]
        for name, contender in pool.contenders.items()
    }


def check_losses(model: str, losses: Mapping[str, float], tolerance: float) -> None:
    """Check that all losses equal ours.

    Raises:
      DisagreementError: a loss differs by more than `tolerance`, relative for losses above 1.
    """
    ours = losses["ours"]
    for contender, loss in losses.items():
        difference = abs(loss - ours) / max(1.0, abs(ours))
        if not difference <= tolerance:  # also refuses NaN
            raise DisagreementError(
                f"{model}: {contender} computes a different function: its loss is {loss:.6g}, ours "
                f"is {ours:.6g}, a difference of {difference:.2g}, which is more than {tolerance:g}"
            )


def listed(answers: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{name} {form.format(value)}" for name, value in answers.items())
