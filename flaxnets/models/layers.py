"""Layers shared by the networks."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flaxnets.errors import InputError
from flaxnets.models.convolution import conv_general_dilated
from flaxnets.models.normalization import BatchNorm

Layer = Callable[..., Any]


def he_normal_fan_out(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Draw kernels `(height, width, in, out)` from an untruncated normal of variance 2 / fan-out.

    See He et al. (2015), "Delving Deep into Rectifiers" (arXiv:1502.01852, equation 14), and
    torchvision. `nn.initializers.he_normal` is truncated and has variance 2 / fan-in. The numbers
    are those of `variance_scaling(2.0, "fan_out", "normal")`, but a flat draw compiles in a third
    of the time.
    """
    fan_out = math.prod(shape) // shape[-2]
    flat = jax.random.normal(key, (math.prod(shape),), dtype)
    return (math.sqrt(2 / fan_out) * flat).reshape(shape)


def uniform_fan_in(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Draw uniform kernels of variance 1 / (3 fan-in), torch's default (conv and dense layers)."""
    # Wrapped, because the function that `variance_scaling` returns cannot be pickled.
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)


# Layers are functions, because an unpickled `partial` does not equal the original.


def dense(
    features: int, *, kernel_init: nn.initializers.Initializer = uniform_fan_in, **kwargs: Any
) -> nn.Dense:
    """Create a dense layer with torch's default kernel initialisation."""
    return nn.Dense(features, kernel_init=kernel_init, **kwargs)


def conv(
    filters: int,
    size: int,
    stride: int = 1,
    *,
    padding: int | str | None = None,
    use_bias: bool = False,
    kernel_init: nn.initializers.Initializer = he_normal_fan_out,
    **kwargs: Any,
) -> nn.Conv:
    """Create a `size` x `size` convolution, padded by `(size - 1) // 2` by default."""
    return nn.Conv(
        filters,
        (size, size),
        stride,
        padding=(size - 1) // 2 if padding is None else padding,
        use_bias=use_bias,
        kernel_init=kernel_init,
        conv_general_dilated=conv_general_dilated,
        **kwargs,
    )


def batch_norm(*, momentum: float = 0.9, epsilon: float = 1e-5, **kwargs: Any) -> BatchNorm:
    """Create a BatchNorm with torchvision's constants.

    `momentum` is the share that the running statistics keep, 1 minus torch's momentum.
    """
    return BatchNorm(momentum=momentum, epsilon=epsilon, **kwargs)


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
    """Compute the rectifier `max(x, 0)`; its gradient at 0 is 0, and NaN stays NaN.

    With `maximum` after an addition, XLA on CPUs recomputes the whole residual stream in every
    later block, so the step time grows with the square of depth. This form avoids that. The
    gradient needs the result, which the next layer keeps anyway, and not `x`.
    """
    return jnp.where(x <= 0, 0, x)


@relu.defjvp
def _relu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    y = relu(*primals)
    return y, jnp.where(y <= 0, 0, tangents[0])


def max_pool(x: jax.Array, size: int, stride: int, padding: int = 0) -> jax.Array:
    """Take the largest value in windows of `size` x `size`; windows that do not fit are dropped."""
    pads: Any = ((padding, padding), (padding, padding))  # annotated as str in Flax
    return nn.max_pool(x, (size, size), (stride, stride), pads)


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """Pool `(batch, height, width, channels)` to `(batch, size, size, channels)`, as torch does.

    Output i of an axis of n pixels averages pixels floor(i n / size) to ceil((i + 1) n / size), so
    that bins overlap if n is not a multiple of `size`, and repeat pixels if n is below it.
    """
    if x.shape[1:3] == (size, size):
        return x

    def bins(n: int) -> jax.Array:
        i, pixel = jnp.arange(size)[:, None], jnp.arange(n)
        inside = (pixel >= i * n // size) & (pixel < -(-(i + 1) * n // size))
        return (inside / inside.sum(1, keepdims=True)).astype(x.dtype)

    height, width = x.shape[1:3]
    return jnp.einsum(
        "ih,jw,bhwc->bijc", bins(height), bins(width), x, precision=lax.Precision.HIGHEST
    )


def local_response_norm(x: jax.Array) -> jax.Array:
    """Normalise local responses over 5 neighbouring channels of `(..., channels)`.

    Krizhevsky et al. (2012), section 3.3: x / (2 + 1e-4 sum x^2)^0.75. In that formula as printed,
    alpha = 1e-4 multiplies the sum. torch and Caffe divide alpha by the 5 channels, so their alpha
    for the same function is 5e-4.
    """
    n, k, alpha, beta = 5, 2.0, 1e-4, 0.75
    channels = x.shape[-1]
    squares = jnp.pad(x * x, [(0, 0)] * (x.ndim - 1) + [(n // 2, n // 2)])
    total = sum(squares[..., i : i + channels] for i in range(n))
    return x / (k + alpha * total) ** beta


def check_pixels(x: jax.Array, images: jax.Array) -> None:
    """Refuse `images` that leave no pixels in the feature map `x`.

    Raises:
      InputError: the images are too small.
    """
    if 0 in x.shape[1:]:
        height, width = images.shape[1:3]
        raise InputError(f"images of {height}x{width} pixels are too small for this network")


def classifier(
    x: jax.Array,
    width: int,
    num_classes: int,
    dropout: Layer,
    hidden: Layer,
    head: Layer,
    dropout_first: bool = False,
) -> jax.Array:
    """Apply two hidden dense layers with dropout, and the head: `(batch, features)` -> logits.

    Dropout follows each hidden layer, or precedes it with `dropout_first`. Call this function from
    a compact method, which then owns the layers.
    """
    for i in (1, 2):
        if dropout_first:
            x = dropout(name=f"dropout{i}")(x)
        x = relu(hidden(width, name=f"dense{i}")(x))
        if not dropout_first:
            x = dropout(name=f"dropout{i}")(x)
    return head(num_classes, name="head")(x)
