"""Two small networks of the Keras functional-API guides: `cnn` on MNIST, and the two-branch `ynet`.

Both are initialised as in Keras: Glorot's uniform kernels (Glorot and Bengio 2010) and biases 0.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxnets.errors import InputError
from flaxnets.models.layers import Layer, check_pixels, conv, max_pool, relu

glorot_uniform = nn.initializers.glorot_uniform()
glorot_conv = partial(conv, use_bias=True, kernel_init=glorot_uniform)


class CNN(nn.Module):
    """Three 3x3 convolutions without padding, the first two followed by 2x2 max pooling.

    Images `(batch, height, width, channels)` of at least 18x18 pixels -> logits
    `(batch, num_classes)`. Collection `params`; rng stream `dropout`. The rectified feature maps of
    the convolutions are sown as `intermediates` `stages`.

    Attributes:
      num_classes: width of the logits; None returns the flattened features.
      filters: filters of every convolution.
      dropout: dropout rate before the dense layer.
      dtype: type of the computation. `param_dtype` is that of the parameters.
    """

    num_classes: int | None = 10
    filters: int = 64
    dropout: float = 0.3
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = jnp.asarray(images, self.dtype)
        for i in (1, 2, 3):
            x = relu(glorot_conv(self.filters, 3, padding="VALID", name=f"conv{i}", **types)(x))
            self.sow("intermediates", "stages", x)
            if i < 3:
                x = max_pool(x, 2, 2)
        check_pixels(x, images)
        x = x.reshape(len(x), -1)
        if self.num_classes is None:
            return x
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        return nn.Dense(self.num_classes, kernel_init=glorot_uniform, name="head", **types)(x)


class Branch(nn.Module):
    """Three 3x3 convolutions of 32, 64 and 128 filters, each followed by dropout and 2x2 max
    pooling: `(batch, h, w, c)` -> `(batch, h // 8, w // 8, 128)`."""

    dilation_rate: int
    conv: Layer
    dropout: Layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, filters in enumerate((32, 64, 128), 1):
            conv = partial(
                self.conv, padding=self.dilation_rate, kernel_dilation=self.dilation_rate
            )
            x = relu(conv(filters, 3, name=f"conv{i}")(x))
            x = max_pool(self.dropout(name=f"dropout{i}")(x), 2, 2)
        return x


class YNet(nn.Module):
    """Two branches whose feature maps are concatenated by channel.

    Images `(batch, height, width, channels)` of at least 8x8 pixels for both branches, or a pair
    `(left, right)` of them -> logits `(batch, num_classes)`. Collection `params`; rng stream
    `dropout`. The feature maps of both branches are sown as `intermediates` `stages`.

    Attributes:
      num_classes: width of the logits; None returns the flattened features.
      dilation_rate: dilation of the right branch's convolutions.
      dropout: dropout rate after every convolution and before the dense layer.
      dtype: type of the computation. `param_dtype` is that of the parameters.
    """

    num_classes: int | None = 10
    dilation_rate: int = 1
    dropout: float = 0.4
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array | tuple[jax.Array, jax.Array], train: bool = False
    ) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dropout = partial(nn.Dropout, self.dropout, deterministic=not train)
        branch = partial(Branch, conv=partial(glorot_conv, **types), dropout=dropout)
        pair = tuple(images) if isinstance(images, tuple | list) else (images, images)
        if len(pair) != 2 or pair[0].shape[:3] != pair[1].shape[:3]:
            raise InputError("ynet takes images, or a pair (left, right) of equal batch and size")
        left, right = pair
        maps = []
        for name, x, rate in (("left", left, 1), ("right", right, self.dilation_rate)):
            y = branch(rate, name=name)(jnp.asarray(x, self.dtype))
            check_pixels(y, x)
            self.sow("intermediates", "stages", y)
            maps.append(y)
        x = jnp.concatenate(maps, axis=-1)
        x = x.reshape(len(x), -1)
        if self.num_classes is None:
            return x
        x = dropout(name="dropout")(x)
        return nn.Dense(self.num_classes, kernel_init=glorot_uniform, name="head", **types)(x)
