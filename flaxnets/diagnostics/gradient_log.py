"""Gradients through training, which runs log in `gradients.csv`."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import flax.linen as nn
import jax
from msgspec import Meta

from flaxnets.diagnostics.finding import MeasureOptions, NotPossibleError
from flaxnets.diagnostics.gradients import trace_norms
from flaxnets.diagnostics.layers import layer_names
from flaxnets.diagnostics.panels import DOTS, LINE, Line, draw_grid
from flaxnets.diagnostics.scales import set_log_scale
from flaxnets.diagnostics.study import DiagnosedStudy, NetworkName, Setting, deepest_of_each_kind
from flaxnets.diagnostics.text import listed, span
from flaxnets.errors import InputError
from flaxnets.files import write_csv
from flaxnets.models.stacking import unscanned, unstack_blocks
from flaxnets.parallel import is_primary
from flaxnets.reporting.findings import Finding, Table
from flaxnets.studies.directory import run_directory
from flaxnets.training.steps import TrainState

PLACES = ("first convolution", "middle convolution", "last convolution")


class GradientLog:
    """`gradients.csv` in a run directory: `epoch`, `step` and the norm of each layer's gradient.

    The gradient is that of the mean loss on fixed training images, as in `gradient_norms`. A run
    that resumes from an earlier step drops the later rows and writes them again.
    """

    def __init__(self, model: nn.Module, images: jax.Array, labels: jax.Array) -> None:
        self._norms = jax.jit(partial(trace_norms, unscanned(model)))
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
        write_csv(directory / "gradients.csv", ["epoch", "step", *names], rows)


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


@dataclass(frozen=True)
class LoggedGradients:
    """Gradients logged by runs: network -> one row per epoch, see `GradientLog`."""

    study: Setting
    rows: Annotated[dict[NetworkName, list[dict[str, float]]], Meta(min_length=1)]

    @classmethod
    def measure(cls, study: DiagnosedStudy, options: MeasureOptions) -> Self:
        """Read what the runs have logged."""
        logged = {}
        for network in study.networks:
            directory = run_directory(study.path, *network.run.key)
            if rows := read_gradients(directory, layer_names(network.variables["params"])):
                logged[network.name] = rows
        if not logged:
            raise NotPossibleError("no run has been trained with --log-gradients")
        return cls(study.setting, logged)

    def series(self, place: str) -> dict[NetworkName, list[float]]:
        """Return the norms of each network at one of `PLACES`, one value per epoch."""
        series = {}
        for name, rows in self.rows.items():
            layers = list(rows[0])[2:]  # after epoch and step
            chosen = (layers[0], layers[len(layers) // 2], layers[-2])  # the last one is dense
            layer = chosen[PLACES.index(place)]
            series[name] = [row[layer] for row in rows]
        return series

    def draw(self, path: Path) -> None:
        epochs = {name: [row["epoch"] for row in rows] for name, rows in self.rows.items()}
        style = DOTS if max(map(len, epochs.values())) <= 30 else LINE
        draw_grid(
            {
                place: [
                    Line(name, epochs[name], y, style) for name, y in self.series(place).items()
                ]
                for place in PLACES
            },
            self.study,
            path,
            "gradients of the convolutions' kernels through training",
            ("epoch", "norm of the gradient"),
            set_log_scale,
        )

    def describe(self) -> Finding:
        first = self.series(PLACES[0])
        clauses = [f"{span(first[name])} in {name}" for name in deepest_of_each_kind(first)]
        paragraph = (
            f"Over training, the gradient norm of the first convolution is {listed(clauses)}. "
            f"Norms are logged at the end of every epoch (seed {self.study.seed})."
        )
        rows = [
            (name, f"{len(rows)}", *(span(self.series(place)[name]) for place in PLACES))
            for name, rows in self.rows.items()
        ]
        headings = ("network", "epochs", *PLACES)
        return Finding("Gradients through training", paragraph, Table(headings, rows))
