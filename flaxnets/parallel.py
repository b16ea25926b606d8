"""Data-parallel training over every device: one mesh, two shardings.

The state is replicated and the batch is split along the mesh's `data` axis; XLA's partitioner adds
the communication. BatchNorm sees the whole batch without knowing of the mesh.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


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
    # `device_put` may alias its input, and train steps donate theirs.
    return jax.device_put(tree, replicated(mesh), may_alias=False)
