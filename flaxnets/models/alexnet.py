"""AlexNet: Krizhevsky, Sutskever and Hinton (2012), "ImageNet Classification with Deep
Convolutional Neural Networks", and torchvision's form of it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxnets.models.layers import (
    adaptive_average_pool,
    check_pixels,
    classifier,
    conv,
    local_response_norm,
    max_pool,
    relu,
    uniform_fan_in,
)


class AlexNet(nn.Module):
    """Five convolutions and three dense layers.

    Images `(batch, height, width, channels)`, 224x224 as published -> logits
    `(batch, num_classes)`. Collection `params`; rng stream `dropout`. The rectified feature maps of
    the five convolutions are sown as `intermediates` `stages`.

    Attributes:
      filters: filters of the five convolutions (11x11/4, 5x5, 3x3, 3x3, 3x3).
      num_classes: width of the logits; None returns the pooled features, flattened.
      groups: number of groups in convolutions 2, 4 and 5; 2 for the two GPUs of 2012.
      local_response_norm: normalise after the rectifiers of convolutions 1 and 2, over all
        channels (in 2012 each GPU saw its own half).
      dropout: dropout rate in the classifier.
      dropout_first: apply dropout before each hidden dense layer, as in torchvision, not after.
      init_2012: initialise as in the paper (section 5): kernels N(0, 0.01), and biases 1 in
        convolutions 2, 4 and 5 and in the hidden dense layers. Otherwise kernels are torch's
        uniform ones, and biases 0.
      padding: padding of the first convolution.
      dtype: type of the computation. `param_dtype` is that of the parameters.
    """

    filters: Sequence[int]
    num_classes: int | None = 1000
    groups: int = 1
    local_response_norm: bool = False
    dropout: float = 0.5
    dropout_first: bool = False
    init_2012: bool = False
    padding: int = 2
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        kernel_init = nn.initializers.normal(0.01) if self.init_2012 else uniform_fan_in
        ones = nn.initializers.ones if self.init_2012 else nn.initializers.zeros
        zeros = nn.initializers.zeros

        x = jnp.asarray(images, self.dtype)
        for i, filters in enumerate(self.filters, 1):
            size, stride, padding = {1: (11, 4, self.padding), 2: (5, 1, 2)}.get(i, (3, 1, 1))
            x = conv(
                filters,
                size,
                stride,
                padding=padding,
                use_bias=True,
                kernel_init=kernel_init,
                bias_init=ones if i in (2, 4, 5) else zeros,
                feature_group_count=self.groups if i in (2, 4, 5) else 1,
                name=f"conv{i}",
                **types,
            )(x)
            x = relu(x)
            self.sow("intermediates", "stages", x)
            if i <= 2 and self.local_response_norm:
                x = local_response_norm(x)
            if i in (1, 2, 5):
                x = max_pool(x, 3, 2)
        check_pixels(x, images)
        x = adaptive_average_pool(x, 6).reshape(len(x), -1)
        if self.num_classes is None:
            return x
        return classifier(
            x,
            4096,
            self.num_classes,
            dropout=partial(nn.Dropout, self.dropout, deterministic=not train),
            hidden=partial(nn.Dense, kernel_init=kernel_init, bias_init=ones, **types),
            head=partial(nn.Dense, kernel_init=kernel_init, **types),
            dropout_first=self.dropout_first,
        )


def alexnet(**overrides: Any) -> AlexNet:
    """Create AlexNet as in torchvision: Krizhevsky (2014), "One weird trick for parallelizing
    convolutional neural networks" (arXiv:1404.5997), on one GPU."""
    settings: dict[str, Any] = {"filters": (64, 192, 384, 256, 256), "dropout_first": True}
    return AlexNet(**settings | overrides)


def alexnet2012(**overrides: Any) -> AlexNet:
    """Create AlexNet as published in 2012, for images of 227x227 or 224x224 pixels.

    The published 55x55 maps come from 224 pixels with padding 2, as here, or from 227 with
    `padding=0`, as in Caffe. `groups=1, local_response_norm=False` gives the common form for one
    GPU.
    """
    settings: dict[str, Any] = {
        "filters": (96, 256, 384, 384, 256),
        "groups": 2,
        "local_response_norm": True,
        "init_2012": True,
    }
    return AlexNet(**settings | overrides)
