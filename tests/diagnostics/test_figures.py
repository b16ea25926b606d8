"""What the diagnostics make from stored numbers: figures, sentences, tables."""

import ast
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from flaxnets import InputError
from flaxnets.decoding import decode
from flaxnets.diagnostics import DIAGNOSTICS
from flaxnets.diagnostics.construction import Construction, History
from flaxnets.diagnostics.finding import (
    LARGEST_FILE,
    read_numbers,
    write_numbers,
)
from flaxnets.diagnostics.gradient_log import LoggedGradients
from flaxnets.diagnostics.gradients import BARE, END, START, Gradients, describe_flow
from flaxnets.diagnostics.landscape import Landscape, interpolate
from flaxnets.diagnostics.residuals import Residuals
from flaxnets.diagnostics.responses import Responses
from flaxnets.diagnostics.scales import round_ticks
from flaxnets.diagnostics.study import Setting
from flaxnets.diagnostics.text import significant, span
from flaxnets.reporting import figures
from flaxnets.reporting.figures import colour_depths
from flaxnets.reporting.findings import Table, read_findings, write_finding

pytestmark = pytest.mark.unit

NETWORKS = ("plain-8", "plain-14", "residual-8", "residual-14")
# Of depth 6 no network is looked into, but it has its colour.
SETTING = Setting("digits", 220, 0, (6, 8, 14))
OFFSETS = np.linspace(-1.0, 1.0, 5)
BOWL = 0.1 + 20 * (OFFSETS[:, None] ** 2 + OFFSETS**2)


def layers(values):
    return {f"conv{i}": float(value) for i, value in enumerate(values, 1)}


def made_gradients(low=0.5, high=640.0):
    """From `high` at the first convolution to `low` at the last; the last layer is dense."""
    norms = {name: layers([high, 10.0, 2.0, 1.0, low, 1.0]) for name in NETWORKS}
    return Gradients(SETTING, 128, {START: norms, BARE: norms, END: norms})


def made_log(epochs=3):
    names = ["conv1", "stage1_block1/conv1", "stage1_block1/conv2", "head"]
    rows = [
        {"epoch": e, "step": 11 * e, **dict.fromkeys(names, 0.1 * e)} for e in range(1, epochs + 1)
    ]
    return LoggedGradients(SETTING, dict.fromkeys(NETWORKS, rows))


def made_responses():
    values = {name: layers(np.linspace(0.98, 1.02, 7)) for name in NETWORKS}
    return Responses(SETTING, 360, values | {"plain-14": layers([2.0, 1.5, *[1.02] * 11])})


def made_residuals(least=4.0):
    lesions = {name: layers([73.0, 5.0, least]) | {"none": least} for name in NETWORKS}
    ratios = {name: layers([1.4, 0.9, 0.3]) for name in NETWORKS if "residual" in name}
    return Residuals(SETTING, 360, ratios, lesions)


def made_construction(**changes):
    numbers = Construction(
        study=SETTING,
        shallow="plain-8",
        deep="plain-14",
        identities=3,
        training_images=1437,
        largest_difference_of_logits=1.2e-5,
        train_error_shallow=0.07,
        train_error_constructed=0.07,
        train_error_from_scratch=59.36,
        status="finished",
        continued=[{"step": 11, "train_error": 2.0}, {"step": 22, "train_error": 0.0}],
        histories={
            "plain-8": History([11, 22], [40.0, 0.07]),
            "plain-14": History([11, 22], [90.0, 59.36]),
        },
    )
    return replace(numbers, **changes)


def made_landscape(plain=BOWL, residual=BOWL):
    loss = {"plain-14": plain.tolist(), "residual-14": residual.tolist()}
    return Landscape(SETTING, 512, OFFSETS.tolist(), loss)


