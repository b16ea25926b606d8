"""Configs of runs and studies: typed, and checked when read, since a file may be untrusted."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import msgspec

from flaxnets.data.batches import Augmentation, Preprocess
from flaxnets.data.datasets import ARRAYS
from flaxnets.decoding import Count, Positive, decode, encode
from flaxnets.errors import InputError
from flaxnets.training.recipes import Recipe

# No `namespace:name`: TFDS would fetch and run community code for it.
DATASET_NAME = re.compile(r"\w[\w.+-]*(/[\w.+-]+)?(:[\d.]+)?")

DEEPEST = 1202  # the paper's deepest; building deeper networks takes minutes

Family = Literal["cifar", "imagenet"]
Shortcut = Literal["A", "B", "C"]
Stem = Literal["imagenet", "small"]
Precision = Literal["float32", "bfloat16"]
DTYPES: Mapping[Precision, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# A plain name or `module:function`, safe to print and draw.
Name = Annotated[str, msgspec.Meta(pattern=r"^[\w.:]{1,200}\Z")]


def is_depth(depth: int) -> bool:
    """Return whether a stored depth is plausible."""
    # Early runs of alexnet2012 have the year as their depth.
    return depth <= DEEPEST or depth == 2012


def is_network(name: str) -> bool:
    """Return whether the numbers in the network name `name` allow it to be built."""
    return all(
        number.isascii() and len(number) < 10 and is_depth(int(number))
        for number in re.findall(r"\d+", name)
    )


@dataclass(frozen=True)
class ModelConfig:
    """A network: one of the library by `name`, or one that the user's `build` makes.

    Attributes:
      num_classes: width of the logits.
      name: name for `flaxnets.create_model`, or None.
      overrides: attributes of the library's module that differ from the named network's.
      build: `module:function` of a custom network, or None. Only the user's own code imports it.
    """

    num_classes: Count
    name: Name | None = None
    overrides: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    build: Name | None = None

    def __post_init__(self) -> None:
        if (self.name is None) == (self.build is None):
            raise InputError("a model has either a name or a build")
        if self.name is not None and not is_network(self.name):
            raise InputError(f"model {self.name} cannot be built")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """The data that a run was trained on.

    Attributes:
      name: a TFDS data set, or `folder:PATH` as it was typed.
      path: absolute path of a folder, which may have moved since.
      sha256: digest of all images and labels, or of a stream's files; it identifies the data.
      streamed: whether pictures were read from storage in every epoch.
      validation_examples: number of training images held out.
    """

    name: str
    version: str
    train_examples: Count
    test_examples: Count
    sha256: str
    path: str | None = None
    streamed: bool = False
    validation_examples: Count = 0

    @property
    def is_folder(self) -> bool:
        return self.name.startswith("folder:")

    @property
    def can_be_opened(self) -> bool:
        """Return whether the name is a folder's or a TFDS data set's, and safe to open."""
        if self.is_folder:
            return self.name != "folder:"
        return self.version != ARRAYS and DATASET_NAME.fullmatch(self.name) is not None


@dataclass(frozen=True)
class InitFrom:
    """Origin of a run's initial weights.

    `digest` is a sha256, or names the step in early runs and in diagnostics.
    """

    path: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The settings of a study, apart from its grid.

    Attributes:
      family, shortcut, stem: how depth becomes a network; None for a run outside a study.
      evaluate_every: number of epochs from one evaluation to the next. It changes no result.
    """

    family: Family | None = None
    shortcut: Shortcut | None = None
    stem: Stem | None = None
    precision: Precision
    dataset: DatasetConfig
    augmentation: Augmentation
    recipe: Recipe
    evaluate_every: Positive = 1


@dataclass(frozen=True, kw_only=True)
class RunConfig(StudyConfig):
    """Everything needed to build a run's network, preprocessing and recipe again.

    Attributes:
      kind: `plain`, `residual`, or the name of a network or of a builder.
      depth: number of weighted layers.
      blocks: number of blocks in each stage, empty if there are no stages.
      block: type of block, or None.
      parameters: number of parameters.
      class_names: class names of the logits, in order.
      total_steps: number of updates of the whole run.
      freeze_backbone: whether only the classifier is trained.
      patience: epochs without a lower validation error after which the run ends, or None.
    """

    kind: Name
    depth: Count
    seed: Count
    model: ModelConfig
    blocks: tuple[Count, ...]
    block: Name | None
    parameters: Count
    class_names: tuple[str, ...]
    preprocess: Preprocess
    total_steps: Count
    freeze_backbone: bool = False
    patience: Positive | None = None
    init_from: InitFrom | None = None

    def __post_init__(self) -> None:
        if not is_depth(self.depth):
            raise InputError(f"depth {self.depth} is more than {DEEPEST}")

    @property
    def key(self) -> tuple[str, int, int]:
        """Kind, depth and seed, which identify a run within its study."""
        return self.kind, self.depth, self.seed

    @property
    def study(self) -> StudyConfig:
        """The part that all runs of a study share."""
        return StudyConfig(**{each.name: getattr(self, each.name) for each in fields(StudyConfig)})


def read_config(value: object) -> RunConfig:
    """Decode the config of a run.

    Raises:
      InputError: `value` is not such a config; the message names the field.
    """
    return decode(RunConfig, upgrade(value), "its config")


def upgrade(value: object) -> object:
    """Return the config that an earlier version stored in today's form."""
    if not isinstance(value, dict):
        return value
    recipe, start = value.get("recipe"), value.get("init_from")
    if isinstance(recipe, dict) and isinstance(augment := recipe.get("augment"), bool):
        value = {**value, "recipe": {**recipe, "augment": "default" if augment else "none"}}
    if isinstance(start, dict) and start.keys() == {"run", "step", "images"}:
        digest = f"step {start['step']}, {start['images']} images"
        value = {**value, "init_from": {"path": start["run"], "digest": digest}}
    return value


def comparable(config: StudyConfig) -> dict[str, Any]:
    """Return the part of a config, as JSON data, that must match for a run to be resumed.

    Evaluation leaves training alone, so a run may be resumed with another `evaluate_every`.
    A folder of pictures, or the weights that a run started from, may have moved: their sha256
    identifies them.
    """
    value = encode(config)
    del value["evaluate_every"]
    if config.dataset.is_folder:
        del value["dataset"]["name"], value["dataset"]["path"]
    if isinstance(config, RunConfig):
        start = config.init_from
        if start is not None and re.fullmatch(r"[0-9a-f]{64}", start.digest):
            del value["init_from"]["path"]
        if config.model.name == config.kind != "alexnet2012":
            # The name determines the depth, which is 0 in early runs if it contains no number.
            del value["depth"]
    return value
