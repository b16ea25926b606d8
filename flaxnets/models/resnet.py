"""Residual networks, versions 1 and 2, and their plain twins.

Version 1 is from He, Zhang, Ren and Sun (2015), "Deep Residual Learning for Image Recognition"
(arXiv:1512.03385), called "the paper" below. Version 2 is from the same authors (2016), "Identity
Mappings in Deep Residual Networks" (arXiv:1603.05027). One module covers the CIFAR family (section
4.2), the ImageNet family (Table 1) and the plain twin of every member: `residual=False` removes the
shortcuts and changes nothing else, so that twins share every other parameter, name for name and bit
for bit.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxnets.errors import InputError
from flaxnets.models.layers import Layer, batch_norm, conv, dense, max_pool, relu
from flaxnets.models.normalization import BatchNorm

BlockType = Literal["basic", "bottleneck"]
Shortcut = Literal["A", "B", "C"]
Stem = Literal["imagenet", "small"]


def zero_padded_identity(x: jax.Array, filters: int, stride: int) -> jax.Array:
    """Apply shortcut A: every `stride`-th pixel, with half of the new zero channels on either side.

    `(batch, height, width, channels)` -> `(batch, ceil(height / stride), ceil(width / stride),
    filters)`. The paper (section 3.3) does not say where the zeros go; the common PyTorch weights
    expect them on both sides.
    """
    x = x[:, ::stride, ::stride]
    before = (filters - x.shape[-1]) // 2
    after = filters - x.shape[-1] - before
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, after)))


def shortcut_branch(
    x: jax.Array, filters: int, stride: int, option: Shortcut, conv: Layer, norm: Layer | None
) -> jax.Array:
    """Apply the shortcut of one block (section 3.3).

    A is zero padding, B is projection where the shape changes, and C is projection everywhere. Call
    this function from a compact method, which then owns the layers.
    """
    changes_shape = stride != 1 or x.shape[-1] != filters
    if option == "C" or (option == "B" and changes_shape):
        x = conv(filters, 1, stride, name="shortcut_conv")(x)
        return x if norm is None else norm(name="shortcut_bn")(x)
    return zero_padded_identity(x, filters, stride) if changes_shape else x


class Block(nn.Module):
    """Convolutions, each with BatchNorm, and a shortcut around them (Figure 2 of the paper).

    `(batch, height, width, channels)` -> `(batch, ceil(height / stride), ceil(width / stride),
    filters of the last convolution)`.

    Attributes:
      layers: filters, kernel size and stride of each convolution.
      stride: stride of the block.
      shortcut: None makes the block plain.
      last_scale_init: initialiser of the last BatchNorm's scale.
      shortcut_norm: apply BatchNorm after projection shortcuts.
    """

    layers: Sequence[tuple[int, int, int]]
    stride: int
    shortcut: Shortcut | None
    conv: Layer
    norm: Layer
    last_scale_init: nn.initializers.Initializer
    shortcut_norm: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        last = len(self.layers)
        for i, (filters, size, stride) in enumerate(self.layers, 1):
            y = self.conv(filters, size, stride, name=f"conv{i}")(y)
            if i < last:
                y = relu(self.norm(name=f"bn{i}")(y))
        y = self.norm(name=f"bn{last}", scale_init=self.last_scale_init)(y)
        if self.shortcut is not None:
            norm = self.norm if self.shortcut_norm else None
            y += shortcut_branch(x, y.shape[-1], self.stride, self.shortcut, self.conv, norm)
        return relu(y)


class PreactivationBlock(nn.Module):
    """Version 2: BatchNorm and rectifier before each convolution, nothing after the addition
    (He et al. 2016, Figure 4e). Shapes are those of `Block`.

    Attributes:
      layers, stride, shortcut: see `Block`.
      activate_shortcut: start the shortcut, too, from the activated signal instead of the raw one
        that flows through the stage.
    """

    layers: Sequence[tuple[int, int, int]]
    stride: int
    shortcut: Shortcut | None
    conv: Layer
    norm: Layer
    activate_shortcut: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for i, (filters, size, stride) in enumerate(self.layers, 1):
            y = relu(self.norm(name=f"bn{i}")(y))
            if i == 1 and self.activate_shortcut:
                x = y
            y = self.conv(filters, size, stride, name=f"conv{i}")(y)
        if self.shortcut is not None:
            y += shortcut_branch(x, y.shape[-1], self.stride, self.shortcut, self.conv, None)
        return y


class ResNet(nn.Module):
    """A residual network, or with `residual=False` its plain twin.

    Images `(batch, height, width, channels)`, float, normalised -> logits `(batch, num_classes)`.
    Collections `params` and `batch_stats`. Convolutions have no bias; BatchNorm has momentum 0.9
    and epsilon 1e-5, as in torchvision (the paper gives neither). The feature map of every stage
    (in version 2 the raw signal) is sown as `intermediates` `stages`.

    Attributes:
      stage_sizes: blocks in each stage; the first block of every stage but the first halves the
        resolution, and each stage has twice the filters of the one before.
      num_classes: width of the logits; None returns the pooled features `(batch, filters)`.
      width: filters of the first stage (16 in the CIFAR family, 64 in the ImageNet family).
      block: `"basic"`, two 3x3 convolutions, or `"bottleneck"`, 1x1, 3x3 and 1x1 convolutions, the
        last of four times the filters (Figure 5).
      stem: `"imagenet"`, 7x7/2 convolution and 3x3/2 max pool, or `"small"`, 3x3/1 convolution.
      shortcut: `"A"`, `"B"` or `"C"` of section 3.3; see `shortcut_branch`.
      residual: False removes every shortcut.
      preactivation: use version 2. The first block of a stage activates before the split, and the
        others add to the raw signal. Projections have no BatchNorm. BatchNorm and rectifier follow
        the last block instead of the stem, whose max pool sees the raw convolution.
      stride_in_3x3: put a bottleneck's stride in its 3x3 convolution, as in torchvision, instead of
        its first 1x1 convolution, as in the paper.
      zero_init_last_scale: initialise the last BatchNorm scale of each block to 0 (Goyal et al.
        2017, arXiv:1706.02677, section 5.1), so that residual blocks start as identities; version 1
        only.
      remat: recompute a block's activations in the backward pass instead of keeping them, which
        saves memory for a third more computation.
      scan_blocks: compile the blocks of a stage after its first as one block that is run
        repeatedly, so that compilation time does not grow with depth. Their parameters are stacked:
        see `flaxnets.models.stacking`.
      conv, norm, head: layer functions such as `conv(filters, size, stride)` and the others in
        `flaxnets.models.layers`.
      shortcut_norm, activated_stages, bottleneck_filters: differences of Keras's networks; see
        `keras_resnet`.
      dtype: type of the computation. `param_dtype` is that of parameters and statistics.
    """

    stage_sizes: Sequence[int]
    num_classes: int | None
    width: int = 64
    block: BlockType = "basic"
    stem: Stem = "imagenet"
    shortcut: Shortcut = "B"
    residual: bool = True
    preactivation: bool = False
    stride_in_3x3: bool = True
    zero_init_last_scale: bool = False
    remat: bool = False
    scan_blocks: bool = False
    conv: Layer = conv
    norm: Layer = batch_norm
    head: Layer = dense
    shortcut_norm: bool = True
    activated_stages: Sequence[int] | None = None
    bottleneck_filters: Sequence[int] | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for name, choices in (
            ("shortcut", get_args(Shortcut)),
            ("stem", get_args(Stem)),
            ("block", get_args(BlockType)),
        ):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}"
                )
        if self.preactivation and self.zero_init_last_scale:
            raise InputError("zero_init_last_scale needs version 1: no BatchNorm ends a v2 block")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = partial(self.conv, **types)
        norm = partial(self.norm, use_running_average=not train, **types)

        x = jnp.asarray(x, self.dtype)
        x = conv(self.width, *((7, 2) if self.stem == "imagenet" else (3, 1)), name="conv1")(x)
        if not self.preactivation:
            x = relu(norm(name="bn1")(x))
        if self.stem == "imagenet":
            x = max_pool(x, 3, 2, padding=1)
        for i, blocks in enumerate(self.stage_sizes, 1):
            x = self._block(i, 1, 2 if i > 1 else 1, conv, norm)(x)
            if self.scan_blocks and blocks > 1:
                x = repeat(self._block(i, "s", 1, conv, norm), x, blocks - 1)
            else:
                for j in range(2, blocks + 1):
                    x = self._block(i, j, 1, conv, norm)(x)
            self.sow("intermediates", "stages", x)
        if self.preactivation:
            x = relu(norm(name="last_bn")(x))
        x = jnp.mean(x, axis=(1, 2))
        if self.num_classes is None:
            return x
        return self.head(self.num_classes, name="head", **types)(x)

    def _block(
        self, stage: int, block: int | Literal["s"], stride: int, conv: Layer, norm: Layer
    ) -> nn.Module:
        filters = self.width * 2 ** (stage - 1)
        if self.block == "basic":
            layers = ((filters, 3, stride), (filters, 3, 1))
        else:
            out = 4 * filters
            strides = (1, stride) if self.stride_in_3x3 else (stride, 1)
            if self.bottleneck_filters is not None:
                filters = self.bottleneck_filters[stage - 1]
            layers = ((filters, 1, strides[0]), (filters, 3, strides[1]), (out, 1, 1))
        settings: dict[str, Any] = {
            "layers": layers,
            "stride": stride,
            "shortcut": self.shortcut if self.residual else None,
            "conv": conv,
            "norm": norm,
            "name": f"stage{stage}_block{block}",
        }
        if self.preactivation:
            activated = self.activated_stages is None or stage in self.activated_stages
            block_class = PreactivationBlock
            settings["activate_shortcut"] = activated and block == 1
        else:
            ones, zeros = nn.initializers.ones, nn.initializers.zeros
            block_class = Block
            settings["last_scale_init"] = zeros if self.zero_init_last_scale else ones
            settings["shortcut_norm"] = self.shortcut_norm
        return (nn.remat(block_class) if self.remat else block_class)(**settings)


def repeat(block: nn.Module, x: jax.Array, times: int) -> jax.Array:
    """Apply copies of `block` in sequence, each with its own slice of the parameters."""
    scan = nn.scan(
        lambda block, x, _: (block(x), None),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=times,
    )
    return scan(block, x, None)[0]


def cifar_stage_sizes(depth: int) -> tuple[int, int, int]:
    """Return the number of two-convolution blocks in each of the three stages at `depth`.

    The (depth - 2) / 2 blocks are distributed as evenly as possible, earlier stages first:
    20 -> (3, 3, 3), 18 -> (3, 3, 2). At depth 6n + 2 it is exactly the paper's network.

    Raises:
      InputError: `depth` is odd or below 8.
    """
    if depth < 8 or depth % 2:
        raise InputError(f"the CIFAR family has even depths from 8 up, not {depth}")
    share, rest = divmod((depth - 2) // 2, 3)
    return share + (rest > 0), share + (rest > 1), share


def cifar_bottleneck_stage_sizes(depth: int) -> tuple[int, int, int]:
    """Return the number of bottlenecks in each of the three stages: n at `depth` = 9n + 2.

    Raises:
      InputError: `depth` is not of this form, or below 11.
    """
    if depth < 11 or depth % 9 != 2:
        raise InputError(
            f"the CIFAR family with bottlenecks has depths 9n + 2 (11, 20, ... 164 ... 1001), "
            f"not {depth}"
        )
    n = depth // 9
    return n, n, n


# Table 1 of the paper: depth -> block, blocks in each stage.
IMAGENET_STAGES: dict[int, tuple[BlockType, tuple[int, int, int, int]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}


def cifar_resnet(depth: int, num_classes: int | None = 10, **overrides: Any) -> ResNet:
    """Create the CIFAR network of `depth` (section 4.2): 16, 32, 64 filters, 3x3 stem, shortcut A.

    From depth 164 up, version 2 (`preactivation=True`) has bottlenecks, as published, with
    projections and the stride in the first 1x1 convolution, as in the authors' code. All other
    networks have two-convolution blocks. `block` overrides this choice.
    """
    published = "bottleneck" if overrides.get("preactivation") and depth >= 164 else "basic"
    bottleneck = overrides.get("block", published) == "bottleneck"
    settings: dict[str, Any] = {
        "stage_sizes": (cifar_bottleneck_stage_sizes if bottleneck else cifar_stage_sizes)(depth),
        "num_classes": num_classes,
        "width": 16,
        "block": published,
        "stem": "small",
        "shortcut": "B" if bottleneck else "A",
        "stride_in_3x3": False,
    }
    return ResNet(**settings | overrides)


def imagenet_resnet(depth: int, num_classes: int | None = 1000, **overrides: Any) -> ResNet:
    """Create the ImageNet network of `depth` (Table 1), with shortcut B as in torchvision.

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


