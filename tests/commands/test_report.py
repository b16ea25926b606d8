"""experiments/report.py, as a user types it, and its page, as a browser shows it."""

import functools
import io
import json
import math
import os
import re
import shlex
import shutil
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from flaxnets.cli.main import run_command
from flaxnets.decoding import decode, encode
from flaxnets.errors import DamageWarning, InputError
from flaxnets.reporting import html_report
from flaxnets.reporting.conclusion import conclude, last_movement
from flaxnets.reporting.error_panels import SCALES, draw_panel, list_errors
from flaxnets.reporting.findings import Table
from flaxnets.reporting.html_report import (
    Diagnostic,
    make_report,
    read_diagnostics,
)
from flaxnets.reporting.reproduce import reproduce
from flaxnets.studies.results import Run, group_runs
from flaxnets.training import RunResult
from flaxnets.training.config import DatasetConfig, ModelConfig, read_config
from flaxnets.training.environment import Environment
from flaxnets.training.result import METRICS, Status
from tests.commands.test_hostile import HOSTILE, changed, places
from tests.conftest import load_script
from tests.factories import make_run

HAS_SELENIUM = find_spec("selenium") is not None
if TYPE_CHECKING or HAS_SELENIUM:
    from selenium import webdriver
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By

FLAGS = """--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-quic"""
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    DRIVER is None or not HAS_SELENIUM,
    reason="no chromedriver: apt-get install chromium chromium-driver; pip install selenium",
)


def made_run(
    kind, depth, seed, errors=(80.0, 40.0, 20.0, 19.5), status: Status = "finished", **more
):
    more = {"parameters": 1000 * depth, "total_steps": 44, **more}
    run = make_run(kind, depth, seed, status, errors, steps=11, **more)
    return replace(run, result=replace(run.result, seconds=62.5))


def made_study():
    """Three kinds, three depths, two seeds; errors of 0, a run that diverged, one under way."""
    runs = [
        made_run(kind, depth, seed, (80.0, 2.0 * depth + seed, last, last))
        for kind, last in (("plain", 30.0), ("residual", 0.0), ("my_nets:build", 1.5))
        for depth in (8, 14, 20)
        for seed in (0, 1)
    ]
    runs[5] = made_run("plain", 20, 1, (90.0, 95.0), "diverged")
    runs[11] = made_run("residual", 20, 1, (88.0,), "unfinished")
    return runs