MADE = {
    "gradients": made_gradients(),
    "gradient-log": made_log(),
    "responses": made_responses(),
    "residuals": made_residuals(),
    "construction": made_construction(),
    "landscape": made_landscape(),
}


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """A function that draws numbers and gives the figure."""
    drawn, write = [], figures.write_figure

    def keep(figure, path, title):
        drawn.append(figure)
        write(figure, path, title)

    monkeypatch.setattr(figures, "write_figure", keep)

    def draw(numbers):
        numbers.draw(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
        assert len((tmp_path / "figure.svg").read_bytes()) < 300_000
        return drawn[-1]

    return draw


def panels(figure):
    """The panels by their titles; a legend may have one of its own, and the scale of colours."""
    return {ax.get_title(): ax for ax in figure.axes if ax.get_title()}


# The convention of all figures.


@pytest.mark.parametrize("name", [name for name in MADE if name != "landscape"])
def test_a_depth_has_its_colour_and_a_kind_its_panel(draw, name):
    """Dashes meant plain, and in construction.png plain-56 had the colour of plain-34."""
    figure = draw(MADE[name])
    colours = {depth: to_hex(colour) for depth, colour in colour_depths(SETTING.depths).items()}
    for title, ax in panels(figure).items():
        assert title.startswith(("plain", "residual"))
        # Each label at the end of a line has its depth's colour, and lines have no others.
        for text in ax.texts:
            depth = int(re.findall(r"^\d+", text.get_text())[0])
            assert to_hex(text.get_color()) == colours[depth]
        assert {to_hex(line.get_color()) for line in ax.lines} == {colours[8], colours[14]}
        solid = [line for line in ax.lines if line.get_linestyle() == "-"]
        dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
        assert len(solid) + len(dashed) == len(ax.lines)
        assert bool(dashed) == (name == "residuals" and "without" in title)
        assert all(line.get_linewidth() <= 1.0 for line in dashed)
    titles = list(panels(figure))
    for plain, residual in zip(titles[::2], titles[1::2], strict=False):
        assert residual == plain.replace("plain", "residual") or name == "residuals"
    assert figure.get_suptitle().endswith("\ndigits, 220 updates, seed 0")
    assert len(figure.findobj(lambda artist: type(artist).__name__ == "Legend")) <= 1


def test_the_colours_are_those_of_the_study():
    assert colour_depths([56, 18, 34, 18]) == dict(zip((18, 34, 56), figures.COLOURS, strict=False))
    assert colour_depths(range(8))[7] == figures.COLOURS[0]


@pytest.mark.parametrize("name", ["gradients", "gradient-log", "responses"])
def test_panels_share_their_scales(draw, name):
    """Three panels of gradients had three scales side by side."""
    figure = draw(MADE[name])
    assert len({(*ax.get_xlim(), *ax.get_ylim(), ax.get_yscale()) for ax in figure.axes}) == 1
    assert figure.axes[0].get_yscale() == ("function" if name == "responses" else "log")
    shape = figure.axes[0].get_subplotspec().get_gridspec()
    assert (shape.nrows, shape.ncols) == (2 if name == "responses" else 3, 2)


@pytest.mark.parametrize("name", MADE)
def test_what_is_drawn_depends_on_the_stored_numbers_alone(name, tmp_path):
    numbers, out = MADE[name], {}
    write_numbers(tmp_path / "numbers.json", numbers)
    stored = read_numbers(tmp_path / "numbers.json", DIAGNOSTICS[name])
    assert stored == numbers
    for version in (numbers, stored):
        version.draw(tmp_path / "figure.png")
        for suffix in (".png", ".svg"):
            data = (tmp_path / "figure.png").with_suffix(suffix).read_bytes()
            assert out.setdefault(suffix, data) == data
    assert stored.describe() == numbers.describe()


def test_labels_cover_neither_lines_nor_each_other(draw):
    norms = {name: layers([*[1.0] * 5, 1.0]) for name in NETWORKS}
    norms["plain-14"] = norms["residual-14"] = layers([*[1.0] * 9, 1.0])
    figure = draw(Gradients(SETTING, 128, {START: norms, BARE: norms, END: norms}))
    for ax in figure.axes:
        line = ax.transAxes.inverted().transform(ax.transData.transform((1, 1.0)))[1]
        heights = {text.get_text(): text.xy[1] for text in ax.texts}
        assert heights["14"] == pytest.approx(line)  # to the right of all lines
        assert abs(heights["8"] - line) > 0.04


def test_labels_keep_clear_of_the_axis(draw):
    """The end of a line at 0 is almost on the axis, which crossed its label."""
    (ax,) = draw(made_construction()).axes
    assert ax.lines[2].get_ydata()[-1] == 0
    height = ax.get_window_extent().height * 72 / ax.figure.dpi  # points
    assert min(text.xy[1] for text in ax.texts) * height > 5


@pytest.mark.parametrize(
    "numbers",
    [
        made_gradients(low=math.nan),
        made_gradients(low=0.0),
        made_gradients(math.nan, math.nan),
        replace(made_responses(), spreads=dict.fromkeys(NETWORKS, layers([math.nan, math.inf, 1]))),
        replace(made_responses(), spreads={"plain-8": layers([0.0, 1e6])}),
        made_construction(status="diverged", continued=[{"step": 11, "train_error": math.nan}]),
        made_residuals(least=0.0),
        replace(
            made_residuals(),
            ratios={"residual-8": layers([math.nan, 2.0]), "residual-14": layers([math.inf])},
        ),
        made_landscape(np.full((5, 5), math.nan), np.full((5, 5), math.inf)),
        made_landscape(0 * BOWL, 0 * BOWL),
    ],
    ids=str,
)
def test_whatever_there_is_is_drawn_and_described(draw, numbers):
    draw(numbers)
    found = numbers.describe()
    assert 1 <= len(found.paragraph.split(". ")) <= 4
    assert {len(row) for row in found.table.rows} == {len(found.table.headings)}


def test_one_kind_has_one_column(draw):
    gradients = made_gradients()
    norms = {
        moment: {name: norms for name, norms in each.items() if "plain" in name}
        for moment, each in gradients.norms.items()
    }
    assert len(panels(draw(replace(gradients, norms=norms)))) == 3
    residuals = made_residuals()
    for kind, count in (("plain", 1), ("residual", 2)):
        lesions = {name: e for name, e in residuals.lesions.items() if kind in name}
        ratios = residuals.ratios if kind == "residual" else {}
        figure = draw(replace(residuals, lesions=lesions, ratios=ratios))
        assert len(panels(figure)) == count
        assert len(figure.legends) == 1


# Single figures.


def test_responses_near_one_can_be_told_apart(draw):
    """They lay at 1.0 below a lot of white paper."""
    figure = draw(made_responses())
    for ax in figure.axes:
        heights = ax.transAxes.inverted().transform(
            ax.transData.transform([(0, value) for value in (0.98, 1.02, 2.0)])
        )[:, 1]
        assert 0 < heights[0] < heights[1] < heights[2] < 1
        assert heights[1] - heights[0] > 0.2
    ticks = [tick for tick in figure.axes[0].get_yticks() if tick > 1]
    assert ticks[0] <= 1.02
    assert ticks[-1] == 2


def test_lesions_are_shown_beside_the_whole_network(draw):
    figure = draw(made_residuals(least=0.0))
    for kind in ("plain", "residual"):
        ax = panels(figure)[f"{kind}, without one block"]
        assert ax.get_yscale() == "symlog"
        assert ax.get_ylim()[0] < 0  # a line at 0 is not hidden by the axis
        dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
        assert [list(line.get_ydata()) for line in dashed] == [[0, 0]] * 2
        assert [line.get_marker() for line in ax.lines[2:]] == ["o", "o"]
    (legend,) = [ax.get_legend() for ax in figure.axes if ax.get_legend()]
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == [
        *("depth 8", "depth 14"),
        *("test error without the block", "test error of the whole network"),
    ]
    ratios = panels(figure)["residual, what each block adds"]
    assert ratios.get_xlim() == panels(figure)["residual, without one block"].get_xlim()


def test_the_curves_of_the_construction_are_named(draw):
    (ax,) = draw(made_construction()).axes
    assert ax.get_yscale() == "symlog"
    assert {line.get_linestyle() for line in ax.lines} == {"-"}
    assert [line.get_marker() for line in ax.lines] == ["None", "None", "o"]
    assert ax.lines[2].get_ydata()[0] == 0.07
    assert sorted(text.get_text() for text in ax.texts) == [
        *("14 from scratch", "14 made from 8", "8 from scratch")
    ]


def test_surfaces_share_their_colours(draw):
    rough = BOWL * 30
    rough[0, 0], rough[4, 4] = np.nan, np.inf
    figure = draw(made_landscape(BOWL, rough))
    first, second, bar = figure.axes
    assert [ax.get_title() for ax in (first, second)] == ["plain-14", "residual-14"]
    norms = [ax.images[0].norm for ax in (first, second)]
    assert (norms[0].vmin, norms[0].vmax) == (norms[1].vmin, norms[1].vmax)
    assert norms[0].vmin == pytest.approx(0.1)
    assert bar.get_ylabel() == "loss, logarithmic"
    assert list(bar.get_yticks()) == round_ticks(norms[0].vmin, norms[0].vmax, most=12)
    for ax in (first, second):
        assert ax.get_aspect() == 1.0
        assert list(ax.get_xticks()) == list(ax.get_yticks()) == [-1, -0.5, 0, 0.5, 1]
        assert ax.images[0].get_array().shape > (100, 100)


def test_surfaces_are_interpolated_through_their_points():
    smooth = interpolate(OFFSETS, BOWL, 0.1, 30.0, OFFSETS)
    np.testing.assert_allclose(smooth, np.minimum(BOWL, 30.0), rtol=1e-6)
    fine = np.linspace(-1, 1, 81)
    smooth = interpolate(OFFSETS, BOWL, 0.1, 30.0, fine)
    assert (smooth.min(), smooth.max()) == (pytest.approx(0.1), 30.0)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.002, 6.1, [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]),
        (1.19, 3.5, [1.2, 1.5, 2, 2.5, 3]),
        (1.61, 2.59, [1.8, 2, 2.2, 2.4]),
        (1e-7, 1e3, [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1, 10, 100, 1000]),
        (1e-9, 1e9, [1e-9, 1e-7, 1e-5, 1e-3, 0.1, 10, 1000, 1e5, 1e7, 1e9]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    """There were ticks such as 0.081."""
    assert round_ticks(low, high, most=12) == pytest.approx(ticks)


# Sentences and tables.


@pytest.mark.parametrize("name", MADE)
def test_a_finding_is_short_and_has_a_table(name, tmp_path):
    found = MADE[name].describe()
    assert 2 <= len(re.findall(r"\.(?= |$)", found.paragraph)) <= 4
    assert found.paragraph[0].isupper() or found.paragraph.startswith("plain")
    assert "seed 0" in found.paragraph.lower()
    networks = [cell for row in found.table.rows for cell in row if cell in NETWORKS]
    assert networks
    write_finding(tmp_path, name, found, list(DIAGNOSTICS))
    (entry,) = json.loads((tmp_path / "diagnostics.json").read_text())
    assert entry["table"]["headings"] == list(found.table.headings)
    assert entry["table"]["rows"] == [list(row) for row in found.table.rows]
    assert entry["figure"] == f"{name}.png"


def test_gradients_are_described_by_their_factor():
    """Only the greatest depth had its numbers, and a threshold parted 99 from 101."""
    assert describe_flow([0.3, 30.0]) == "shrinks 100-fold"
    assert describe_flow([30.0, 0.3]) == "grows 100-fold"
    assert describe_flow([99.0, 1.0]) == "grows 99.0-fold"
    assert describe_flow([101.0, 1.0]) == "grows 101-fold"
    assert describe_flow([1.0, 1.001]) == "keeps its norm"
    assert describe_flow([0.0, 0.3]) == "goes from 0.300 to 0.00"
    assert describe_flow([float("inf"), 0.3]) == "is not finite"
    paragraph = made_gradients(low=0.5, high=640.0).describe().paragraph
    assert "the gradient of plain-14 grows 1,280-fold at the start" in paragraph
    assert "That of residual-14 grows 1,280-fold at the start" in paragraph


@pytest.mark.parametrize(
    ("scratch", "words"),
    [
        (59.36, "ended at 59.36 %, 59.29 points higher: a better solution exists, and this"),
        (1.09, "ended at 1.09 %, 1.02 points higher: a better solution exists, and this"),
        (1.05, "ended at 1.05 %, 0.98 points higher: a better solution exists, and this"),
        (0.0701, "ended at 0.07 %, as low as that of the construction."),
        (0.0, "ended at 0.00 %, 0.07 points lower than the construction."),
    ],
)
def test_the_construction_is_compared_without_a_threshold(scratch, words):
    found = made_construction(train_error_from_scratch=scratch).describe()
    assert words in found.paragraph
    assert "a better solution" not in found.title


def test_the_construction_says_how_training_went_on():
    found = made_construction().describe()
    assert "for 22 updates, it ends at 0.00 % (seed 0)." in found.paragraph
    assert found.table.rows[-1] == ("plain-14", "plain-8 and identities", "22", "0.00")
    rows = [{"step": 11, "train_error": 90.0}]
    found = made_construction(status="diverged", continued=rows).describe()
    assert "for 11 updates, it diverges (seed 0)." in found.paragraph
    assert found.table.rows[-1][-1] == "diverged"
    found = made_construction(largest_difference_of_logits=math.nan).describe()
    assert "are not all finite" in found.paragraph


def test_residuals_name_the_worst_block():
    found = made_residuals().describe()
    assert (
        "With one block removed, the median test error of residual-14 is 5.0 % and the highest is "
        "73.0 % (intact: 4.0 %)." in found.paragraph
    )
    assert found.table.rows[-1] == ("residual-14", "3", "4.0", "5.0", "73.0", "conv1", "0.90")


def test_lower_points_are_counted():
    surface = BOWL.copy()
    surface[0, 0], surface[4, 4] = 0.01, math.nan
    found = made_landscape(BOWL, surface).describe()
    assert "0 around plain-14 and 1 around residual-14 have a lower loss" in found.paragraph
    assert found.table.rows[1][-2:] == ("1", "1")


def test_numbers_are_written_as_they_are_read():
    values = [0.0238, 640.888, 1358.0, 999.9, 5.71e-7, 39_800.0, 1e9, 0.1, 12, math.nan, -1358.0]
    assert [significant(value) for value in values] == [
        *("0.0238", "641", "1,360", "1,000", "5.71e-07", "39,800", "1.00e+09", "0.100", "12.0"),
        *("nan", "-1,360"),
    ]
    assert span([0.5, 0.25, math.nan]) == "0.250 to 0.500 (1 not finite)"
    assert span([math.nan]) == "not finite"


# Files.


def test_numbers_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "gradients.json"
    write_numbers(path, made_gradients(low=math.inf))
    assert "null" in path.read_text()
    stored = read_numbers(path, Gradients)
    assert math.isnan(stored.norms[START]["plain-8"]["conv5"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: "{", "damaged"),
        (lambda v: [], "Expected object, got array"),
        (lambda v: {}, "missing required field study"),
        (lambda v: {**v, "more": 1}, "unknown field more"),
        (lambda v: {**v, "images": "128"}, "Expected int, got str - at images"),
        (lambda v: {**v, "images": True}, "Expected int, got bool - at images"),
        (lambda v: {**v, "images": None}, "Expected int, got float - at images"),
        (lambda v: {**v, "images": 0}, "Expected int >= 1 - at images"),
        (lambda v: {**v, "images": 10**400}, "at images"),
        (lambda v: {**v, "norms": {}}, "length >= 3 - at norms"),
        (
            lambda v: {**v, "norms": {**v["norms"], START: {"plain-8": dict.fromkeys("abc", "x")}}},
            "Expected float, got str",
        ),
        (lambda v: {**v, "norms": {**v["norms"], "later": {}}}, "Invalid enum value 'later'"),
        (lambda v: {**v, "norms": {**v["norms"], START: {"evil-8": {}}}}, "at key in $.norms[...]"),
        (lambda v: {**v, "norms": {**v["norms"], START: {"plain-8": {}}}}, "length >= 3"),
        (lambda v: {**v, "study": {**v["study"], "depths": 8}}, "damaged"),
        (lambda v: "[" * 100_000, "damaged"),
        (lambda v: "[" * 900 + "]" * 900, "damaged"),
        (lambda v: " " * (LARGEST_FILE + 1), "too large"),
    ],
)
def test_damaged_numbers_are_refused(tmp_path, change, reason):
    path = tmp_path / "gradients.json"
    write_numbers(path, made_gradients())
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(InputError, match=re.escape(reason)):
        read_numbers(path, Gradients)


