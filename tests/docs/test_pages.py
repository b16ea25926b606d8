"""The documentation builds, and names everything that commands take and files hold."""

import contextlib
import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flaxnets
from flaxnets.training import RECIPES, Recipe
from tests.conftest import load_script
from tests.pages import TEXTS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*(?!\w)")
COMMANDS = (
    *("degradation", "train", "evaluate", "predict", "diagnostics", "report", "show"),
    *("benchmark", "count_kernels"),
)
# Options of pip.
OTHERS = {"--upgrade", "--group"}


@pytest.fixture(scope="module")
def options():
    """The options of each command, from its `--help`."""
    found = {}
    for name in COMMANDS:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            load_script(name).main(["--help"])
        found[name] = set(FLAG.findall(text.getvalue())) - {"--help"}
    assert all(found.values())
    return found


def test_every_option_is_documented(options):
    pages = "\n".join(TEXTS.values())
    fields = {f"--{name.replace('_', '-')}" for name in Recipe.__dataclass_fields__}
    documented = set(FLAG.findall(pages)) | fields
    for name, flags in options.items():
        assert not flags - documented, name


def test_every_documented_option_exists(options):
    known = set.union(*options.values()) | OTHERS | {"--help"}
    for page, text in TEXTS.items():
        assert not set(FLAG.findall(text)) - known, page


def test_every_recipe_and_its_fields_are_documented():
    training = TEXTS[DOCS / "training.md"]
    assert all(f"`{name}`" in training for name in (*RECIPES, *Recipe.__dataclass_fields__))


def test_every_family_of_networks_is_documented():
    networks = TEXTS[DOCS / "networks.md"]
    for name in flaxnets.list_models():
        family = name if "<" in name else re.sub(r"\d.*", "", name)
        assert f"`{family}" in networks, name


def keys(value):
    """All names of entries in a JSON value."""
    if isinstance(value, dict):
        return set(value).union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


def named(text):
    """The names that `text` sets as code."""
    return set(re.findall(r"[\w-]+", " ".join(re.findall(r"`([^`]+)`", text))))


def test_every_column_and_entry_of_a_study_is_documented(study):
    pages = named(TEXTS[DOCS / "files.md"] + TEXTS[DOCS / "training.md"])
    packages = {"flaxnets", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
    run = study.out / "residual-8" / "seed-0"
    for path in (study.out / "summary.csv", run / "metrics.csv"):
        with path.open() as file:
            assert not set(csv.DictReader(file).fieldnames or ()) - pages, path.name
    for path in (study.out / "study.json", run / "config.json"):
        assert not keys(json.loads(path.read_text())) - pages - packages, path.name


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments" / "results").glob("*/diagnostics/*.json"))
)
def test_every_entry_of_a_diagnostic_is_documented(path):
    value = json.loads(path.read_text())
    entries = set(value) if isinstance(value, dict) else set(value[0])
    section = TEXTS[DOCS / "files.md"].split("## diagnostics/")[1].split("\n## ")[0]
    assert path.name in section
    assert not entries - named(section)


@pytest.mark.slow
def test_the_documentation_builds(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_nb")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-b", "html"]
    built = subprocess.run(
        [*command, "-d", tmp_path / "cache", DOCS, tmp_path / "html"],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert "flaxnets.create_model" in (tmp_path / "html" / "api" / "flaxnets.html").read_text()
