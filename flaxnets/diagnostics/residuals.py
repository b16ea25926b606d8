"""Blocks one by one: how much each adds to the signal, and the error without it."""

import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flaxnets.diagnostics.finding import (
    Finding,
    Options,
    Setting,
    Study,
    Table,
    deepest_of_each_kind,
    finite,
    split_name,
)
from flaxnets.diagnostics.layers import Variables, block_names, shortcut_output, watch_modules
from flaxnets.diagnostics.panels import (
    DOTS,
    LINE,
    WIDTH,
    draw_lines,
    list_kinds,
    name_depths,
    number_values,
    of_kind,
)
from flaxnets.models.resnet import Block
from flaxnets.reporting.figures import STYLES, colour_depths, scale_errors, write_png_and_svg
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
        seen = {}

        def remove(
            call: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext
        ) -> Any:
            output, path = call(*args, **kwargs), "/".join(context.module.path)
            if context.method_name == "__call__":
                seen[path] = (args[0], output)
            if isinstance(context.module, Block):
                # Blocks end in a rectifier.
                rest = jnp.maximum(shortcut_output(seen, path, output), 0)
                output = jnp.where(removed == blocks.index(path), rest, output)
            return output

        with nn.intercept_methods(remove):
            logits: Any = model.apply(variables, images, train=False)
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
    images: int
    ratios: dict[str, dict[str, float]]
    lesions: dict[str, dict[str, float]]

    def __post_init__(self) -> None:
        self.study.check_names(self.lesions)
        if self.ratios.keys() != {name for name in self.lesions if name.startswith("residual")}:
            raise ValueError("its ratios are not those of the residual networks")
        if any(WHOLE not in errors or len(errors) < 2 for errors in self.lesions.values()):
            raise ValueError("a network lacks its own error or its blocks")
        if not self.lesions or not all(self.ratios.values()):
            raise ValueError("it lacks networks or blocks")

    @classmethod
    def measure(cls, study: Study, options: Options) -> Self:
        ratios = {
            network.name: residual_ratios(network.model, network.variables, study.test.images)
            for network in study.of_kind("residual")
        }
        lesions = {
            network.name: {
                block or WHOLE: error
                for block, error in lesion_errors(
                    network.model, network.variables, *study.test
                ).items()
            }
            for network in study.networks
        }
        return cls(study.setting, len(study.test.labels), ratios, lesions)

    def errors(self) -> dict[str, list[float]]:
        """Return the test error without each block, in order."""
        return {
            name: [error for block, error in errors.items() if block != WHOLE]
            for name, errors in self.lesions.items()
        }

    def draw(self, path: Path) -> None:
        """Draw the errors without each block, and below those of residual networks the ratios."""
        kinds = list_kinds(self.lesions)
        rows = 2 if self.ratios else 1
        figure = Figure(figsize=(WIDTH, 1.6 + 3.0 * rows), layout="constrained")
        axes = figure.subplots(rows, len(kinds), squeeze=False, sharex=True)
        for kind, column in zip(kinds, axes.T, strict=True):
            self._draw_lesions(column[0], kind)
            column[-1].set_xlabel("block, counted from the image")
            if kind == "residual":
                self._draw_ratios(column[1])
            elif self.ratios:
                column[1].set_axis_off()
                # The empty panel below cannot carry the axis labels.
                column[0].set_xlabel("block removed, counted from the image")
                column[0].tick_params(labelbottom=True)
        for ax in axes[0, 1:]:
            ax.sharey(axes[0, 0])
            ax.set_ylabel("")
            ax.tick_params(labelleft=False)
        depths = {split_name(name)[1] for name in self.lesions}
        handles = [
            *name_depths(depths, self.study),
            Line2D([], [], color="0.3", label="test error without the block", **LINE, **DOTS),
            Line2D(
                [], [], color="0.3", label="test error of the whole network", **STYLES["test error"]
            ),
        ]
        if self.ratios and kinds[0] == "plain":
            free = axes[1, 0]
            free.legend(handles=handles, loc="center", frameon=False, bbox_to_anchor=(0.5, 0.6))
            text = "A removed block leaves its shortcut,\na plain one that of its residual twin."
            free.text(0.5, 0.2, text, ha="center", color="0.3", transform=free.transAxes)
        else:
            figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        write_png_and_svg(figure, path, f"blocks removed one by one\n{self.study}")

    def _draw_lesions(self, ax: Axes, kind: str) -> None:
        errors = [error for blocks in self.lesions.values() for error in blocks.values()]
        scale_errors(ax, errors, "test error")
        ax.set_ylim(top=1.3 * ax.get_ylim()[1])  # room for the depth labels
        colours = colour_depths(self.study.depths)
        lines = number_values(self.errors())
        for name, errors in self.lesions.items():
            if split_name(name)[0] == kind:
                x, whole = lines[name].x, errors[WHOLE]
                colour = colours[lines[name].depth]
                ax.plot([x[0], x[-1]], [whole, whole], color=colour, **STYLES["test error"])
        draw_lines(ax, of_kind(lines, kind), self.study, dots=True)
        ax.set_title(f"{kind}, without one block", fontsize="medium")

    def _draw_ratios(self, ax: Axes) -> None:
        ratios = {name: list(blocks.values()) for name, blocks in self.ratios.items()}
        largest = max(finite(value for values in ratios.values() for value in values))
        ax.set_ylim(0, 1.08 * largest if largest > 0 else 1.0)
        draw_lines(ax, of_kind(number_values(ratios), "residual"), self.study, dots=True)
        ax.set_ylabel("||F(x)|| / ||x||")
        ax.set_title("residual, what each block adds", fontsize="medium")

    def describe(self) -> Finding:
        medians = {name: statistics.median(errors) for name, errors in self.errors().items()}
        ratios = {
            name: statistics.median(finite(blocks.values())) for name, blocks in self.ratios.items()
        }
        sentences = [
            f"Without one of its blocks, {name} has a test error of {medians[name]:.1f} % in the "
            f"median and {max(self.errors()[name]):.1f} % at worst; whole, it has "
            f"{self.lesions[name][WHOLE]:.1f} %."
            for name in deepest_of_each_kind(medians)
        ]
        named = sorted(ratios, key=split_name)
        if named:
            chosen = dict.fromkeys((named[0], named[-1]))
            sentences.append(
                "What a block adds, ||F(x)|| / ||x||, has the median "
                + " and ".join(f"{ratios[name]:.2f} in {name}" for name in chosen)
                + "."
            )
        sentences.append(
            f"The errors are those of {self.images:,} test images, seed {self.study.seed}."
        )
        rows = []
        for name, errors in self.lesions.items():
            others = {block: error for block, error in errors.items() if block != WHOLE}
            worst = max(others, key=lambda block: others[block])
            rows.append(
                (
                    name,
                    f"{len(others)}",
                    f"{errors[WHOLE]:.1f}",
                    f"{medians[name]:.1f}",
                    f"{others[worst]:.1f}",
                    worst,
                    f"{ratios[name]:.2f}" if name in ratios else "-",
                )
            )
        headings = (
            "network",
            "blocks",
            "test error, %",
            "median without a block, %",
            "worst, %",
            "worst block",
            "median ||F(x)|| / ||x||",
        )
        return Finding("Blocks one by one", " ".join(sentences), Table(headings, rows))
