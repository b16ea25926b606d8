"""Import and export of PyTorch weights.

AlexNet, VGG and the ImageNet family of ResNets use torchvision's layout, which for ResNets is also
timm's. The CIFAR family uses the common one: `conv1`, `bn1`, `layer1.0.conv1` ... `linear`.
"""

import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxnets.errors import InputError
from flaxnets.files import write_atomic
from flaxnets.models import create_model, published_image_shape
from flaxnets.models.stacking import is_scanned, stack_blocks, unscanned, unstack_blocks
from flaxnets.models.vgg import VGGS

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
CLASSIFIER = ("dense1", "dense2", "head")
ALEXNET = {
    **{f"conv{i}": f"features.{j}" for i, j in enumerate((0, 3, 6, 8, 10), 1)},
    "dense1": "classifier.1",
    "dense2": "classifier.4",
    "head": "classifier.6",
}


class Entry(NamedTuple):
    """A leaf of `variables` and the tensor of a state dict that holds the same numbers."""

    path: tuple[str, ...]
    key: str
    leaf_shape: tuple[int, ...]
    shape: tuple[int, ...]  # shape of the tensor
    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray], np.ndarray]


def load_torch(
    name: str, weights: str | os.PathLike | Mapping[str, Any], **overrides: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """Create a network with the weights of its PyTorch counterpart.

    Args:
      name: `alexnet`, a VGG or a ResNet of version 1 (`resnet50`, `cifar_resnet20`).
      weights: a `.safetensors` file; a `.pth`, `.pt` or `.th` file, which needs torch and from
        which only tensors are ever unpickled; or a state dict of tensors or arrays. It may be
        nested under `state_dict` or `model`, and its names may start with `module.`
      overrides: module attributes, as in `create_model`. The numbers of classes and input channels
        come from the weights. Another `num_classes` keeps the backbone and initialises a new head
        (from seed 0), even if the weights have none; `num_classes=None` drops the classifier.

    Returns:
      The module, and the `variables` for its `apply` in the model's `param_dtype`. They have
      `params` and, with BatchNorm, `batch_stats`.

    Raises:
      InputError: the weights cannot be read or do not fit the network; the message names the
        entries.
    """
    layout = _layout(name)
    tensors, source = _read(weights)
    classes = overrides.pop("num_classes", ...)
    head, stem = (tensors.get(f"{layout(module)}.weight") for module in ("head", _stem(name)))
    for module, tensor, ndim in ((_stem(name), stem, 4), ("head", head, 2)):
        if module == "head" and tensor is None and classes is not ...:
            continue
        if tensor is None or tensor.ndim != ndim:
            what = "is missing" if tensor is None else f"has {tensor.ndim} dimensions, not {ndim}"
            raise InputError(
                f"{source} does not fit {name}: {layout(module)}.weight {what}; "
                f"it has {_some(list(tensors))}"
            )
    assert stem is not None
    old_classes = None if head is None else len(head)
    if classes is ...:
        classes = old_classes
    model: Any = create_model(name, classes, **overrides)
    entries = _entries(unscanned(model), layout, _image_shape(name, stem.shape[1]))

    replaced = classes is not None and classes != old_classes
    problems, found, used = [], {}, set()
    for entry in entries:
        used.add(entry.key)
        if replaced and entry.path[1] == "head":
            continue
        tensor = tensors.get(entry.key)
        if tensor is None:
            problems.append(f"{entry.key} is missing")
        elif tensor.shape != entry.shape:
            problems.append(f"{entry.key} is {tensor.shape}, not {entry.shape}")
        else:
            # A copy: the caller's tensors may change.
            found[entry.path] = jnp.array(entry.from_torch(tensor), model.param_dtype)
    dropped = CLASSIFIER if classes is None else ()
    for key in tensors:
        module = key.rpartition(".")[0]
        if key not in used and module not in map(layout, dropped):
            problems.append(f"{key} is unexpected")
    _refuse(problems, f"{source} does not fit {name}")
    variables = unflatten_dict(found)
    if replaced:
        variables["params"]["head"] = _new_head(model, _image_shape(name, stem.shape[1]))
    return model, stack_blocks(variables) if is_scanned(model) else variables


def save_torch(
    variables: Mapping[str, Any], name: str, path: str | os.PathLike, **overrides: Any
) -> None:
    """Write `variables` of the network `name` as `.safetensors` that PyTorch's network loads with
    `strict=True`: `model.load_state_dict(safetensors.torch.load_file(path))`.

    BatchNorm's batch counts, which Flax does not have, are written as 0.

    Args:
      variables: `params` and `batch_stats`.
      name: name of the network, as in `load_torch`.
      path: path of the file, which is written atomically.
      overrides: attributes that the network was created with, if they change its parameters.

    Raises:
      InputError: the network has no PyTorch counterpart, the variables do not belong to it, or
        `path` does not end in `.safetensors` or is not in an existing directory.
    """
    layout = _layout(name)
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"weights are written as .safetensors, not {path.name!r}")
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: give a file in a directory that exists")
    variables = unstack_blocks(variables)
    leaves: Any = flatten_dict(dict(variables)) if isinstance(variables, Mapping) else {}
    shapes = {path: np.shape(leaf) for path, leaf in leaves.items()}
    stem = shapes.get(("params", _stem(name), "kernel"), ())
    head = shapes.get(("params", "head", "bias"), ())
    if len(stem) != 4:
        raise InputError(f"these are not variables of {name}: no params/{_stem(name)}/kernel")
    overrides["num_classes"] = head[0] if head else None
    model = unscanned(create_model(name, **overrides))
    entries = _entries(model, layout, _image_shape(name, stem[2]))

    problems, tensors = [], {}
    for entry in entries:
        leaf = leaves.pop(entry.path, None)
        if leaf is None:
            problems.append(f"{'/'.join(entry.path)} is missing")
        elif np.shape(leaf) != entry.leaf_shape:
            shape = np.shape(leaf)
            problems.append(f"{'/'.join(entry.path)} is {shape}, not {entry.leaf_shape}")
        else:
            tensors[entry.key] = np.ascontiguousarray(entry.to_torch(np.asarray(leaf)))
            if entry.path[-1] == "mean":
                module = entry.key.rpartition(".")[0]
                tensors[f"{module}.num_batches_tracked"] = np.zeros((), np.int64)
    problems += [f"{'/'.join(map(str, path))} is unexpected" for path in leaves]
    _refuse(problems, f"these are not variables of {name}")
    write_atomic(path, safetensors.numpy.save(tensors, {"format": "pt"}))


