"""Initial weights of a run: those of another run or of a PyTorch file."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxnets.data import Preprocess
from flaxnets.errors import InputError
from flaxnets.models.torch_weights import load_torch
from flaxnets.parallel import data_mesh, replicate
from flaxnets.studies.restore import restore
from flaxnets.training import RunConfig, TrainState
from flaxnets.training.config import InitFrom

HEAD = "head"


@dataclass(frozen=True)
class InitialWeights:
    """Weights to start a run from.

    Attributes:
      variables: `params` and `batch_stats`; None if their source is gone and no longer needed.
      keeps_head: whether the classes are the same, so that the classifier is kept.
      preprocess: that of the run they come from; None for PyTorch weights, which do not record it.
      origin: recorded in the config of the new run.
    """

    variables: dict[str, Any] | None
    keeps_head: bool
    preprocess: Preprocess | None
    origin: InitFrom


def read_initial_weights(
    path: Path, model: str, class_names: tuple[str, ...], begun: RunConfig | None
) -> InitialWeights:
    """Read the weights in `path`, a run directory or a PyTorch file of the network `model`.

    `begun` is the config of a run that has a checkpoint, and so no longer needs them.

    Raises:
      InputError: `path` does not exist or holds no such weights.
    """
    origin = begun.init_from if begun is not None else None
    no_longer_needed = None
    if begun is not None and origin is not None and origin.path == str(path):
        no_longer_needed = InitialWeights(None, True, begun.preprocess, origin)
    if no_longer_needed is not None and not path.exists():
        return no_longer_needed
    if path.is_dir():
        try:
            run = restore(path)
        except InputError:  # it may have lost its checkpoints
            if no_longer_needed is None:
                raise
            return no_longer_needed
        # Early runs recorded the step instead of a digest.
        former = InitFrom(str(path), f"step {run.step}")
        return InitialWeights(
            jax.device_get(run.variables),
            run.class_names == class_names,
            run.preprocess,
            former if origin == former else InitFrom(str(path), digest(run.variables)),
        )
    if not path.is_file():
        raise InputError(f"--init-from {path}: there is no such run directory or file")
    _, variables = load_torch(model, path, num_classes=len(class_names))
    of_file = hashlib.sha256(path.read_bytes()).hexdigest()
    # `load_torch` has made a new head if the classes differ.
    return InitialWeights(variables, True, None, InitFrom(str(path), of_file))


def digest(variables: dict[str, Any]) -> str:
    """Compute the sha256 of the names and values of all arrays."""
    sha256 = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(variables):
        sha256.update(jax.tree_util.keystr(path).encode())
        sha256.update(np.ascontiguousarray(leaf).data)
    return sha256.hexdigest()


def begin_from(
    start: InitialWeights, model: nn.Module, preprocess: Preprocess
) -> Callable[[TrainState], TrainState]:
    """Make a function that puts the initial weights into the first state of a run.

    Raises:
      InputError: the weights do not fit the network.
    """
    path, weights = start.origin.path, start.variables
    if weights is None:

        def refuse(state: TrainState) -> TrainState:
            raise InputError(f"--init-from {path} is gone, but this run has to restart from it")

        return refuse

    def fitted(params: Any, stats: Any) -> tuple[Any, Any]:
        return (
            require_matching_params(params, weights["params"], start.keeps_head, path),
            require_matching_params(stats, weights.get("batch_stats", {}), True, path),
        )

    def begin(state: TrainState) -> TrainState:
        params, stats = replicate(fitted(state.params, state.batch_stats), data_mesh())
        return state.replace(params=params, batch_stats=stats)

    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, *preprocess.input_shape)))
    )
    fitted(shapes["params"], shapes.get("batch_stats", {}))
    return begin


def require_matching_params(own: Any, other: Any, keeps_head: bool, path: str) -> Any:
    """Return the arrays of `other`, which must match `own` in names and shapes.

    Without `keeps_head`, the head comes from `own`.
    """
    if not keeps_head:
        other = {**other, HEAD: own[HEAD]}
    shapes = [
        {jax.tree_util.keystr(p): leaf.shape for p, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (own, other)
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        there, here = shapes[1].get(name), shapes[0].get(name)
        if there != here:
            raise InputError(
                f"--init-from {path} does not fit this network: {name} is {there} there and "
                f"{here} here; give weights of the same network and kind of images"
            )
    return other
