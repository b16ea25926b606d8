"""What a network costs, counted from shapes; nothing is computed."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Cost(NamedTuple):
    """Trainable parameters, and multiply-adds of one image's forward pass.

    Multiply-adds are those of convolutions and dense layers, taps on the padding included, as in
    the paper's Table 1.
    """

    parameters: int
    multiply_adds: int

    @property
    def work(self) -> int:
        """Multiply-adds, or the parameters of a network of other layers; at least 1."""
        return max(self.multiply_adds, self.parameters, 1)


def count_cost(model: nn.Module, image_shape: tuple[int, ...], num_classes: int) -> Cost:
    """The cost of `model` on images `(height, width, channels)`.

    Raises:
      ValueError: the output is not logits `(batch, num_classes)`, in training mode or out of it.
    """
    multiply_adds = 0

    def count(next_method, args, kwargs, context):
        nonlocal multiply_adds
        output = next_method(*args, **kwargs)
        if isinstance(context.module, (nn.Conv, nn.Dense)) and context.method_name == "__call__":
            kernel = context.module.variables["params"]["kernel"]
            multiply_adds += output.size * kernel.size // kernel.shape[-1]
        return output

    key = jax.random.key(0)
    images = jnp.zeros((1, *image_shape), jnp.float32)
    with nn.intercept_methods(count):
        logits, variables = jax.eval_shape(
            lambda: model.init_with_output({"params": key, "dropout": key}, images, train=False)
        )
    trained = jax.eval_shape(
        lambda variables: model.apply(
            variables, images, train=True, mutable=True, rngs={"dropout": key}
        ),
        variables,
    )[0]
    for output in (logits, trained):
        if output.shape != (1, num_classes):
            raise ValueError(f"gives {output.shape}, not logits (1, {num_classes}), for one image")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return Cost(parameters, multiply_adds)
