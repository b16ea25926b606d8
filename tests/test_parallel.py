"""Devices and processes, as one process on one device has them.

Several are in `commands/test_devices_and_processes.py`.
"""

from collections.abc import Iterator
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from flaxnets import parallel
from flaxnets.errors import InputError
from flaxnets.parallel import (
    data_mesh,
    gather_texts,
    is_primary,
    make_deterministic,
    process_max,
    raise_on_all_processes,
    replicate,
    replicated,
    split_batch,
    start_processes,
)

pytestmark = pytest.mark.unit


def test_the_batch_is_split_and_the_state_is_not() -> None:
    mesh = data_mesh()
    assert mesh.shape == {"data": jax.device_count()}
    assert split_batch(mesh).spec == PartitionSpec("data")
    assert replicated(mesh).is_fully_replicated
    assert split_batch(mesh).shard_shape((64, 8)) == (64 // jax.device_count(), 8)
    assert data_mesh(jax.devices()[:1]).shape == {"data": 1}


def test_what_is_replicated_may_be_donated() -> None:
    """A train step donates its state; the original must outlive it."""
    original = {"array": jnp.arange(4.0), "key": jax.random.key(0), "numpy": np.arange(3)}
    copy = replicate(original, data_mesh())
    assert copy["array"].sharding.is_fully_replicated
    donate = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf, tree), donate_argnums=0)
    jax.block_until_ready(donate(copy))
    assert copy["array"].is_deleted()
    assert original["array"].tolist() == [0, 1, 2, 3]
    assert jax.random.key_data(original["key"]).tolist() == [0, 0]


def test_one_process_speaks_for_all() -> None:
    assert is_primary()
    assert process_max(-3) == -3
    assert gather_texts("größe") == ["größe"]
    with raise_on_all_processes():
        pass
    error = InputError("no such folder")
    with pytest.raises(InputError) as raised, raise_on_all_processes():
        raise error
    assert raised.value is error


def test_what_another_process_refuses_is_raised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(parallel, "gather_texts", lambda text: [text, "", "no such folder"])
    with pytest.raises(InputError, match=r"^no such folder$"), raise_on_all_processes():
        pass
    with pytest.raises(InputError, match=r"^ours comes first$"), raise_on_all_processes():
        raise InputError("ours comes first")


def test_texts_of_any_length_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes exchange arrays of one shape: as long as the longest text."""
    texts = ["größe", "", "x" * 300]
    lengths = np.array([len(text.encode()) for text in texts])
    sent: list[np.ndarray] = []

    def allgather(array: np.ndarray) -> np.ndarray:
        if array.ndim == 0:
            return lengths
        sent.append(array)
        return np.stack(sent)

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(parallel.multihost_utils, "process_allgather", allgather)
    gathered = [gather_texts(text) for text in texts]
    assert gathered[-1] == texts


@pytest.fixture
def preemption_service() -> Iterator[None]:
    """Put back the setting that joining processes changes."""
    enabled = jax.config.values["jax_enable_preemption_service"]
    yield
    jax.config.update("jax_enable_preemption_service", enabled)


@pytest.mark.usefixtures("preemption_service")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("coordinator_address"), "no cluster was found .*; give --distributed HOST"),
        (RuntimeError("deadline"), "cannot join the other processes: deadline"),
    ],
)
def test_processes_that_cannot_be_joined(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def initialize(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError, match=f"^--distributed: {message}"):
        start_processes(None, None, None)


def test_flags_that_are_set_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    make_deterministic()
    flags = parallel.os.environ["XLA_FLAGS"].split()
    assert flags == ["--xla_cpu_enable_fast_math=false", "--xla_gpu_deterministic_ops=true"]
    monkeypatch.delenv("XLA_FLAGS")
    make_deterministic()
    assert parallel.os.environ["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=true"
