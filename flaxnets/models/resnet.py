"""Residual networks and their plain twins.

He, Zhang, Ren and Sun (2015), "Deep Residual Learning for Image Recognition" (arXiv:1512.03385),
written "the paper" below. One module covers the CIFAR family (section 4.2), the ImageNet family
(Table 1) and the plain twin of every member: `residual=False` leaves out the shortcuts and changes
nothing else, so that the two share every other parameter, name for name and bit for bit.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxnets.errors import InputError
from flaxnets.models.convolution import conv_general_dilated

Shortcut = Literal["A", "B", "C"]
Stem = Literal["imagenet", "small"]
Layer = Callable[..., Any]


def he_normal_fan_out(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Untruncated normal of variance 2 / fan-out, for kernels `(height, width, in, out)`.

    He et al. (2015), "Delving Deep into Rectifiers" (arXiv:1502.01852, equation 14), and
    torchvision. `nn.initializers.he_normal` is truncated, and of variance 2 / fan-in. The same
    numbers as `variance_scaling(2.0, "fan_out", "normal")`; a flat draw compiles in a third.
    """
    fan_out = math.prod(shape) // shape[-2]
    flat = jax.random.normal(key, (math.prod(shape),), dtype)
    return (math.sqrt(2 / fan_out) * flat).reshape(shape)


# torchvision's dense layers; the paper does not say.
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def relu(x: jax.Array) -> jax.Array:
    """Rectifier `max(x, 0)`; its gradient at 0 is 0, and NaN stays NaN.

    `maximum` after an addition makes XLA on CPUs compute the whole residual stream again in every
    later block, a step time quadratic in depth; this form does not.
    """
    return jnp.where(x <= 0, 0, x)


def zero_padded_identity(x: jax.Array, filters: int, stride: int) -> jax.Array:
    """Shortcut A: every `stride`-th pixel, new channels zero, half of them before and half after.

    `(batch, height, width, channels)` -> `(batch, ceil(height / stride), ceil(width / stride),
    filters)`. The paper (section 3.3) leaves open where the zeros go; the common PyTorch weights
    expect them on both sides.
    """
    x = x[:, ::stride, ::stride]
    before = (filters - x.shape[-1]) // 2
    after = filters - x.shape[-1] - before
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, after)))


def shortcut_branch(
    x: jax.Array, filters: int, stride: int, option: Shortcut, conv: Layer, norm: Layer
) -> jax.Array:
    """The shortcut of one block (section 3.3): A zero padding, B projection where the shape
    changes, C projection everywhere. Call it from a compact method, which then owns the layers."""
    changes_shape = stride != 1 or x.shape[-1] != filters
    if option == "C" or (option == "B" and changes_shape):
        x = conv(filters, (1, 1), stride, padding=0, name="shortcut_conv")(x)
        return norm(name="shortcut_bn")(x)
    return zero_padded_identity(x, filters, stride) if changes_shape else x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (Figure 5, left). `shortcut=None` makes the block plain.

    `(batch, height, width, channels)` -> `(batch, ceil(height / stride), ceil(width / stride),
    filters)`.
    """

    filters: int
    stride: int
    shortcut: Shortcut | None
    conv: Layer
    norm: Layer
    last_scale_init: nn.initializers.Initializer
    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv(self.filters, (3, 3), self.stride, padding=1, name="conv1")(x)
        y = relu(self.norm(name="bn1")(y))
        y = self.conv(self.filters, (3, 3), padding=1, name="conv2")(y)
        y = self.norm(name="bn2", scale_init=self.last_scale_init)(y)
        if self.shortcut is not None:
            y += shortcut_branch(x, self.filters, self.stride, self.shortcut, self.conv, self.norm)
        return relu(y)


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions (Figure 5, right). `shortcut=None` makes the block plain.

    `(batch, height, width, channels)` -> `(batch, ceil(height / stride), ceil(width / stride),
    4 * filters)`. The 3x3 convolution carries the stride, as in torchvision; the paper's first 1x1
    carries it.
    """

    filters: int
    stride: int
    shortcut: Shortcut | None
    conv: Layer
    norm: Layer
    last_scale_init: nn.initializers.Initializer
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        out = self.expansion * self.filters
        y = self.conv(self.filters, (1, 1), padding=0, name="conv1")(x)
        y = relu(self.norm(name="bn1")(y))
        y = self.conv(self.filters, (3, 3), self.stride, padding=1, name="conv2")(y)
        y = relu(self.norm(name="bn2")(y))
        y = self.conv(out, (1, 1), padding=0, name="conv3")(y)
        y = self.norm(name="bn3", scale_init=self.last_scale_init)(y)
        if self.shortcut is not None:
            y += shortcut_branch(x, out, self.stride, self.shortcut, self.conv, self.norm)
        return relu(y)


BLOCKS: dict[str, type[BasicBlock] | type[BottleneckBlock]] = {
    "basic": BasicBlock,
    "bottleneck": BottleneckBlock,
}


