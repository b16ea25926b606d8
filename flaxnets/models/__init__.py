"""Networks by name."""

import re
from typing import Any

import flax.linen as nn

from flaxnets.errors import InputError, nearest
from flaxnets.models.resnet import IMAGENET_STAGES, ResNet, cifar_resnet, imagenet_resnet

__all__ = ["ResNet", "cifar_resnet", "create_model", "imagenet_resnet", "list_models"]

_PATTERN = re.compile(r"(cifar_)?(resnet|plain)(\d+)")


def list_models() -> list[str]:
    """Names that `create_model` takes: the published depths, then a pattern for the rest.

    The paper trained no plain networks but 18 and 34 (ImageNet) and 20, 32, 44, 56 (CIFAR);
    `plain50`, `plain101` and `plain152` are the residual ones of its Table 1 without shortcuts.
    """
    return [
        *(f"{kind}{depth}" for kind in ("resnet", "plain") for depth in IMAGENET_STAGES),
        *(f"cifar_resnet{depth}" for depth in (20, 32, 44, 56, 110, 1202)),
        *(f"cifar_plain{depth}" for depth in (20, 32, 44, 56)),
        "cifar_resnet<depth>",
        "cifar_plain<depth>",
    ]


def create_model(name: str, num_classes: int | None = None, **overrides: Any) -> nn.Module:
    """The network called `name`, with any attribute of its module overridden.

    Args:
      name: one of `list_models()`; `<depth>` is any even number from 8.
      num_classes: 1,000 for the ImageNet family and 10 for the CIFAR family unless given.
      overrides: attributes of `ResNet`, such as `shortcut="C"` or `dtype=jnp.bfloat16`.

    Returns:
      A Linen module: `init(key, images, train=False)` and `apply(variables, images, train=False)`
      take NHWC float images and give `params`, `batch_stats` and logits `(batch, num_classes)`.

    Raises:
      InputError: no network has that name, or the family does not have that depth.
    """
    match = _PATTERN.fullmatch(name)
    if match is None:
        raise InputError(
            f"no network is called {name!r}{nearest(name, list_models())}; "
            "flaxnets.list_models() lists them"
        )
    cifar, kind, depth = match.groups()
    family = cifar_resnet if cifar else imagenet_resnet
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    return family(int(depth), residual=kind == "resnet", **overrides)
