"""Convolutions of tiny feature maps as matrix products, for CPUs.

XLA's CPU convolution spends most of its time on overhead when maps are tiny. Forward and gradients
of one 3x3 convolution at batch 128 on two cores, in milliseconds:

    map    channels   convolution   here
    8x8    16          3.8          (as it is)
    4x4    32          3.7          1.8     patches times the kernel
    2x2    64         11.2          1.0     one dense matrix: every output sees every input

Everything else, and every other platform, gets `lax.conv_general_dilated` itself. Forward-mode
differentiation (`jax.jvp`) does not go through `patch_conv`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def conv_general_dilated(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **kw: Any):
    """`lax.conv_general_dilated` as `flax.linen.Conv` calls it (NHWC images, HWIO kernels)."""
    plain = all(d in (None, 1, (1, 1)) for d in (kw["lhs_dilation"], kw["rhs_dilation"]))
    tiny = (
        kernel.shape[:2] == (3, 3)
        and tuple(strides) == (1, 1)
        and [tuple(p) for p in padding] == [(1, 1), (1, 1)]
        and plain
        and kw["feature_group_count"] == 1
        and kw["precision"] is None
        and 0 < x.shape[1] * x.shape[2] <= 16
    )
    if not tiny or jax.default_backend() != "cpu":
        return lax.conv_general_dilated(x, kernel, strides, padding, **kw)
    return dense_conv(x, kernel) if x.shape[1] * x.shape[2] <= 4 else patch_conv(x, kernel)


def dense_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3x3 convolution, stride 1, padding 1, as one matrix over all pixels and channels.

    `(batch, height, width, in)`, `(3, 3, in, out)` -> `(batch, height, width, out)`.
    """
    batch, height, width, channels = x.shape
    # The kernel seen from one output pixel, laid over the whole map.
    views = [
        jnp.pad(kernel, ((i, height - 1 - i), (j, width - 1 - j), (0, 0), (0, 0)))[1:-1, 1:-1]
        for i in range(height)
        for j in range(width)
    ]
    matrix = jnp.stack(views, axis=3).reshape(height * width * channels, -1)
    return (x.reshape(batch, -1) @ matrix).reshape(batch, height, width, -1)


@jax.custom_vjp
def patch_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3x3 convolution, stride 1, padding 1, as patches times the kernel.

    `(batch, height, width, in)`, `(3, 3, in, out)` -> `(batch, height, width, out)`.
    """
    return _patches(x) @ kernel.reshape(-1, kernel.shape[-1])


def _patches(x: jax.Array) -> jax.Array:
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(taps, axis=-1)


def _patch_conv_forward(x: jax.Array, kernel: jax.Array):
    return patch_conv(x, kernel), (x, kernel)


def _patch_conv_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array):
    # Left to itself autodiff adds up nine padded slices; both gradients are matrix products too.
    x, kernel = saved
    dx = patch_conv(g, kernel[::-1, ::-1].swapaxes(2, 3))
    dkernel = jnp.einsum("bhwp,bhwo->po", _patches(x), g).reshape(kernel.shape)
    return dx, dkernel


patch_conv.defvjp(_patch_conv_forward, _patch_conv_backward)
