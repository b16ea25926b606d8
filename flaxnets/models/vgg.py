"""VGG: Simonyan and Zisserman (2014), "Very Deep Convolutional Networks for Large-Scale Image
Recognition" (arXiv:1409.1556), called "the paper" below."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxnets.models.layers import (
    adaptive_average_pool,
    batch_norm,
    check_pixels,
    classifier,
    conv,
    local_response_norm,
    max_pool,
    relu,
)

FILTERS = (64, 128, 256, 512, 512)

# Name -> the paper's configuration (Table 1).
VGGS: dict[str, dict[str, Any]] = {
    "vgg11": {"stage_sizes": (1, 1, 2, 2, 2)},  # A
    "vgg11_lrn": {"stage_sizes": (1, 1, 2, 2, 2), "local_response_norm": True},  # A-LRN
    "vgg13": {"stage_sizes": (2, 2, 2, 2, 2)},  # B
    "vgg16_1x1": {"stage_sizes": (2, 2, 3, 3, 3), "third_conv_size": 1},  # C
    "vgg16": {"stage_sizes": (2, 2, 3, 3, 3)},  # D
    "vgg19": {"stage_sizes": (2, 2, 4, 4, 4)},  # E
    # Not in the paper but in torchvision: BatchNorm after every convolution.
    "vgg11_bn": {"stage_sizes": (1, 1, 2, 2, 2), "batch_norm": True},
    "vgg13_bn": {"stage_sizes": (2, 2, 2, 2, 2), "batch_norm": True},
    "vgg16_bn": {"stage_sizes": (2, 2, 3, 3, 3), "batch_norm": True},
    "vgg19_bn": {"stage_sizes": (2, 2, 4, 4, 4), "batch_norm": True},
}


class VGG(nn.Module):
    """Five stages of convolutions, each ended by 2x2 max pooling, and three dense layers.

    Images `(batch, height, width, channels)` of at least 32x32 pixels, 224x224 as published ->
    logits `(batch, num_classes)`. Collections `params` and, with BatchNorm, `batch_stats`; rng
    stream `dropout`. The feature map of every stage (before the pooling) is sown as
    `intermediates` `stages`. Initialisation is torchvision's.

    Attributes:
      stage_sizes: convolutions in each stage, with 64, 128, 256, 512 and 512 filters.
      num_classes: width of the logits; None returns the pooled features, flattened.
      batch_norm: apply BatchNorm after every convolution.
      local_response_norm: apply AlexNet's normalisation after the first convolution.
      third_conv_size: kernel size of a stage's third convolution.
      pool_size: side of the maps that the classifier sees, after adaptive average pooling; 7 as
        published, 1 for small images.
      classifier_width: units of the two hidden dense layers.
      dropout: dropout rate in the classifier.
      dtype: type of the computation. `param_dtype` is that of parameters and statistics.
    """

    stage_sizes: Sequence[int]
    num_classes: int | None = 1000
    batch_norm: bool = False
    local_response_norm: bool = False
    third_conv_size: int = 3
    pool_size: int = 7
    classifier_width: int = 4096
    dropout: float = 0.5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(batch_norm, use_running_average=not train, **types)

        x = jnp.asarray(images, self.dtype)
        for i, (convolutions, filters) in enumerate(zip(self.stage_sizes, FILTERS, strict=True), 1):
            for j in range(1, convolutions + 1):
                size = self.third_conv_size if j == 3 else 3
                x = conv(filters, size, use_bias=True, name=f"stage{i}_conv{j}", **types)(x)
                if self.batch_norm:
                    x = norm(name=f"stage{i}_bn{j}")(x)
                x = relu(x)
                if self.local_response_norm and i == j == 1:
                    x = local_response_norm(x)
            self.sow("intermediates", "stages", x)
            x = max_pool(x, 2, 2)
        check_pixels(x, images)
        x = adaptive_average_pool(x, self.pool_size).reshape(len(x), -1)
        if self.num_classes is None:
            return x
        dense = partial(nn.Dense, kernel_init=nn.initializers.normal(0.01), **types)
        return classifier(
            x,
            self.classifier_width,
            self.num_classes,
            dropout=partial(nn.Dropout, self.dropout, deterministic=not train),
            hidden=dense,
            head=dense,
        )


def vgg(name: str, **overrides: Any) -> VGG:
    """Create the network called `name` in `VGGS`."""
    return VGG(**VGGS[name] | overrides)