class Page(HTMLParser):
    """Tags, attributes, and text outside scripts and styles, as a browser would have them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.last = [], [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.last = tag

    def handle_endtag(self, tag):
        self.last = ""

    def handle_data(self, data):
        if self.last not in ("script", "style"):
            self.text += data + "\n"


def data_of(page):
    return json.loads(re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page)[0])


# The command.


@pytest.fixture(scope="module")
def report():
    return load_script("report")


@pytest.fixture
def copy(study, tmp_path):
    return shutil.copytree(study.out, tmp_path / "study")


def run(report, capsys, *arguments):
    status = run_command(report.main, [*map(str, arguments)])
    return status, *capsys.readouterr()


def test_a_finished_study(report, capsys, copy):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert run(report, capsys, copy) == (0, f"report: {copy / 'report.html'}\n", "")
    after = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    text = after.pop(copy / "report.html").decode()
    assert after == before
    page = Page(text)
    assert "Plain and residual networks at depth 8" in page.text
    assert "--depths 8 --epochs 2" in page.text
    assert "diagnostics.py STUDY_DIR" in page.text
    assert page.tags.count("img") == 0
    assert [(run["kind"], run["epoch"]) for run in data_of(text)] == [
        ("plain", [1, 2]),
        ("residual", [1, 2]),
    ]
    for value in (*before, str(copy), os.path.expanduser("~")):
        assert str(value) not in text
    run(report, capsys, copy)
    assert (copy / "report.html").read_text() == text


def test_another_place(report, capsys, copy, tmp_path):
    out = tmp_path / "there.html"
    assert run(report, capsys, copy, "--out", out)[:2] == (0, f"report: {out}\n")
    assert not (copy / "report.html").exists()
    (tmp_path / "link").symlink_to(copy)
    assert run(report, capsys, tmp_path / "link")[0] == 0


def test_before_anything_is_trained(report, capsys, copy):
    for path in copy.glob("*-8"):
        shutil.rmtree(path)
    (copy / "degradation.png").unlink()
    assert run(report, capsys, copy)[0] == 0
    text = Page((copy / "report.html").read_text()).text
    assert "No run has been started yet." in text
    assert "nothing to draw" in text
    assert "jaxlib" in text


def test_before_the_first_epoch(report, capsys, copy):
    for path in copy.glob("*-8/seed-0/checkpoints"):
        shutil.rmtree(path)
    assert run(report, capsys, copy)[0] == 0
    text = Page((copy / "report.html").read_text()).text
    assert "nothing to draw" in text
    assert text.count("unfinished, 0%") == 2
    assert "plain networks is known at too few depths to compare (none finished)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "there is no directory missing"),
        (["a.txt"], "a.txt is a file"),
        (["empty"], "empty is not a study"),
        (["study/plain-8/seed-0"], "is a single run; give study/plain-8/seed-0/../.., the study"),
        (["alone"], "alone is a single run; give a study"),
        (["study/plain-8"], "is not a study"),
        (["x" * 300], "File name too long"),
        (["study", "--out", "empty"], "such as empty/report.html"),
        (["study", "--out", "study/study.json"], "does not end in .html"),
        (["study", "--out", "none/r.html"], "there is no directory none"),
        (["study", "--out", "a.txt/r.html"], "there is no directory a.txt"),
        (["study", "--uot", "r.html"], "did you mean --out?"),
        (["blocked"], "is a directory"),
        ([], "STUDY_DIR"),
    ],
)
def test_mistakes_are_one_line(report, capsys, study, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("study").symlink_to(study.out)
    Path("a.txt").touch()
    Path("empty").mkdir()
    Path("alone/checkpoints").mkdir(parents=True)
    Path("blocked/report.html").mkdir(parents=True)
    Path("blocked/study.json").touch()
    status, out, err = run(report, capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_place_that_cannot_be_written(report, capsys, copy, monkeypatch):
    # Asked of the system, because root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != copy)
    status, _, err = run(report, capsys, copy)
    assert status == 2
    assert "cannot be written; give a writable path" in err


# Diagnostics, and other files beside the runs.


@pytest.fixture
def diagnostics(tmp_path):
    """A function that writes diagnostics.json; there is a picture and a secret."""
    folder = tmp_path / "study" / "diagnostics"
    folder.mkdir(parents=True)
    Image.new("L", (2, 2)).save(folder / "good.png")
    Image.new("L", (3, 3)).save(tmp_path / "secret.png")

    def write(content):
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "diagnostics.json").write_text(text)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = read_diagnostics(tmp_path / "study")
        assert all(warning.category is DamageWarning for warning in seen)
        return found, [str(warning.message) for warning in seen]

    return write


def entry(figure):
    return {"name": "x", "title": "A title", "paragraph": "Some words.", "figure": figure}


def test_diagnostics_become_sections(diagnostics):
    found, seen = diagnostics([entry("good.png"), entry(None)])
    assert not seen
    page = Page(make_report(made_study(), diagnostics=found))
    assert page.text.count("A title") == page.text.count("Some words.") == 2
    assert ("alt", "A title") in page.attributes
    assert any(
        name == "src" and value.startswith("data:image/png") for name, value in page.attributes
    )
    assert "diagnostics.py" not in page.text


TABLE = {
    "headings": ["network", "first / last", "worst block"],
    "rows": [
        ["plain-8", "1,360", "stage1_block1"],
        ["plain-14", "not finite", "-"],
        ["residual-8", "7.97", "<b>"],
        ["residual-14", 0.0795, "-"],
    ],
}


def test_tables_of_diagnostics_are_shown(diagnostics):
    (found,), seen = diagnostics([{**entry(None), "table": TABLE}])
    assert not seen
    page = make_report([made_run("plain", 8, 0)], diagnostics=[found])
    assert cells(page, 1) == [
        TABLE["headings"],
        ["plain-8", "1,360", "stage1_block1"],
        ["plain-14", "not finite", "-"],
        ["residual-8", "7.97", "&lt;b&gt;"],
        ["residual-14", "0.0795", "-"],
    ]
    rows = re.findall(r"<table.*?</table>", page, re.DOTALL)[1]
    assert re.findall('data-sort="(.*?)"', rows) == ["1360.0", "", "7.97", "0.0795"]


def test_diagnostics_of_earlier_versions_have_no_table(diagnostics):
    (found,), seen = diagnostics([entry("good.png")])
    assert (found.table, seen) == (None, [])
    page = make_report([made_run("plain", 8, 0)], diagnostics=[found])
    assert page.count("<table") == 1


@pytest.mark.parametrize(
    "table",
    [
        7,
        [],
        {},
        {"headings": ["a"]},
        {"headings": ["a"], "rows": []},
        {"headings": [], "rows": [[]]},
        {"headings": "a", "rows": ["b"]},
        {"headings": [1], "rows": [["b"]]},
        {"headings": ["a"], "rows": [["b", "c"]]},
        {"headings": ["a"], "rows": [{"b": 1}]},
        {"headings": ["a"], "rows": [[None]]},
        {"headings": ["a"], "rows": [[True]]},
        {"headings": ["a"], "rows": [[math.nan]]},
        {"headings": ["a"], "rows": [[10**400]]},
    ],
)
def test_damaged_tables_are_left_out(diagnostics, table):
    (found,), (warning,) = diagnostics([{**entry("good.png"), "table": table}])
    assert found.table is None
    assert found.picture
    assert "diagnostics.json is damaged (a table in it is invalid" in warning
    assert warning.endswith("; the report leaves it out")


def test_any_text_may_be_in_a_table():
    texts = [*map(str, HOSTILE), EVIL, "1e999", "9" * 500, "-1,234.5e+02", "1,2", "\ud800", ""]
    rows = [(text,) for text in texts]
    page = make_report([], diagnostics=[Diagnostic(EVIL, EVIL, None, Table((EVIL,), rows))])
    assert page.encode()
    assert Page(page).tags.count("script") == 2
    assert not [name for name, _ in Page(page).attributes if name.startswith("on")]
    keys = [key for key in re.findall('data-sort="(.*?)"', page) if key]
    assert all(math.isfinite(float(key)) for key in keys)
    assert "-123450.0" in keys


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[" * 100_000,
        "{}",
        "7",
        "\x00",
        [7],
        [{"title": "x"}],
        [{**entry(None), "title": {}}],
    ],
)
def test_damaged_diagnostics_are_left_out(diagnostics, content):
    found, (warning,) = diagnostics(content)
    assert not found
    assert "diagnostics.json is damaged" in warning


def test_figures_are_files_of_that_folder(diagnostics, tmp_path):
    folder = tmp_path / "study" / "diagnostics"
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "text.png").write_text("secret")
    secret = str(tmp_path / "secret.png")
    for figure in (
        *("link.png", "folder.png", "pipe.png", "text.png", "missing.png", "../../secret.png"),
        *(secret, "..", ".", "", "a/b.png", "a\0b", "x" * 300, 7, [], "\ud800.png"),
    ):
        (found,), (warning,) = diagnostics([entry(figure)])
        assert found.picture is None, figure
        assert found.title == "A title"
        assert warning.endswith("; the report leaves it out")
    (folder / "good.png").unlink()
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    found, (warning,) = diagnostics([entry(None)])
    assert not found
    assert "is a link" in warning


def test_warnings_are_a_line_each(report, capsys, copy):
    folder = copy / "diagnostics"
    folder.mkdir()
    (folder / "diagnostics.json").write_text(json.dumps([entry("gone.png")]))
    (copy / "study.json").write_text("{")
    status, out, err = run(report, capsys, copy)
    assert (status, out.count("\n")) == (0, 1)
    assert [line[:9] for line in err.splitlines()] == ["warning: "] * 2
    for name in ("gone.png", "study.json"):
        assert name in err
    assert "A title" in (copy / "report.html").read_text()


# Strangers' studies.

CODE = "document.title='evil'"
EVIL = f'</script><script>{CODE}</script><img src=x onerror="{CODE}">\'"&'


def evil_report():
    """A report of values that no decoder would let pass, too."""
    dataset = DatasetConfig(
        name=EVIL, version=EVIL, train_examples=1, test_examples=1, sha256=EVIL, path=EVIL
    )
    runs = [
        replace(
            run,
            config=replace(
                run.config,
                kind=run.config.kind + EVIL,
                model=ModelConfig(10, build=EVIL),
                family=EVIL,
                dataset=dataset,
                recipe=replace(run.config.recipe, name=EVIL),
            ),
        )
        for run in made_study()
    ]
    found = read_diagnostics(Path("none"))
    assert not found
    return make_report(runs, [Environment({EVIL: EVIL}, platform=EVIL, xla_flags=EVIL)])


def test_text_is_never_markup():
    page = Page(evil_report())
    assert page.tags.count("script") == 2
    assert page.tags.count("style") == 1
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "style"]
    assert "</script>" in page.text


def test_hidden_characters_are_replaced():
    text = make_report([made_run("plain", 8, 0, family="a\u202eb\x1b[2J\ud800c")])
    assert text.encode()
    assert not set("\u202e\x1b\ud800") & set(text)


def test_any_config_and_record_gives_a_report(monkeypatch):
    monkeypatch.setattr(html_report, "draw_panel", functools.cache(draw_panel))
    good = made_run("plain", 8, 0)
    stored = encode([good.config, Environment(platform="cpu")])
    fields = list(places(stored))
    assert len(fields) > 60
    reports = 0
    for path in fields:
        for new in (*HOSTILE, 10**400, "x" * 1000):
            config, environment = changed(stored, path, new) if path[1:] else stored
            try:
                run = Run(read_config(config), good.result)
                environments = [decode(Environment, environment, "it")]
            except InputError:
                continue
            assert make_report([run], environments).encode()
            reports += 1
    assert reports > 100
    for new in (math.nan, math.inf, -math.inf, 1e308, -1e308, 10**400, -1, 0):
        rows = [{**row, name: new} for row in good.result.rows[:2] for name in METRICS]
        for status in ("finished", "diverged", "unfinished"):
            runs = [Run(good.config, RunResult(status, rows, 10**400, new, 10**400))] * 2
            curve = data_of(make_report(runs))[0]
            assert all(error is None or 0 <= error <= 100 for error in curve["train"])


# What is said.


def test_the_report_concludes_as_the_console_does():
    """It called a rise of the same numbers by other words, and dropped the caveat."""
    runs = [
        made_run("plain", 8, 0, (80.0, 9.0, 9.0, 1.0)),
        made_run("plain", 20, 0, (80.0, 9.0, 9.0, 1.5)),
        made_run("plain", 20, 1, (), "unfinished"),
        made_run("plain", 20, 2, (90.0,), "diverged"),
    ]
    sentences = conclude(group_runs(runs), 44)
    assert sentences == (
        "After 44 updates from 1 to 3 seeds, the training error of plain networks does not rise "
        "with depth (1.0 % at 8, 1.5 % at 20): no degradation in these numbers. Of 4 runs, left "
        "out of the means: 1 unfinished, 1 diverged. Not converged: over the last quarter the "
        "training error of plain-8, plain-20 moved by a point or more."
    )
    assert f'<p class="lead">{sentences}</p>' in make_report(runs)
    assert "No run has been started yet." in make_report([])


def test_errors_that_fall_with_depth():
    runs = [made_run("residual", depth, 0, (last,)) for depth, last in ((8, 5.0), (14, 1.0))]
    text = conclude(group_runs(runs), None)
    assert "Trained from one seed, the training error of residual networks falls with" in text


def cells(page, table):
    rows = re.findall(r"<tr>(.*?)</tr>", re.findall(r"<table.*?</table>", page, re.DOTALL)[table])
    return [
        [re.sub("<.*?>", "", cell) for cell in re.findall("<t[hd].*?</t[hd]>", row)] for row in rows
    ]


def test_tables():
    page = make_report(made_study())
    networks, runs = cells(page, 0), cells(page, 1)
    assert len(networks) == 1 + 9
    assert len(runs) == 1 + 18
    assert networks[3][-1] == "1 of 2 (1 diverged)"
    assert networks[1][:7] == [
        "plain",
        "cifar_plain8",
        "1-1-1",
        "8",
        "8,000",
        "30.00 ± 0.00",
        "35.00 ± 0.00",
    ]
    first, diverged, unfinished = (dict(zip(runs[0], runs[i], strict=True)) for i in (1, 6, 12))
    assert first == {
        "kind": "plain",
        "network": "cifar_plain8",
        "blocks": "1-1-1",
        "depth": "8",
        "parameters": "8,000",
        "seed": "0",
        "train error, %": "30.00",
        "test error, %": "35.00",
        "train loss": "0.500",
        "test loss": "0.500",
        "steps": "44",
        "time": "1:02",
        "status": "finished",
    }
    assert (diverged["status"], diverged["train error, %"]) == ("diverged at step 17", "95.00")
    assert (unfinished["status"], unfinished["train error, %"]) == ("unfinished, 25%", "-")
    one = make_report([made_run("plain", 8, 0)])
    assert "Networks:" not in one
    assert len(cells(one, 0)) == 2
    assert "More depth" not in one


def test_depths_are_compared_seed_by_seed():
    rows = cells(make_report(made_study()), 2)
    assert rows[0] == ["more depth", "training error changes, points", "seed by seed"]
    # Of the two plain networks of depth 20 one diverged.
    assert rows[1:4] == [
        ["plain 8 to 14", "+0.00", "+0.00, +0.00"],
        ["plain 14 to 20", "+0.00", "+0.00"],
        ["plain 8 to 20", "+0.00", "+0.00"],
    ]
    risen = [made_run("plain", 8, 0), made_run("plain", 14, 0, (90.0, 22.0))]
    assert cells(make_report(risen), 1)[1] == ["plain 8 to 14", "+2.50", "+2.50"]


# The command that makes a study again.


def configs_of(degradation, arguments, data_dir):
    """What the study of these arguments would store, without training it."""
    options = degradation.parse_arguments([*arguments, "--data-dir", str(data_dir)])
    return options.study.plan().configs


@pytest.mark.parametrize(
    "command",
    [
        "--depths 8,10",
        "--depths 8 --kinds residual --seeds 0,3",
        "--depths 8 --kinds plain,tests.commands.test_report:build --seeds 5",
        "--depths 8 --batch-size 64 --epochs 3 --learning-rate 0.05",
        "--depths 18 --family imagenet --shortcut B --stem small --precision bfloat16",
        "--depths 8 --train-examples 500 --recipe modern-cifar",
        "--depths 8 --epochs 2 --recipe he2015-cifar",
        "--depths 8 --evaluate-every 5",
    ],
)
def test_the_command_makes_the_same_study(degradation, data_dir, command):
    configs = configs_of(degradation, command.split(), data_dir)
    (made,), remarks = reproduce(configs)
    assert len(remarks) == (":" in command)
    python, script, *arguments = shlex.split(made)
    assert (python, script) == ("python", "experiments/degradation.py")
    assert sorted(arguments) == sorted(command.split())
    assert configs_of(degradation, arguments, data_dir) == configs


def build(depth, num_classes, dtype):
    import flaxnets

    return flaxnets.create_model(f"cifar_resnet{depth}", num_classes, dtype=dtype)


@pytest.fixture(scope="module")
def configs(degradation, data_dir):
    return configs_of(degradation, ["--depths", "8"], data_dir)


def test_a_study_that_has_grown_takes_several_commands(configs):
    plain, residual = configs
    deeper = [replace(residual, depth=14, seed=seed) for seed in (0, 1)]
    commands, _ = reproduce([plain, residual, *deeper])
    assert [command.split("degradation.py ")[1] for command in commands] == [
        "--depths 8",
        "--depths 14 --kinds residual --seeds 0,1",
    ]


def test_runs_that_were_evaluated_at_other_epochs_are_still_one_study(configs):
    (command,), _ = reproduce([configs[0], replace(configs[1], evaluate_every=4)])
    assert command == "python experiments/degradation.py --depths 8"


def test_a_report_of_runs_that_were_not_evaluated_in_every_epoch():
    runs = [make_run(kind, 8, 0, evaluate_every=3) for kind in ("plain", "residual")]
    page = make_report(runs)
    assert "19.50" in page
    assert list_errors(runs[0]).train == (80.0, 20.0, 19.5)
    assert list_errors(runs[0]).epoch == (1.0, 3.0, 4.0)
    assert last_movement(runs[0]) == pytest.approx(0.5)


def test_what_no_option_gives_is_said_in_words(configs):
    recipe = replace(configs[0].recipe, weight_decay=0.5, epochs=None, steps=77)
    commands, remarks = reproduce([replace(config, recipe=recipe) for config in configs])
    assert commands == ["python experiments/degradation.py --depths 8"]
    assert [re.findall("sets (.*?):", remark)[0] for remark in remarks] == [
        "epochs",
        "steps",
        "weight_decay",
    ]
    other = replace(configs[0].dataset, name="cifar10", train_examples=50_000)
    (command,), (remark,) = reproduce([replace(configs[0], dataset=other)])
    assert command.endswith("--kinds plain --dataset cifar10 --recipe digits")
    assert "--data-dir" in remark
    flags = Environment(xla_flags="--xla_gpu_deterministic_ops=true")
    (command,), _ = reproduce(configs, [flags])
    assert command.endswith("--deterministic")


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": "evil:code"},
        {"dataset": "$(reboot)"},
        {"dataset": "folder:"},
        {"dataset": "folder:x; reboot"},
        {"recipe": "unknown"},
        {"family": "x; reboot"},
        {"shortcut": "\x1b[201~\nreboot\n"},
        {"stem": {}},
        {"depth": 14, "family": "imagenet"},  # next to the other run
    ],
)
def test_no_command_for_what_it_cannot_do(configs, change):
    for name in ("dataset", "recipe"):
        if name in change:
            change = {name: replace(getattr(configs[0], name), name=change[name])}
    given = [replace(configs[0], **change)] + ([configs[1]] if "depth" in change else [])
    commands, (remark,) = reproduce(given)
    assert not commands
    assert remark


# In a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = Options()
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def visit(browser, tmp_path):
    """A function that opens a page in a window of some width; it must complain of nothing."""

    def visit(text, width=1280, theme="light"):
        (tmp_path / "report.html").write_text(text)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        scheme = [{"name": "prefers-color-scheme", "value": theme}]
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        browser.get((tmp_path / "report.html").as_uri())
        return browser

    yield visit
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource')") == []


def panels(browser):
    found = browser.find_elements(By.CSS_SELECTOR, ".panel")
    return {p.find_element(By.TAG_NAME, "h3").text: p for p in found if p.is_displayed()}


def press(browser, *boxes):
    for box in boxes:
        browser.find_element(By.ID, box).click()


def texts(panel):
    script = """return [...arguments[0].querySelectorAll("text")]
        .filter((text) => text.getClientRects().length).map((text) => text.textContent);"""
    return panel.parent.execute_script(script, panel)


def count(browser, selector):
    """Count the elements that are shown."""
    script = """return [...document.querySelectorAll(arguments[0])]
        .filter((element) => element.getClientRects().length).length;"""
    return browser.execute_script(script, selector)


def points_of(browser, panel, metric, which):
    """Points of a curve, in pixels from the middle of its panel's picture."""
    script = """const [panel, metric, which] = arguments, svg = panel.querySelector("svg");
        const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
        const path = panel.querySelectorAll(`.curve.${metric} > path`)[which].getAttribute("d");
        return path.match(/[\\d.]+ [\\d.]+/g)
          .map((pair) => pair.split(" ").map(Number))
          .map(([x, y]) => [x * scale - box.width / 2, y * scale - box.height / 2]);"""
    return browser.execute_script(script, panel, metric, which)