def _layout(name: str) -> Callable[..., str]:
    """Return a function from the names of a Linen module, outermost first, to its torch name."""
    if name == "alexnet":
        return lambda *path: str(ALEXNET.get(path[0], path[0]))
    if name in VGGS and not name.endswith(("_lrn", "_1x1")):
        names = {"dense1": "classifier.0", "dense2": "classifier.3", "head": "classifier.6"}
        layer = 0
        for i, convolutions in enumerate(VGGS[name]["stage_sizes"], 1):
            for j in range(1, convolutions + 1):
                names[f"stage{i}_conv{j}"] = f"features.{layer}"
                names[f"stage{i}_bn{j}"] = f"features.{layer + 1}"
                layer += 3 if name.endswith("_bn") else 2
            layer += 1  # the pooling
        return lambda *path: str(names.get(path[0], path[0]))
    match = re.fullmatch(r"(cifar_)?resnet\d+", name)
    if match is None:
        raise InputError(
            f"no PyTorch layout is known for {name!r}: only for alexnet, vgg11, 13, 16, 19 "
            "(and _bn), resnet18 ... resnet152 and cifar_resnet<depth>"
        )
    head, shortcut = ("linear", "shortcut") if match[1] else ("fc", "downsample")

    def resnet(module: str, layer: str | None = None) -> str:
        if layer is None:
            return head if module == "head" else module
        stage, block = map(int, re.findall(r"\d+", module))
        layer = {"shortcut_conv": f"{shortcut}.0", "shortcut_bn": f"{shortcut}.1"}.get(layer, layer)
        return f"layer{stage}.{block - 1}.{layer}"

    return resnet


def _stem(name: str) -> str:
    return "stage1_conv1" if name.startswith("vgg") else "conv1"


def _image_shape(name: str, channels: int) -> tuple[int, int, int]:
    height, width, _ = published_image_shape(name)
    return height, width, channels


def _init(model: nn.Module, image_shape: tuple[int, int, int]) -> Any:
    return model.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False)


def _new_head(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, jax.Array]:
    # Under jit, nothing but the head is computed.
    return jax.jit(lambda: _init(model, image_shape)["params"]["head"])()


