"""Panels, lines and scales shared by the figures of several diagnostics.

They follow the convention of `flaxnets.reporting.figures`: a column for each kind, a colour for
each depth.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from flaxnets.diagnostics.finding import Setting, split_name
from flaxnets.reporting.figures import colour_depths, label_ends, style_axes, write_png_and_svg

WIDTH = 8.8  # inches
LINE: dict[str, Any] = {"lw": 1.8, "ls": "-"}
DOTS: dict[str, Any] = {"marker": "o", "ms": 3.5}


class Line(NamedTuple):
    """One line: `x` and `y`, in the colour of `depth`, which is written at its end."""

    depth: int
    x: Sequence[float]
    y: Sequence[float]


class Row(NamedTuple):
    """A row of panels: the second half of their titles, and a line for each network."""

    title: str
    lines: Mapping[str, Line]


def number_values(values: Mapping[str, Sequence[float]]) -> dict[str, Line]:
    """Make a line for each network: its values against 1, 2, 3 ..."""
    return {
        name: Line(split_name(name)[1], range(1, len(numbers) + 1), numbers)
        for name, numbers in values.items()
    }


def list_kinds(names: Iterable[str]) -> list[str]:
    """List kinds in the order of their columns: plain left, residual right."""
    return sorted({split_name(name)[0] for name in names})


def of_kind(lines: Mapping[str, Line], kind: str) -> list[Line]:
    return [line for name, line in lines.items() if split_name(name)[0] == kind]


def draw_grid(
    rows: Sequence[Row],
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
      labels: labels of the x-axes and of the y-axes.
      set_scale: sets the y-scale for the given values.
      dots: whether to mark every value.
    """
    kinds = list_kinds(name for row in rows for name in row.lines)
    figure = Figure(figsize=(WIDTH, 1.0 + 2.7 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(kinds), sharex=True, sharey=True, squeeze=False)
    set_scale(axes[0, 0], [y for row in rows for line in row.lines.values() for y in line.y])
    for row, row_axes in zip(rows, axes, strict=True):
        row_axes[0].set_ylabel(labels[1])
        for kind, ax in zip(kinds, row_axes, strict=True):
            ax.set_title(f"{kind}, {row.title}", fontsize="medium")
            draw_lines(ax, of_kind(row.lines, kind), setting, dots)
    for ax in axes[-1]:
        ax.set_xlabel(labels[0])
    depths = {line.depth for row in rows for line in row.lines.values()}
    handles = name_depths(depths, setting)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    write_png_and_svg(figure, path, f"{title}\n{setting}")


def draw_lines(ax: Axes, lines: Sequence[Line], setting: Setting, dots: bool = False) -> None:
    """Draw lines over axes whose y-scale is set, and write each one's depth at its end."""
    colours = colour_depths(setting.depths)
    ends = []
    for line in lines:
        colour = colours[line.depth]
        ax.plot(line.x, line.y, color=colour, **LINE, **(DOTS if dots else {}))
        shown = [(x, y) for x, y in zip(line.x, line.y, strict=True) if _can_be_shown(ax, y)]
        if shown:
            ends.append((*shown[-1], str(line.depth), colour))
    style_axes(ax)
    label_ends(ax, ends)


def _can_be_shown(ax: Axes, y: float) -> bool:
    return math.isfinite(y) and (y > 0 or ax.get_yscale() != "log")


def name_depths(depths: Iterable[int], setting: Setting) -> list[Line2D]:
    """Make legend entries for these depths."""
    colours = colour_depths(setting.depths)
    return [
        Line2D([], [], color=colours[depth], label=f"depth {depth}", **LINE)
        for depth in sorted(depths)
    ]


# Scales.


def round_ticks(low: float, high: float, most: int = 9) -> list[float]:
    """List round numbers from `low` to `high` for a logarithmic scale.

    They are 1, 2 and 5 times powers of ten. If these are more than `most`, only powers of ten
    remain. If they are fewer than four, numbers between them are added.
    """
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)

    def fill(*digits: float) -> list[float]:
        numbers = [float(f"{digit}e{power}") for power in powers for digit in digits]
        return [number for number in numbers if low <= number <= high]

    ticks = fill(1, 2, 5)
    if len(ticks) < 4:
        ticks = fill(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    if len(ticks) < 4:
        linear = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
        ticks = [float(f"{tick:.12g}") for tick in linear if low <= tick <= high]
    if len(ticks) > most:
        ticks = fill(1)
    return ticks[:: -(-len(ticks) // most) or 1]


def set_log_scale(ax: Axes, values: Sequence[float]) -> None:
    """Set a logarithmic scale for those values that are above 0."""
    shown = [value for value in values if 0 < value < math.inf]
    low, high = (min(shown), max(shown)) if shown else (0.1, 1.0)
    low, high = low / 1.5, high * 1.5
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    set_ticks(ax, round_ticks(low, high))


def set_ticks(ax: Axes, ticks: Sequence[float]) -> None:
    """Set the ticks of the y-axis; as powers of ten where plain numbers would be long."""
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_minor_locator(NullLocator())
    plain = all(1e-3 <= tick <= 1e4 for tick in ticks if tick)
    ax.yaxis.set_major_formatter(
        FuncFormatter(lambda tick, _: f"{tick:g}" if plain else _format_power(tick))
    )


def _format_power(tick: float) -> str:
    power = math.log10(tick)
    return f"$10^{{{power:.0f}}}$" if abs(power - round(power)) < 1e-9 else f"{tick:g}"


def stretch_around_one(values: ArrayLike) -> np.ndarray:
    """Map 1 to 0: linearly within 0.01 of 1, logarithmically beyond."""
    deviations = (np.asarray(values, float) - 1) / 0.01
    return np.sign(deviations) * np.log1p(np.abs(deviations))


def shrink_around_one(values: ArrayLike) -> np.ndarray:
    """Invert `stretch_around_one`."""
    values = np.asarray(values, float)
    return 1 + 0.01 * np.sign(values) * np.expm1(np.abs(values))


def set_scale_around_one(ax: Axes, values: Sequence[float]) -> None:
    """Set a scale for values mostly near 1; see `stretch_around_one`."""
    shown = [value for value in values if math.isfinite(value)] or [1.0]
    low, high = stretch_around_one(np.array([min(*shown, 0.99), max(*shown, 1.01)]))
    margin = 0.05 * (high - low)
    low, high = shrink_around_one(np.array([low - margin, high + margin]))
    ax.set_yscale("function", functions=(stretch_around_one, shrink_around_one))
    ax.set_ylim(low, high)
    set_ticks(ax, _ticks_around_one(low, high))


def _ticks_around_one(low: float, high: float) -> list[float]:
    """List round numbers on both sides of 1, at least a sixteenth of the axis apart."""
    gap = float(np.ptp(stretch_around_one(np.array([low, high])))) / 16
    sides = (
        (0.99, 0.98, 0.95, 0.9, 0.8, 0.5, 0.2, 0.0),
        (1.01, 1.02, 1.05, 1.1, 1.2, 1.5, *(d * 10**p for p in range(6) for d in (2, 5, 10))),
    )
    ticks = [1.0]
    for side in sides:
        last = 1.0
        for tick in side:
            if low <= tick <= high and abs(np.diff(stretch_around_one([last, tick]))[0]) >= gap:
                ticks.append(tick)
                last = tick
    return sorted(ticks)