def hover(browser, panel, metric, which, point):
    """Move over a point of a curve and return the text that appears."""
    x, y = points_of(browser, panel, metric, which)[point]
    picture = panel.find_element(By.TAG_NAME, "svg")
    ActionChains(browser).move_to_element_with_offset(picture, round(x), round(y)).perform()
    return browser.find_element(By.ID, "tip").text.split("\n")


@needs_browser
def test_a_point_tells_its_run_epoch_and_error(visit):
    browser = visit(make_report(made_study()))
    tip = browser.find_element(By.ID, "tip")
    assert not tip.is_displayed()
    for _ in SCALES:
        for kind in ("plain", "residual"):
            # Depth 14, seed 1. The last panel clicked has the focus.
            found = hover(browser, panels(browser)[kind], "test", 3, 1)
            ActionChains(browser).click().perform()
            assert (
                found
                == tip.text.split("\n")
                == [
                    *(f"{kind}, depth 14, seed 1", "epoch 2"),
                    *("training error 29.00 %", "test error 34.00 %"),
                ]
            )
            (read,) = browser.find_elements(By.CSS_SELECTOR, ".reading .read")
            assert "test" in read.get_attribute("class").split()
        ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
        assert not tip.is_displayed()
        press(browser, "log")
    # A hidden curve is not read.
    hover(browser, panels(browser)["plain"], "train", 0, 1)
    browser.execute_script("document.getElementById('depth-0').click()")
    assert not tip.is_displayed()
    assert "depth 14" in hover(browser, panels(browser)["plain"], "train", 0, 2)[0]


