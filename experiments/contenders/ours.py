"""flaxnets as its README recommends: data on the device, one jitted call a step."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from flaxnets import create_model
from flaxnets.data import Augmentation, Preprocess, Split, epoch_order
from flaxnets.models.cost import count_cost
from flaxnets.parallel import data_mesh, replicate
from flaxnets.training import create_state, make_train_step
from flaxnets.training.steps import cross_entropy

MATRIX_SIZES = {"cpu": (1024, 2048), "gpu": (4096, 8192)}


class Contender:
    """See `worker.py`. With `seeds` above 1, that many networks are trained together, as one."""

    def __init__(
        self,
        model: str,
        data: Mapping[str, np.ndarray],
        batch_size: int,
        bfloat16: bool,
        device: str | None,
        weights: str | None,
        seeds: int = 1,
    ) -> None:
        self.device = jax.devices()[0].platform
        self._dtype = jnp.bfloat16 if bfloat16 else jnp.float32
        self._model: Any = create_model(model, num_classes=10, dtype=self._dtype)
        self._data, self._batch_size = data, batch_size
        images, labels = data["images"], data["labels"]
        self._shape = images.shape[1:]
        preprocess = Preprocess(self._shape, tuple(data["mean"]), tuple(data["std"]))
        optimizer = optax.chain(
            optax.add_decayed_weights(1e-4), optax.sgd(float(data["rate"]), momentum=0.9)
        )
        mesh = data_mesh(jax.devices()[:1])
        self._split = replicate(Split(images, labels), mesh)
        states = [create_state(self._model, optimizer, s, self._shape, mesh) for s in range(seeds)]
        orders = [epoch_order(state.key, 0, len(labels)) for state in states]
        self._step = make_train_step(
            self._model, optimizer, preprocess, Augmentation(4, flip=True), batch_size, mesh
        )
        # States are donated, and the loss check needs their weights later.
        self._variables = jax.device_get([state.variables for state in states])
        if seeds == 1:
            self._state, self._order = states[0], orders[0]
        else:
            self._state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
            self._order = jnp.stack(orders)
            self._step = jax.jit(jax.vmap(self._step, (0, None, 0)), donate_argnums=0)

    def save_weights(self, path: str) -> None:
        leaves: Any = flatten_dict(self._variables[0], sep="/")
        np.savez(path, **leaves)

    def loss(self) -> float:
        def loss(variables: Any, images: Any, labels: Any):
            logits = self._model.apply(variables, images, train=True, mutable=["batch_stats"])[0]
            return cross_entropy(logits, labels).mean()

        batch = self._data["check_images"], self._data["labels"][: self._batch_size]
        if len(self._variables) == 1:
            return float(jax.jit(loss)(self._variables[0], *batch))
        together = jax.tree.map(lambda *leaves: np.stack(leaves), *self._variables)
        return float(jax.jit(jax.vmap(loss, (0, None, None)))(together, *batch)[0])

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._state, _ = self._step(self._state, self._split, self._order)
        jax.block_until_ready(self._state)

    def peak_bytes(self) -> int:
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]

    def device_kind(self) -> str:
        return jax.devices()[0].device_kind

    def multiply_adds(self) -> int:
        """Count the multiply-adds of one image's forward pass."""
        return count_cost(self._model, self._shape, 10).multiply_adds

    def host_seconds(self, steps: int) -> float:
        """Measure the median time until a step's call returns, starting from an idle device."""
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            self._state, _ = self._step(self._state, self._split, self._order)
            times.append(time.perf_counter() - start)
            jax.block_until_ready(self._state)
        return statistics.median(times)

    def matmul_flops(self) -> float:
        """Measure operations a second in the best of a few products of square matrices."""
        best = 0.0
        for size in MATRIX_SIZES.get(self.device, MATRIX_SIZES["gpu"]):
            matrix = jax.random.normal(jax.random.key(0), (size, size), self._dtype)
            multiply = jax.jit(jnp.matmul)
            jax.block_until_ready(multiply(matrix, matrix))
            for _ in range(8):
                start = time.perf_counter()
                jax.block_until_ready(multiply(matrix, matrix))
                best = max(best, 2 * size**3 / (time.perf_counter() - start))
        return best
