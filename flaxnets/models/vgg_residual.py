"""A residual VGG: the tutorials' bridge from VGG to residual networks, and its plain twin."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxnets.models.layers import (
    Layer,
    batch_norm,
    check_pixels,
    classifier,
    conv,
    dense,
    max_pool,
    relu,
)


class Stage(nn.Module):
    """Two 3x3 convolutions and a 2x2 max pool, with a shortcut of one 3x3 convolution and the same
    pool: `(batch, h, w, c)` -> `(batch, h // 2, w // 2, filters)`."""

    filters: int
    residual: bool
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for i in (1, 2):
            y = self.conv(self.filters, 3, name=f"conv{i}")(y)
            y = relu(self.norm(name=f"bn{i}")(y))
        y = max_pool(y, 2, 2)
        if self.residual:
            x = self.conv(self.filters, 3, name="shortcut_conv")(x)
            y += max_pool(relu(self.norm(name="shortcut_bn")(x)), 2, 2)
        return y


class VGGResidual(nn.Module):
    """Four residual stages of 64, 128, 256 and 512 filters, global average pooling and a classifier
    of 1024-1024-`num_classes` with dropout; `residual=False` removes the shortcuts.

    Images `(batch, height, width, channels)` of at least 16x16 pixels -> logits
    `(batch, num_classes)`. Collections `params` and `batch_stats`; rng stream `dropout`. The
    feature map of every stage is sown as `intermediates` `stages`.

    Attributes:
      num_classes: width of the logits; None returns the pooled features `(batch, 512)`.
      residual: False removes every shortcut.
      dropout: dropout rate in the classifier.
      dtype: type of the computation. `param_dtype` is that of parameters and statistics.
    """

    num_classes: int | None = 10
    residual: bool = True
    dropout: float = 0.5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        stage = partial(
            Stage,
            residual=self.residual,
            conv=partial(conv, use_bias=True, **types),
            norm=partial(batch_norm, use_running_average=not train, **types),
        )
        x = jnp.asarray(images, self.dtype)
        for i, filters in enumerate((64, 128, 256, 512), 1):
            x = stage(filters, name=f"stage{i}")(x)
            self.sow("intermediates", "stages", x)
        check_pixels(x, images)
        x = jnp.mean(x, axis=(1, 2))
        if self.num_classes is None:
            return x
        return classifier(
            x,
            1024,
            self.num_classes,
            dropout=partial(nn.Dropout, self.dropout, deterministic=not train),
            hidden=partial(dense, **types),
            head=partial(dense, **types),
        )