def _entries(
    model: nn.Module, layout: Callable[..., str], image_shape: tuple[int, int, int]
) -> list[Entry]:
    leaves: Any = flatten_dict(jax.eval_shape(lambda: _init(model, image_shape)))
    # Channels of the maps that `dense1` of AlexNet and VGG sees: they are flattened pixel by pixel
    # here, and channel by channel in torch.
    channels = [leaves[path].shape[-1] for path in sorted(leaves) if leaves[path].ndim == 4][-1]
    entries = []
    for path, leaf in leaves.items():
        modules, name = path[1:-1], path[-1]
        to_torch, from_torch = _same, _same
        if leaf.ndim == 4:
            to_torch, from_torch = _conv_to_torch, _conv_from_torch
        elif leaf.ndim == 2:
            maps = channels if modules == ("dense1",) else leaf.shape[0]
            to_torch, from_torch = _dense_to_torch(maps), _dense_from_torch(maps)
        shape = jax.eval_shape(to_torch, leaf).shape
        key = f"{layout(*modules)}.{LEAVES[name]}"
        entries.append(Entry(path, key, leaf.shape, shape, to_torch, from_torch))
    return entries


def _same(array: Any) -> Any:
    return array


def _conv_to_torch(kernel: Any) -> Any:
    return kernel.transpose(3, 2, 0, 1)


def _conv_from_torch(weight: Any) -> Any:
    return weight.transpose(2, 3, 1, 0)


def _dense_to_torch(channels: int) -> Callable[[Any], Any]:
    def convert(kernel: Any) -> Any:
        features, units = kernel.shape
        maps = kernel.reshape(features // channels, channels, units)
        return maps.transpose(2, 1, 0).reshape(units, features)

    return convert


def _dense_from_torch(channels: int) -> Callable[[Any], Any]:
    def convert(weight: Any) -> Any:
        units, features = weight.shape
        maps = weight.reshape(units, channels, features // channels)
        return maps.transpose(2, 1, 0).reshape(features, units)

    return convert


def _read(weights: str | os.PathLike | Mapping[str, Any]) -> tuple[dict[str, np.ndarray], str]:
    """Read tensors by name, without BatchNorm's batch counts; also return their source."""
    if isinstance(weights, Mapping):
        content, source = weights, "the state dict"
    elif isinstance(weights, str | os.PathLike):
        source = str(weights)
        content = _read_file(Path(weights))
    else:
        hint = "; give its state_dict()" if hasattr(weights, "state_dict") else ""
        raise InputError(
            f"weights must be a file or a state dict, not {type(weights).__name__}{hint}"
        )
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{source} holds no state dict")
    tensors = {}
    for key, value in content.items():
        if not hasattr(value, "shape"):
            raise InputError(
                f"{source} is not a state dict: {key!r} is a {type(value).__name__}, not a tensor"
            )
        key = str(key).removeprefix("module.")
        if key in tensors:
            raise InputError(f"{source} has {key} twice, with and without module.")
        if not key.endswith("num_batches_tracked"):
            tensors[key] = _to_numpy(key, value, source)
    return tensors, source


def _read_file(path: Path) -> Any:
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        try:
            return safetensors.numpy.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged or not a safetensors file: {error}") from error
        except (TypeError, AttributeError) as error:  # a type that NumPy lacks
            raise InputError(f"{path} holds tensors of an unsupported type: {error}") from error
    if path.suffix not in (".pth", ".pt", ".th"):
        raise InputError(
            f"weights must be a .safetensors, .pth, .pt or .th file, not {path.name!r}"
        )
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"reading {path} needs torch: pip install torch, or use weights as .safetensors"
        ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is damaged or holds Python objects besides tensors, which are never "
            "unpickled; save its state_dict() alone"
        ) from error
    except Exception as error:  # torch's reader raises many types
        raise InputError(
            f"{path} is damaged or was not written by torch.save ({type(error).__name__})"
        ) from error


def _to_numpy(key: str, tensor: Any, source: str) -> np.ndarray:
    try:
        if hasattr(tensor, "detach"):  # a torch tensor; NumPy has no bfloat16
            tensor = tensor.detach().cpu()
            tensor = tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor.numpy()
        array = np.asarray(tensor)
    except Exception as error:  # sparse, quantised, without data ...
        raise InputError(
            f"{source}: {key} cannot be read as an array ({type(error).__name__})"
        ) from error
    if not jnp.issubdtype(array.dtype, jnp.floating) or not array.size:
        raise InputError(
            f"{source}: {key} is {array.dtype} {array.shape}, not floating-point numbers"
        )
    return array


def _refuse(problems: Sequence[str], what: str) -> None:
    if problems:
        raise InputError(f"{what}: {_some(problems)}")


def _some(items: Sequence[str], most: int = 4) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
