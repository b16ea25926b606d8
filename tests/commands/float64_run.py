"""Train a small network in float64, whose runs on any number of devices can be compared.

    python tests/commands/float64_run.py DIRECTORY STOP_AT [HOST:PORT,PROCESSES,INDEX]

goes on from DIRECTORY's newest checkpoint, or from the start, to update STOP_AT of 20, on every
device there is, and leaves the final state in DIRECTORY/state.npz.
"""

import os

os.environ["JAX_ENABLE_X64"] = "1"

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flaxnets
from flaxnets.cli.arguments import process_group
from flaxnets.data import Augmentation, Dataset, Preprocess, Split
from flaxnets.parallel import data_mesh, is_primary, start_processes
from flaxnets.training import (
    CheckpointEvery,
    Checkpoints,
    Recipe,
    TrainSetup,
    create_state,
    train_run,
)

directory, stop_at = Path(sys.argv[1]), int(sys.argv[2])
if len(sys.argv) > 3:
    start_processes(*process_group(sys.argv[3]))

rng = np.random.RandomState(0)
made = Split(
    rng.randint(0, 256, (80, 8, 8, 3)).astype(np.uint8), rng.randint(0, 10, 80).astype(np.int32)
)
dataset = Dataset(
    "made",
    "1.0.0",
    tuple("0123456789"),
    made,
    made,
    Preprocess((8, 8, 3), (0.5,) * 3, (0.25,) * 3),
    Augmentation(1, True),
)
recipe = Recipe("made", learning_rate=0.1, batch_size=16, steps=20)
model = flaxnets.create_model("cifar_resnet8", dtype=jnp.float64, param_dtype=jnp.float64)
setup = TrainSetup.create(model, 8, recipe, dataset, data_mesh())
step = [0]


def on_progress(progress):
    step[0] = progress.step


result = train_run(
    setup, 0, directory, on_progress, lambda: stop_at <= step[0] < 20, CheckpointEvery(steps=3)
)
print(f"{jax.process_count()} processes, {jax.device_count()} devices: {result.status}")
like = create_state(model, setup.optimizer, 0, (8, 8, 3), setup.mesh)
with Checkpoints(directory, read_only=True) as checkpoints:
    state = checkpoints.restore(like)
assert state.params["conv1"]["kernel"].dtype == jnp.float64
assert len(state.params["conv1"]["kernel"].sharding.device_set) == jax.device_count()
if is_primary():
    leaves = jax.tree_util.tree_flatten_with_path(state.replace(key=None))[0]
    arrays: dict[str, Any] = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    losses = [[row["train_loss"], row["test_loss"]] for row in result.evaluated]
    np.savez(directory / "state.npz", losses=losses, **arrays)
