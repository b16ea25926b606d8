"""Shared by all tests: compiled code, the digits, and one small finished study."""

import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What one test compiles, another one (or a command it starts) need not compile again.
_cache = tempfile.TemporaryDirectory(prefix="flaxnets-tests-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _cache.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Nothing is left behind in the user's own cache.
os.environ["XDG_CACHE_HOME"] = _cache.name


def load_script(name: str):
    """A script of experiments/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def degradation():
    """`experiments/degradation.py`; call `run_command(module.main, arguments)`."""
    return load_script("degradation")


@pytest.fixture(scope="session")
def show():
    """`experiments/show.py`."""
    return load_script("show")


@pytest.fixture(scope="session")
def train():
    """`experiments/train.py`."""
    return load_script("train")


@pytest.fixture(scope="session")
def diagnostics():
    """`experiments/diagnostics.py`."""
    return load_script("diagnostics")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TFDS directory with the digits in it."""
    from flaxnets.data import load_dataset

    directory = tmp_path_factory.mktemp("data")
    load_dataset("digits", directory)
    return directory


@pytest.fixture(scope="session")
def digits(data_dir: Path):
    from flaxnets.data import load_dataset

    return load_dataset("digits", data_dir)


@dataclass(frozen=True)
class TrainedStudy:
    """The directory of a finished study, and the arguments of the command that made it."""

    out: Path
    arguments: list[str]


@pytest.fixture(scope="session")
def study(degradation, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedStudy:
    """A finished study, both kinds at depth 8, seed 0, two epochs, each with a checkpoint. Not to
    be changed."""
    from flaxnets.cli.main import run_command

    out = tmp_path_factory.mktemp("study") / "out"
    arguments = ["--depths", "8", "--epochs", "2", "--data-dir", str(data_dir)]
    arguments += ["--checkpoint-every", "11steps", "--out", str(out)]
    assert run_command(degradation.main, arguments) == 0
    return TrainedStudy(out, arguments)
