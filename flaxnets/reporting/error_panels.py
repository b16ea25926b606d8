"""Error curves for the HTML report: SVG drawn by Matplotlib, styled and scripted by the page.

Plotly, Bokeh and Vega-Altair would add 0.9 to 4.8 MB to every report, need a content security
policy that allows inline styles, and offer no reading by keyboard.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flaxnets.reporting.figures import STYLES, colour_depths, label_ends, scale_errors, style_axes
from flaxnets.studies.results import Run

METRICS = {"train": "training", "test": "test"}
SCALES = ("linear", "log")


@dataclass(frozen=True)
class RunErrors:
    """The errors of a run in percent, by epoch; invalid ones are None."""

    kind: str
    depth: int
    seed: int
    epoch: tuple[float, ...]
    train: tuple[float | None, ...]
    test: tuple[float | None, ...]


def list_errors(run: Run) -> RunErrors:
    """List the errors of a run that has rows, in the evaluated epochs. As in `degradation.png`, its
    first row is epoch 1."""
    rows = run.result.evaluated
    first = rows[0]["step"] if rows[0]["step"] > 0 else 1.0
    epoch = (round(row["step"] / first, 4) if row["step"] > 0 else 0 for row in rows)
    errors = ([row[f"{metric}_error"] for row in rows] for metric in METRICS)
    valid = (tuple(round(e, 4) if 0 <= e <= 100 else None for e in column) for column in errors)
    return RunErrors(run.kind, run.depth, run.seed, tuple(epoch), *valid)


# Paths keep all their vertices, and text stays text.
@rc_context({"path.simplify": False, "svg.fonttype": "none"})
def draw_panel(runs: Sequence[RunErrors], kind: str, scale: str) -> str:
    """Draw the runs of one kind as an `<svg>` element; the panels of all kinds share their scales.

    Every curve is a group with the classes `train` or `test`, `run-I` for the I-th of `runs`
    and `depth-I` for the I-th depth. The vertices of its path are its valid errors, in order.
    """
    colours = colour_depths(run.depth for run in runs)
    classes = {depth: f"depth-{i}" for i, depth in enumerate(colours)}
    figure = Figure(figsize=(4.6, 3.2))
    # Equal margins instead of a layout engine: the axes of all panels have one size.
    ax = figure.add_axes((0.12, 0.13, 0.78, 0.84))
    for i, run in enumerate(runs):
        if run.kind == kind:
            _draw_run(ax, run, colours[run.depth], f"run-{i} {classes[run.depth]}")
    errors = [e for run in runs for e in (*run.train, *run.test) if e is not None]
    if scale == "log":
        scale_errors(ax, errors)
    else:
        ax.set_ylim(0, min(100, 1.05 * max(errors, default=0)) or 1)
        ax.set_ylabel("error (%)")
    ax.set_xlim(0, max(epoch for run in runs for epoch in run.epoch) or 1)
    ax.set_xlabel("epoch")
    style_axes(ax)
    ax.tick_params(length=0, pad=5)
    # A depth is named at the end of the seed that got furthest.
    furthest_last = sorted((run for run in runs if run.kind == kind), key=lambda r: r.epoch[-1])
    ends = {r.depth: (r.epoch[-1], r.train[-1]) for r in furthest_last if r.train[-1] is not None}
    label_ends(ax, [(*end, str(depth), "black") for depth, end in sorted(ends.items())])
    # Classes let the page colour labels and grid.
    for text in ax.texts:
        text.set_gid(f"class:end {classes[int(text.get_text())]}")
    for line in (*ax.get_xgridlines(), *ax.get_ygridlines()):
        line.set_gid("class:grid")
    return _to_element(figure, salt=ascii((kind, scale)))


def _draw_run(ax: Axes, run: RunErrors, colour: str, classes: str) -> None:
    for metric, style in zip(METRICS, STYLES.values(), strict=True):
        errors = np.array(getattr(run, metric), float)  # None becomes NaN
        valid = np.pad(np.isfinite(errors), 1)
        lone = valid[1:-1] & ~valid[:-2] & ~valid[2:]  # a path does not show these
        marks = {"marker": "o", "markersize": 2 * style["lw"], "markevery": lone}
        gid = f"class:curve {metric} {classes}"
        ax.plot(run.epoch, errors, color=colour, clip_on=False, gid=gid, **style, **marks)


def _to_element(figure: Figure, salt: str) -> str:
    """Convert a figure to an element for a page whose policy forbids inline styles.

    Styles become attributes, which the style sheet of the page overrides. Fonts are the page's, and
    black is its colour of text.
    """
    picture = io.StringIO()
    with rc_context({"svg.hashsalt": salt}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(picture, format="svg", transparent=True, metadata=metadata)

    def to_attributes(match: re.Match[str]) -> str:
        pairs = re.findall(r"([a-z-]+): ([^;]+)", match[1])
        return "".join(f' {name}="{value}"' for name, value in pairs if not name.startswith("font"))

    svg = picture.getvalue()
    svg = re.sub(r"<style.*?</style>", "", svg[svg.index("<svg") :])
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' style="([^"]*)"', to_attributes, svg)
    # Hundredths of a point are enough.
    svg = re.sub(r' d="[^"]*"', lambda d: re.sub(r"(\.\d\d)\d+| \n", r"\1", d[0]), svg)
    svg = svg.replace(' id="class:', ' class="').replace("#000000", "currentColor")
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # no element refers to these
    svg = svg.replace("<svg", '<svg role="img" aria-label="error against epoch"', 1)
    return svg.replace("</svg>", '<circle class="marker" r="4"/></svg>')
