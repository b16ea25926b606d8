"""Recipes: everything about training that is neither the network nor the data."""

import inspect
import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from optax.contrib import ReduceLROnPlateauState, reduce_on_plateau

from flaxnets.data.batches import Augmentation
from flaxnets.data.crops import Crop
from flaxnets.errors import InputError

Optimizer = Literal["sgd", "adam"]
Decay = Literal["all", "kernels", "convolutions"]
Schedule = Literal["steps", "cosine", "plateau"]
Augment = Literal["default", "none", "keras", "resized-crop", "scaled-crop", "fixed-crop"]
CHOICES = {
    "optimizer": get_args(Optimizer),
    "decay": get_args(Decay),
    "schedule": get_args(Schedule),
    "augment": get_args(Augment),
}

# Pixels per side. The smallest networks halve their maps twice, and no published network takes
# images larger than 4096.
SMALLEST_IMAGE, LARGEST_IMAGE = 4, 4096


@dataclass(frozen=True)
class Recipe:
    """Optimizer, schedule, length and augmentation of a run.

    The schedule is given in fractions of the run, so that it scales with its length.

    Attributes:
      name: key in `RECIPES`.
      learning_rate: the rate after warm-up.
      batch_size: training examples per step, over all devices.
      steps: length of the run in updates; exactly one of `steps` and `epochs` is given.
      epochs: length of the run in epochs.
      optimizer: `sgd` (with momentum) or `adam`, both as PyTorch and Optax define them.
      momentum: momentum of SGD (no dampening).
      nesterov: whether SGD's momentum is Nesterov's.
      weight_decay: coefficient of coupled L2, which is added to the gradient before momentum or
        Adam and never part of a reported loss.
      decay: parameters with weight decay: `all`, `kernels` (no biases or BatchNorm parameters) or
        `convolutions` (their kernels only).
      schedule: `steps` multiplies the rate by `decay_factor` at each of `decay_at`; `cosine` takes
        it to 0 along half a cosine; `plateau` multiplies it by `decay_factor` once the validation
        loss has not fallen for `plateau_patience` epochs, down to `plateau_floor`.
      decay_at: fractions of the run at which the rate is lowered, such as 0.5,0.75.
      decay_factor: factor by which the rate is multiplied: one number for all of `decay_at`, or
        one for each.
      plateau_patience: epochs without a lower validation loss before the rate is lowered.
      plateau_floor: the lowest rate of a `plateau` schedule.
      warmup: fraction of the run spent on warm-up. With `cosine`, the rate rises from 0; otherwise
        it is held at `warmup_factor` of the learning rate.
      warmup_factor: the rate during warm-up, as a fraction of `learning_rate`.
      warmup_from_depth: smallest depth with warm-up.
      label_smoothing: share of the label's probability spread over all classes
        (Szegedy et al. 2015, arXiv:1512.00567, section 7).
      augment: `default` (that of the data set), `none`, `keras`, `resized-crop`, `scaled-crop` or
        `fixed-crop` (docs/data.md explains them).
      colour_noise: standard deviation of noise along the principal components of colour
        (Krizhevsky et al. 2012, section 4.1; 0.1 there).
      image_size: side in pixels that images are resized to. By default, images of one size keep
        it, and pictures of a folder or of different sizes get the network's published size.
    """

    name: str
    learning_rate: float
    batch_size: int = 128
    steps: int | None = None
    epochs: int | None = None
    optimizer: Optimizer = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay: Decay = "all"
    schedule: Schedule = "steps"
    decay_at: tuple[float, ...] = (0.5, 0.75)
    decay_factor: float | tuple[float, ...] = 0.1
    plateau_patience: int = 5
    plateau_floor: float = 0.0
    warmup: float = 0.0
    warmup_factor: float = 0.1
    warmup_from_depth: int = 0
    label_smoothing: float = 0.0
    augment: Augment = "default"
    colour_noise: float = 0.0
    image_size: int | None = None

    def __post_init__(self) -> None:
        def refuse(problem: str) -> None:
            raise InputError(f"recipe {self.name}: {problem}")

        if (self.steps is None) == (self.epochs is None):
            refuse("give either steps or epochs")
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                refuse(f"{field} must be one of {', '.join(choices)}, not {getattr(self, field)!r}")
        factors = self.decay_factor
        if isinstance(factors, tuple) and len(factors) != len(self.decay_at):
            refuse(f"decay_factor must be one number, or one per step ({len(self.decay_at)})")
        all_factors = factors if isinstance(factors, tuple) else (factors,)
        if any(not 0 < factor <= 1 for factor in all_factors):
            refuse("decay_factor must be above 0 and at most 1")
        if self.schedule == "plateau" and not (isinstance(factors, float) and 0 < factors < 1):
            refuse("decay_factor must be one number between 0 and 1 if the schedule is plateau")
        if any(not 0 < at < 1 for at in self.decay_at):
            refuse("decay_at must be fractions of the run, between 0 and 1")
        for field in ("learning_rate", "batch_size", "plateau_patience"):
            if not getattr(self, field) > 0:
                refuse(f"{field} must be above 0")
        for field in ("momentum", "warmup", "label_smoothing"):
            if not 0 <= getattr(self, field) < 1:
                refuse(f"{field} must be at least 0 and below 1")
        for field in ("weight_decay", "plateau_floor", "colour_noise", "warmup_from_depth"):
            if not getattr(self, field) >= 0:
                refuse(f"{field} must be at least 0")
        if not 0 < self.warmup_factor <= 1:
            refuse("warmup_factor must be above 0 and at most 1")
        if self.image_size is not None and not SMALLEST_IMAGE <= self.image_size <= LARGEST_IMAGE:
            refuse(f"image_size must be from {SMALLEST_IMAGE} to {LARGEST_IMAGE} pixels")

    def total_steps(self, num_examples: int) -> int:
        """Return the number of updates in a run over `num_examples` training images."""
        return self.steps or (self.epochs or 0) * (num_examples // self.batch_size)

    def make_schedule(self, total_steps: int, depth: int) -> optax.Schedule:
        """Return the learning rate of updates 0 to total_steps - 1 for a network of `depth`.

        A `plateau` schedule lowers this rate further, see `scale_by_plateau`.
        """
        warmup_steps = round(self.warmup * total_steps) if depth >= self.warmup_from_depth else 0
        if self.schedule == "cosine":
            return optax.warmup_cosine_decay_schedule(
                0.0 if warmup_steps else self.learning_rate,
                self.learning_rate,
                warmup_steps,
                total_steps,
            )
        decays: dict[int, float] = {}
        if self.schedule == "steps":
            factors = self.decay_factor
            if not isinstance(factors, tuple):
                factors = (factors,) * len(self.decay_at)
            for at, factor in zip(self.decay_at, factors, strict=True):
                decays[round(at * total_steps)] = factor
        stepwise = optax.piecewise_constant_schedule(self.learning_rate, decays)
        warm = self.learning_rate * self.warmup_factor

        def schedule(step):
            return jnp.where(step < warmup_steps, warm, stepwise(step))

        return schedule if warmup_steps else stepwise

    def make_optimizer(self, total_steps: int, depth: int) -> optax.GradientTransformation:
        """Make the update rule as an Optax transformation."""
        rates = self.make_schedule(total_steps, depth)
        if self.optimizer == "sgd":
            rule = optax.sgd(rates, momentum=self.momentum, nesterov=self.nesterov)
        else:
            rule = optax.adam(rates)
        mask = None if self.decay == "all" else self._decays
        parts = [optax.add_decayed_weights(self.weight_decay, mask), rule]
        if self.plateau is not None:
            parts.append(scale_by_plateau(self.plateau))
        return optax.chain(*parts)

    def _decays(self, params: Any) -> Any:
        dimensions = (4,) if self.decay == "convolutions" else (2, 4)
        return jax.tree.map_with_path(
            lambda path, leaf: path[-1].key == "kernel" and leaf.ndim in dimensions, params
        )

    @property
    def plateau(self) -> optax.GradientTransformationExtraArgs | None:
        """Transformation that lowers the rate of a `plateau` schedule, or None."""
        if self.schedule != "plateau":
            return None
        assert isinstance(self.decay_factor, float)
        return reduce_on_plateau(
            factor=self.decay_factor,
            patience=self.plateau_patience,
            atol=1e-4,  # Keras's default
            rtol=0.0,
            min_scale=self.plateau_floor / self.learning_rate,
        )

    @property
    def crop(self) -> Crop:
        """Crop of `augment`, apart from that of a data set's default augmentation."""
        name = self.augment.removesuffix("-crop")
        return Crop.NONE if name == self.augment else Crop(name)

    def augmentation(self, default: Augmentation, image_size: int) -> Augmentation:
        """Return the augmentation of images of `image_size` pixels; `default` is the data set's.

        `keras` shifts by up to a tenth and repeats the edges. It and all crops add random flips.
        For `resized-crop`, `scaled-crop` and `fixed-crop` see `flaxnets.data.crops.Crop`.
        """
        kinds = {
            "default": default,
            "none": Augmentation(),
            "keras": Augmentation(pad=image_size // 10, edge=True, flip=True),
        }
        chosen = kinds.get(self.augment, Augmentation(crop=self.crop, flip=True))
        return chosen.with_colour_noise(self.colour_noise)


def scale_by_plateau(
    plateau: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformation:
    """Multiply updates by the scale that `observe_plateau` sets.

    Optax's own transformation counts its patience in updates; this one counts it in epochs.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda update: state.scale * update, updates), state

    return optax.GradientTransformation(plateau.init, update)


def observe_plateau(
    plateau: optax.GradientTransformationExtraArgs, opt_state: Any, loss: float
) -> Any:
    """Return the optimizer state updated with the validation loss of an epoch."""

    def observe(node: Any) -> Any:
        if not isinstance(node, ReduceLROnPlateauState):
            return node
        observed = plateau.update({}, node, value=jnp.float32(loss))[1]
        # Keep dtypes and shardings: a change would recompile the train step.
        return jax.tree.map(
            lambda new, old: jax.device_put(new.astype(old.dtype), old.sharding), observed, node
        )

    return jax.tree.map(
        observe, opt_state, is_leaf=lambda node: isinstance(node, ReduceLROnPlateauState)
    )


def plateau_scale(opt_state: Any) -> float:
    """Return the factor by which the plateau schedule has lowered the rate; 1 without one."""
    nodes = jax.tree.leaves(
        opt_state, is_leaf=lambda node: isinstance(node, ReduceLROnPlateauState)
    )
    scales: list[Any] = [node.scale for node in nodes if isinstance(node, ReduceLROnPlateauState)]
    return float(scales[0]) if scales else 1.0


def check_batch_size(batch_size: int, num_train: int, name: str = "--batch-size") -> None:
    """Raise an `InputError` if the batch size does not suit the training images or devices."""
    devices = jax.device_count()
    if batch_size > num_train:
        raise InputError(
            f"{name} {batch_size} is more than the {num_train} training images; "
            f"give at most {num_train}"
        )
    if batch_size % devices:
        raise InputError(
            f"{name} {batch_size} is not divisible by the {devices} devices; "
            f"give a multiple of {devices}"
        )


class Preset(NamedTuple):
    """A recipe and its source."""

    recipe: Recipe
    source: str


PRESETS = (
    Preset(
        Recipe(
            name="he2015-cifar",
            learning_rate=0.1,
            steps=64_000,
            warmup=400 / 64_000,
            warmup_from_depth=110,
        ),
        # Differences from the paper:
        # - Channels are divided by their standard deviation (the paper only subtracts each pixel's
        #   mean).
        # - Padding is black (the paper does not say).
        # - All 50,000 training images are used, as in the paper's final runs (its 45k/5k split
        #   chose the schedule).
        # - Padding and flips are those of the data set (4 pixels and flips on CIFAR-10, as in the
        #   paper).
        # - Warm-up always takes 400 updates (in the paper, until training error is below 80 %).
        # - BatchNorm parameters and biases decay too (the paper does not say).
        "He et al. 2015, arXiv:1512.03385, section 4.2",
    ),
    Preset(
        # The paper's recipe, shortened and without augmentation. Rate and warm-up (none) gave the
        # *lowest* training error of the plain network of depth 56 in a small grid, so that nothing
        # is tuned to make plain networks look bad (docs/results.md).
        Recipe(name="digits", learning_rate=0.01, epochs=20, augment="none"),
        "he2015-cifar shortened, for scikit-learn's digits",
    ),
    Preset(
        Recipe(
            name="adam",
            learning_rate=1e-3,
            epochs=10,
            optimizer="adam",
            weight_decay=0.0,
            schedule="cosine",
        ),
        "ours: a simple starting point for new data",
    ),
    Preset(
        Recipe(
            name="he2015-imagenet",
            learning_rate=0.1,
            batch_size=256,
            steps=600_000,
            schedule="plateau",
            augment="scaled-crop",
            colour_noise=0.1,
            image_size=224,
        ),
        # The paper does not define a plateau; here it is 5 epochs without a lower loss.
        "He et al. 2015, arXiv:1512.03385, section 3.4",
    ),
    Preset(
        Recipe(
            name="torchvision-imagenet",
            learning_rate=0.1,
            batch_size=256,
            epochs=90,
            decay_at=(1 / 3, 2 / 3),
            augment="resized-crop",
            image_size=224,
        ),
        "torchvision, references/classification, for ResNets",
    ),
    Preset(
        Recipe(
            name="keras-cifar",
            learning_rate=1e-3,
            batch_size=32,
            epochs=200,
            optimizer="adam",
            weight_decay=2e-4,
            decay="convolutions",
            decay_at=(0.4, 0.6, 0.8, 0.9),
            decay_factor=(0.1, 0.1, 0.1, 0.5),
            augment="keras",
        ),
        # Keras's l2(1e-4) adds 1e-4 w^2 to the loss. Its schedule resets the rate each epoch, so
        # that its plateau callback never has a lasting effect: see the next recipe. Difference from
        # the example: images are normalised by channel (there, each pixel's mean is subtracted).
        "Keras's CIFAR-10 ResNet example, cifar10_resnet.py",
    ),
    Preset(
        Recipe(
            name="keras-cifar-plateau",
            learning_rate=1e-3,
            batch_size=32,
            epochs=200,
            optimizer="adam",
            weight_decay=2e-4,
            decay="convolutions",
            schedule="plateau",
            decay_factor=0.1**0.5,
            plateau_floor=0.5e-6,
            augment="keras",
        ),
        "the same with only ReduceLROnPlateau, on validation images",
    ),
    Preset(
        Recipe(
            name="d2l-fashion",
            learning_rate=1e-3,
            batch_size=256,
            epochs=5,
            optimizer="adam",
            weight_decay=0.0,
            decay_at=(),
            augment="none",
            image_size=96,
        ),
        "Dive into Deep Learning, ResNet on Fashion-MNIST, a PyTorch port",
    ),
    Preset(
        Recipe(
            name="vgg2014",
            learning_rate=0.01,
            batch_size=256,
            epochs=74,
            weight_decay=5e-4,
            schedule="plateau",
            augment="fixed-crop",
            colour_noise=0.1,
            image_size=224,
        ),
        # Dropout of 0.5 is in the networks.
        "Simonyan and Zisserman 2014, arXiv:1409.1556, section 3.1",
    ),
    Preset(
        Recipe(
            name="alexnet2012",
            learning_rate=0.01,
            epochs=90,
            weight_decay=5e-4,
            schedule="plateau",
            plateau_floor=1e-5,
            augment="fixed-crop",
            colour_noise=0.1,
            image_size=224,
        ),
        # The rate was lowered by hand, three times.
        "Krizhevsky et al. 2012, sections 4 and 5",
    ),
    Preset(
        Recipe(
            name="modern-cifar",
            learning_rate=0.2,
            epochs=20,
            nesterov=True,
            weight_decay=5e-4,
            decay="kernels",
            schedule="cosine",
            warmup=0.2,
        ),
        "ours: a short budget on CIFAR-10",
    ),
)

RECIPES = {preset.recipe.name: preset.recipe for preset in PRESETS}


def describe_fields() -> dict[str, str]:
    """Return the description of each recipe field, from the docstring of `Recipe`, for `--help`."""
    attributes = inspect.cleandoc(Recipe.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", attributes, re.MULTILINE)
    return {name: " ".join(text.replace("`", "").split()).rstrip(".") for name, text in entries}
