"""From a run directory back to a network that can be used."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxnets.data.batches import Preprocess
from flaxnets.errors import InputError
from flaxnets.models import create_model
from flaxnets.parallel import data_mesh, replicated
from flaxnets.training.checkpoints import Checkpoints

Build = Callable[[int, int, Any], nn.Module]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Restored:
    """A trained network: `model.apply(variables, preprocess(images), train=False)` -> logits.

    Attributes:
      model: the Linen module.
      variables: `params` and `batch_stats`, on every device.
      config: the run's `config.json`.
      step: updates done when the checkpoint was written.
      class_names: of the logits, in order.
      preprocess: uint8 images `(batch, height, width, channels)` -> normalised float32.
    """

    model: nn.Module
    variables: dict[str, Any]
    config: dict[str, Any]
    step: int
    class_names: tuple[str, ...]
    preprocess: Preprocess


def build_model(config: dict[str, Any], build: Build | None = None) -> nn.Module:
    """The network that a run's `config.json` describes; `build` makes one of the user's own."""
    dtype = DTYPES[config["precision"]]
    model = config["model"]
    if "build" in model:
        if build is None:
            raise InputError(
                f"this run's network was built by {model['build']}; "
                "pass that function: restore(path, build=...)"
            )
        return build(config["depth"], model["num_classes"], dtype)
    return create_model(model["name"], model["num_classes"], dtype=dtype, **model["overrides"])


def restore(path: str | Path, build: Build | None = None) -> Restored:
    """Load the newest checkpoint of a run, on any number of devices.

    Args:
      path: a run directory, such as `runs/degradation/digits-cifar/residual-56/seed-0`.
      build: `build(depth, num_classes, dtype)` for a network of one's own; nothing that a file
        names is ever imported or run.

    Raises:
      InputError: `path` is not a run directory, has no checkpoint, or needs `build`.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        runs = sorted(str(found.parent) for found in path.glob("*/seed-*/config.json"))
        hint = f"; its runs are {', '.join(runs)}" if runs else " (it has no config.json)"
        raise InputError(f"{path} is not a run directory{hint}")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if not (path / "checkpoints").is_dir():
        raise InputError(f"{path} has no checkpoint yet")

    model = build_model(config, build)
    preprocess = Preprocess(**{k: tuple(v) for k, v in config["preprocess"].items()})
    images = jnp.zeros((1, *preprocess.image_shape), jnp.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    sharding = replicated(data_mesh())
    like = {
        collection: jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes.get(collection, {}),
        )
        for collection in ("params", "batch_stats")
    }
    with Checkpoints(path, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise InputError(f"{path} has no checkpoint yet")
        variables = checkpoints.restore_variables(like)
    return Restored(
        model=model,
        variables=variables,
        config=config,
        step=step,
        class_names=tuple(config["class_names"]),
        preprocess=preprocess,
    )
