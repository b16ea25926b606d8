"""Networks by name."""

import re
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from types import EllipsisType
from typing import Any

import flax.linen as nn

from flaxnets.errors import InputError, nearest
from flaxnets.models.alexnet import AlexNet, alexnet, alexnet2012
from flaxnets.models.resnet import (
    IMAGENET_STAGES,
    ResNet,
    cifar_resnet,
    imagenet_resnet,
    keras_resnet,
)
from flaxnets.models.tutorial import CNN, YNet
from flaxnets.models.vgg import VGG, VGGS, vgg
from flaxnets.models.vgg_residual import VGGResidual

__all__ = [
    "CNN",
    "VGG",
    "AlexNet",
    "ResNet",
    "VGGResidual",
    "YNet",
    "cifar_resnet",
    "create_model",
    "imagenet_resnet",
    "keras_resnet",
    "list_models",
    "published_image_shape",
]

_NAMED: dict[str, Callable[..., nn.Module]] = {
    "alexnet2012": alexnet2012,
    "alexnet": alexnet,
    **{name: partial(vgg, name) for name in VGGS},
    "vgg_residual": VGGResidual,
    "cnn": CNN,
    "ynet": YNet,
}
_RESNET = re.compile(r"(cifar_)?(resnet|plain)(\d+)(v2)?")
_KERAS_RESNET = re.compile(r"keras_resnet(\d+)v([12])")


def list_models() -> list[str]:
    """List the names that `create_model` takes: published networks, then patterns for other depths.

    The paper trained plain networks only of depths 18 and 34 (ImageNet) and 20, 32, 44, 56 (CIFAR).
    `plain50`, `plain101` and `plain152` are the residual networks of its Table 1 without shortcuts.
    No plain network of version 2 has been published.
    """
    kinds = ("resnet", "plain")
    return [
        *_NAMED,
        *(f"{kind}{depth}{v2}" for v2 in ("", "v2") for kind in kinds for depth in IMAGENET_STAGES),
        *(f"cifar_resnet{depth}" for depth in (20, 32, 44, 56, 110, 1202)),
        *(f"cifar_plain{depth}" for depth in (20, 32, 44, 56)),
        *(f"cifar_resnet{depth}v2" for depth in (110, 164, 1001)),
        *(f"keras_resnet{depth}v1" for depth in (20, 32, 44, 56, 110)),
        *(f"keras_resnet{depth}v2" for depth in (20, 56, 110)),
        *(f"cifar_{kind}<depth>{v2}" for v2 in ("", "v2") for kind in kinds),
        "keras_resnet<depth>v1",
        "keras_resnet<depth>v2",
    ]


def published_image_shape(name: str) -> tuple[int, int, int]:
    """Return height, width and channels of the images that network `name` was published for."""
    if name in ("cnn", "ynet"):
        return 28, 28, 1
    small = name == "vgg_residual" or name.startswith(("cifar_", "keras_"))
    return (32, 32, 3) if small else (224, 224, 3)


def create_model(
    name: str, num_classes: int | EllipsisType | None = ..., **overrides: Any
) -> nn.Module:
    """Create the network called `name`, with any attribute of its module overridden.

    Args:
      name: one of `list_models()`. `<depth>` is any even number of at least 8. It must have the
        form 9n + 2 in `cifar_resnet<depth>v2` from 164 up and in `keras_resnet<depth>v2`, and
        6n + 2 in `keras_resnet<depth>v1`.
      num_classes: width of the logits; by default that of the published network, 1,000 for
        ImageNet's and 10 for the others. None returns pooled features `(batch, features)`
        instead of logits.
      overrides: attributes of the module, such as `shortcut="C"` or `dtype=jnp.bfloat16`.

    Returns:
      A Linen module. `init(key, images, train=False)` and `apply(variables, images, train=False)`
      take NHWC float images and give `params`, `batch_stats` (if it has BatchNorm) and logits
      `(batch, num_classes)`. Training a network with dropout takes `rngs={"dropout": key}`.

    Raises:
      InputError: the name, the depth or an attribute is unknown, or `num_classes` is neither a
        positive integer nor None.
    """
    build, module = _builder(name)
    known = [field.name for field in fields(module) if field.name not in ("parent", "name")]
    for attribute in overrides:
        if attribute not in known:
            raise InputError(
                f"{name} has no attribute {attribute!r}{nearest(attribute, known)}; "
                f"it has {', '.join(known)}"
            )
    if num_classes is not ...:
        whole = hasattr(num_classes, "__index__") and not isinstance(num_classes, bool)
        if num_classes is not None and not (whole and num_classes > 0):
            raise InputError(
                f"num_classes must be a positive integer, or None for features, not {num_classes!r}"
            )
        overrides["num_classes"] = num_classes
    return build(**overrides)


def _builder(name: str) -> tuple[Callable[..., Any], Any]:
    """Return the function that builds network `name` from module attributes, and the module."""
    if name in _NAMED:
        return _NAMED[name], _NAMED[name]()
    if match := _RESNET.fullmatch(str(name)):
        cifar, kind, depth, v2 = match.groups()
        if not cifar and int(depth) not in IMAGENET_STAGES:
            raise InputError(
                f"unknown network {name!r}: the ImageNet family has depths "
                f"{', '.join(map(str, IMAGENET_STAGES))}; did you mean cifar_{name}?"
            )
        family = cifar_resnet if cifar else imagenet_resnet
        settings = {"residual": kind == "resnet", "preactivation": v2 is not None}
        return lambda **overrides: family(int(depth), **settings | overrides), ResNet
    if match := _KERAS_RESNET.fullmatch(str(name)):
        depth, version = match.groups()
        settings = {"preactivation": version == "2"}
        return lambda **overrides: keras_resnet(int(depth), **settings | overrides), ResNet
    if "<depth>" in str(name):
        raise InputError(f"write a number for <depth>: {str(name).replace('<depth>', '56')!r}")
    raise InputError(
        f"unknown network {name!r}{nearest(str(name), list_models())}; "
        "flaxnets.list_models() lists them"
    )
