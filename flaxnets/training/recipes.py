"""Recipes: everything about training that is neither the network nor the data."""

from dataclasses import dataclass

import jax.numpy as jnp
import optax

from flaxnets.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum, L2 weight decay and a step-wise schedule.

    The schedule is given in fractions of the run, so that it scales with its length.

    Attributes:
      name: key in `RECIPES`.
      learning_rate: the rate after warm-up.
      batch_size: training examples a step, over all devices.
      steps: length of the run in updates, or None where `epochs` gives it.
      epochs: length of the run in epochs, or None where `steps` gives it.
      momentum: of SGD, as PyTorch and Optax define it (no dampening, no Nesterov).
      weight_decay: coefficient of coupled L2 on every parameter: added to the gradient before
        momentum, and never part of a reported loss.
      decay_at: where the rate is multiplied by `decay_factor`.
      warmup: the first part of the run, trained at `warmup_factor` of the rate.
      warmup_from_depth: shallower networks have no warm-up.
      augment: whether to augment, in the way the data set has by default.
    """

    name: str
    learning_rate: float
    batch_size: int = 128
    steps: int | None = None
    epochs: int | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_at: tuple[float, ...] = (0.5, 0.75)
    decay_factor: float = 0.1
    warmup: float = 0.0
    warmup_factor: float = 0.1
    warmup_from_depth: int = 0
    augment: bool = True

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise InputError(f"recipe {self.name}: give either steps or epochs")

    def total_steps(self, num_examples: int) -> int:
        """Updates in a run over `num_examples` training images."""
        return self.steps or (self.epochs or 0) * (num_examples // self.batch_size)

    def schedule(self, total_steps: int, depth: int) -> optax.Schedule:
        """Learning rate of update 0 .. total_steps - 1 for a network of `depth`."""
        warmup_steps = round(self.warmup * total_steps) if depth >= self.warmup_from_depth else 0
        decays = {round(at * total_steps): self.decay_factor for at in self.decay_at}
        stepwise = optax.piecewise_constant_schedule(self.learning_rate, decays)
        warm = self.learning_rate * self.warmup_factor

        def schedule(step):
            return jnp.where(step < warmup_steps, warm, stepwise(step))

        return schedule if warmup_steps else stepwise

    def optimizer(self, total_steps: int, depth: int) -> optax.GradientTransformation:
        """The update rule as an Optax transformation."""
        return optax.chain(
            optax.add_decayed_weights(self.weight_decay),
            optax.sgd(self.schedule(total_steps, depth), momentum=self.momentum),
        )


HE2015_CIFAR = Recipe(
    name="he2015-cifar",
    learning_rate=0.1,
    steps=64_000,
    warmup=400 / 64_000,
    warmup_from_depth=110,
)
"""He et al. (2015), section 4.2: SGD 0.1, momentum 0.9, weight decay 1e-4, batch 128, 64k updates,
a tenth of the rate from 32k and again from 48k on; depth 110 starts with about 400 updates at 0.01.

Where it departs: channels are divided by their standard deviation (the paper only subtracts the
mean, of each pixel); padding is black (the paper does not say); all 50,000 training images are
used, as in the paper's final runs (its 45k/5k split chose the schedule); padding and flips are
those of the data set (4 pixels and flips on CIFAR-10, as in the paper); the warm-up always takes
400 updates (the paper ends it once the training error is below 80 %); parameters of BatchNorm and
biases decay too (the paper does not say).
"""

DIGITS = Recipe(name="digits", learning_rate=0.01, epochs=20, augment=False)
"""For the study's default data, scikit-learn's 1,437 training digits: 220 updates in 20 epochs.

The paper's recipe, shortened and without augmentation. Rate and warm-up (none) are those of a small
grid that gave the *lowest* training error of the plain network of depth 56 (the README has the
grid), so that nothing is tuned to make plain networks look bad.
"""

RECIPES = {recipe.name: recipe for recipe in (HE2015_CIFAR, DIGITS)}
