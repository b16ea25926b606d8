"""Restoring trained networks from run directories."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxnets.data.batches import Preprocess
from flaxnets.errors import InputError
from flaxnets.models import create_model
from flaxnets.models.stacking import unscanned
from flaxnets.parallel import data_mesh, replicated
from flaxnets.training.checkpoints import Checkpoints, read_newest
from flaxnets.training.config import DTYPES, RunConfig
from flaxnets.training.loop import find_mismatch

RUNS_NAMED = 10  # most runs listed in an error message
Build = Callable[[int, int, Any], nn.Module]


@dataclass(frozen=True)
class Restored:
    """A trained network: `model.apply(variables, preprocess(images), train=False)` -> logits.

    Attributes:
      model: the Linen module.
      variables: `params` and `batch_stats`, on every device.
      config: the run's config, as stored in the checkpoint.
      step: number of updates done, which is the checkpoint's name.
      class_names: class names of the logits, in order.
      preprocess: uint8 images `(batch, height, width, channels)` -> normalised float32.
    """

    model: nn.Module
    variables: dict[str, Any]
    config: RunConfig
    step: int
    class_names: tuple[str, ...]
    preprocess: Preprocess

    def __repr__(self) -> str:
        # Leave out `variables`, whose arrays would flood a notebook.
        config = self.config
        in_study = config.kind != config.model.name
        network = f"{config.kind}-{config.depth}" if in_study else config.kind
        return (
            f"Restored({network} of seed {config.seed}, "
            f"step {self.step}, {config.parameters:,} parameters, "
            f"{len(self.class_names)} classes)"
        )


def build_model(config: RunConfig, build: Build | None = None) -> nn.Module:
    """Build the network that a run's config describes; `build` makes a custom one."""
    dtype, model = DTYPES[config.precision], config.model
    if model.name is not None:
        return create_model(model.name, model.num_classes, dtype=dtype, **model.overrides)
    if build is None:
        raise InputError(
            f"this run's network was built by {model.build}; "
            "pass that function: restore(path, build=...)"
        )
    return build(config.depth, model.num_classes, dtype)


def restore(
    path: str | Path, build: Build | None = None, which: Literal["latest", "best"] = "latest"
) -> Restored:
    """Load the newest good checkpoint of a run, on any number of devices.

    Everything comes from that checkpoint, whose files are first checked against their sha256. If
    newer checkpoints are damaged, there is a `DamageWarning`, and `.step` is the step restored.

    Args:
      path: a run directory, such as `runs/degradation/digits-cifar/residual-56/seed-0`.
      build: `build(depth, num_classes, dtype)` for a custom network; nothing that a file names is
        ever imported or run.
      which: `best` for the state with the lowest validation error, if the run has kept it.

    Raises:
      InputError: `path` is not a run directory, has no good checkpoint, or needs `build`.
    """
    path = Path(path)

    def read(checkpoints: Checkpoints) -> Restored:
        if checkpoints.step is None:
            raise InputError(_why_nothing(path, checkpoints.damage, which))
        checkpoints.warn_of_damage("")
        if which == "best":
            _check_best(path, checkpoints)
        try:
            return _restore(checkpoints, build)
        except InputError as error:
            raise InputError(f"checkpoint {checkpoints.step} of {path}: {error}") from error

    return read_newest(path, read, "best" if which == "best" else "checkpoints")


def _check_best(path: Path, best: Checkpoints) -> None:
    """Check that the best state belongs to the run whose checkpoints are next to it."""

    def read(latest: Checkpoints) -> str | None:
        if latest.step is None:
            return None
        return find_mismatch(best, latest.read_config(), latest.read_result().rows)

    if reason := read_newest(path, read):
        raise InputError(f"{best.directory} does not belong to this run: {reason}; move it away")


def _restore(checkpoints: Checkpoints, build: Build | None) -> Restored:
    config = checkpoints.read_config()
    images = jax.ShapeDtypeStruct((1, *config.preprocess.input_shape), jnp.float32)
    sharding = replicated(data_mesh())
    try:
        model = unscanned(build_model(config, build))
        shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    except InputError:
        raise
    except Exception as error:  # an untrusted config may describe any network
        raise InputError(f"its network cannot be built: {type(error).__name__}: {error}") from error
    like = {
        collection: jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes.get(collection, {}),
        )
        for collection in ("params", "batch_stats")
    }
    variables = checkpoints.restore_variables(like)
    assert checkpoints.step is not None
    return Restored(
        model=model,
        variables=variables,
        config=config,
        step=checkpoints.step,
        class_names=config.class_names,
        preprocess=config.preprocess,
    )


def _why_nothing(path: Path, damage: list[str], which: Literal["latest", "best"]) -> str:
    if which == "best" and (path / "config.json").is_file():
        measured = read_newest(path, _has_measured_validation)
        if damage:
            why = f"has lost its best state: {'; '.join(damage)}"
        elif measured:
            why = "has lost its best state: best/ has no checkpoint"
        elif measured is None:
            return f"{path} has no best checkpoint: it was trained without --validation"
        else:
            return f"{path} has no best checkpoint yet: no epoch has been measured"
        return f"{path} {why}; use the latest one, or train again with another --out"
    if damage:
        return f"{path} has no good checkpoint: {'; '.join(damage)}"
    if (path / "config.json").is_file():
        return f"{path} has no checkpoint yet"
    runs = sorted(
        str(found.parent)
        for pattern in ("seed-*", "*/seed-*")  # runs of one network, or of a whole study
        for found in path.glob(f"{pattern}/config.json")
    )
    if not runs:
        return f"{path} is not a run directory (it has no config.json)"
    more = f" and {len(runs) - RUNS_NAMED} more" if len(runs) > RUNS_NAMED else ""
    return f"{path} is not a run directory; its runs are {', '.join(runs[:RUNS_NAMED])}{more}"


def _has_measured_validation(checkpoints: Checkpoints) -> bool | None:
    """Return whether the run has measured a validation error, or None if it has no validation."""
    if checkpoints.step is None:
        return False
    if "validation_error" in checkpoints.read_result().columns:
        return True
    return False if checkpoints.read_config().dataset.validation_examples else None