def keras_kernel(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Draw kernels by Keras's `he_normal`: truncated normal of variance 2 / fan-in."""
    return nn.initializers.he_normal()(key, shape, dtype)


def keras_conv(filters: int, size: int, stride: int = 1, **kwargs: Any) -> nn.Conv:
    """Create a `conv` with bias and Keras's kernels.

    At stride 2, "SAME" pads more after the image than before it.
    """
    return conv(
        filters, size, stride, padding="SAME", use_bias=True, kernel_init=keras_kernel, **kwargs
    )


def keras_batch_norm(**kwargs: Any) -> BatchNorm:
    """Create a BatchNorm with Keras's default constants."""
    return batch_norm(momentum=0.99, epsilon=1e-3, **kwargs)


def keras_dense(features: int, **kwargs: Any) -> nn.Dense:
    """Create a dense layer with Keras's kernels."""
    return dense(features, kernel_init=keras_kernel, **kwargs)


def keras_resnet(depth: int, num_classes: int | None = 10, **overrides: Any) -> ResNet:
    """Create a ResNet of Keras's CIFAR-10 example (`cifar10_resnet.py`), copied in many tutorials.

    Version 1 has depths 6n + 2, version 2 (`preactivation=True`) 9n + 2. They differ from the
    paper's networks in four ways: convolutions have a bias and TensorFlow's padding; BatchNorm's
    constants and the initialisation are Keras's; projections, where the shape changes, have no
    BatchNorm; and version 2 has bottlenecks of 16, 64 and 128 filters with outputs of 64, 128 and
    256, whose projections see the raw signal in stages 2 and 3.

    Raises:
      InputError: the version does not have this depth.
    """
    preactivation = overrides.get("preactivation", False)
    if not preactivation and (depth < 8 or depth % 6 != 2):
        raise InputError(f"keras_resnet<depth>v1 has depths 6n + 2 (8, 14, 20 ...), not {depth}")
    settings: dict[str, Any] = {
        "stage_sizes": (cifar_bottleneck_stage_sizes if preactivation else cifar_stage_sizes)(
            depth
        ),
        "num_classes": num_classes,
        "width": 16,
        "block": "bottleneck" if preactivation else "basic",
        "stem": "small",
        "shortcut": "B",
        "stride_in_3x3": False,
        "conv": keras_conv,
        "norm": keras_batch_norm,
        "head": keras_dense,
        "shortcut_norm": False,
        "activated_stages": (1,),
        "bottleneck_filters": (16, 64, 128),
    }
    return ResNet(**settings | overrides)