@needs_browser
def test_points_between_invalid_ones(visit):
    """They are dots, and read as the epochs they belong to."""
    errors = (math.nan, 7.0, math.nan, 9.0)
    browser = visit(make_report([made_run("plain", 8, 0, errors, "diverged")]))
    (panel,) = panels(browser).values()
    dots = panel.find_elements(By.CSS_SELECTOR, ".curve.train use")
    assert len(dots) == len(points_of(browser, panel, "train", 0)) == 2
    assert hover(browser, panel, "train", 0, 0)[1:3] == ["epoch 2", "training error 7.00 %"]
    assert hover(browser, panel, "train", 0, 1)[1:3] == ["epoch 4", "training error 9.00 %"]


@needs_browser
def test_points_are_read_with_the_keyboard(visit):
    browser = visit(make_report(made_study()))
    press(browser, "test")
    boxes = browser.find_elements(By.CSS_SELECTOR, ".legend input")
    boxes[-1].send_keys(Keys.TAB)  # to the first panel
    spoken = browser.find_element(By.CSS_SELECTOR, "[aria-live]")
    heard = []
    for key in (None, Keys.ARROW_LEFT, Keys.HOME, Keys.ARROW_LEFT, Keys.ARROW_DOWN, Keys.ARROW_UP):
        if key:
            browser.switch_to.active_element.send_keys(key)
        heard.append(spoken.get_attribute("textContent"))
    one, other = "plain, depth 8, seed 0", "plain, depth 8, seed 1"
    assert heard == [
        f"{one}, epoch 4, training error 30.00 %",
        f"{one}, epoch 3, training error 30.00 %",
        *[f"{one}, epoch 1, training error 80.00 %"] * 2,
        f"{other}, epoch 1, training error 80.00 %",
        f"{one}, epoch 1, training error 80.00 %",
    ]
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not browser.find_element(By.ID, "tip").is_displayed()


