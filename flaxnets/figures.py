"""Figures of the study, as Figure 6 of He et al. (2015), of one run, and of the benchmark."""

import io
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
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
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from flaxnets.files import write_atomic
from flaxnets.study import Network, Run
from flaxnets.tables import blocks, millions, network_name
from flaxnets.text import shorten

# After Okabe and Ito (2008), without faint ones: each has a contrast of 3:1 or more on white,
# and neighbouring depths differ in lightness too.
COLOURS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7", "#A6761D", "#777777")

# The degradation problem is about training error.
STYLES: dict[str, dict[str, Any]] = {
    "training error": {"lw": 2.2, "ls": "-"},
    "test error": {"lw": 1.0, "ls": "--"},
}
TICKS = (0, 0.5, 1, 2, 5, 10, 20, 30, 50, 70, 100)  # percent


def write_figure(figure: Figure, path: Path, title: str, **place: Any) -> None:
    """Write a figure with a title, whole or not at all; the suffix of `path` gives the format.

    Titles, labels and legends may be names of paths, kinds or classes: a dollar in them starts no
    formula. `place` are further arguments of `Figure.suptitle`.
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
    picture = io.BytesIO()
    form = path.suffix.lstrip(".")
    metadata = {"Date": None} if form == "svg" else None  # the same bytes each time
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "flaxnets"}):
        # Of scripts that the font does not have: boxes are drawn.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(picture, dpi=160, format=form, metadata=metadata)
    write_atomic(path, picture.getvalue())


def draw_errors(networks: Sequence[Network], path: Path, title: str) -> None:
    """Draw a panel a kind, a colour a depth: training error solid and bold, test error dashed.

    All panels share one scale, linear up to 1 % and logarithmic above, on which small errors can be
    read. With several seeds a line is their mean over the seeds that got that far, and a band their
    smallest and largest value. Written to `path`, a PNG, and as an SVG beside it.
    """
    kinds = list(dict.fromkeys(network.kind for network in networks))
    depths = sorted({network.depth for network in networks})
    figure = Figure(figsize=(max(4.4 * len(kinds), 6.4), 5.0), layout="constrained")
    axes = figure.subplots(1, len(kinds), sharex=True, sharey=True, squeeze=False)[0]
    _scale_errors(axes[0], networks)
    for ax, kind in zip(axes, kinds, strict=True):
        labels = [
            _draw_network(ax, network, COLOURS[depths.index(network.depth) % len(COLOURS)])
            for network in networks
            if network.kind == kind
        ]
        _label_ends(ax, [label for label in labels if label])
        ax.set_title(kind)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        ax.grid(color="0.9", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    lines: list[Artist] = [Line2D([], [], color="0.3", label=n, **STYLES[n]) for n in STYLES]
    if any(len(network.runs) > 1 for network in networks):
        lines.append(Patch(color="0.3", alpha=0.15, lw=0, label="lowest to highest seed"))
    axes[0].set_xlim(left=0)
    # Below the axes, where they hide no curve.
    names = _name_networks(networks, depths)
    figure.legend(handles=names, frameon=False, loc="outside lower left")
    figure.legend(handles=lines, frameon=False, loc="outside lower right")
    for suffix in (path.suffix, ".svg"):
        write_figure(figure, path.with_suffix(suffix), title)


def _scale_errors(ax: Axes, networks: Sequence[Network]) -> None:
    """A scale for the errors of the networks, which begins at a tick."""
    errors = [
        row[metric]
        for network in networks
        for run in network.runs
        for row in run.result.rows
        for metric in ("train_error", "test_error")
        if math.isfinite(row[metric])
    ]
    top = min(100.0, max(errors, default=100.0))
    below = max((tick for tick in TICKS if tick <= min(errors, default=0.0)), default=0)
    ax.set_yscale("symlog", linthresh=1, linscale=0.6)
    ax.set_ylim(0.98 * below if below else -0.04, 1.1 * max(top, 1.0))
    ax.yaxis.set_major_locator(FixedLocator(TICKS))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{error:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("error (%), logarithmic above 1 %")


def _name_networks(networks: Sequence[Network], depths: Sequence[int]) -> list[Line2D]:
    """A line a depth, which plain and residual twins share: they have equal blocks and
    parameters."""
    names: dict[tuple[int, str], list[str]] = {}
    for network in networks:
        config = network.runs[0].config
        size = f"{blocks(config)} blocks, {millions(config['parameters'])}"
        names.setdefault((network.depth, size), []).append(network_name(config))
    return [
        Line2D(
            [],
            [],
            color=COLOURS[depths.index(depth) % len(COLOURS)],
            label=f"{', '.join(members)}: {size}",
            **STYLES["training error"],
        )
        for (depth, size), members in sorted(names.items())
    ]


def draw_run(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw one run: error of each split against epoch, of training solid, of other images dashed.

    `rows` are those of `metrics.csv`. Written to `path`, whose suffix gives the format.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.subplots()
    epochs = [row["step"] / rows[0]["step"] for row in rows]
    names = ("running train", "train", "validation", "test")
    for name, colour in zip(names, ("0.3", *COLOURS), strict=False):
        metric = f"{name.replace(' ', '_')}_error"
        if metric in rows[0]:
            style = STYLES["training error" if "train" in name else "test error"]
            errors = [row[metric] for row in rows]
            label = "training (augmented)" if name == "running train" else name
            ax.plot(epochs, errors, color=colour, label=f"{label}: {errors[-1]:.2f} %", **style)
    ax.set_ylim(bottom=0)
    ax.set_xlim(left=0)
    ax.set_xlabel("epoch")
    ax.set_ylabel("error (%)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.grid(color="0.9", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    write_figure(figure, path, title)


def _draw_network(ax: Axes, network: Network, colour: str) -> tuple[float, float, str, str] | None:
    """Draw both curves; returns where that of training ends, its label and colour."""
    runs = [run for run in network.runs if run.result.rows]
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
    """Epochs and the metric of each run `(runs, epochs)`, NaN from where a run has no more rows."""
    longest = max((run.result.rows for run in runs), key=len)
    curves = np.full((len(runs), len(longest)), np.nan)
    for curve, run in zip(curves, runs, strict=True):
        curve[: len(run.result.rows)] = [row[metric] for row in run.result.rows]
    # The last epoch may be a part of one.
    per_epoch = longest[0]["step"]
    return [row["step"] / per_epoch for row in longest], curves


def _label_ends(ax: Axes, labels: list[tuple[float, float, str, str]]) -> None:
    """Write each depth beside the end of its training curve, moved up where two would overlap."""
    lowest = -np.inf
    for x, y, text, colour in sorted(labels, key=lambda label: label[1]):
        height = float((ax.transScale + ax.transLimits).transform((x, y))[1])  # share of the axes
        height = max(height, lowest)
        lowest = height + 0.05
        ax.annotate(
            text,
            (x, height),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )


def draw_benchmark(
    rates: Mapping[str, Mapping[str, Sequence[float]]], path: Path, title: str
) -> None:
    """Draw the speed of each contender as a bar, a group a model, from `rates`: model -> contender
    -> images a second in each round.

    Bars are medians, and the thin lines on them the slowest and the fastest round, relative to the
    median of `torch`, or of `ours` where torch has not run for every model. Written to `path`,
    whose suffix gives the format.
    """
    baseline = "torch" if all("torch" in contenders for contenders in rates.values()) else "ours"
    names = list(dict.fromkeys(name for contenders in rates.values() for name in contenders))
    height = 0.8 / len(names)
    bar_colours = [colour for colour in COLOURS if colour != "#000000"]  # lines are drawn on bars
    figure = Figure(
        figsize=(7.6, 1.3 + len(rates) * (0.3 + 0.22 * len(names))), layout="constrained"
    )
    ax = figure.subplots()
    for group, contenders in enumerate(rates.values()):
        unit = float(np.median(contenders[baseline]))
        for i, name in enumerate(name for name in names if name in contenders):
            relative = np.asarray(contenders[name]) / unit
            middle, low, high = np.median(relative), relative.min(), relative.max()
            y = group + (i - (len(contenders) - 1) / 2) * height
            colour = bar_colours[names.index(name) % len(bar_colours)]
            ax.barh(y, middle, 0.9 * height, color=colour)
            ax.plot([low, high], [y, y], color="0.25", lw=0.8)
            images = np.median(contenders[name])
            ax.annotate(
                f"{middle:.2f}  ({images:,.0f}/s)",
                (max(middle, high), y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize="small",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
    ax.axvline(1, color="0.4", lw=0.8, ls="--", zorder=0)
    ax.set_yticks(range(len(rates)), list(rates))
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.18)
    ax.set_xlim(left=0)
    ax.set_xlabel(f"images per second, relative to {baseline}")
    bars = [
        Patch(color=bar_colours[i % len(bar_colours)], label=name) for i, name in enumerate(names)
    ]
    figure.legend(handles=bars, loc="outside lower center", ncols=len(bars), frameon=False)
    write_figure(figure, path, title)
