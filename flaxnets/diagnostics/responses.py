"""Responses of layers, as in Figure 7 of He et al. (2015)."""

import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import flax.linen as nn
import jax

from flaxnets.diagnostics.finding import (
    Finding,
    Options,
    Setting,
    Study,
    Table,
    finite,
    span,
    split_name,
)
from flaxnets.diagnostics.layers import Variables, find_layer, layer_names, watch_modules
from flaxnets.diagnostics.panels import Row, draw_grid, number_values, set_scale_around_one


def layer_responses(model: nn.Module, variables: Variables, images: jax.Array) -> dict[str, float]:
    """Compute the standard deviation of each 3x3 layer's output over images, places and channels.

    The output is taken after BatchNorm, before the addition and the rectifier (He et al. 2015,
    Figure 7).
    """
    names = [
        name
        for name in layer_names(variables["params"])[:-1]
        if find_layer(variables["params"], name)["kernel"].shape[:2] == (3, 3)
    ]

    @jax.jit
    def spreads(variables: Variables, images: jax.Array) -> dict[str, jax.Array]:
        seen = watch_modules(model, variables, images)
        return {name: seen[re.sub(r"conv(\d+)$", r"bn\1", name)][1].std() for name in names}

    spread = spreads(variables, images)
    return {name: float(spread[name]) for name in names}


@dataclass(frozen=True)
class Responses:
    """Standard deviations of responses on `images` test images: network -> 3x3 layer -> value."""

    study: Setting
    images: int
    spreads: dict[str, dict[str, float]]

    def __post_init__(self) -> None:
        self.study.check_names(self.spreads)
        if not all(self.spreads.values()):
            raise ValueError("a network has no layers")

    @classmethod
    def measure(cls, study: Study, options: Options) -> Self:
        spreads = {
            network.name: layer_responses(network.model, network.variables, study.test.images)
            for network in study.networks
        }
        return cls(study.setting, len(study.test.labels), spreads)

    def values(self) -> dict[str, list[float]]:
        return {name: list(layers.values()) for name, layers in self.spreads.items()}

    def draw(self, path: Path) -> None:
        values = self.values()
        ranked = {name: sorted(spreads, reverse=True) for name, spreads in values.items()}
        draw_grid(
            [
                Row("in the order of the layers", number_values(values)),
                Row("sorted, largest first", number_values(ranked)),
            ],
            self.study,
            path,
            f"responses of the 3x3 layers on {self.images:,} test images",
            ("3x3 layer", "standard deviation,\nlogarithmic beyond 1 ± 0.01"),
            set_scale_around_one,
        )

    def describe(self) -> Finding:
        values = self.values()
        means = {name: statistics.fmean(spreads) for name, spreads in values.items()}
        sentences = [
            f"On {self.images:,} test images (seed {self.study.seed}) the mean standard deviation "
            f"of a network's 3x3 layers is {span(means.values())}; BatchNorm's scales start at 1."
        ]
        known = {name: mean for name, mean in means.items() if math.isfinite(mean)}
        depths = sorted({split_name(name)[1] for name in known})
        twins = [
            (known[f"residual-{depth}"], known[f"plain-{depth}"])
            for depth in depths
            if f"residual-{depth}" in known and f"plain-{depth}" in known
        ]
        if twins:
            less = sum(residual < plain for residual, plain in twins)
            sentences.append(
                f"Residual networks respond less than their plain twins at {less} of {len(twins)} "
                f"depth{'s' * (len(twins) > 1)}."
            )
        residual = [f"residual-{depth}" for depth in depths if f"residual-{depth}" in known]
        if len(residual) > 1:
            change = known[residual[-1]] - known[residual[0]]
            sentences.append(
                f"From {residual[0]} to {residual[-1]} the mean changes by {change:+.3f}; in the "
                "paper (Figure 7) it falls with depth, as each of more layers changes the signal "
                "less."
            )
        rows = []
        for name, spreads in values.items():
            shown = finite(spreads)
            numbers = (min(shown), means[name], max(shown))
            rows.append((name, f"{len(spreads)}", *(f"{number:.3f}" for number in numbers)))
        headings = ("network", "3x3 layers", "lowest", "mean", "highest")
        return Finding("How much layers respond", " ".join(sentences), Table(headings, rows))
