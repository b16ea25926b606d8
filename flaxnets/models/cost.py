"""Layers and cost of a network, counted from shapes alone."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxnets.models.stacking import unscanned


class Cost(NamedTuple):
    """Trainable parameters, and multiply-adds of one image's forward pass.

    Multiply-adds are those of convolutions and dense layers, including taps on the padding, as in
    the paper's Table 1.
    """

    parameters: int
    multiply_adds: int

    @property
    def work(self) -> int:
        """Multiply-adds, or the number of parameters if that is larger; at least 1."""
        return max(self.multiply_adds, self.parameters, 1)


class LayerCost(NamedTuple):
    """A layer with parameters, or a block of such layers.

    Attributes:
      path: names of the enclosing modules and the layer, outermost first.
      kind: description such as `3x3 conv, 64, /2`, with the filters and the stride.
      input_shape, output_shape: shapes without the batch axis.
      cost: parameters and multiply-adds of the layer itself; 0 for a block.
    """

    path: tuple[str, ...]
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    cost: Cost


def list_layers(model: nn.Module, image_shape: tuple[int, ...]) -> list[LayerCost]:
    """List the layers of `model` on images `(height, width, channels)`, in order of execution."""
    return [layer for layer in list_modules(model, image_shape) if layer.cost.parameters]


def list_modules(model: nn.Module, image_shape: tuple[int, ...]) -> list[LayerCost]:
    """List the layers as `list_layers` does, and each block after its layers."""
    return _trace(unscanned(model), image_shape)[0]


def count_cost(model: nn.Module, image_shape: tuple[int, ...], num_classes: int) -> Cost:
    """Count the cost of `model` on images `(height, width, channels)`.

    Raises:
      ValueError: the output is not logits `(batch, num_classes)` in training or evaluation mode.
    """
    model = unscanned(model)
    layers, logits, variables = _trace(model, image_shape)
    key, images = jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    trained = jax.eval_shape(
        lambda variables, images: model.apply(
            variables, images, train=True, mutable=True, rngs={"dropout": key}
        ),
        variables,
        images,
    )[0]
    for output in (logits, trained):
        if output.shape != (1, num_classes):
            raise ValueError(f"gives {output.shape}, not logits (1, {num_classes}), for one image")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return Cost(parameters, sum(layer.cost.multiply_adds for layer in layers))


def count_depth(model: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Count the weighted layers (convolutions and dense layers) on the longest path of `model`
    from images `(height, width, channels)` to its output.

    Networks are named by this depth: it is 20 for `cifar_resnet20` and 8 for AlexNet. For `ynet`,
    with two parallel branches of three layers, it is 4.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(
        lambda images: model.init(jax.random.key(0), images, train=False), images
    )
    apply = jax.make_jaxpr(lambda *args: model.apply(*args, train=False))
    return _longest_path(apply(variables, images).jaxpr)


def _longest_path(jaxpr: Any) -> int:
    """Count the convolutions and dense layers on the longest path through `jaxpr`."""
    passed: dict[Any, int] = {}
    for equation in jaxpr.eqns:
        # Literals, which have a `val`, have passed no layer and cannot be keys.
        before = [passed.get(v, 0) for v in equation.invars if not hasattr(v, "val")]
        weighted = equation.primitive.name in ("conv", "conv_general_dilated", "dot_general")
        parts = jax.tree.leaves(equation.params, is_leaf=lambda part: hasattr(part, "eqns"))
        inside = [_longest_path(part) for part in parts if hasattr(part, "eqns")]
        times = equation.params.get("length", 1)  # iterations of a scan
        for output in equation.outvars:
            passed[output] = max(before, default=0) + weighted + times * max(inside, default=0)
    return max(passed.values(), default=0)


def _trace(model: nn.Module, image_shape: tuple[int, ...]):
    """Trace `model`; return its layers and the shapes of its output and variables."""
    layers: list[LayerCost] = []

    def record(next_method, args, kwargs, context):
        output = next_method(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and module.path:
            parameters = module.variables.get("params", {})
            own = [leaf for leaf in parameters.values() if not isinstance(leaf, Mapping)]
            multiply_adds = 0
            if isinstance(module, (nn.Conv, nn.Dense)):
                multiply_adds = output.size * parameters["kernel"].size // output.shape[-1]
            if parameters:
                cost = Cost(sum(leaf.size for leaf in own), multiply_adds)
                before, after = _shape((args, kwargs)), _shape(output)
                layers.append(LayerCost(module.path, _kind(module), before, after, cost))
        return output

    key, images = jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    keys = {"params": key, "dropout": key}
    with nn.intercept_methods(record):
        output, variables = jax.eval_shape(
            lambda images: model.init_with_output(keys, images, train=False), images
        )
    return layers, output, variables


def _shape(arrays: Any) -> tuple[int, ...]:
    """Return the shape of the first array, if any, without its batch axis."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(arrays) if hasattr(leaf, "shape")]
    return tuple(shapes[0][1:]) if shapes else ()


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Conv):
        kernel_size: Any = module.kernel_size
        kind = f"{'x'.join(map(str, kernel_size))} conv, {module.features}"
        for text, value in (
            (", /{}", module.strides),
            (", {} groups", module.feature_group_count),
            (", dilation {}", module.kernel_dilation),
        ):
            if value not in (None, 1, (1, 1)):
                kind += text.format(value)
        return kind
    if isinstance(module, nn.Dense):
        return f"dense, {module.features}"
    return {"BatchNorm": "batch norm"}.get(type(module).__name__, type(module).__name__)
