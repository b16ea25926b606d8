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
LINE: Mapping[str, Any] = {"lw": 1.8, "ls": "-"}
DOTS: Mapping[str, Any] = {**LINE, "marker": "o", "ms": 3.5}


class Line(NamedTuple):
    """A line in the colour of its network, with a label at its end: the depth by default."""

    name: NetworkName
    x: Sequence[float]
    y: Sequence[float]
    style: Mapping[str, Any] = LINE
    label: str = ""


def number_values(
    values: Mapping[NetworkName, Sequence[float]], style: Mapping[str, Any] = LINE
) -> list[Line]:
    """Make a line for each network: its values against 1, 2, 3 ..."""
    return [Line(name, range(1, len(y) + 1), y, style) for name, y in values.items()]


def list_kinds(names: Iterable[NetworkName]) -> list[str]:
    """List kinds in the order of their columns: plain left, residual right."""
    return sorted({split_name(name)[0] for name in names})


def draw_grid(
    rows: Mapping[str, Sequence[Line]],
    setting: Setting,
    path: Path,
    title: str,
    labels: tuple[str, str],
    set_scale: Callable[[Axes, Sequence[float]], None],
) -> None:
    """Draw rows of panels, a column for each kind, all on the same scales.

    Written to `path`, a PNG, and as an SVG next to it.

    Args:
      rows: second half of the panels' titles -> a line for each network.
      labels: labels of the x-axes and of the y-axes.
      set_scale: sets the y-scale for the given values.
    """
    lines = [line for row in rows.values() for line in row]
    kinds = list_kinds(line.name for line in lines)
    figure = Figure(figsize=(WIDTH, 1.0 + 2.7 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(kinds), sharex=True, sharey=True, squeeze=False)
    set_scale(axes[0, 0], [y for line in lines for y in line.y])
    for (name, row), row_axes in zip(rows.items(), axes, strict=True):
        row_axes[0].set_ylabel(labels[1])
        for kind, ax in zip(kinds, row_axes, strict=True):
            ax.set_title(f"{kind}, {name}", fontsize="medium")
            draw_lines(ax, [line for line in row if line.name.startswith(kind)], setting)
    for ax in axes[-1]:
        ax.set_xlabel(labels[0])
    handles = name_depths((line.name for line in lines), setting)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    write_png_and_svg(figure, path, f"{title}\n{setting}")


def draw_lines(ax: Axes, lines: Iterable[Line], setting: Setting) -> None:
    """Draw lines and their labels over axes whose y-scale is set."""
    lowest = 0 if ax.get_yscale() == "log" else -math.inf
    ends = []
    for line in lines:
        colour = setting.colour(line.name)
        ax.plot(line.x, line.y, color=colour, **line.style)
        points = zip(line.x, line.y, strict=True)
        if shown := [(x, y) for x, y in points if lowest < y < math.inf]:
            ends.append((*shown[-1], line.label or f"{split_name(line.name)[1]}", colour))
    style_axes(ax)
    label_ends(ax, ends)


def name_depths(names: Iterable[NetworkName], setting: Setting) -> list[Line2D]:
    """Make legend entries for the depths of these networks."""
    colours = {split_name(name)[1]: setting.colour(name) for name in names}
    return [
        Line2D([], [], color=colour, label=f"depth {depth}", **LINE)
        for depth, colour in sorted(colours.items())
    ]
