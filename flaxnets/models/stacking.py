"""Parameters of scanned blocks: stacked for computation, separate everywhere else."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

STACKED = re.compile(r"stage\d+_blocks")


def unscanned(model: nn.Module) -> nn.Module:
    """Return the same network without scanned blocks."""
    return model.clone(scan_blocks=False) if is_scanned(model) else model


def is_scanned(model: nn.Module) -> bool:
    """Return whether the network has stacked parameters."""
    return getattr(model, "scan_blocks", False)


def stack_blocks(tree: Any) -> Any:
    """Convert variables of a `ResNet` to those of one with `scan_blocks=True`.

    In every dictionary of `tree` (variables, optimizer state, train state), the entries
    `stage<i>_block2`, `stage<i>_block3` ... become one, `stage<i>_blocks`, with their arrays
    stacked along a new leading axis.
    """

    def stack(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        others, stages = {}, {}
        for name, child in node.items():
            found = re.fullmatch(r"(stage\d+_block)(\d+)", name)
            if found and found[2] != "1":
                stages.setdefault(f"{found[1]}s", {})[int(found[2])] = child
            else:
                others[name] = stack(child)
        for name, blocks in stages.items():
            in_order = [blocks[number] for number in sorted(blocks)]
            others[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *in_order)
        return others

    return jax.tree.map(stack, tree, is_leaf=lambda node: isinstance(node, dict))


def unstack_blocks(tree: Any) -> Any:
    """Undo `stack_blocks`; a tree without stacked blocks is returned as it is."""

    def unstack(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        others = {}
        for name, child in node.items():
            if not STACKED.fullmatch(name):
                others[name] = unstack(child)
                continue
            for number in range(len(jax.tree.leaves(child)[0])):
                block = f"{name.removesuffix('s')}{number + 2}"
                others[block] = jax.tree.map(lambda leaf, n=number: leaf[n], child)
        return others

    paths = (jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree))
    if not any(STACKED.search(path) for path in paths):
        return tree
    return jax.tree.map(unstack, tree, is_leaf=lambda node: isinstance(node, dict))
