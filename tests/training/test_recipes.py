import re
from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from flaxnets.errors import InputError
from flaxnets.training import RECIPES, Recipe
from flaxnets.training.recipes import (
    check_batch_size,
    describe_fields,
    observe_plateau,
    plateau_scale,
)

pytestmark = pytest.mark.unit


def test_he2015_cifar_is_the_papers():
    recipe = RECIPES["he2015-cifar"]
    total = recipe.total_steps(50_000)
    assert total == 64_000
    rates: Any = recipe.make_schedule(total, depth=56)
    expected = {0: 0.1, 399: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001}
    np.testing.assert_allclose([rates(s) for s in expected], list(expected.values()), rtol=1e-6)
    deep: Any = recipe.make_schedule(total, depth=110)
    np.testing.assert_allclose([deep(0), deep(399), deep(400)], [0.01, 0.01, 0.1], rtol=1e-6)
    assert (recipe.batch_size, recipe.momentum, recipe.weight_decay) == (128, 0.9, 1e-4)


def test_the_schedule_scales_with_the_length():
    recipe = replace(RECIPES["he2015-cifar"], steps=None, epochs=2)
    total = recipe.total_steps(50_000)
    assert total == 2 * 390  # the incomplete batch is dropped
    rates: Any = recipe.make_schedule(total, depth=56)
    expected = {389: 0.1, 390: 0.01, 584: 0.01, 585: 0.001}
    np.testing.assert_allclose([rates(s) for s in expected], list(expected.values()), rtol=1e-6)


def test_weight_decay_is_coupled_and_on_every_parameter():
    """Two updates by hand: decay enters the gradient, before momentum."""
    recipe = RECIPES["he2015-cifar"]
    optimizer = recipe.make_optimizer(64_000, depth=20)
    params: Any = {"kernel": jnp.float32([2.0]), "bias": jnp.float32([-3.0])}
    expected = {name: float(value[0]) for name, value in params.items()}
    velocity = dict.fromkeys(expected, 0.0)
    state = optimizer.init(params)
    for gradient in (0.5, -1.0):
        gradients = {name: jnp.float32([gradient]) for name in params}
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for name, value in expected.items():
            velocity[name] = 0.9 * velocity[name] + gradient + 1e-4 * value
            expected[name] = value - 0.1 * velocity[name]
    for name, value in expected.items():
        np.testing.assert_allclose(params[name], [value], rtol=1e-6)


