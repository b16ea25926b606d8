"""The library's packages import one another in one direction, and tests mirror them."""

import ast
from pathlib import Path

import pytest

import flaxnets

pytestmark = pytest.mark.unit

ROOT = Path(flaxnets.__file__).parent
# From top to bottom: each may import those below it, and all may import the other modules ("").
ORDER = ("study", "cli", "diagnostics", "reporting", "studies", "training", "models", "data", "")
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def package_of(path):
    first = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return first if first in ORDER else ""


def imported_packages(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            root, _, rest = name.partition(".")
            if root == "flaxnets":
                first = rest.split(".")[0]
                yield first if first in ORDER else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = ORDER.index(package_of(path))
    above = [name for name in imported_packages(path) if ORDER.index(name) < own]
    assert not above


def test_every_package_has_its_place():
    packages = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert packages <= set(ORDER)


def test_tests_mirror_the_packages():
    """But for tests of the commands and of the documentation."""
    folders = {path.parent.name for path in Path(__file__).parent.glob("*/test_*.py")}
    assert folders - {"commands", "docs"} == {name for name in ORDER if (ROOT / name).is_dir()} - {
        ""
    }