@needs_browser
def test_the_legend_hides_lines(visit):
    browser = visit(make_report(made_study()))
    assert list(panels(browser)) == ["plain", "residual", "my_nets:build"]
    assert set(texts(panels(browser)["plain"])) > {"8", "14", "20"}
    for _ in SCALES:
        assert count(browser, ".curve.train") == count(browser, ".curve.test") == 18
        press(browser, "depth-1")
        assert count(browser, ".curve.test") == 12
        assert not any("14" in texts(panel) for panel in panels(browser).values())
        press(browser, "kind-0", "train")
        assert list(panels(browser)) == ["residual", "my_nets:build"]
        assert (count(browser, ".curve.train"), count(browser, ".curve.test")) == (0, 8)
        press(browser, "test")
        assert count(browser, ".curve") == 0
        press(browser, "test", "kind-0", "train", "depth-1", "log")
    assert count(browser, ".curve") == 36
    names = [box.accessible_name for box in browser.find_elements(By.CSS_SELECTOR, "input")]
    assert names[:5] == ["depth 8", "depth 14", "depth 20", "training error", "test error"]


@needs_browser
def test_the_axes(visit):
    browser = visit(make_report(made_study()))
    for panel in panels(browser).values():
        assert {"error (%)", "epoch", "0", "1", "4", "20", "80"} <= set(texts(panel))
    press(browser, "log")
    for panel in panels(browser).values():
        ticks = {"0", "0.5", "1", "10", "100", "4"}
        assert {"error (%), logarithmic above 1 %", *ticks} <= set(texts(panel))
    found = panels(browser)
    ys = [y for _, y in points_of(browser, found["residual"], "train", 0)]
    assert ys[-1] == ys[-2] > ys[1] > ys[0]
    # Panels share their scales: both start at 80 %.
    assert points_of(browser, found["plain"], "train", 0)[0][1] == pytest.approx(ys[0], abs=0.1)


