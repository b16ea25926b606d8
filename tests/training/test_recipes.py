import jax.numpy as jnp
import numpy as np
import optax

from flaxnets.training import RECIPES


def test_he2015_cifar_is_the_papers():
    recipe = RECIPES["he2015-cifar"]
    total = recipe.total_steps(50_000)
    assert total == 64_000
    rates = recipe.schedule(total, depth=56)
    expected = {0: 0.1, 399: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001}
    np.testing.assert_allclose([rates(s) for s in expected], list(expected.values()), rtol=1e-6)
    deep = recipe.schedule(total, depth=110)
    np.testing.assert_allclose([deep(0), deep(399), deep(400)], [0.01, 0.01, 0.1], rtol=1e-6)
    assert (recipe.batch_size, recipe.momentum, recipe.weight_decay) == (128, 0.9, 1e-4)


def test_the_schedule_scales_with_the_length():
    from dataclasses import replace

    recipe = replace(RECIPES["he2015-cifar"], steps=None, epochs=2)
    total = recipe.total_steps(50_000)
    assert total == 2 * 390  # the incomplete batch is dropped
    rates = recipe.schedule(total, depth=56)
    expected = {389: 0.1, 390: 0.01, 584: 0.01, 585: 0.001}
    np.testing.assert_allclose([rates(s) for s in expected], list(expected.values()), rtol=1e-6)


def test_weight_decay_is_coupled_and_on_every_parameter():
    """Two updates by hand: decay enters the gradient, before momentum."""
    recipe = RECIPES["he2015-cifar"]
    optimizer = recipe.optimizer(64_000, depth=20)
    params = {"kernel": jnp.float32([2.0]), "bias": jnp.float32([-3.0])}
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
