"""Estimates of how long runs take on this machine, from a few measured steps."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import flax.linen as nn

from flaxnets.data.datasets import Dataset
from flaxnets.models.cost import count_cost, count_depth
from flaxnets.models.resnet import ResNet
from flaxnets.parallel import data_mesh
from flaxnets.studies.grid import Plan, PlannedNetwork
from flaxnets.studies.results import Run
from flaxnets.training.loop import TrainSetup
from flaxnets.training.recipes import Recipe
from flaxnets.training.result import count_evaluations
from flaxnets.training.steps import create_state

# Approximate speed-up from concurrent runs on a CPU; measured: 1.3 to 1.5.
GAIN_OF_WORKERS = 1.4
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


def estimate_study(plan: Plan, stored: list[Run], workers: int) -> float:
    """Estimate the seconds that the rest of the study takes, from steps of small networks."""
    data, recipe, steps = plan.config.dataset, plan.config.recipe, plan.total_steps
    done = {run.key: run.result.step for run in stored}
    left: dict[PlannedNetwork, int] = {}  # updates, over all seeds
    for planned, config in plan.unfinished(stored):
        updates = max(steps - done.get(config.key, 0), 0)
        left[planned] = left.get(planned, 0) + updates
    probes = measure_probes(plan)
    epochs = -(-steps // (data.train_examples // recipe.batch_size))
    evaluations = count_evaluations(epochs, plan.config.evaluate_every)
    evaluated = evaluations * (data.train_examples + data.test_examples)
    # An evaluated image costs a forward pass, a trained one three.
    evaluation = 1 + evaluated / 3 / recipe.batch_size / steps
    seconds = sum(
        estimate_seconds(probes, planned.depth, planned.cost.work, evaluation * updates)
        for planned, updates in left.items()
    )
    return seconds / GAIN_OF_WORKERS if min(workers, len(left)) > 1 else seconds


def measure_probes(plan: Plan) -> list[Probe]:
    """Time networks of one and three blocks a stage, or the user's own network."""
    planned, dataset, recipe = plan.networks[0], plan.dataset, plan.config.recipe
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
