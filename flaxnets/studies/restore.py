"""From a run directory back to a network that can be used."""

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
from flaxnets.studies.config import DTYPES, check_config
from flaxnets.training.checkpoints import Checkpoints, read_newest
from flaxnets.training.loop import find_mismatch, read_rows

RUNS_NAMED = 10  # in an error
Build = Callable[[int, int, Any], nn.Module]


@dataclass(frozen=True)
class Restored:
    """A trained network: `model.apply(variables, preprocess(images), train=False)` -> logits.

    Attributes:
      model: the Linen module.
      variables: `params` and `batch_stats`, on every device.
      config: the run's, as the checkpoint has it.
      step: updates done when the checkpoint was written, which is the checkpoint's name.
      class_names: of the logits, in order.
      preprocess: uint8 images `(batch, height, width, channels)` -> normalised float32.
    """

    model: nn.Module
    variables: dict[str, Any]
    config: dict[str, Any]
    step: int
    class_names: tuple[str, ...]
    preprocess: Preprocess

    def __repr__(self) -> str:
        # Without the arrays of `variables`, which would fill a notebook.
        kind, depth = self.config["kind"], self.config["depth"]
        network = kind if kind == self.config["model"].get("name") else f"{kind}-{depth}"
        return (
            f"Restored({network} of seed {self.config['seed']}, "
            f"step {self.step}, {self.config['parameters']:,} parameters, "
            f"{len(self.class_names)} classes)"
        )


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


def restore(
    path: str | Path, build: Build | None = None, which: Literal["latest", "best"] = "latest"
) -> Restored:
    """Load the newest good checkpoint of a run, on any number of devices.

    Everything comes from that checkpoint, whose files are compared with their sha256 first; where
    newer ones are damaged, a `DamageWarning` says so, and `.step` is the one that was used.

    Args:
      path: a run directory, such as `runs/degradation/digits-cifar/residual-56/seed-0`.
      build: `build(depth, num_classes, dtype)` for a network of one's own; nothing that a file
        names is ever imported or run.
      which: `best` for the state at the lowest validation error, where a run has kept it.

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
    """Refuse a best state of another run than the one whose checkpoints stand beside it."""

    def read(latest: Checkpoints) -> str | None:
        if latest.step is None:
            return None
        return find_mismatch(best, latest.read_config(), read_rows(latest))

    if reason := read_newest(path, read):
        raise InputError(f"{best.directory} does not belong to this run: {reason}; move it away")


def _restore(checkpoints: Checkpoints, build: Build | None) -> Restored:
    config = checkpoints.read_config()
    check_config(config)
    preprocess = preprocess_of(config)
    images = jax.ShapeDtypeStruct((1, *preprocess.input_shape), jnp.float32)
    sharding = replicated(data_mesh())
    try:
        model = unscanned(build_model(config, build))
        shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    except InputError:
        raise
    except Exception as error:  # a config of a stranger's may say anything of a network
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
        class_names=tuple(config["class_names"]),
        preprocess=preprocess,
    )


def preprocess_of(config: dict[str, Any]) -> Preprocess:
    """What a run's `config.json` says is done to images."""
    stored = config["preprocess"]
    return Preprocess(
        image_shape=tuple(stored["image_shape"]),
        mean=tuple(stored["mean"]),
        std=tuple(stored["std"]),
        size=stored["size"],
    )


def _why_nothing(path: Path, damage: list[str], which: Literal["latest", "best"]) -> str:
    if which == "best" and (path / "config.json").is_file():
        measured = read_newest(path, _has_measured_validation)
        if damage:
            why = f"has lost its best state: {'; '.join(damage)}"
        elif measured:
            why = "has lost its best state: there is none in best/"
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
        for pattern in ("seed-*", "*/seed-*")  # of one network, of a whole study
        for found in path.glob(f"{pattern}/config.json")
    )
    if not runs:
        return f"{path} is not a run directory (it has no config.json)"
    more = f" and {len(runs) - RUNS_NAMED} more" if len(runs) > RUNS_NAMED else ""
    return f"{path} is not a run directory; its runs are {', '.join(runs[:RUNS_NAMED])}{more}"


def _has_measured_validation(checkpoints: Checkpoints) -> bool | None:
    """Whether an epoch of the run has a validation error; None for a run without validation."""
    if checkpoints.step is None:
        return False
    if any("validation_error" in row for row in read_rows(checkpoints)):
        return True
    dataset = checkpoints.read_config().get("dataset")
    held_out = dataset.get("validation_examples") if isinstance(dataset, dict) else None
    return False if held_out else None
