"""Estimates of how long runs take on this machine, from a few measured steps."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import flax.linen as nn

from flaxnets.data.datasets import Dataset
from flaxnets.parallel import data_mesh
from flaxnets.training.loop import TrainSetup
from flaxnets.training.recipes import Recipe
from flaxnets.training.steps import create_state

# Compiling evaluation, a forward pass, adds about a third to compiling the train step.
EVALUATION_TOO = 4 / 3


class Probe(NamedTuple):
    """A network whose speed was measured.

    Attributes:
      depth: number of weighted layers; compilation time is proportional to it.
      work: cost of a train step for one image, see `flaxnets.models.cost`.
      first_step: seconds until the first train step is done, compilation included.
      step: seconds of each later train step.
    """

    depth: int
    work: float
    first_step: float
    step: float


def measure(
    model: nn.Module, depth: int, work: float, dataset: Dataset, recipe: Recipe, steps: int = 3
) -> Probe:
    """Time the first train steps of `model`, on every device."""
    start = time.perf_counter()
    setup = TrainSetup.create(
        model, 0, replace(recipe, steps=1 + steps, epochs=None), dataset, data_mesh()
    )
    state = create_state(model, setup.optimizer, 0, setup.image_shape, setup.mesh)
    times = []
    batches = setup.feed(state.key, 0)
    for _ in range(1 + steps):
        state, loss = setup.train_step(state, *next(batches))
        loss.block_until_ready()
        times.append(time.perf_counter())
    return Probe(depth, work, times[0] - start, (times[-1] - times[0]) / steps)


def estimate_seconds(probes: Sequence[Probe], depth: int, work: float, steps: float) -> float:
    """Estimate the seconds to compile a network and train it for `steps` steps.

    The estimate lies on the line through the first and the last probe. A single probe is scaled in
    proportion.
    """
    first, last = probes[0], probes[-1]
    compilation = EVALUATION_TOO * _extrapolate(
        (first.depth, first.first_step), (last.depth, last.first_step), depth
    )
    return compilation + steps * _extrapolate(
        (first.work, first.step), (last.work, last.step), work
    )


def _extrapolate(first: tuple[float, float], last: tuple[float, float], x: float) -> float:
    (x0, y0), (x1, y1) = first, last
    if x1 == x0:
        return y0 * x / x0
    slope = max(0.0, (y1 - y0) / (x1 - x0))  # noise may make it negative
    return max(y0, y0 + slope * (x - x0)) if x >= x0 else y0
