"""Data-parallel training over all devices of one or more processes.

One mesh, two shardings: the state is replicated, and the batch is split along the mesh's `data`
axis. XLA's partitioner adds the communication, so BatchNorm sees the whole batch without referring
to the mesh. Several processes (usually one per host) run the same program. The first is the primary
process, and it alone writes files other than Orbax's.
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

# Seconds without a heartbeat before a process is considered dead.
HEARTBEAT_SECONDS = 30


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Create a mesh with one axis, `data`, over `devices` (by default, all of them)."""
    devices = jax.devices() if devices is None else devices
    # Auto axes: explicit ones reject the gather that takes a batch from a data set on the device.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """Return the sharding that splits the leading axis over the devices.

    The axis must be divisible by the number of devices.
    """
    return NamedSharding(mesh, PartitionSpec("data"))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copy every array of `tree` to every device of `mesh`."""
    if jax.process_count() == 1:
        # Train steps donate their state, so the copy must not alias its input.
        return jax.device_put(tree, replicated(mesh), may_alias=False)
    return jax.tree.map(lambda leaf: _replicate_everywhere(leaf, replicated(mesh)), tree)


def _replicate_everywhere(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Replicate an array over all processes, each of which holds (JAX checks) the same one."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _replicate_everywhere(jax.random.key_data(leaf), sharding)
        return jax.jit(jax.random.wrap_key_data, out_shardings=sharding)(data)
    return jax.device_put(np.asarray(leaf), sharding)


def start_processes(address: str | None, count: int | None, index: int | None) -> None:
    """Join the other processes of this run. Call it before any other use of JAX.

    Args:
      address: `host:port` of the primary process. If all three arguments are None, the cluster
        (SLURM, Open MPI, Kubernetes, Cloud TPU) is asked, as in `jax.distributed.initialize`.
      count: number of processes.
      index: index of this process; 0 is the primary one.

    Raises:
      InputError: no cluster was found, or the other processes cannot be reached.
    """
    # JAX's preemption service would swallow SIGTERM.
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
    """Return whether this process writes the files."""
    return jax.process_index() == 0


def process_max(number: int) -> int:
    """Return the maximum of `number` over all processes, which must all call this."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int64(number)).max())


def gather_texts(text: str) -> list[str]:
    """Return the `text` of every process; all processes must call this."""
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
    """Raise the first `InputError` of any process on all of them.

    Inside, no process may wait for another.
    """
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
    """Make XLA choose the same algorithms for the same program every time, on GPUs too.

    Call it before any other use of JAX. CPUs and TPUs are deterministic without it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
