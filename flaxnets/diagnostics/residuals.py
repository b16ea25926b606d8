"""Blocks one by one: how much each adds to the signal, and the error without it."""

import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flaxnets.decoding import Positive
from flaxnets.diagnostics.finding import MeasureOptions
from flaxnets.diagnostics.layers import (
    Signals,
    Variables,
    block_names,
    shortcut_output,
    watch_modules,
)
from flaxnets.diagnostics.panels import (
    DOTS,
    WIDTH,
    draw_lines,
    list_kinds,
    name_depths,
    number_values,
)
from flaxnets.diagnostics.study import (
    ByNetwork,
    DiagnosedStudy,
    Layers,
    NetworkName,
    Setting,
    deepest_of_each_kind,
    split_name,
)
from flaxnets.diagnostics.text import finite, listed
from flaxnets.reporting.figures import STYLES, scale_errors, write_png_and_svg
from flaxnets.reporting.findings import Finding, Table
from flaxnets.training.steps import count_errors

WHOLE = "none"  # key of the network with no block removed


def residual_ratios(model: nn.Module, variables: Variables, images: jax.Array) -> dict[str, float]:
    """Compute the mean over images of ||F(x)|| / ||x|| for each block.

    F is the residual function and x the output of the shortcut.
    """
    blocks = block_names(variables["params"])

    @jax.jit
    def ratios(variables: Variables, images: jax.Array) -> dict[str, jax.Array]:
        seen = watch_modules(model, variables, images)
        found = {}
        for block in blocks:
            last = max(name for name in seen if re.fullmatch(rf"{block}/bn\d+", name))
            residual = seen[last][1]
            norms = [
                jnp.linalg.norm(array.reshape(len(array), -1), axis=1)
                for array in (residual, shortcut_output(seen, block, residual))
            ]
            found[block] = (norms[0] / norms[1]).mean()
        return found

    ratio = ratios(variables, images)
    return {block: float(ratio[block]) for block in blocks}


def lesion_errors(
    model: nn.Module, variables: Variables, images: jax.Array, labels: jax.Array
) -> dict[str | None, float]:
    """Compute the error in percent without each block and, under None, of the whole network.

    A removed block leaves its shortcut. A plain block leaves the parameter-free shortcut A of its
    residual twin (Veit et al. 2016, arXiv:1605.06431, section 4).
    """
    blocks = block_names(variables["params"])

    @jax.jit
    def count(variables: dict, images: jax.Array, labels: jax.Array, removed: jax.Array):
        def remove(name: str, seen: Signals, output: jax.Array) -> jax.Array:
            if name not in blocks:
                return output
            # Blocks end in a rectifier.
            rest = jnp.maximum(shortcut_output(seen, name, output), 0)
            return jnp.where(removed == blocks.index(name), rest, output)

        logits = watch_modules(model, variables, images, remove)[""][1]
        return count_errors(logits, labels).sum()

    return {
        block: 100 * int(count(dict(variables), images, labels, jnp.int32(i))) / len(labels)
        for i, block in enumerate([*blocks, None])
    }


