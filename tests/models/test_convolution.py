import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flaxnets.models.convolution import conv_general_dilated, dense_conv, patch_conv

PADDING = ((1, 1), (1, 1))
DIMENSIONS = lax.conv_dimension_numbers((1,) * 4, (1,) * 4, ("NHWC", "HWIO", "NHWC"))


def reference(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), PADDING, dimension_numbers=DIMENSIONS)


@pytest.mark.parametrize("conv", [dense_conv, patch_conv])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 3), (4, 4), (3, 2)])
def test_equals_the_ordinary_convolution_in_value_and_gradient(conv, size):
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(3, *size, 5)))
    kernel = jnp.float32(rng.normal(size=(3, 3, 5, 7)))
    weights = jnp.float32(rng.normal(size=(3, *size, 7)))

    def value_and_gradients(conv):
        value = conv(x, kernel)
        return value, *jax.grad(lambda x, k: (conv(x, k) * weights).sum(), (0, 1))(x, kernel)

    for ours, theirs in zip(value_and_gradients(conv), value_and_gradients(reference), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conv", [dense_conv, patch_conv])
def test_nan_spreads(conv):
    x, kernel = jnp.ones((1, 2, 2, 3)), jnp.ones((3, 3, 3, 4))
    assert jnp.isnan(conv(x.at[0, 0, 0, 0].set(jnp.nan), kernel)).all()
    assert jnp.isnan(conv(x, kernel.at[1, 1, 0, 0].set(jnp.nan))[..., 0]).all()


def test_used_for_tiny_maps_alone():
    keywords = {
        "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1),
        "dimension_numbers": DIMENSIONS,
        "feature_group_count": 1,
        "precision": None,
    }

    def ordinary(size, kernel=(3, 3), strides=(1, 1), padding=PADDING, **changed):
        channels = 4 // changed.get("feature_group_count", 1)
        jaxpr = jax.make_jaxpr(
            lambda x, k: conv_general_dilated(x, k, strides, padding, **(keywords | changed))
        )(jnp.ones((1, *size, 4)), jnp.ones((*kernel, channels, 4)))
        return [str(equation.primitive) for equation in jaxpr.eqns] == ["conv_general_dilated"]

    cpu = jax.default_backend() == "cpu"
    assert ordinary((2, 2)) != cpu
    assert ordinary((4, 4)) != cpu
    assert ordinary((8, 8))
    assert ordinary((4, 4), strides=(2, 2))
    assert ordinary((4, 4), kernel=(1, 1), padding=((0, 0), (0, 0)))
    assert ordinary((4, 4), rhs_dilation=(2, 2))
    assert ordinary((4, 4), feature_group_count=2)
