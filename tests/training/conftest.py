"""A small run, uninterrupted, that others are compared with."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import flaxnets
from flaxnets.parallel import data_mesh
from flaxnets.training import RECIPES, Checkpoints, TrainSetup, create_state, train_run


@pytest.fixture(scope="session")
def setup(digits):
    """Two epochs and a half of the smallest network: 28 steps, 11 an epoch."""
    recipe = replace(RECIPES["digits"], epochs=None, steps=28)
    return TrainSetup.create(
        flaxnets.create_model("cifar_resnet8", num_classes=10), 8, recipe, digits, data_mesh()
    )


@pytest.fixture(scope="session")
def uninterrupted(setup, tmp_path_factory):
    """Directory and result. Not to be changed."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    return directory, train_run(setup, 0, directory)


@pytest.fixture(scope="session")
def assert_same_state(setup, uninterrupted):
    """Assert that a run has ended bit for bit with the state of the uninterrupted one."""

    def final_state(directory):
        state = create_state(setup.model, setup.optimizer, 0, setup.image_shape, setup.mesh)
        with Checkpoints(directory, read_only=True) as checkpoints:
            state = checkpoints.restore(state)
        return jax.tree.map(np.asarray, state.replace(key=jax.random.key_data(state.key)))

    expected = final_state(uninterrupted[0])

    def assert_same_state(directory):
        jax.tree.map(np.testing.assert_array_equal, final_state(directory), expected)

    return assert_same_state


@pytest.fixture(scope="session")
def assert_same_run(uninterrupted, assert_same_state):
    """Assert that a run has ended bit for bit as the uninterrupted one: the whole state, and
    `metrics.csv` but for the seconds."""

    def metrics(directory):
        rows = (directory / "metrics.csv").read_text().splitlines()
        return [row.rpartition(",")[0] for row in rows]

    def assert_same_run(directory):
        assert metrics(directory) == metrics(uninterrupted[0])
        assert_same_state(directory)

    return assert_same_run
