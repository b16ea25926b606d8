"""Studies in processes of their own, and whether two of them are the same."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from flaxnets.parallel import data_mesh
from flaxnets.studies.directory import run_directory
from flaxnets.studies.restore import build_model
from flaxnets.studies.results import read_runs
from flaxnets.training import Checkpoints, create_state

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, ROOT / "experiments" / "degradation.py")


def start(*command, place=ROOT, **environment):
    return subprocess.Popen(
        [*map(str, command)],
        cwd=place,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*command, **environment):
    """Run to the end: exit status, stdout, stderr."""
    process = start(*command, **environment)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def without_seconds(path):
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def assert_same_study(ours, theirs):
    """Bit for bit: every parameter, statistic and number but the times."""
    assert without_seconds(ours / "summary.csv") == without_seconds(theirs / "summary.csv")
    assert (ours / "study.json").read_bytes() == (theirs / "study.json").read_bytes()
    runs = read_runs(theirs)
    assert [run.key for run in read_runs(ours)] == [run.key for run in runs]
    for run in runs:
        assert_same_run(*(run_directory(out, *run.key) for out in (ours, theirs)))


def assert_same_run(one, other):
    """The same of a run."""
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()
    assert without_seconds(one / "metrics.csv") == without_seconds(other / "metrics.csv")
    first, second = stored_state(one), stored_state(other)
    assert first.keys() == second.keys()
    assert len(first) > 50
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def stored_state(directory):
    """Every array of a run's newest good checkpoint, by its path, and where the run is."""
    with Checkpoints(directory, read_only=True) as checkpoints:
        config, result = checkpoints.read_config(), checkpoints.read_result()
        optimizer = config.recipe.make_optimizer(config.total_steps, config.depth)
        shape = config.preprocess.input_shape
        like = create_state(build_model(config), optimizer, 0, shape, data_mesh())
        state = checkpoints.restore(like)
    state = state.replace(key=jax.random.key_data(state.key))
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return {**arrays, "progress": np.array([result.step, result.status])}
