"""Figures of a study (as Figure 6 of He et al. 2015), of one run, and of the benchmark.

All figures of a study follow the convention set here: a colour is a depth, a panel is a kind, a
solid line is training error or the subject of the figure, a thin dashed line is always test error,
and panels share their scales.
"""

import io
import math
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from flaxnets.files import write_atomic
from flaxnets.reporting.tables import blocks, network_name
from flaxnets.studies.results import NetworkResults, Run
from flaxnets.text import millions, shorten

# After Okabe and Ito (2008), without faint colours. Each has a contrast of 3:1 or more on white,
# and neighbouring depths differ in lightness too.
COLOURS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7", "#A6761D", "#777777")

# Training error is bold, because the degradation problem is about it.
STYLES: dict[str, dict[str, Any]] = {
    "training error": {"lw": 2.2, "ls": "-"},
    "test error": {"lw": 1.0, "ls": "--"},
}
TICKS = (0, 0.5, 1, 2, 5, 10, 20, 30, 50, 70, 100)  # percent


def colour_depths(depths: Iterable[int]) -> dict[int, str]:
    """Map all depths of a study to their colours, which go by the order of the depths."""
    return {depth: COLOURS[i % len(COLOURS)] for i, depth in enumerate(sorted(set(depths)))}


def write_png_and_svg(figure: Figure, path: Path, title: str) -> None:
    """Write a figure to `path`, a PNG, and as an SVG next to it; see `write_figure`."""
    for suffix in (path.suffix, ".svg"):
        write_figure(figure, path.with_suffix(suffix), title)


def write_figure(figure: Figure, path: Path, title: str, **place: Any) -> None:
    """Write a figure with a title atomically; the suffix of `path` gives the format.

    `place` holds further arguments of `Figure.suptitle`.
    """
    set_title(figure, title, **place)
    picture = io.BytesIO()
    form = path.suffix.lstrip(".")
    metadata = {"Date": None} if form == "svg" else None  # a date would change the bytes
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "flaxnets"}):
        # Characters missing from the font are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(picture, dpi=160, format=form, metadata=metadata)
    write_atomic(path, picture.getvalue())


def set_title(figure: Figure, title: str, **place: Any) -> None:
    """Give a finished figure a title.

    Titles, labels and legends may contain names of paths, kinds or classes, so dollar signs in them
    do not start formulas. `place` holds further arguments of `Figure.suptitle`.
    """
    # Matplotlib's own wrapping would take dollar signs for formulas.
    width = int(11 * figure.get_figwidth())  # characters
    lines = [textwrap.fill(shorten(line, 300), width) for line in title.splitlines()]
    texts = [figure.suptitle("\n".join(lines), fontsize="medium", **place)]
    for ax in figure.axes:
        texts += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
    for legend in figure.findobj(Legend):
        texts += cast(Legend, legend).get_texts()
    for text in texts:
        text.set_parse_math(False)


class _NotebookFigure(Figure):
    """A figure that a notebook displays; without this, only pyplot's figures are displayed."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()


def draw_errors(networks: Sequence[NetworkResults]) -> Figure:
    """Draw a panel per kind, a colour per depth: training error solid and bold, test error dashed.

    All panels share one scale, linear up to 1 % and logarithmic above, so that small errors can be
    read. With several seeds, a line is the mean over the seeds that got that far, and a band spans
    their lowest and highest values.
    """
    kinds = list(dict.fromkeys(network.kind for network in networks))
    colours = colour_depths(network.depth for network in networks)
    figure = _NotebookFigure(figsize=(max(4.4 * len(kinds), 6.4), 5.0), layout="constrained")
    axes = figure.subplots(1, len(kinds), sharex=True, sharey=True, squeeze=False)[0]
    scale_errors(axes[0], _list_errors(networks))
    for ax, kind in zip(axes, kinds, strict=True):
        labels = [
            _draw_network(ax, network, colours[network.depth])
            for network in networks
            if network.kind == kind
        ]
        label_ends(ax, [label for label in labels if label])
        ax.set_title(kind)
        ax.set_xlabel("epoch")
        style_axes(ax)
    lines: list[Artist] = [Line2D([], [], color="0.3", label=n, **STYLES[n]) for n in STYLES]
    if any(len(network.runs) > 1 for network in networks):
        lines.append(Patch(color="0.3", alpha=0.15, lw=0, label="lowest to highest seed"))
    axes[0].set_xlim(left=0)
    # Below the axes, where they hide no curve.
    names = _name_networks(networks, colours)
    figure.legend(handles=names, frameon=False, loc="outside lower left")
    figure.legend(handles=lines, frameon=False, loc="outside lower right")
    return figure


def style_axes(ax: Axes) -> None:
    """Set whole numbers along x, a faint grid and no frame."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.grid(color="0.9", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def _list_errors(networks: Sequence[NetworkResults]) -> list[float]:
    return [
        row[metric]
        for network in networks
        for run in network.runs
        for row in run.result.evaluated
        for metric in ("train_error", "test_error")
    ]


