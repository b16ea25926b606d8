from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.compilation_cache import compilation_cache

from flaxnets.models import convolution
from flaxnets.models.convolution import (
    conv_general_dilated,
    conv_p,
    has_onednn,
    onednn_conv,
    ordinary_conv,
)


@contextmanager
def without_compilation_cache():
    """The tests' own, with which oneDNN cannot be used."""
    directory = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", directory)
    compilation_cache.reset_cache()


with without_compilation_cache():
    needs_onednn = pytest.mark.skipif(not has_onednn(), reason="no oneDNN in this jaxlib")


@pytest.fixture(autouse=True, scope="module")
def _without_compilation_cache():
    with without_compilation_cache():
        yield


KEYWORDS = {
    "lhs_dilation": (1, 1),
    "rhs_dilation": (1, 1),
    "dimension_numbers": convolution.DIMENSIONS,
    "feature_group_count": 1,
    "precision": None,
}
# Images, channels in and out, kernel, strides, padding: those of the networks, and odd ones.
SHAPES = [
    ((5, 8, 8), 3, 16, (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((4, 9, 7), 8, 16, (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((3, 2, 2), 6, 5, (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((2, 6, 6), 8, 16, (1, 1), (2, 2), ((0, 0), (0, 0))),
    ((2, 23, 23), 3, 8, (7, 7), (2, 2), ((3, 3), (3, 3))),
    ((1, 5, 4), 1, 1, (2, 3), (3, 1), ((0, 2), (2, 0))),
    ((2, 1, 6), 3, 4, (1, 5), (3, 1), ((2, 0), (0, 1))),  # the last rows are in no window
]


def random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def operands(shape):
    images, channels, filters, size, strides, padding = shape
    x, kernel = random(*images, channels), random(*size, channels, filters)
    return x, kernel, {"strides": strides, "padding": padding}


def value_and_gradients(conv, x, kernel):
    value, pullback = jax.vjp(conv, x, kernel)
    weights = random(*value.shape)
    gradients = pullback(weights)

    # The gradients' own derivatives, as in a Hessian times a vector.
    def gradient(x, kernel):
        return jax.grad(lambda x, kernel: (conv(x, kernel) ** 2 * weights).sum(), (0, 1))(x, kernel)

    return value, *gradients, *jax.jvp(gradient, (x, kernel), (2 * x, kernel + 1))[1]


@needs_onednn
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_ordinary_convolution_in_value_and_derivatives(shape):
    x, kernel, settings = operands(shape)
    ours = jax.jit(partial(value_and_gradients, partial(conv_p.bind, **settings)))(x, kernel)
    theirs = jax.jit(partial(value_and_gradients, partial(ordinary_conv, **settings)))(x, kernel)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@needs_onednn
def test_a_kernel_gradient_in_parts(monkeypatch):
    x, kernel, settings = operands(SHAPES[1])
    monkeypatch.setattr(convolution, "LARGE", x.size)
    monkeypatch.setattr(convolution, "PART", 2)
    gradient = jax.grad(lambda conv, k: (conv(x, k, **settings) ** 2).sum(), 1)
    text = str(
        jax.make_jaxpr(
            lambda: convolution.onednn_kernel_gradient(
                x, onednn_conv(x, kernel, **settings), size=(3, 3), **settings
            )
        )()
    )
    assert "scan" in text
    np.testing.assert_allclose(
        gradient(conv_p.bind, kernel), gradient(ordinary_conv, kernel), rtol=1e-4, atol=1e-3
    )


@needs_onednn
def test_nan_spreads():
    x, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 16))
    conv = partial(conv_p.bind, strides=(1, 1), padding=((1, 1), (1, 1)))
    spoilt = x.at[0, 0, 0, 0].set(jnp.nan)
    assert jnp.isnan(conv(spoilt, kernel)[0, :2, :2]).all()
    assert not jnp.isnan(conv(spoilt, kernel)[1]).any()
    assert jnp.isnan(conv(x, kernel.at[1, 1, 0, 0].set(jnp.nan))[..., 0]).all()
    pullback = jax.vjp(conv, spoilt, kernel)[1]
    assert jnp.isnan(pullback(jnp.ones((2, 4, 4, 16)))[1][:2, :2, 0]).all()


@needs_onednn
def test_batches_over_new_axes():
    x, kernel, settings = operands(SHAPES[0])
    xs, kernels = jnp.stack([x, 2 * x]), jnp.stack([kernel, kernel + 1])
    for axes in ((0, None), (None, 0), (0, 0)):
        args = [
            v if axis is None else vs
            for axis, v, vs in zip(axes, (x, kernel), (xs, kernels), strict=True)
        ]
        np.testing.assert_allclose(
            jax.vmap(partial(conv_p.bind, **settings), axes)(*args),
            jax.vmap(partial(ordinary_conv, **settings), axes)(*args),
            rtol=1e-4,
            atol=1e-4,
        )


def uses_onednn(x, kernel, strides=(1, 1), padding=((1, 1), (1, 1)), **changed):
    jaxpr = jax.make_jaxpr(
        lambda x, k: conv_general_dilated(x, k, strides, padding, **(KEYWORDS | changed))
    )(x, kernel)
    return [str(equation.primitive) for equation in jaxpr.eqns] == ["conv"]


@needs_onednn
def test_used_where_it_is_known_to_work():
    x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
    assert uses_onednn(x, kernel)
    assert uses_onednn(x, kernel, strides=(2, 2))
    assert not uses_onednn(x, kernel, padding="SAME")
    assert not uses_onednn(x, kernel, rhs_dilation=(2, 2))
    assert not uses_onednn(x, kernel[:, :, :2], feature_group_count=2)
    assert not uses_onednn(x, kernel, precision=lax.Precision.HIGHEST)
    assert not uses_onednn(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))


@needs_onednn
def test_not_used_where_it_would_fail(monkeypatch, tmp_path):
    for where, name, value in (
        (convolution.sys, "platform", "darwin"),
        (convolution.platform, "machine", lambda: "aarch64"),
        (convolution.jaxlib.version, "__version_info__", convolution.TESTED_JAXLIB[1]),
        (convolution.jax, "default_backend", lambda: "gpu"),
        (convolution.jax, "device_count", lambda: 8),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            assert not has_onednn(), name
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        assert not has_onednn()
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
    assert has_onednn()