@needs_browser
def test_a_depth_is_named_where_its_lines_end(visit):
    browser = visit(make_report(made_study()))
    # Of residual-20 one seed is still in its first epoch, with an error of 93 %.
    panel = panels(browser)["residual"]
    (label,) = (
        text for text in panel.find_elements(By.CSS_SELECTOR, ".end text") if text.text == "20"
    )
    line = panel.find_elements(By.CSS_SELECTOR, ".curve.train > path")[0].get_attribute("d")
    end = float(line.split()[-1])
    assert abs(float(label.get_attribute("y")) - end) < 3 * 13  # three labels, one above the other


@needs_browser
@pytest.mark.parametrize(
    "runs",
    [
        [made_run("plain", 8, 0, (0.0,))],
        [made_run("plain", 8, 0, (0.0, 0.0)), made_run("residual", 8, 0, ())],
        [made_run("plain", 8, 0, (100.0, 100.0), "diverged")],
        [made_run("plain", 8, 0, (math.nan, 7.0, math.nan, math.nan), "diverged")],
        [made_run("plain", 8, 0, (math.nan,), "diverged")],
        [made_run("plain", 8, 0, [50.0 / (i + 1) for i in range(500)])],
        [made_run("plain", 2 * depth, 0) for depth in range(4, 40)],
    ],
    ids=["a zero", "zeros", "all wrong", "gaps", "no number", "many epochs", "many depths"],
)
def test_whatever_there_is_is_drawn(visit, runs):
    browser = visit(make_report(runs), 360)
    for _ in SCALES:
        (panel,) = panels(browser).values()
        drawn = panel.find_element(By.TAG_NAME, "svg").get_attribute("outerHTML")
        assert not re.search("nan|inf|undefined|null", drawn, re.IGNORECASE)
        assert len([t for t in texts(panel) if re.fullmatch(r"[\d.]+", t)]) >= 3
        for run in runs:
            for metric in ("train", "test"):
                errors = list_errors(run).__dict__[metric] if run.result.rows else []
                valid = [error for error in errors if error is not None]
                if valid:
                    assert len(points_of(browser, panel, metric, runs.index(run))) == len(valid)
        press(browser, "log")


