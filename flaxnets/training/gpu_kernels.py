"""Fewer kernels in a train step on GPUs.

A small network on a large GPU is bound by the number of kernels that a step launches. For every
parameter, XLA launches kernels to transpose it into cuDNN's layout, to transpose its gradient back,
to check the gradient and to update the parameter. It merges element-wise operations on arrays of
equal shapes into one kernel, but only if they share an operand that is not a scalar. The functions
here add such an operand: a factor of 1, which changes no bit. `experiments/count_kernels.py` shows
the number of kernels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

# XLA fuses at most 96 operands into one kernel.
LARGEST_GROUP = 90


def is_on_gpu(mesh: Mesh) -> bool:
    """Return whether the devices of `mesh` are GPUs."""
    return mesh.devices.flat[0].platform in ("gpu", "cuda", "rocm")


def share_conversions(params: Any, dtype: Any) -> Any:
    """Return `params`, so that the convolution kernels of one shape are converted together.

    XLA transposes them and casts them to `dtype`, that of the computation.
    """
    one = _opaque_one()

    def convert(leaf: jax.Array) -> jax.Array:
        # Without a cast, XLA would move the factor behind the reversal of the kernel for the
        # gradient of the input, and do both once more.
        scaled = _scale(leaf, one)
        return lax.optimization_barrier(scaled) if leaf.dtype == dtype else scaled

    return jax.tree.map(lambda leaf: convert(leaf) if leaf.ndim == 4 else leaf, params)


def share_updates(gradients: Any) -> tuple[Any, jax.Array]:
    """Return `gradients`, so that arrays of one shape are updated together, and whether all of them
    are finite.
    """
    leaves, tree = jax.tree.flatten(gradients)
    one = _opaque_one()
    leaves = [_scale(leaf, one) if leaf.ndim == 4 else leaf for leaf in leaves]
    finite = []
    for group in _groups(leaves):
        # No update can start before all gradients are there. Otherwise XLA copies the parameters
        # that it would overwrite too early.
        flat = jnp.concatenate([leaves[i].ravel() for i in group])
        flat = lax.optimization_barrier(flat)
        finite.append(jnp.isfinite(flat).all())
        start = 0
        for i in group:
            end = start + leaves[i].size
            leaves[i] = flat[start:end].reshape(leaves[i].shape)
            start = end
    one = _opaque_one(*finite)
    leaves = [_scale(leaf, one) for leaf in leaves]
    return jax.tree.unflatten(tree, leaves), jnp.stack(finite).all()


def _opaque_one(*after: jax.Array) -> jax.Array:
    """Return 1 as an element of a vector that XLA cannot simplify, computed later than `after`."""
    return lax.optimization_barrier((jnp.ones(2), *after))[0][0]


def _scale(leaf: jax.Array, one: jax.Array) -> jax.Array:
    return leaf * one.astype(leaf.dtype)


def _groups(leaves: list[jax.Array]) -> list[list[int]]:
    """Return the indices of `leaves` in groups of one dtype."""
    groups: list[list[int]] = []
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
        same = [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
        groups += [same[i : i + LARGEST_GROUP] for i in range(0, len(same), LARGEST_GROUP)]
    return groups
