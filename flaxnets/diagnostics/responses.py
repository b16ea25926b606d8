"""Responses of layers, as in Figure 7 of He et al. (2015)."""

import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import flax.linen as nn
import jax

from flaxnets.decoding import Positive
from flaxnets.diagnostics.finding import MeasureOptions
from flaxnets.diagnostics.layers import Variables, find_layer, layer_names, watch_modules
from flaxnets.diagnostics.panels import draw_grid, number_values
from flaxnets.diagnostics.scales import set_scale_around_one
from flaxnets.diagnostics.study import ByNetwork, DiagnosedStudy, NetworkName, Setting, split_name
from flaxnets.diagnostics.text import finite, span
from flaxnets.reporting.findings import Finding, Table


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
    images: Positive
    spreads: ByNetwork

    @classmethod
    def measure(cls, study: DiagnosedStudy, options: MeasureOptions) -> Self:
        spreads = {
            network.name: layer_responses(network.model, network.variables, study.test.images)
            for network in study.networks
        }
        return cls(study.setting, len(study.test.labels), spreads)

    def values(self) -> dict[NetworkName, list[float]]:
        return {name: list(layers.values()) for name, layers in self.spreads.items()}

    def draw(self, path: Path) -> None:
        values = self.values()
        ranked = {name: sorted(spreads, reverse=True) for name, spreads in values.items()}
        draw_grid(
            {
                "in the order of the layers": number_values(values),
                "sorted, largest first": number_values(ranked),
            },
            self.study,
            path,
            f"responses of the 3x3 layers on {self.images:,} test images",
            ("3x3 layer", "standard deviation,\nlogarithmic beyond 1 ± 0.01"),
            set_scale_around_one,
        )

    def describe(self) -> Finding:
        means = {name: statistics.fmean(spreads.values()) for name, spreads in self.spreads.items()}
        sentences = [
            "Averaged over a network's 3x3 layers, the standard deviation of the responses to "
            f"{self.images:,} test images is {span(means.values())} (seed {self.study.seed}); "
            "BatchNorm's scales start at 1.",
            *compare_twins(means),
        ]
        rows = []
        for name, spreads in self.values().items():
            shown = finite(spreads)
            numbers = (min(shown), means[name], max(shown))
            rows.append((name, f"{len(spreads)}", *(f"{number:.3f}" for number in numbers)))
        headings = ("network", "3x3 layers", "lowest", "mean", "highest")
        return Finding("How much layers respond", " ".join(sentences), Table(headings, rows))


def compare_twins(means: dict[NetworkName, float]) -> list[str]:
    """Compare residual networks with their plain twins, and with one another."""
    plain, residual = (
        {split_name(n)[1]: mean for n, mean in means.items() if n.startswith(kind)}
        for kind in ("plain", "residual")
    )
    residual = {depth: mean for depth, mean in sorted(residual.items()) if math.isfinite(mean)}
    sentences = []
    twins = [depth for depth in residual if math.isfinite(plain.get(depth, math.nan))]
    if twins:
        fewer = sum(residual[depth] < plain[depth] for depth in twins)
        sentences.append(
            f"Residual networks respond less than their plain twins at {fewer} of {len(twins)} "
            f"depth{'s' * (len(twins) > 1)}."
        )
    if len(residual) > 1:
        (shallow, first), *_, (deep, last) = residual.items()
        sentences.append(
            f"From residual-{shallow} to residual-{deep}, the mean changes by {last - first:+.3f}; "
            "in the paper (Figure 7) it falls with depth, because each layer of a deeper network "
            "changes the signal less."
        )
    return sentences
