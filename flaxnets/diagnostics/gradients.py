"""Do gradients vanish? Norms of the gradient with respect to each layer's kernel."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from msgspec import Meta

from flaxnets.decoding import Positive
from flaxnets.diagnostics.finding import MeasureOptions
from flaxnets.diagnostics.layers import Variables, find_layer, layer_names
from flaxnets.diagnostics.panels import draw_grid, number_values
from flaxnets.diagnostics.scales import set_log_scale
from flaxnets.diagnostics.study import (
    DiagnosedStudy,
    MeasuredNetwork,
    NetworkName,
    Setting,
    deepest_of_each_kind,
)
from flaxnets.diagnostics.text import significant
from flaxnets.models.resnet import ResNet
from flaxnets.parallel import data_mesh, replicate
from flaxnets.reporting.findings import Finding, Table
from flaxnets.training.steps import cross_entropy, init_variables

Moment = Literal["at the start", "at the start, without BatchNorm", "at the end of training"]
MOMENTS: tuple[Moment, Moment, Moment] = get_args(Moment)
START, BARE, END = MOMENTS


def gradient_norms(
    model: nn.Module, variables: Variables, images: jax.Array, labels: jax.Array
) -> dict[str, float]:
    """Compute the norm of the gradient with respect to each layer's kernel.

    Norms are Euclidean and the loss is the mean cross-entropy. The network is in training mode:
    BatchNorm, if any, uses the statistics of these images.

    Args:
      images: float32 `(batch, height, width, channels)`, normalised.
      labels: int `(batch,)`.
    """
    norms = jax.jit(partial(trace_norms, model))(dict(variables), images, labels)
    return {name: float(norms[name]) for name in layer_names(variables["params"])}


def trace_norms(
    model: nn.Module, variables: dict[str, Any], images: jax.Array, labels: jax.Array
) -> dict[str, jax.Array]:
    """Compute `gradient_norms` within `jax.jit`."""

    def loss(params: Any) -> jax.Array:
        logits: Any
        logits, _ = model.apply(
            {**variables, "params": params},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        return cross_entropy(logits, labels).mean()

    gradients = jax.grad(loss)(variables["params"])
    names = layer_names(variables["params"])
    return {name: jnp.linalg.norm(find_layer(gradients, name)["kernel"].ravel()) for name in names}


def without_batch_norm(model: ResNet) -> ResNet:
    """Return the same network without BatchNorm."""
    return model.clone(norm=_Nothing)


class _Nothing(nn.Module):
    scale_init: Any = None
    use_running_average: bool = False
    dtype: Any = None
    param_dtype: Any = None

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def initial_variables(network: MeasuredNetwork) -> dict[str, Any]:
    """Recreate the variables that the run began with, as `create_state` makes them."""
    init_key, _ = jax.random.split(jax.random.key(network.run.seed))
    shape = network.restored.preprocess.input_shape
    return replicate(init_variables(network.model, init_key, shape), data_mesh())


@dataclass(frozen=True)
class Gradients:
    """Norms of the gradients of kernels: moment -> network -> layer -> norm.

    The loss is that of `images` training images. Every network has two convolutions or more, and a
    dense layer.
    """

    study: Setting
    images: Positive
    norms: Annotated[
        dict[Moment, dict[NetworkName, Annotated[dict[str, float], Meta(min_length=3)]]],
        Meta(min_length=3),
    ]

    @classmethod
    def measure(cls, study: DiagnosedStudy, options: MeasureOptions) -> Self:
        images, labels = (array[: options.batch] for array in study.train)
        norms: dict[Moment, dict[NetworkName, dict[str, float]]]
        norms = {moment: {} for moment in MOMENTS}
        for network in study.networks:
            name, model, initial = network.name, network.model, initial_variables(network)
            bare, params = without_batch_norm(model), {"params": initial["params"]}
            norms[START][name] = gradient_norms(model, initial, images, labels)
            norms[BARE][name] = gradient_norms(bare, params, images, labels)
            norms[END][name] = gradient_norms(model, network.variables, images, labels)
        return cls(study.setting, len(labels), norms)

    def convolutions(self, moment: Moment) -> dict[NetworkName, list[float]]:
        """Return the norms at a moment, of every layer but the last one, which is dense."""
        return {name: [*layers.values()][:-1] for name, layers in self.norms[moment].items()}

    def draw(self, path: Path) -> None:
        draw_grid(
            {moment: number_values(self.convolutions(moment)) for moment in MOMENTS},
            self.study,
            path,
            "gradients of the convolutions' kernels",
            ("convolution, counted from the image", "norm of the gradient"),
            set_log_scale,
        )

    def describe(self) -> Finding:
        norms = {moment: self.convolutions(moment) for moment in MOMENTS}
        subject = "From the last convolution to the first, the gradient"
        sentences = []
        for name in deepest_of_each_kind(norms[START]):
            start, bare, end = (describe_flow(norms[moment][name]) for moment in MOMENTS)
            sentences.append(
                f"{subject} of {name} {start} at the start, {bare} at the start without BatchNorm, "
                f"and {end} at the end of training."
            )
            subject = "That"
        sentences.append(
            f"The loss is that of {self.images:,} training images (seed {self.study.seed})."
        )
        short = ("start", "start, no BatchNorm", "end")
        rows = [
            (
                name,
                moment,
                significant(values[-1]),
                significant(values[0]),
                significant(values[0] / values[-1]) if values[-1] else "-",
            )
            for moment, networks in zip(short, norms.values(), strict=True)
            for name, values in networks.items()
        ]
        headings = ("network", "moment", "last convolution", "first convolution", "first / last")
        return Finding("Do gradients vanish?", " ".join(sentences), Table(headings, rows))


def describe_flow(norms: Sequence[float]) -> str:
    """Describe how the gradient changes from the last of these layers to the first.

    The description is the factor, without a threshold: 99-fold and 101-fold must read alike.
    """
    first, last = norms[0], norms[-1]
    if not (math.isfinite(first) and math.isfinite(last)):
        return "is not finite"
    if min(first, last) <= 0:
        return f"goes from {significant(last)} to {significant(first)}"
    factor = significant(max(first, last) / min(first, last))
    if factor == "1.00":
        return "keeps its norm"
    return f"{'grows' if first > last else 'shrinks'} {factor}-fold"
