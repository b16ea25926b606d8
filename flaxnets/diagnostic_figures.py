"""Figures of the diagnostics: lines over layers, blocks or epochs, and loss surfaces."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from flaxnets.figures import COLOURS, write_figure


@dataclass(frozen=True)
class Curve:
    """One line: `x` and `y`, in the colour of `depth`, under `label` in the legend."""

    label: str
    depth: int
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False

    def style(self, depths: Sequence[int]) -> dict[str, Any]:
        line = {"ls": "--", "lw": 1.3} if self.dashed else {"ls": "-", "lw": 1.8}
        return {"color": COLOURS[depths.index(self.depth) % len(COLOURS)], **line}


@dataclass(frozen=True)
class Panel:
    """Curves over one pair of axes; `log` is of the vertical one."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log: bool = False
    markers: bool = False


def draw_panels(panels: Sequence[Panel], path: Path, title: str) -> None:
    """Draw panels side by side, with one legend. Written to `path`, whose suffix gives the
    format."""
    depths = sorted({curve.depth for panel in panels for curve in panel.curves})
    by_label = {curve.label: curve for panel in panels for curve in panel.curves}
    figure = Figure(figsize=(4.4 * len(panels) + 0.6, 4.6), layout="constrained")
    for ax, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        for curve in panel.curves:
            marker = "o" if panel.markers else None
            ax.plot(curve.x, curve.y, marker=marker, ms=3, **curve.style(depths))
        if panel.log:
            ax.set_yscale("log")
        else:
            # Not quite at 0, where the axis would hide a line.
            ax.set_ylim(bottom=-0.02 * ax.get_ylim()[1])
        ax.set_title(panel.title, fontsize="medium")
        ax.set_xlabel(panel.x_label)
        ax.set_ylabel(panel.y_label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        ax.grid(color="0.9", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    names = [
        Line2D([], [], label=label, **curve.style(depths)) for label, curve in by_label.items()
    ]
    columns = min(len(names), 36 * len(panels) // max(map(len, by_label)))
    figure.legend(handles=names, loc="outside lower center", ncols=max(columns, 1), frameon=False)
    write_figure(figure, path, title)


def draw_surfaces(
    surfaces: Sequence[tuple[str, np.ndarray]], offsets: np.ndarray, path: Path, title: str
) -> None:
    """Draw each named loss surface `(n, n)` over `offsets` `(n,)` as contours, on one scale of
    colours; the cross is the network."""
    finite = np.concatenate([surface[np.isfinite(surface)] for _, surface in surfaces])
    low, high = max(float(finite.min()), 1e-6), float(np.quantile(finite, 0.98))
    levels = np.geomspace(low, max(high, 1.01 * low), 18)
    figure = Figure(figsize=(4.7 * len(surfaces) + 0.8, 4.9), layout="constrained")
    axes: list[Axes] = list(np.atleast_1d(figure.subplots(1, len(surfaces), sharey=True)))
    filled = None
    for ax, (name, surface) in zip(axes, surfaces, strict=True):
        clipped = np.clip(np.nan_to_num(surface, nan=levels[-1]), levels[0], levels[-1])
        logs = np.log10(clipped)
        filled = ax.contourf(offsets, offsets, logs, np.log10(levels), cmap="cividis")
        shown = np.log10(levels[1:-1:2])
        lines = ax.contour(
            offsets, offsets, logs, shown, colors="w", linewidths=0.6, linestyles="solid"
        )
        ax.clabel(lines, fmt=lambda value: f"{10**value:.2g}", fontsize="x-small")
        ax.plot(0, 0, "+", color="w", ms=9, mew=1.6)
        ax.set_title(name, fontsize="medium")
        ax.set_xlabel("offset along a random direction")
        ax.set_aspect("equal")
        ticks = np.linspace(offsets[0], offsets[-1], 5)
        ax.set_xticks(ticks)
        ax.set_yticks(ticks)
    axes[0].set_ylabel("offset along another one")
    assert filled is not None
    bar = figure.colorbar(filled, ax=axes, shrink=0.85, label="loss (logarithmic colours)")
    bar.set_ticks(list(np.log10(levels[::4])), labels=[f"{level:.2g}" for level in levels[::4]])
    write_figure(figure, path, title)
