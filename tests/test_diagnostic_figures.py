"""Figures of the diagnostics, as matplotlib has them and as files."""

import numpy as np
import pytest

from flaxnets import diagnostic_figures
from flaxnets.diagnostic_figures import Curve, Panel, draw_panels, draw_surfaces

OFFSETS = np.linspace(-1.0, 1.0, 5)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written, in their order."""
    figures, write = [], diagnostic_figures.write_figure

    def keep(figure, path, title):
        figures.append(figure)
        write(figure, path, title)

    monkeypatch.setattr(diagnostic_figures, "write_figure", keep)
    return figures


def test_panels(drawn, tmp_path):
    plain = [Curve(f"plain-{n}", n, [1, 2, 3], [1e-3, 1.0, n], dashed=True) for n in (8, 14)]
    residual = [Curve(f"residual-{n}", n, [1, 2, 3], [1.0, 2.0, n]) for n in (8, 14)]
    panels = [
        Panel("gradients", "layer", "norm", [*plain, *residual], log=True),
        Panel("blocks", "block", "error", residual, markers=True),
    ]
    draw_panels(panels, tmp_path / "panels.png", "a study")
    assert (tmp_path / "panels.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    left, right = figure.axes
    assert [text.get_text() for text in figure.legends[0].texts] == [
        "plain-8",
        "plain-14",
        "residual-8",
        "residual-14",
    ]
    assert [line.get_linestyle() for line in left.lines] == ["--", "--", "-", "-"]
    eight, fourteen = (line.get_color() for line in left.lines[:2])
    assert eight != fourteen
    assert [line.get_color() for line in right.lines] == [eight, fourteen]
    assert [line.get_marker() for line in (left.lines[0], right.lines[0])] == ["None", "o"]
    assert (left.get_yscale(), right.get_yscale()) == ("log", "linear")
    assert (left.get_title(), left.get_xlabel(), left.get_ylabel()) == (
        "gradients",
        "layer",
        "norm",
    )
    assert right.get_ylim()[0] < 0  # a line at 0 is not hidden by the axis


def test_surfaces_share_their_colours(drawn, tmp_path):
    bowl = 0.1 + 20 * (OFFSETS[:, None] ** 2 + OFFSETS**2)
    rough = bowl * 30
    rough[0, 0], rough[4, 4] = np.nan, np.inf
    draw_surfaces([("a", bowl), ("b", rough)], OFFSETS, tmp_path / "loss.png", "a study")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    first, second, bar = figure.axes
    assert [ax.get_title() for ax in (first, second)] == ["a", "b"]
    levels = [ax.collections[0].levels for ax in (first, second)]
    np.testing.assert_array_equal(*levels)
    assert 10 ** levels[0][0] == pytest.approx(0.1)
    assert bar.get_ylabel() == "loss (logarithmic colours)"


def test_a_flat_surface_is_drawn(drawn, tmp_path):
    flat = np.full((5, 5), 2.3)
    draw_surfaces([("flat", flat), ("nothing", 0 * flat)], OFFSETS, tmp_path / "flat.png", "")
    draw_surfaces([("flat", flat)], OFFSETS, tmp_path / "one.png", "")
    assert len(drawn) == 2