@needs_browser
def test_tables_are_sorted_by_their_headings(visit):
    runs = made_study()
    runs[:2] = [made_run("plain", 8, seed, (error,)) for seed, error in ((0, 30.5), (1, 30.25))]
    browser = visit(make_report(runs))
    table = browser.find_elements(By.TAG_NAME, "table")[1]
    headings = table.find_elements(By.TAG_NAME, "th")
    names = [heading.text for heading in headings]

    def column(name):
        rows = table.find_elements(By.CSS_SELECTOR, "tbody tr")
        return [row.find_elements(By.TAG_NAME, "td")[names.index(name)].text for row in rows]

    def sort(name):
        button = headings[names.index(name)].find_element(By.TAG_NAME, "button")
        button.send_keys(Keys.ENTER)
        return column(name)

    errors = sort("train error, %")
    assert errors[-1] == "-"
    assert [float(error) for error in errors[:-1]] == sorted(map(float, errors[:-1]))
    falling = ["95.00", "30.50", "30.25", *["30.00"] * 3, *["1.50"] * 6, *["0.00"] * 5, "-"]
    assert sort("train error, %") == falling
    assert sort("parameters")[::6] == ["8,000", "14,000", "20,000"]
    assert sort("kind")[0] == "my_nets:build"
    assert sort("time")[0] == "1:02"
    sorts = [heading.get_attribute("aria-sort") for heading in headings]
    assert sorts[names.index("time")] == "ascending"
    assert sorts.count("none") == len(names) - 1


