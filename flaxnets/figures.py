"""Figures of the study, as Figure 6 of He et al. (2015), of one run, and of the benchmark."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from flaxnets.files import write_atomic
from flaxnets.study import Network, Run
from flaxnets.tables import blocks, millions, network_name

# Okabe and Ito (2008), ordered so that neighbouring depths differ in lightness too.
COLOURS = ("#0072B2", "#E69F00", "#000000", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")

# As in the paper: training error thin and dashed, test error bold.
STYLES: dict[str, dict[str, Any]] = {
    "training error": {"lw": 1.0, "ls": "--"},
    "test error": {"lw": 2.2, "ls": "-"},
}


def write_figure(figure: Figure, path: Path, title: str) -> None:
    """Write a figure with a title, whole or not at all; the suffix of `path` gives the format."""
    figure.suptitle(title, fontsize="medium")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=160, format=path.suffix.lstrip("."))
    write_atomic(path, picture.getvalue())


def draw_errors(networks: Sequence[Network], path: Path, title: str) -> None:
    """Draw a panel a kind, a colour a depth: training error thin and dashed, test error solid.

    With several seeds a line is their mean over the seeds that got that far, and a band their
    smallest and largest value. Written to `path`, whose suffix gives the format.
    """
    kinds = list(dict.fromkeys(network.kind for network in networks))
    depths = sorted({network.depth for network in networks})
    figure = Figure(figsize=(max(4.4 * len(kinds), 6.4), 5.0), layout="constrained")
    axes = figure.subplots(1, len(kinds), sharex=True, sharey=True, squeeze=False)[0]
    top = max((_ceiling(network) for network in networks), default=100.0)
    for ax, kind in zip(axes, kinds, strict=True):
        labels, names = [], []
        for network in networks:
            if network.kind == kind:
                colour = COLOURS[depths.index(network.depth) % len(COLOURS)]
                labels.append(_draw_network(ax, network, colour))
                config = network.runs[0].config
                text = f"{network_name(config)}, {blocks(config)} blocks, "
                text += millions(config["parameters"])
                names += ax.plot([], [], color=colour, label=text, **STYLES["test error"])
        _label_ends(ax, [label for label in labels if label], top)
        ax.set_title(kind)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if ax is axes[-1]:
            lines = [ax.plot([], [], color="0.3", label=name, **STYLES[name])[0] for name in STYLES]
            ax.add_artist(ax.legend(handles=lines, frameon=False, loc="upper right"))
        # Below the axes, where it hides no curve.
        ax.legend(handles=names, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.14))
        ax.grid(color="0.9", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(-0.02 * top, top)
    axes[0].set_xlim(left=0)
    axes[0].set_ylabel("error (%)")
    write_figure(figure, path, title)


def draw_run(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw one run: error of each split against epoch, that seen in training thin and dashed.

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


def _ceiling(network: Network) -> float:
    values = [
        row[metric]
        for run in network.runs
        for row in run.result.rows
        for metric in ("train_error", "test_error")
    ]
    return min(100.0, 1.05 * max(values, default=100.0))


def _draw_network(ax: Axes, network: Network, colour: str) -> tuple[float, float, str, str] | None:
    """Draw both curves; returns where the test curve ends, its label and colour."""
    runs = [run for run in network.runs if run.result.rows]
    if not runs:
        return None
    for metric, style in zip(("train_error", "test_error"), STYLES.values(), strict=True):
        epochs, curves = _curves(runs, metric)
        ax.plot(epochs, np.nanmean(curves, axis=0), color=colour, **style)
        if len(runs) > 1:
            low, high = np.nanmin(curves, axis=0), np.nanmax(curves, axis=0)
            ax.fill_between(epochs, low, high, color=colour, alpha=0.15, lw=0)
    epochs, curves = _curves(runs, "test_error")
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


def _label_ends(ax: Axes, labels: list[tuple[float, float, str, str]], top: float) -> None:
    """Write each depth beside the end of its test curve, moved up where two would overlap."""
    lowest = -np.inf
    for x, y, text, colour in sorted(labels, key=lambda label: label[1]):
        y = max(y, lowest)
        lowest = y + 0.05 * top
        ax.annotate(
            text,
            (x, y),
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
