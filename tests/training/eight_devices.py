"""Train on eight (fake) devices and on one and compare; exit status 0 where they agree.

Float32 training is chaotic: differences of rounding grow tenfold every few steps. So twenty steps
are compared in float64, and in float32 only the first.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_ENABLE_X64"] = "1"

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flaxnets
from flaxnets.data import Augmentation, Preprocess, Split, epoch_order
from flaxnets.parallel import data_mesh, replicate
from flaxnets.training import RECIPES, create_state, evaluate, make_eval_step, make_train_step

rng = np.random.RandomState(0)
images = rng.randint(0, 256, (80, 8, 8, 3)).astype(np.uint8)
made = Split(images, rng.randint(0, 10, 80).astype(np.int32))
preprocess = Preprocess((8, 8, 3), (0.5,) * 3, (0.25,) * 3)


def train(num_devices, steps, dtype):
    mesh = data_mesh(jax.devices()[:num_devices])
    model = flaxnets.create_model("cifar_resnet8", dtype=dtype, param_dtype=dtype)
    optimizer = RECIPES["he2015-cifar"].make_optimizer(100, 8)
    step: Any = make_train_step(model, optimizer, preprocess, Augmentation(1, True), 16, mesh)
    state = create_state(model, optimizer, 0, (8, 8, 3), mesh)
    split = replicate(made, mesh)
    if num_devices == 8 and steps == 1:
        compiled = step.lower(state, split, epoch_order(state.key, 0, 80)).compile()
        assert "all-reduce" in compiled.as_text(), "the batch is not split over the devices"
    for s in range(steps):
        state, _ = step(state, split, epoch_order(state.key, s // 5, 80))
    measured = None
    if steps == 20:
        eval_step = make_eval_step(model, preprocess, mesh)
        measured = evaluate(eval_step, state.variables, split, 24)
    assert len(state.params["conv1"]["kernel"].sharding.device_set) == num_devices
    return jax.device_get((state.variables, state.opt_state, state.running, measured))


def largest_difference(steps, dtype):
    one, eight = (train(n, steps, dtype) for n in (1, 8))
    start = train(1, 0, dtype)
    differences = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), one, eight)
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), one[0], start[0])
    assert min(jax.tree.leaves(moved)) > 0, "some parameter or statistic never moved"
    return max(jax.tree.leaves(differences))


for steps, dtype, tolerance in ((20, jnp.float64, 1e-9), (1, jnp.float32, 1e-5)):
    difference = largest_difference(steps, dtype)
    print(f"{steps} steps of {dtype.__name__}: largest difference {difference:.1e}")
    assert difference <= tolerance
