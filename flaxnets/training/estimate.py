"""How fast this machine trains, from a few measured steps."""

import time
from dataclasses import replace
from typing import NamedTuple

import flax.linen as nn

from flaxnets.data.datasets import Dataset
from flaxnets.parallel import data_mesh
from flaxnets.training.loop import Program
from flaxnets.training.recipes import Recipe
from flaxnets.training.steps import create_state


class Speed(NamedTuple):
    """Seconds until the first train step is done (compilation, mostly), and of each later one."""

    first_step: float
    step: float


def measure_speed(model: nn.Module, dataset: Dataset, recipe: Recipe, steps: int = 3) -> Speed:
    """Time the first train steps of `model`, on every device."""
    program = Program.create(
        model, 0, replace(recipe, steps=1 + steps, epochs=None), dataset, data_mesh()
    )
    state = create_state(model, program.optimizer, 0, program.image_shape, program.mesh)
    times = [time.perf_counter()]
    batches = program.feed(state.key, 0)
    for _ in range(1 + steps):
        state, loss = program.train_step(state, *next(batches))
        loss.block_until_ready()
        times.append(time.perf_counter())
    return Speed(times[1] - times[0], (times[-1] - times[1]) / steps)
