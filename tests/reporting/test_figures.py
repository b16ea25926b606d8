"""The figures of a study and of a run."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from flaxnets.reporting import figures
from flaxnets.reporting.figures import draw_errors, draw_run, write_png_and_svg
from flaxnets.studies.results import group_runs
from tests.factories import make_run

pytestmark = pytest.mark.unit


def test_the_figure_takes_whatever_there_is(tmp_path):
    runs = [make_run("plain", 8, seed) for seed in range(3)]
    runs += [make_run("plain", 20, 0, "diverged", (90.0, 100.0)), make_run("mine:build", 8, 0)]
    runs += [make_run("residual", 8, 0, "unfinished", ())]
    write_png_and_svg(draw_errors(group_runs(runs)), tmp_path / "figure.png", "title")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_training_error_stands_out_and_small_errors_can_be_read(tmp_path, monkeypatch):
    """It was the thin dashed line, the labels belonged to the test error, and a panel of errors
    below 5 % was crushed."""
    drawn, write = [], figures.write_figure

    def keep(figure, path, title):
        drawn.append((figure, path.name))
        write(figure, path, title)

    monkeypatch.setattr(figures, "write_figure", keep)
    runs = [
        make_run(kind, depth, seed, "finished", (90.0, last))
        for kind, last in (("plain", 50.0), ("residual", 0.0))
        for depth in (8, 14)
        for seed in (0, 1)
    ]
    networks = group_runs(runs)
    write_png_and_svg(draw_errors(networks), tmp_path / "figure.png", "title")
    first = (tmp_path / "figure.svg").read_bytes()
    write_png_and_svg(draw_errors(networks), tmp_path / "figure.png", "title")
    assert (tmp_path / "figure.svg").read_bytes() == first
    figure, _ = drawn[0]
    assert [name for _, name in drawn[:2]] == ["figure.png", "figure.svg"]
    for ax, last in zip(figure.axes, (50.0, 0.0), strict=True):
        train, test, *_ = ax.lines
        assert train.get_ydata()[-1] == last
        assert (train.get_linestyle(), test.get_linestyle()) == ("-", "--")
        assert train.get_linewidth() > 2 * test.get_linewidth()
        heights = [ax.transAxes.transform((0, text.xy[1]))[1] for text in ax.texts]
        assert heights[0] == pytest.approx(ax.transData.transform((0, last))[1])  # at its end
        assert heights[1] - heights[0] >= 0.049 * ax.bbox.height
    pixels = figure.axes[1].transData.transform([(0, 0), (0, 1), (0, 100)])[:, 1]
    assert pixels[1] - pixels[0] > 0.1 * (pixels[2] - pixels[0])
    texts = [text.get_text() for text in figure.legends[1].get_texts()]
    assert texts == ["training error", "test error", "lowest to highest seed"]
    assert len(figure.legends[0].get_texts()) == 2  # a line a depth


def test_colours_can_be_seen_on_white():
    for colour in figures.COLOURS:
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        assert 1.05 / (linear @ (0.2126, 0.7152, 0.0722) + 0.05) >= 3, colour


def test_dollars_and_underscores_in_names_are_no_formulas(tmp_path):
    kind = "my$x^{$:build"
    networks = group_runs([make_run(kind, 8, 0), make_run("plain", 8, 0)])
    title = "$x^{$" + 40 * " \x1b long"
    write_png_and_svg(draw_errors(networks), tmp_path / "figure.png", title)
    draw_run(networks[0].runs[0].result.rows, tmp_path / "errors.png", "$x^{$")
    for name in ("figure.png", "errors.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_epochs_without_evaluation_are_left_out(tmp_path, monkeypatch):
    """A run evaluated in every epoch, and one in the first, the third and the last of four."""
    runs = [make_run("plain", 8, 0, evaluate_every=3), make_run("plain", 8, 1)]
    for members in (runs[:1], runs):
        ax = draw_errors(group_runs(members)).axes[0]
        for line, shift in zip(ax.lines, (0, 5), strict=False):
            np.testing.assert_array_equal(line.get_xdata(), [1, 3, 4])
            np.testing.assert_array_equal(line.get_ydata(), [80 + shift, 20 + shift, 19.5 + shift])
    drawn = []
    monkeypatch.setattr(figures, "write_png_and_svg", lambda figure, *_: drawn.append(figure))
    draw_run(runs[0].result.rows, tmp_path / "errors.png", "title")
    points = {
        line.get_label().partition(":")[0]: list(line.get_xdata())
        for line in drawn[0].axes[0].lines
    }
    assert points == {
        "training (augmented)": [1, 2, 3, 4],
        "train": [1, 3, 4],
        "test": [1, 3, 4],
    }


def test_a_run_that_ended_early_does_not_hide_later_epochs():
    runs = [make_run("plain", 8, 0, "diverged", (80.0, 90.0)), make_run("plain", 8, 1)]
    ax = draw_errors(group_runs(runs)).axes[0]
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [1, 2, 3, 4])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [80, 65, 20, 19.5])
