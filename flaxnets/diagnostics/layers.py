"""Names of layers and blocks, and the signals between them.

Layers and blocks are named as in `params`, joined by `/`, in the order in which an image passes
them. Networks are version 1 of `flaxnets.models.resnet`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from flaxnets.models.resnet import zero_padded_identity

Variables = Mapping[str, Any]
# Input and output of modules by name; the network itself has the empty name.
Signals = dict[str, tuple[jax.Array, jax.Array]]


def layer_names(params: Mapping[str, Any]) -> list[str]:
    """List the weighted layers on the longest path, which has no shortcuts."""
    names = [
        "/".join(entry.key for entry in path[:-1])
        for path, _ in jax.tree.leaves_with_path(params)
        if len(path) > 1 and path[-1].key == "kernel" and path[-2].key[:8] != "shortcut"
    ]

    def place(name: str) -> tuple[bool, list[int]]:
        return name == "head", [int(number) for number in re.findall(r"\d+", name)]

    return sorted(names, key=place)


def block_names(params: Mapping[str, Any]) -> list[str]:
    """List the blocks, `stage1_block1` first."""
    return list(dict.fromkeys(name.split("/")[0] for name in layer_names(params)[1:-1]))


def find_layer(tree: Mapping[str, Any], name: str) -> Any:
    """Return the subtree of the layer `name`."""
    for part in name.split("/"):
        tree = tree[part]
    return tree


def watch_modules(
    model: nn.Module,
    variables: Variables,
    images: jax.Array,
    change: Callable[[str, Signals, Any], Any] = lambda name, seen, output: output,
) -> Signals:
    """Return the input and output of every module in evaluation mode.

    Args:
      change: called with the name of a module, the signals seen so far and the module's output;
        returns the output to pass on instead.
    """
    seen: Signals = {}

    def look(call: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output = call(*args, **kwargs)
        if context.method_name != "__call__":
            return output
        name = "/".join(context.module.path)
        seen[name] = (args[0], output)
        seen[name] = (args[0], change(name, seen, output))
        return seen[name][1]

    with nn.intercept_methods(look):
        model.apply(dict(variables), images, train=False)
    return seen


def shortcut_output(seen: Signals, block: str, like: jax.Array) -> jax.Array:
    """Return the output of a block's shortcut, with the shape of `like`.

    A plain block gets the parameter-free shortcut A. `seen` is returned by `watch_modules`.
    """
    projection = seen.get(f"{block}/shortcut_bn")
    if projection is not None:
        return projection[1]
    x = seen[block][0]
    return zero_padded_identity(x, like.shape[-1], -(-x.shape[1] // like.shape[1]))