def rates(name, epochs_of, examples=50_000):
    """Learning rate of a preset in each of these epochs (counted from 0), at their first update."""
    recipe = RECIPES[name]
    total = recipe.total_steps(examples)
    schedule: Any = recipe.make_schedule(total, depth=20)
    return [float(schedule(epoch * total // recipe.epochs)) for epoch in epochs_of]


def test_published_schedules():
    keras = rates("keras-cifar", [0, 79, 80, 119, 120, 159, 160, 179, 180, 199])
    expected = [1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6, 5e-7, 5e-7]
    np.testing.assert_allclose(keras, expected, rtol=1e-5)
    vision = rates("torchvision-imagenet", [0, 29, 30, 59, 60, 89], 1_281_167)
    np.testing.assert_allclose(vision, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-5)
    np.testing.assert_allclose(rates("d2l-fashion", [0, 4], 60_000), 1e-3, rtol=1e-6)
    paper = RECIPES["he2015-imagenet"]
    assert (paper.steps, paper.batch_size, paper.weight_decay) == (600_000, 256, 1e-4)


def test_cosine_rises_and_ends_at_zero():
    recipe = replace(RECIPES["modern-cifar"], epochs=None, steps=100, warmup=0.2, learning_rate=0.5)
    schedule: Any = recipe.make_schedule(100, depth=20)
    np.testing.assert_allclose([schedule(s) for s in (0, 10, 20, 60)], [0, 0.25, 0.5, 0.25])
    assert 0 < schedule(99) < 0.002


PARAMS = {
    "conv1": {"kernel": jnp.ones((3, 3, 1, 2))},
    "bn1": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
    "head": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
}


@pytest.mark.parametrize(
    ("name", "decayed"),
    [
        ("he2015-cifar", {"conv1.kernel", "bn1.scale", "bn1.bias", "head.kernel", "head.bias"}),
        ("modern-cifar", {"conv1.kernel", "head.kernel"}),
        ("keras-cifar", {"conv1.kernel"}),
        ("d2l-fashion", set()),
    ],
)
def test_what_decays(name, decayed):
    """With a gradient of 0 only weight decay moves a parameter."""
    recipe = replace(RECIPES[name], warmup=0.0)
    optimizer = recipe.make_optimizer(1000, depth=20)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    flat: Any = flatten_dict(updates, sep=".")
    assert {path for path, update in flat.items() if jnp.abs(update).max() > 0} == decayed


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_updates(name):
    optimizer = RECIPES[name].make_optimizer(1000, depth=20)
    update = jax.jit(optimizer.update)
    # A rate that rises from 0 does nothing in the first one.
    _, state = update(PARAMS, optimizer.init(PARAMS), PARAMS)
    updates, _ = update(PARAMS, state, PARAMS)
    assert all(jnp.abs(leaf).min() > 0 for leaf in jax.tree.leaves(updates))


def test_a_plateau_lowers_the_rate():
    """After `patience` epochs without a lower loss, by the factor, to the floor and no further."""
    recipe = replace(
        RECIPES["he2015-imagenet"], plateau_patience=2, learning_rate=0.1, plateau_floor=0.001
    )
    assert recipe.plateau is not None
    optimizer = recipe.make_optimizer(100, depth=20)
    state = optimizer.init(PARAMS)
    first: Any
    later: Any
    first, state = optimizer.update(PARAMS, state, PARAMS)
    scales = []
    losses = [3.0, 2.0, 2.0, 2.0, 1.9, 1.95, float("nan"), 1.95, 1.95, 1.95, 1.95]
    for loss in losses:
        state = observe_plateau(recipe.plateau, state, loss)
        scales.append(plateau_scale(state))
    np.testing.assert_allclose(
        scales, [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01, 0.01], rtol=1e-5
    )
    later, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, PARAMS), state, jax.tree.map(jnp.zeros_like, PARAMS)
    )
    # Momentum alone is left of the first update.
    ratio = later["head"]["bias"] / first["head"]["bias"]
    np.testing.assert_allclose(ratio, 0.9 * 0.01, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"epochs": None}, "give either steps or epochs"),
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adam, not 'lion'"),
        ({"decay_at": (0.5, 1.5)}, "decay_at must be fractions of the run"),
        ({"decay_factor": (0.1,)}, "decay_factor must be one number, or one per step (2)"),
        ({"schedule": "plateau", "decay_factor": (0.1, 0.1)}, "one number between 0 and 1 if the"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0"),
        ({"decay_factor": -1.0}, "decay_factor must be above 0 and at most 1"),
        ({"decay_factor": (0.1, 10.0)}, "decay_factor must be above 0 and at most 1"),
        ({"warmup_factor": 0.0}, "warmup_factor must be above 0 and at most 1"),
        ({"warmup_from_depth": -1}, "warmup_from_depth must be at least 0"),
        ({"image_size": -1}, "image_size must be from 4 to 4096 pixels"),
        ({"image_size": 0}, "image_size must be from 4 to 4096 pixels"),
        ({"image_size": 1}, "image_size must be from 4 to 4096 pixels"),
        ({"image_size": 1_000_000}, "image_size must be from 4 to 4096 pixels"),
    ],
)
def test_what_is_no_recipe_is_refused(changes, problem):
    with pytest.raises(InputError, match=re.escape(problem)):
        replace(RECIPES["digits"], **changes)


def test_every_field_is_described():
    described = describe_fields()
    assert described.keys() == {field.name for field in fields(Recipe)}
    assert all(len(text) > 10 and "`" not in text for text in described.values())
    assert described["decay_at"].endswith("such as 0.5,0.75")


def test_a_batch_suits_images_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    check_batch_size(64, 64)
    with pytest.raises(InputError, match=r"^batch_size 72 is more than the 64 .*give at most 64$"):
        check_batch_size(72, 64, "batch_size")
    with pytest.raises(InputError, match=r"^--batch-size 60 is not divisible by the 8 devices"):
        check_batch_size(60, 64)