@needs_browser
@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_any_window_and_theme(visit, width, theme):
    browser = visit(make_report(made_study(), [Environment({"jax": "1" * 200})]), width, theme)
    press(browser, "log")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    columns = {panel.location["x"] for panel in panels(browser).values()}
    assert len(columns) == (1 if width == 360 else 3)
    script = "return [getComputedStyle(document.body).backgroundColor, " + ", ".join(
        f"getComputedStyle(document.querySelectorAll('.curve.train > path')[{line}]).stroke"
        for line in (0, 4)
    )
    script += ", getComputedStyle(document.querySelectorAll('use')[0]).fill"  # of residual-20
    paper, first, third, dot = browser.execute_script(script + "]")
    assert first == "rgb(0, 114, 178)"  # as in degradation.png
    assert dot == third
    dark, light = (sum(map(int, re.findall(r"\d+", colour))) for colour in (paper, third))
    if theme == "light":
        dark, light = light, dark
    assert (dark < 120, light > 600) == (True, True)


def wide_report():
    """With figures and tables that are wider than a phone."""
    picture = io.BytesIO()
    Image.new("RGB", (1408, 700), "white").save(picture, "png")
    row = tuple(f"cell {i} of a row" for i in range(9))
    table = Table(tuple(f"heading {i}" for i in range(9)), [row] * 3)
    found = Diagnostic("A title", "Some words.", picture.getvalue(), table)
    return make_report(made_study(), [Environment({"jax": "1" * 200})], [found])


@needs_browser
def test_on_a_phone_figures_and_tables_scroll_and_the_page_does_not(visit):
    """Figures shrank until nothing could be read, and tables were cut off."""
    browser = visit(wide_report(), 390)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    boxes = browser.find_elements(By.CLASS_NAME, "scroll")
    assert len(boxes) == 3 + 2  # tables of the study; figure and table of the diagnostic
    wide = [box for box in boxes if box.get_property("scrollWidth") > 390]
    assert len(wide) == 4  # the table of differences is narrow
    for box in wide:
        assert box.get_property("clientWidth") <= 390
        browser.execute_script("arguments[0].scrollLeft = 1e6", box)
        assert box.get_property("scrollLeft") > 0
        # Shades at both edges, which what scrolls may hide.
        shades = box.value_of_css_property("background-attachment").split(", ")
        assert shades == ["local", "local", "scroll", "scroll"]
        assert box.get_attribute("tabindex") == "0"
    image = browser.find_element(By.CSS_SELECTOR, ".picture img")
    assert image.size["width"] == 704
    browser = visit(wide_report(), 1280)
    assert browser.find_element(By.CSS_SELECTOR, ".picture img").size["width"] == 1408 * 96 // 160


@needs_browser
def test_strangers_run_no_code(visit):
    browser = visit(evil_report())
    assert "evil" in browser.title  # its text
    assert browser.title != "evil"
    assert len(panels(browser)) == 3
    ActionChains(browser).move_to_element(panels(browser).popitem()[1]).perform()
    assert EVIL in browser.find_element(By.ID, "tip").text
    assert count(browser, "img") == 0


@needs_browser
def test_it_is_read_without_javascript(visit, browser):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        visit(make_report(made_study()))
        assert count(browser, ".panel") == 3
        assert count(browser, ".curve") == 36
        press(browser, "depth-0", "log")
        assert count(browser, ".curve") == 24
        assert count(browser, "tbody tr") == 9 + 18 + 9  # networks, runs, differences
        assert count(browser, "button") == 0
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@needs_browser
def test_the_page_may_neither_run_more_nor_ask_anyone(visit):
    browser = visit(make_report(made_study()))
    script = """const more = document.createElement("script");
        more.textContent = "window.ran = true";
        document.body.append(more);
        return fetch("http://127.0.0.1:9/").catch(() => window.ran);"""
    assert browser.execute_script(script) is None
    blocked = [entry["message"] for entry in browser.get_log("browser")]
    assert any("script-src" in message for message in blocked)
    assert any("default-src 'none'" in message for message in blocked)
