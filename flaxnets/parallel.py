"""Data-parallel training over every device, of one process or of several.

One mesh, two shardings: the state is replicated and the batch is split along the mesh's `data`
axis; XLA's partitioner adds the communication. BatchNorm sees the whole batch without knowing of
the mesh. Several processes (one a host, as a rule) run the same program; the first is the primary
one and alone writes files that are not Orbax's.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flaxnets.errors import InputError

# A process that has not been heard of for so long is taken for dead.
HEARTBEAT_SECONDS = 30


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with one axis, `data`, over `devices` (all there are, unless given)."""
    devices = jax.devices() if devices is None else devices
    # Auto axes: explicit ones refuse the gather that takes a batch out of a data set on the device.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The leading axis, which must divide by the number of devices, split over them."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of every array of `tree` on every device of `mesh`."""
    if jax.process_count() == 1:
        # `device_put` may alias its input, and train steps donate theirs.
        return jax.device_put(tree, replicated(mesh), may_alias=False)
    return jax.tree.map(lambda leaf: _replicate_everywhere(leaf, replicated(mesh)), tree)


def _replicate_everywhere(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Onto the devices of other processes too, which have (and compare) the same array."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _replicate_everywhere(jax.random.key_data(leaf), sharding)
        return jax.jit(jax.random.wrap_key_data, out_shardings=sharding)(data)
    return jax.device_put(np.asarray(leaf), sharding)


def start_processes(address: str | None, count: int | None, index: int | None) -> None:
    """Join the other processes of this run, before anything else is done with JAX.

    Args:
      address: `host:port` of the primary process; None, with the others, to ask the cluster
        (SLURM, Open MPI, Kubernetes, Cloud TPU), as `jax.distributed.initialize` does.
      count: how many processes there are.
      index: which one this is; 0 is the primary one.

    Raises:
      InputError: no cluster was found, or the others cannot be reached.
    """
    # It would take SIGTERM for itself before the work begins, and do nothing with it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise InputError(
            f"--distributed: no cluster was found ({error}); "
            "give --distributed HOST:PORT,PROCESSES,INDEX"
        ) from error
    except RuntimeError as error:
        raise InputError(f"--distributed: cannot join the other processes: {error}") from error


def is_primary() -> bool:
    """Whether this process writes the files."""
    return jax.process_index() == 0


def process_max(number: int) -> int:
    """The greatest `number` of all processes, which must ask together."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int64(number)).max())


def gather_texts(text: str) -> list[str]:
    """The `text` of every process, which must ask together."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    padded = np.zeros(process_max(len(data)) + 4, np.uint8)
    padded[:4] = np.frombuffer(np.uint32(len(data)).tobytes(), np.uint8)
    padded[4 : 4 + len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [row[4 : 4 + row[:4].view(np.uint32)[0]].tobytes().decode() for row in rows]


@contextmanager
def raise_on_all_processes() -> Iterator[None]:
    """What one process refuses, all refuse. Inside, no process may wait for another."""
    message = ""
    try:
        yield
    except InputError as error:
        message = str(error)
        if jax.process_count() == 1:
            raise
    for refusal in gather_texts(message):
        if refusal:
            raise InputError(refusal)


def make_deterministic() -> None:
    """Have XLA choose the same algorithms for the same program each time, on GPUs too.

    Before anything is done with JAX. On CPUs and TPUs that is so without it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
