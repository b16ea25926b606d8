"""Scales of y-axes, with round numbers at their ticks."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import ArrayLike


def round_ticks(low: float, high: float, most: int = 9) -> list[float]:
    """List round numbers from `low` to `high` for a logarithmic scale.

    They are 1, 2 and 5 times powers of ten. If there are more than `most`, only powers of ten
    remain. If there are fewer than four, numbers between them are added.
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
    shown = [value for value in values if math.isfinite(value)]
    low, high = stretch_around_one([min([0.99, *shown]), max([1.01, *shown])])
    margin = 0.05 * (high - low)
    low, high = shrink_around_one([low - margin, high + margin])
    ax.set_yscale("function", functions=(stretch_around_one, shrink_around_one))
    ax.set_ylim(low, high)
    set_ticks(ax, _ticks_around_one(low, high))


def _ticks_around_one(low: float, high: float) -> list[float]:
    """List round numbers on both sides of 1, at least a sixteenth of the axis apart."""
    gap = np.ptp(stretch_around_one([low, high])) / 16
    sides = (
        (0.99, 0.98, 0.95, 0.9, 0.8, 0.5, 0.2, 0.0),
        (1.01, 1.02, 1.05, 1.1, 1.2, 1.5, *(d * 10**p for p in range(6) for d in (2, 5, 10))),
    )
    ticks = [1.0]
    for side in sides:
        last = 1.0
        for tick in side:
            if low <= tick <= high and np.ptp(stretch_around_one([last, tick])) >= gap:
                ticks.append(tick)
                last = tick
    return sorted(ticks)