@dataclass(frozen=True)
class Residuals:
    """Contribution of blocks and errors without them, on `images` test images.

    Attributes:
      ratios: residual network -> block -> ||F(x)|| / ||x||.
      lesions: network -> block removed, or `none` -> test error in percent.
    """

    study: Setting
    images: Positive
    ratios: dict[NetworkName, Layers]
    lesions: ByNetwork

    def __post_init__(self) -> None:
        if self.ratios.keys() != {name for name in self.lesions if name.startswith("residual")}:
            raise ValueError("its ratios are not those of the residual networks")

    @classmethod
    def measure(cls, study: DiagnosedStudy, options: MeasureOptions) -> Self:
        ratios, lesions = {}, {}
        for network in study.networks:
            name, model, variables = network.name, network.model, network.variables
            errors = lesion_errors(model, variables, *study.test)
            lesions[name] = {block or WHOLE: error for block, error in errors.items()}
            if network.run.kind == "residual":
                ratios[name] = residual_ratios(model, variables, study.test.images)
        return cls(study.setting, len(study.test.labels), ratios, lesions)

    def errors(self) -> dict[NetworkName, dict[str, float]]:
        """Return the test error without each block, in order."""
        return {
            name: {block: error for block, error in errors.items() if block != WHOLE}
            for name, errors in self.lesions.items()
        }

    def draw(self, path: Path) -> None:
        """Draw the errors without each block, and below those of residual networks the ratios."""
        kinds = list_kinds(self.lesions)
        rows = 2 if self.ratios else 1
        figure = Figure(figsize=(WIDTH, 1.6 + 3.0 * rows), layout="constrained")
        axes = figure.subplots(rows, len(kinds), squeeze=False, sharex=True, sharey="row")
        errors = [error for blocks in self.lesions.values() for error in blocks.values()]
        scale_errors(axes[0, 0], errors, "test error")
        axes[0, 0].set_ylim(top=1.3 * axes[0, 0].get_ylim()[1])  # room for the depth labels
        for kind, column in zip(kinds, axes.T, strict=True):
            self._draw_lesions(column[0], kind)
            column[-1].set_xlabel("block, counted from the image")
        if self.ratios:
            self._draw_ratios(axes[1, -1])
        handles = [
            *name_depths(self.lesions, self.study),
            Line2D([], [], c="0.3", label="test error without the block", **DOTS),
            Line2D(
                [], [], c="0.3", label="test error of the whole network", **STYLES["test error"]
            ),
        ]
        if axes.size == 4:
            # Below the plain networks there are no ratios, but room for the legend.
            axes[0, 0].set_xlabel("block removed, counted from the image")
            axes[0, 0].tick_params(labelbottom=True)
            free = axes[1, 0]
            free.set_axis_off()
            free.legend(handles=handles, loc="center", frameon=False, bbox_to_anchor=(0.5, 0.6))
            text = "A removed block leaves its shortcut,\na plain one that of its residual twin."
            free.text(0.5, 0.2, text, ha="center", color="0.3", transform=free.transAxes)
        else:
            figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        write_png_and_svg(figure, path, f"blocks removed one by one\n{self.study}")

    def _draw_lesions(self, ax: Axes, kind: str) -> None:
        for name, errors in self.lesions.items():
            if name.startswith(kind):
                ends, whole = (1, len(errors) - 1), (errors[WHOLE], errors[WHOLE])
                ax.plot(ends, whole, color=self.study.colour(name), **STYLES["test error"])
        errors = {
            name: [*blocks.values()]
            for name, blocks in self.errors().items()
            if name.startswith(kind)
        }
        draw_lines(ax, number_values(errors, DOTS), self.study)
        ax.set_title(f"{kind}, without one block", fontsize="medium")

    def _draw_ratios(self, ax: Axes) -> None:
        ratios = {name: [*blocks.values()] for name, blocks in self.ratios.items()}
        largest = max(finite(ratio for values in ratios.values() for ratio in values))
        ax.set_ylim(0, 1.08 * largest if largest > 0 else 1.0)
        ax.tick_params(labelleft=True)
        draw_lines(ax, number_values(ratios, DOTS), self.study)
        ax.set_ylabel("||F(x)|| / ||x||")
        ax.set_title("residual, what each block adds", fontsize="medium")

    def describe(self) -> Finding:
        errors = self.errors()
        medians = {name: statistics.median(blocks.values()) for name, blocks in errors.items()}
        ratios = {
            name: statistics.median(finite(blocks.values())) for name, blocks in self.ratios.items()
        }
        sentences = [
            f"With one block removed, the median test error of {name} is {medians[name]:.1f} % and "
            f"the highest is {max(errors[name].values()):.1f} % (intact: "
            f"{self.lesions[name][WHOLE]:.1f} %)."
            for name in deepest_of_each_kind(errors)
        ]
        if ratios:
            by_depth = sorted(ratios, key=split_name)
            ends = dict.fromkeys((by_depth[0], by_depth[-1]))
            clauses = [f"{ratios[name]:.2f} in {name}" for name in ends]
            sentences.append(
                "The median ratio of what a block adds to the signal it receives, ||F(x)|| / "
                f"||x||, is {listed(clauses)}."
            )
        sentences.append(
            f"All errors are those of {self.images:,} test images (seed {self.study.seed})."
        )
        rows = []
        for name, blocks in errors.items():
            worst = max(blocks, key=lambda block: blocks[block])
            numbers = (self.lesions[name][WHOLE], medians[name], blocks[worst])
            ratio = f"{ratios[name]:.2f}" if name in ratios else "-"
            percentages = (f"{number:.1f}" for number in numbers)
            rows.append((name, f"{len(blocks)}", *percentages, worst, ratio))
        headings = (
            *("network", "blocks", "test error, %", "median without a block, %", "worst, %"),
            *("worst block", "median ||F(x)|| / ||x||"),
        )
        return Finding("Blocks one by one", " ".join(sentences), Table(headings, rows))