class ResNet(nn.Module):
    """A residual network, or with `residual=False` its plain twin.

    Images `(batch, height, width, channels)`, float, normalised -> logits `(batch, num_classes)`.
    Collections `params` and `batch_stats`. Convolutions have no bias; BatchNorm has momentum 0.9
    and epsilon 1e-5, as torchvision's (the paper does not say).

    Attributes:
      stage_sizes: blocks in each stage; the first block of every stage but the first halves the
        resolution, and each stage has twice the filters of the one before.
      num_classes: width of the logits.
      width: filters of the first stage (16 in the CIFAR family, 64 in the ImageNet family).
      block: `"basic"` (two 3x3 convolutions) or `"bottleneck"` (1x1, 3x3, 1x1).
      stem: `"imagenet"`, 7x7/2 convolution and 3x3/2 max pool, or `"small"`, 3x3/1 convolution.
      shortcut: `"A"`, `"B"` or `"C"` of section 3.3; see `shortcut_branch`.
      residual: False removes every shortcut.
      zero_init_last_scale: start the last BatchNorm scale of each block at 0 (Goyal et al. 2017,
        arXiv:1706.02677, section 5.1), so that residual blocks start as identities.
      dtype: type of the computation. `param_dtype` is that of parameters and statistics.
    """

    stage_sizes: Sequence[int]
    num_classes: int
    width: int = 64
    block: Literal["basic", "bottleneck"] = "basic"
    stem: Stem = "imagenet"
    shortcut: Shortcut = "B"
    residual: bool = True
    zero_init_last_scale: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for name, choices in (
            ("shortcut", get_args(Shortcut)),
            ("stem", get_args(Stem)),
            ("block", BLOCKS),
        ):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name} is one of {', '.join(choices)}, not {getattr(self, name)!r}"
                )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = partial(
            nn.Conv,
            use_bias=False,
            kernel_init=he_normal_fan_out,
            conv_general_dilated=conv_general_dilated,
            **types,
        )
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            # Statistics of bfloat16 activations stay float32; those of float64 ones, float64.
            force_float32_reductions=self.param_dtype != jnp.float64,
            **types,
        )
        block = partial(
            BLOCKS[self.block],
            shortcut=self.shortcut if self.residual else None,
            conv=conv,
            norm=norm,
            last_scale_init=nn.initializers.zeros
            if self.zero_init_last_scale
            else nn.initializers.ones,
        )

        x = jnp.asarray(x, self.dtype)
        if self.stem == "imagenet":
            x = conv(self.width, (7, 7), 2, padding=3, name="conv1")(x)
            x = relu(norm(name="bn1")(x))
            padding: Any = ((1, 1), (1, 1))  # annotated as str in Flax
            x = nn.max_pool(x, (3, 3), (2, 2), padding)
        else:
            x = conv(self.width, (3, 3), padding=1, name="conv1")(x)
            x = relu(norm(name="bn1")(x))
        for i, blocks in enumerate(self.stage_sizes):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                x = block(self.width * 2**i, stride, name=f"stage{i + 1}_block{j + 1}")(x)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=uniform_fan_in, name="head", **types)(x)


def cifar_stage_sizes(depth: int) -> tuple[int, int, int]:
    """Two-convolution blocks of the three stages at `depth`, any even number from 8.

    (depth - 2) / 2 blocks shared out as evenly as possible, earlier stages first: 20 -> (3, 3, 3),
    18 -> (3, 3, 2). At depth 6n + 2 it is exactly the paper's network.

    Raises:
      InputError: `depth` is odd or below 8.
    """
    if depth < 8 or depth % 2:
        raise InputError(f"the CIFAR family has even depths from 8 on, not {depth}")
    share, rest = divmod((depth - 2) // 2, 3)
    return share + (rest > 0), share + (rest > 1), share


# Table 1 of the paper: depth -> block, blocks in each stage.
IMAGENET_STAGES: dict[int, tuple[Literal["basic", "bottleneck"], tuple[int, int, int, int]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}


def cifar_resnet(depth: int, num_classes: int = 10, **overrides: Any) -> ResNet:
    """The CIFAR family at `depth` (section 4.2): 16, 32, 64 filters, 3x3 stem, shortcut A."""
    settings: dict[str, Any] = {
        "stage_sizes": cifar_stage_sizes(depth),
        "num_classes": num_classes,
        "width": 16,
        "stem": "small",
        "shortcut": "A",
    }
    return ResNet(**settings | overrides)


def imagenet_resnet(depth: int, num_classes: int = 1000, **overrides: Any) -> ResNet:
    """The ImageNet family at `depth` (Table 1), shortcut B, as torchvision has it.

    Raises:
      InputError: `depth` is not one of 18, 34, 50, 101, 152.
    """
    if depth not in IMAGENET_STAGES:
        depths = ", ".join(map(str, IMAGENET_STAGES))
        raise InputError(f"the ImageNet family has depths {depths}, not {depth}")
    block, stage_sizes = IMAGENET_STAGES[depth]
    settings: dict[str, Any] = {
        "stage_sizes": stage_sizes,
        "num_classes": num_classes,
        "block": block,
    }
    return ResNet(**settings | overrides)
