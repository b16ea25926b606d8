"""PyTorch as a reference for networks and weights."""

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")
F = torch.nn.functional


def import_torchvision() -> Any:
    """torchvision, also where its compiled operators do not fit the installed torch.

    Its wheel may be built for GPUs; on a CPU build of torch it then fails to describe operators
    (such as non-maximum suppression) that no classification network uses.
    """
    try:
        return pytest.importorskip("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        register_fake = torch.library.register_fake

        def without_torchvision(name, *args, **kwargs):
            if str(name).startswith("torchvision::"):
                return lambda function: function
            return register_fake(name, *args, **kwargs)

        torch.library.register_fake = without_torchvision
        try:
            import torchvision
        finally:
            torch.library.register_fake = register_fake
    return torchvision


torchvision = import_torchvision()


def torchvision_network(name: str, **options: Any) -> torch.nn.Module:
    """torchvision's network in evaluation mode, every number in it random."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None, **options).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        if getattr(module, "bias", None) is not None:
            module.bias.data.normal_(0, 0.1)
    return network


class TorchLayers:
    """The layers of a network in PyTorch, with the numbers of Flax `variables`.

    Each takes the name of a layer, `"stage1_block1/conv1"`, and maps `(batch, channels, height,
    width)`.
    """

    def __init__(self, variables: dict[str, Any]) -> None:
        self.unused = {"/".join(path[1:]) for path in flatten_dict(variables)}
        self._values = {
            "/".join(path[1:]): torch.from_numpy(np.array(leaf))
            for path, leaf in flatten_dict(variables).items()
        }

    def _get(self, name: str) -> torch.Tensor | None:
        self.unused.discard(name)
        return self._values.get(name)

    def has(self, name: str) -> bool:
        return any(key.startswith(f"{name}/") for key in self._values)

    def conv(self, name: str, x: torch.Tensor, stride=1, padding=0, groups=1, dilation=1):
        kernel = self._values[f"{name}/kernel"].permute(3, 2, 0, 1)
        self.unused.discard(f"{name}/kernel")
        bias = self._get(f"{name}/bias")
        return F.conv2d(x, kernel, bias, stride, padding, dilation, groups)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        mean, var, scale, bias = (
            self._get(f"{name}/{leaf}") for leaf in ("mean", "var", "scale", "bias")
        )
        return F.batch_norm(x, mean, var, scale, bias, training=False, eps=1e-5)

    def dense(self, name: str, x: torch.Tensor) -> torch.Tensor:
        kernel = self._values[f"{name}/kernel"]
        self.unused.discard(f"{name}/kernel")
        return F.linear(x, kernel.T, self._get(f"{name}/bias"))


def to_torch(images: np.ndarray) -> torch.Tensor:
    """NHWC -> NCHW."""
    return torch.from_numpy(np.ascontiguousarray(np.transpose(images, (0, 3, 1, 2))))