@pytest.mark.parametrize("name", [name for name in MADE if name != "landscape"])
def test_networks_of_other_studies_are_not_drawn(draw, name):
    numbers = MADE[name]
    with pytest.raises(ValueError, match="is not of the study's depths"):
        draw(replace(numbers, study=replace(numbers.study, depths=(6, 8))))


def test_findings_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "diagnostics.json"
    for name in ("responses", "gradients"):
        write_finding(tmp_path, name, MADE[name].describe(), list(DIAGNOSTICS))
    found = read_findings(path)
    assert [entry.name for entry in found] == ["gradients", "responses"]
    tables = [decode(Table, entry.table, "it") for entry in found]
    assert tables == [MADE[entry.name].describe().table for entry in found]
    # Entries of earlier versions have no table, and stay.
    entries = json.loads(path.read_text())
    del entries[0]["table"]
    path.write_text(json.dumps(entries))
    write_finding(tmp_path, "responses", MADE["responses"].describe(), list(DIAGNOSTICS))
    assert [entry.name for entry in read_findings(path)] == ["gradients", "responses"]


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: {**entry, "title": None},
        lambda entry: {**entry, "more": 1},
        lambda entry: 7,
    ],
)
def test_damaged_findings_are_dropped_and_the_others_stay(tmp_path, change):
    path = tmp_path / "diagnostics.json"
    for name in ("gradients", "residuals"):
        write_finding(tmp_path, name, MADE[name].describe(), list(DIAGNOSTICS))
    first, second = json.loads(path.read_text())
    path.write_text(json.dumps([change(first), second]))
    write_finding(tmp_path, "responses", MADE["responses"].describe(), list(DIAGNOSTICS))
    assert [entry.name for entry in read_findings(path)] == ["responses", "residuals"]


@pytest.mark.parametrize("content", ["{}", "", "[" * 100_000])
def test_a_file_that_holds_no_findings_is_replaced(tmp_path, content):
    path = tmp_path / "diagnostics.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"diagnostics\.json (is damaged|cannot be read)"):
        read_findings(path)
    write_finding(tmp_path, "responses", MADE["responses"].describe(), list(DIAGNOSTICS))
    assert [entry.name for entry in read_findings(path)] == ["responses"]


def test_numbers_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.json cannot be read"):
        read_numbers(tmp_path / "none.json", Gradients)


def test_diagnostics_know_nothing_of_terminals():
    """They take callables; consoles, progress bars and arguments are the command's."""
    folder = Path(figures.__file__).parents[1] / "diagnostics"
    imported = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
    assert "flaxnets.reporting.figures" in imported
    assert not {
        name for name in imported if re.match(r"rich|argparse|tyro|flaxnets\.(console|cli)", name)
    }
