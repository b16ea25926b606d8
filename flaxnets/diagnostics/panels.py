"""Panels and lines shared by the figures of several diagnostics.

They follow the convention of `flaxnets.reporting.figures`: a column for each kind, a colour for
each depth.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flaxnets.diagnostics.study import NetworkName, Setting, split_name
from flaxnets.reporting.figures import label_ends, style_axes, write_png_and_svg

WIDTH = 8.8  # inches
LINE: dict[str, Any] = {"lw": 1.8, "ls": "-"}
DOTS: dict[str, Any] = {"marker": "o", "ms": 3.5}


class Line(NamedTuple):
    """A line of a network."""

    x: Sequence[float]
    y: Sequence[float]


Lines = Mapping[NetworkName, Line]


def number_values(values: Mapping[NetworkName, Mapping[str, float]]) -> Lines:
    """Make a line for each network: the values of its layers or blocks against 1, 2, 3 ..."""
    return {name: Line(range(1, len(y) + 1), [*y.values()]) for name, y in values.items()}


def list_kinds(names: Iterable[NetworkName]) -> list[str]:
    """List kinds in the order of their columns: plain left, residual right."""
    return sorted({split_name(name)[0] for name in names})


def draw_grid(
    rows: Mapping[str, Lines],
    setting: Setting,
    path: Path,
    title: str,
    labels: tuple[str, str],
    set_scale: Callable[[Axes, Sequence[float]], None],
    dots: bool = False,
) -> None:
    """Draw rows of panels, a column for each kind, all on the same scales.

    Written to `path`, a PNG, and as an SVG next to it.

    Args:
      rows: second half of the panels' titles -> a line for each network.
      labels: labels of the x-axes and of the y-axes.
      set_scale: sets the y-scale for the given values.
      dots: whether to mark every value.
    """
    names = {name for lines in rows.values() for name in lines}
    kinds = list_kinds(names)
    figure = Figure(figsize=(WIDTH, 1.0 + 2.7 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(kinds), sharex=True, sharey=True, squeeze=False)
    set_scale(axes[0, 0], [y for lines in rows.values() for line in lines.values() for y in line.y])
    for (name, lines), row_axes in zip(rows.items(), axes, strict=True):
        row_axes[0].set_ylabel(labels[1])
        for kind, ax in zip(kinds, row_axes, strict=True):
            ax.set_title(f"{kind}, {name}", fontsize="medium")
            draw_lines(ax, lines, kind, setting, dots)
    for ax in axes[-1]:
        ax.set_xlabel(labels[0])
    handles = name_depths(names, setting)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    write_png_and_svg(figure, path, f"{title}\n{setting}")


def draw_lines(ax: Axes, lines: Lines, kind: str, setting: Setting, dots: bool = False) -> None:
    """Draw the lines of one kind, each with its depth at its end; the y-scale must be set."""
    lowest = 0 if ax.get_yscale() == "log" else -math.inf
    ends = []
    for name, (xs, ys) in lines.items():
        network_kind, depth = split_name(name)
        if network_kind != kind:
            continue
        colour = setting.colour(name)
        ax.plot(xs, ys, color=colour, **LINE, **(DOTS if dots else {}))
        if shown := [(x, y) for x, y in zip(xs, ys, strict=True) if lowest < y < math.inf]:
            ends.append((*shown[-1], f"{depth}", colour))
    style_axes(ax)
    label_ends(ax, ends)


def name_depths(names: Iterable[NetworkName], setting: Setting) -> list[Line2D]:
    """Make legend entries for the depths of these networks."""
    colours = {split_name(name)[1]: setting.colour(name) for name in names}
    return [
        Line2D([], [], color=colour, label=f"depth {depth}", **LINE)
        for depth, colour in sorted(colours.items())
    ]