def scale_errors(ax: Axes, errors: Sequence[float], name: str = "error") -> None:
    """Set the y-scale for `errors` in percent: linear up to 1 %, logarithmic above, from the tick
    below the lowest error."""
    errors = [error for error in errors if math.isfinite(error)]
    top = min(100.0, max(errors, default=100.0))
    below = max((tick for tick in TICKS if tick <= min(errors, default=0.0)), default=0)
    ax.set_yscale("symlog", linthresh=1, linscale=0.6)
    # Labels of lines at 0 stay clear of the axis.
    ax.set_ylim(0.98 * below if below else -0.11, 1.1 * max(top, 1.0))
    ax.yaxis.set_major_locator(FixedLocator(TICKS))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{error:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel(f"{name} (%), logarithmic above 1 %")


def _name_networks(networks: Sequence[NetworkResults], colours: Mapping[int, str]) -> list[Line2D]:
    """Make a legend entry per depth, shared by plain and residual twins of equal size."""
    names: dict[tuple[int, str], list[str]] = {}
    for network in networks:
        config = network.runs[0].config
        size = f"{blocks(config)} blocks, {millions(config.parameters)}"
        names.setdefault((network.depth, size), []).append(network_name(config))
    return [
        Line2D(
            [],
            [],
            color=colours[depth],
            label=f"{', '.join(members)}: {size}",
            **STYLES["training error"],
        )
        for (depth, size), members in sorted(names.items())
    ]


def draw_run(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the errors of one run against epoch: training images solid, other images dashed.

    `rows` are those of `metrics.csv`; epochs without a value are left out. Written to `path`, a
    PNG, and as an SVG next to it.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.subplots()
    epochs = [row["step"] / rows[0]["step"] for row in rows]
    names = ("running train", "train", "validation", "test")
    for name, colour in zip(names, ("0.3", *COLOURS), strict=False):
        metric = f"{name.replace(' ', '_')}_error"
        if metric in rows[0]:
            style = STYLES["training error" if "train" in name else "test error"]
            pairs = zip(epochs, (row[metric] for row in rows), strict=True)
            x, errors = zip(*(pair for pair in pairs if pair[1] is not None), strict=True)
            label = "training (augmented)" if name == "running train" else name
            ax.plot(x, errors, color=colour, label=f"{label}: {errors[-1]:.2f} %", **style)
    ax.set_ylim(bottom=0)
    ax.set_xlim(left=0)
    ax.set_xlabel("epoch")
    ax.set_ylabel("error (%)")
    style_axes(ax)
    ax.legend(frameon=False)
    write_png_and_svg(figure, path, title)


def _draw_network(
    ax: Axes, network: NetworkResults, colour: str
) -> tuple[float, float, str, str] | None:
    """Draw both curves; return the end of the training curve, its label and colour."""
    runs = [run for run in network.runs if run.result.evaluated]
    if not runs:
        return None
    for metric, style in zip(("train_error", "test_error"), STYLES.values(), strict=True):
        epochs, curves = _curves(runs, metric)
        ax.plot(epochs, np.nanmean(curves, axis=0), color=colour, **style)
        if len(runs) > 1:
            low, high = np.nanmin(curves, axis=0), np.nanmax(curves, axis=0)
            ax.fill_between(epochs, low, high, color=colour, alpha=0.15, lw=0)
    epochs, curves = _curves(runs, "train_error")
    label = f"{network.depth}"
    if any(run.result.status != "finished" for run in runs):
        label += f" ({network.status})"
    return epochs[-1], float(np.nanmean(curves[:, -1])), label, colour


def _curves(runs: Sequence[Run], metric: str) -> tuple[list[float], np.ndarray]:
    """Return epochs and each run's metric `(runs, epochs)`, NaN after a run's last row.

    An epoch is left out if a run that went on after it was not evaluated there: a mean over the
    other runs would jump.
    """
    measured = [{row["step"]: row[metric] for row in run.result.evaluated} for run in runs]
    steps = sorted(
        step
        for step in set().union(*measured)
        if all(step in values or step > max(values) for values in measured)
    )
    curves = np.array([[values.get(step, np.nan) for step in steps] for values in measured], float)
    # The last epoch may be incomplete.
    return [step / steps[0] for step in steps], curves


def label_ends(ax: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each label (x, y, text, colour) to the right of the end of its line.

    A label moves up if it would cover another one. If its line ends further left than others, it
    moves up or down until it covers no line. All labels keep clear of the axis below. Scales and
    lines must be set before.
    """
    ax.get_xlim()  # forces lazy autoscaling
    to_shares = ax.transScale + ax.transLimits  # as shares of the axes' width and height
    lines = [to_shares.transform(np.asarray(line.get_xydata(), float)) for line in ax.lines]
    last = max((np.fmax.reduce(line[:, 0], initial=0.0) for line in lines), default=0.0)
    height = ax.get_position().height * cast(Figure, ax.figure).get_figheight()
    gap = max(0.05, 11.5 / 72 / height)  # 11.5 points as a share of the axes' height
    placed: list[np.ndarray] = []

    def is_free(place: np.ndarray) -> bool:
        if any(abs(x - place[0]) < 0.08 and abs(y - place[1]) < gap - 1e-9 for x, y in placed):
            return False
        if place[0] + 0.01 > last:
            return True
        across = place[0] + np.linspace(0.01, 0.09, 9)
        for line in lines:
            heights = np.interp(across, *line.T, right=np.nan)
            above = np.fmin(heights[1:], heights[:-1]) - place[1] > 0.6 * gap
            below = place[1] - np.fmax(heights[1:], heights[:-1]) > 0.6 * gap
            if not np.all(above | below | np.isnan(heights[1:])):
                return False
        return gap / 2 <= place[1] < 1 - gap / 2

    steps = gap / 4 * np.arange(40)
    steps = np.stack([steps, -steps], 1).ravel()  # nearest first
    for x, y, text, colour in sorted(labels, key=lambda label: label[1]):
        end = np.fmax(to_shares.transform((x, y)), (0, gap / 2))
        stacked = sorted(max(0.0, above + gap - end[1]) for _, above in placed)
        shifts = [0.0, *stacked] if end[0] + 0.01 > last else steps
        places = (end + np.array([0, shift]) for shift in shifts)
        placed.append(next(filter(is_free, places), end))
        ax.annotate(
            text,
            (x, placed[-1][1]),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )


def draw_benchmark(
    ratios: Mapping[str, Mapping[str, Sequence[float]]], path: Path, title: str
) -> None:
    """Draw how fast we are relative to each contender, in a group of points per workload.

    A point is the median over rounds, and the line through it spans the lowest to the highest
    round. The scale is logarithmic, so that twice and half as fast are equally far from 1. Written
    to `path`, a PNG, and as an SVG next to it.

    Args:
      ratios: workload -> contender -> our images per second divided by its, in each round.
    """
    names = list(dict.fromkeys(name for contenders in ratios.values() for name in contenders))
    group_height = 0.2 + 0.2 * max(2, len(names))  # inches; labels may have two lines
    figure = Figure(figsize=(7.6, 1.6 + len(ratios) * group_height), layout="constrained")
    ax = figure.subplots()
    for group, contenders in enumerate(ratios.values()):
        for i, (name, rounds) in enumerate(contenders.items()):
            y = group + (i - (len(contenders) - 1) / 2) * 0.2 / group_height
            middle, low, high = np.median(rounds), min(rounds), max(rounds)
            colour = COLOURS[names.index(name) % len(COLOURS)]
            ax.plot([low, high], [y, y], color=colour, lw=1.4)
            ax.plot(middle, y, "o", color=colour, ms=6)
            ax.annotate(
                f"{middle:.2f}",
                (high, y),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=colour,
                fontsize="small",
                fontweight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
        if group:
            ax.axhline(group - 0.5, color="0.9", lw=0.6)
    _scale_speed(ax, [ratio for c in ratios.values() for rounds in c.values() for ratio in rounds])
    ax.set_yticks(range(len(ratios)), list(ratios), fontsize="small")
    ax.set_ylim(len(ratios) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right"]].set_visible(False)
    points: list[Artist] = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], marker="o", label=name)
        for i, name in enumerate(names)
    ]
    points.append(Line2D([], [], color="0.3", lw=1.4, label="lowest to highest round"))
    figure.legend(handles=points, loc="outside lower center", ncols=2, frameon=False)
    write_png_and_svg(figure, path, title)


def _scale_speed(ax: Axes, ratios: Sequence[float]) -> None:
    """Set a logarithmic x-scale with a line at 1 and room for labels on the right."""
    ax.set_xscale("log")
    ax.set_xlim(min([0.5, *ratios]) / 1.1, max([2.0, *ratios]) * 1.3)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.axvline(1, color="0.4", lw=0.8, ls="--", zorder=0)
    ax.set_xlabel("ours / it, ratio of images per second (above 1: ours is faster)")
