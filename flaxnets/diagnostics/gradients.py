"""Do gradients vanish? Norms of the gradient of each layer's kernel, and their log in training."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxnets.diagnostics.finding import (
    Finding,
    Images,
    Network,
    NotPossibleError,
    Options,
    Setting,
    Study,
    Table,
    deepest_of_each_kind,
    listed,
    significant,
    span,
    split_name,
)
from flaxnets.diagnostics.layers import Variables, find_layer, layer_names
from flaxnets.diagnostics.panels import Line, Row, draw_grid, number_values, set_log_scale
from flaxnets.errors import InputError
from flaxnets.files import write_atomic
from flaxnets.models.resnet import ResNet
from flaxnets.models.stacking import unscanned, unstack_blocks
from flaxnets.parallel import data_mesh, is_primary, replicate
from flaxnets.studies.directory import run_directory
from flaxnets.training.steps import TrainState, cross_entropy, init_variables

START, BARE, END = "at the start", "at the start, without BatchNorm", "at the end of training"


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
    gradients = jax.jit(partial(_gradients, model))(dict(variables), images, labels)
    return {name: float(gradients[name]) for name in layer_names(variables["params"])}


def _gradients(
    model: nn.Module, variables: dict[str, Any], images: jax.Array, labels: jax.Array
) -> dict[str, jax.Array]:
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


def initial_variables(network: Network) -> dict[str, Any]:
    """Recreate the variables that the run began with, as `create_state` makes them."""
    init_key, _ = jax.random.split(jax.random.key(network.run.seed))
    shape = network.restored.preprocess.input_shape
    return replicate(init_variables(network.model, init_key, shape), data_mesh())


@dataclass(frozen=True)
class Gradients:
    """Norms of the gradients of kernels: moment -> network -> layer -> norm.

    The loss is that of `images` training images.
    """

    study: Setting
    images: int
    norms: dict[str, dict[str, dict[str, float]]]

    def __post_init__(self) -> None:
        if self.norms.keys() != {START, BARE, END}:
            raise ValueError("its moments are not the expected ones")
        for norms in self.norms.values():
            self.study.check_names(norms)
            if any(len(layers) < 3 for layers in norms.values()):
                raise ValueError("a network has fewer than three layers")

    @classmethod
    def measure(cls, study: Study, options: Options) -> Self:
        batch = Images(*(array[: options.batch] for array in study.train))
        initial = {network.name: initial_variables(network) for network in study.networks}
        moments: dict[str, Callable[[Network], tuple[Any, Any]]] = {
            START: lambda network: (network.model, initial[network.name]),
            BARE: lambda network: (
                without_batch_norm(network.model),
                {"params": initial[network.name]["params"]},
            ),
            END: lambda network: (network.model, network.variables),
        }
        norms = {
            moment: {
                network.name: gradient_norms(*at(network), *batch) for network in study.networks
            }
            for moment, at in moments.items()
        }
        return cls(study.setting, len(batch.labels), norms)

    def convolutions(self, moment: str) -> dict[str, list[float]]:
        """Return the norms at a moment, of every layer but the last one, which is dense."""
        return {name: list(layers.values())[:-1] for name, layers in self.norms[moment].items()}

    def draw(self, path: Path) -> None:
        draw_grid(
            [Row(each, number_values(self.convolutions(each))) for each in (START, BARE, END)],
            self.study,
            path,
            "gradients of the convolutions' kernels",
            ("convolution, counted from the image", "norm of the gradient"),
            set_log_scale,
        )

    def describe(self) -> Finding:
        norms = {moment: self.convolutions(moment) for moment in (START, BARE, END)}
        sentences = [
            f"{beginning} of {name} {describe_flow(norms[START][name])} at the start, "
            f"{describe_flow(norms[BARE][name])} there without BatchNorm, and "
            f"{describe_flow(norms[END][name])} at the end of training."
            for beginning, name in zip(
                ("From the last convolution to the first, the gradient", "That"),
                deepest_of_each_kind(norms[START]),
                strict=False,
            )
        ]
        sentences.append(
            f"The loss is that of {self.images:,} training images, seed {self.study.seed}."
        )
        short = {START: "start", BARE: "start, no BatchNorm", END: "end"}
        rows = [
            (
                name,
                short[moment],
                significant(values[-1]),
                significant(values[0]),
                significant(values[0] / values[-1]) if values[-1] else "-",
            )
            for moment, networks in norms.items()
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


# Gradients through training.

PLACES = ("first convolution", "middle convolution", "last convolution")


@dataclass(frozen=True)
class LoggedGradients:
    """Gradients logged by runs: network -> one row per epoch, see `GradientLog`."""

    study: Setting
    rows: dict[str, list[dict[str, float]]]

    def __post_init__(self) -> None:
        self.study.check_names(self.rows)
        for rows in self.rows.values():
            if not rows or any(row.keys() != rows[0].keys() for row in rows) or len(rows[0]) < 5:
                raise ValueError("its rows are not those of a gradients.csv")

    @classmethod
    def measure(cls, study: Study, options: Options) -> Self:
        """Read what the runs have logged."""
        logged = {}
        for network in study.networks:
            directory = run_directory(study.path, *network.run.key)
            if rows := read_gradients(directory, layer_names(network.variables["params"])):
                logged[network.name] = rows
        if not logged:
            raise NotPossibleError("no run has been trained with --log-gradients")
        return cls(study.setting, logged)

    def series(self, name: str) -> dict[str, list[float]]:
        """Return the norms of a network at three places, one value per epoch."""
        rows = self.rows[name]
        layers = list(rows[0])[2:]  # after epoch and step
        chosen = (layers[0], layers[len(layers) // 2], layers[-2])  # the last one is dense
        return {
            place: [row[layer] for row in rows] for place, layer in zip(PLACES, chosen, strict=True)
        }

    def draw(self, path: Path) -> None:
        series = {name: self.series(name) for name in self.rows}
        rows = [
            Row(
                place,
                {
                    name: Line(
                        split_name(name)[1], [row["epoch"] for row in rows], series[name][place]
                    )
                    for name, rows in self.rows.items()
                },
            )
            for place in PLACES
        ]
        draw_grid(
            rows,
            self.study,
            path,
            "gradients of the convolutions' kernels through training",
            ("epoch", "norm of the gradient"),
            set_log_scale,
            dots=max(len(rows) for rows in self.rows.values()) <= 30,
        )

    def describe(self) -> Finding:
        series = {name: self.series(name) for name in self.rows}
        clauses = [
            f"{span(series[name][PLACES[0]])} in {name}" for name in deepest_of_each_kind(series)
        ]
        paragraph = (
            f"Over the epochs, the norm of the first convolution's gradient is {listed(clauses)}. "
            f"Each value is from the end of an epoch, seed {self.study.seed}."
        )
        rows = [
            (name, f"{len(self.rows[name])}", *(span(places[place]) for place in PLACES))
            for name, places in series.items()
        ]
        headings = ("network", "epochs", *PLACES)
        return Finding("Gradients through training", paragraph, Table(headings, rows))


def read_gradients(directory: Path, names: Sequence[str]) -> list[dict[str, float]]:
    """Read the rows of a run's `gradients.csv`, one per epoch; none without the file.

    Raises:
      InputError: it is damaged, or its layers are not `names`.
    """
    path = directory / "gradients.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            if reader.fieldnames != ["epoch", "step", *names]:
                raise ValueError("its columns are not epoch, step and this network's layers")
            return [
                {k: (int if k in ("epoch", "step") else float)(v) for k, v in row.items()}
                for row in reader
            ]
        except (TypeError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error}); move it away") from error


class GradientLog:
    """`gradients.csv` in a run directory: `epoch`, `step` and the norm of each layer's gradient.

    The gradient is that of the mean loss on fixed training images, as in `gradient_norms`. A run
    that resumes from an earlier step drops the later rows and writes them again.
    """

    def __init__(self, model: nn.Module, images: jax.Array, labels: jax.Array) -> None:
        self._norms = jax.jit(partial(_gradients, unscanned(model)))
        self._images, self._labels = images, labels
        shapes = jax.eval_shape(
            lambda: unscanned(model).init(jax.random.key(0), images[:1], train=False)
        )
        self._names = layer_names(shapes["params"])

    def check(self, directory: Path) -> None:
        """Refuse a damaged `gradients.csv` before the run resumes.

        Raises:
          InputError: as `read_gradients`.
        """
        read_gradients(directory, self._names)

    def write(self, directory: Path, state: TrainState, row: Mapping[str, Any]) -> None:
        """Add a row for `state` at the end of an epoch, whose row of `metrics.csv` is `row`."""
        variables = unstack_blocks(state.variables)
        norms = jax.device_get(self._norms(variables, self._images, self._labels))
        if not is_primary():
            return
        names = self._names
        earlier = [old for old in read_gradients(directory, names) if old["step"] < row["step"]]
        place = {"epoch": row["epoch"], "step": row["step"]}
        rows = [*earlier, {**place, **{name: float(norms[name]) for name in names}}]
        text = io.StringIO()
        writer = csv.DictWriter(text, ["epoch", "step", *names], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(directory / "gradients.csv", text.getvalue())
