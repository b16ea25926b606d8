from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxnets.models.layers import relu
from flaxnets.models.normalization import BatchNorm, _sum_apart, _sum_together, normalize

OURS = partial(BatchNorm, momentum=0.9, epsilon=1e-5)
FLAX = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)
TOLERANCES = {jnp.float64: 1e-12, jnp.float32: 1e-5, jnp.bfloat16: 2e-2}


def both(dtype, use_running_average):
    types = {"dtype": dtype, "param_dtype": jnp.promote_types(dtype, jnp.float32)}
    force = dtype != jnp.float64
    return (
        OURS(use_running_average, **types),
        FLAX(use_running_average, force_float32_reductions=force, **types),
    )


def example(dtype):
    """Images, a direction, and variables that differ from their initial values."""
    keys = iter(jax.random.split(jax.random.key(0), 9))
    shape, wide = (6, 5, 4, 3), jnp.promote_types(dtype, jnp.float32)
    x = (2 * jax.random.normal(next(keys), shape) + 1).astype(dtype)
    direction = jax.random.normal(next(keys), shape).astype(dtype)

    def positive():
        return jax.random.uniform(next(keys), (3,), wide, 0.5, 2)

    variables = {
        "params": {"scale": positive(), "bias": positive()},
        "batch_stats": {"mean": positive(), "var": positive()},
    }
    return x, direction, variables


def derivatives(layer, x, direction, variables):
    """Return values, running statistics, gradients, a tangent and a Hessian times a vector."""

    def apply(params, x):
        return layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])

    def objective(params, x):
        y, updates = apply(params, x)
        wide = jnp.promote_types(y.dtype, jnp.float32)
        return (y.astype(wide) ** 3).sum() + sum(leaf.sum() for leaf in jax.tree.leaves(updates))

    primals, tangents = (variables["params"], x), (variables["params"], direction)
    gradient = jax.grad(objective, (0, 1))
    return (
        apply(*primals),
        gradient(*primals),
        jax.jvp(apply, primals, tangents)[1],
        jax.jvp(gradient, primals, tangents)[1],
    )


@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_equals_flax_in_values_statistics_and_derivatives(dtype, use_running_average):
    with jax.enable_x64(dtype == jnp.float64):
        x, direction, variables = example(dtype)
        ours, flax = (
            jax.jit(partial(derivatives, layer))(x, direction, variables)
            for layer in both(dtype, use_running_average)
        )
        for (path, a), b in zip(
            jax.tree.leaves_with_path(ours), jax.tree.leaves(flax), strict=True
        ):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), path
            a, b = (np.asarray(each, np.float64) for each in (a, b))
            np.testing.assert_allclose(
                a, b, rtol=0, atol=TOLERANCES[dtype] * np.abs(b).max(), err_msg=str(path)
            )


def test_statistics_keep_their_type():
    with jax.enable_x64(True):
        x, layer = jnp.ones((4, 3), jnp.float64), OURS(False)
        variables = layer.init(jax.random.key(0), x)
        updated = layer.apply(variables, x, mutable=["batch_stats"])[1]
        assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {np.dtype("float32")}


def test_the_same_variables_as_flax():
    ours, flax = (
        layer.init(jax.random.key(0), jnp.ones((2, 4, 4, 3))) for layer in both(jnp.float32, False)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, flax)
    types = [jax.tree.map(lambda leaf: leaf.dtype, variables) for variables in (ours, flax)]
    assert types[0] == types[1]


def test_a_constant_channel_has_finite_gradients():
    """Rounding may make the mean of squares smaller than the square of the mean."""
    x = jnp.full((64, 8, 8, 2), 1.1)
    y, mean, var = normalize(x, jnp.ones(2), jnp.zeros(2), 1e-5)
    assert (var >= 0).all()
    np.testing.assert_allclose(mean, 1.1, rtol=1e-6)
    gradient = jax.grad(lambda x: normalize(x, jnp.ones(2), jnp.zeros(2), 1e-5)[0].sum())(x)
    assert jnp.isfinite(y).all()
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("transform", [jax.vmap, jax.checkpoint, jax.jit])
def test_transformations(transform):
    x, direction, variables = example(jnp.float32)
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    images = jnp.stack([x, direction]) if transform is jax.vmap else x

    def apply(x):
        return normalize(x, scale, bias, 1e-5)[0]

    transformed = jax.grad(lambda images: (transform(apply)(images) ** 3).sum())(images)
    for a, b in zip(transformed.reshape(-1, *x.shape), images.reshape(-1, *x.shape), strict=True):
        expected = jax.grad(lambda x: (apply(x) ** 3).sum())(b)
        np.testing.assert_allclose(a, expected, rtol=1e-4, atol=1e-4)


def test_training_keeps_less_memory_than_flax():
    """Flax keeps a third array of the input's size for every layer."""

    def temporaries(norm):
        def loss(x):
            for _ in range(6):
                y = norm.apply(variables, x, mutable=["batch_stats"])[0]
                x = jnp.sin(relu(y))  # in place of a convolution, which reads what `relu` returns
            return x.sum()

        compiled: Any = jax.jit(jax.grad(loss)).lower(jnp.ones((16, 32, 32, 16))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    layers = both(jnp.float32, False)
    variables = layers[0].init(jax.random.key(0), jnp.ones((1, 1, 1, 16)))
    ours, flax = map(temporaries, layers)
    assert ours < 0.8 * flax


def test_the_rectifiers_gradient():
    x = jnp.array([-1.0, 0.0, 2.0, jnp.nan])
    y, pullback = jax.vjp(relu, x)
    np.testing.assert_array_equal(y, [0, 0, 2, jnp.nan])
    np.testing.assert_array_equal(pullback(jnp.ones(4))[0], [0, 0, 1, 1])
    np.testing.assert_array_equal(jax.jvp(relu, (x,), (2 * jnp.ones(4),))[1], [0, 0, 2, 2])


def test_sums_in_one_pass_on_accelerators():
    x = jax.random.normal(jax.random.key(0), (6, 5, 4, 3)) + 1
    for together, apart in zip(_sum_together(x), _sum_apart(x), strict=True):
        np.testing.assert_allclose(together, apart, rtol=1e-5)
    scale = jnp.ones(3)
    traced = jax.jit(lambda x: normalize(x, scale, scale, 1e-5)).trace(x)
    for platform, reductions in (("cpu", 2), ("cuda", 1), ("tpu", 1)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.reduce") == reductions, platform
