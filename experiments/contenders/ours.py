"""flaxnets as its README recommends: data on the device, one jitted call a step."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
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
from flaxnets.training import create_state, evaluate, make_eval_step, make_train_step
from flaxnets.training.loop import steps_in_flight
from flaxnets.training.steps import cross_entropy, init_variables


class Contender:
    """See `worker.py`. With `seeds` above 1, that many networks are trained together, as one."""

    def __init__(
        self,
        model: str,
        data: Mapping[str, np.ndarray],
        batch_size: int,
        bfloat16: bool,
        task: str,
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
        self._preprocess = Preprocess(self._shape, tuple(data["mean"]), tuple(data["std"]))
        self._mesh = data_mesh(jax.devices()[:1])
        self._split = replicate(Split(images, labels), self._mesh)
        self._evaluates = task == "evaluate"
        if self._evaluates:
            self._start_evaluation(seeds)
        else:
            self._start_training(seeds)

    def _start_evaluation(self, seeds: int) -> None:
        if seeds > 1:
            raise RuntimeError("networks are trained together, but evaluated one by one")
        variables = init_variables(self._model, jax.random.key(0), self._shape)
        variables = estimate_statistics(self._model, variables, self._data["check_images"][:16])
        self._variables = [jax.device_get(variables)]
        self._on_device = replicate(self._variables[0], self._mesh)
        self._eval_step = make_eval_step(self._model, self._preprocess, self._mesh)

    def _start_training(self, seeds: int) -> None:
        optimizer = optax.chain(
            optax.add_decayed_weights(1e-4), optax.sgd(float(self._data["rate"]), momentum=0.9)
        )
        states = [
            create_state(self._model, optimizer, seed, self._shape, self._mesh)
            for seed in range(seeds)
        ]
        orders = [epoch_order(state.key, 0, len(self._data["labels"])) for state in states]
        self._step = make_train_step(
            self._model,
            optimizer,
            self._preprocess,
            Augmentation(4, flip=True),
            self._batch_size,
            self._mesh,
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

        if self._evaluates:
            return self.evaluate()[0]
        batch = self._data["check_images"], self._data["labels"][: self._batch_size]
        if len(self._variables) == 1:
            return float(jax.jit(loss)(self._variables[0], *batch))
        together = jax.tree.map(lambda *leaves: np.stack(leaves), *self._variables)
        return float(jax.jit(jax.vmap(loss, (0, None, None)))(together, *batch)[0])

    def evaluate(self) -> tuple[float, float]:
        """Compute mean cross-entropy and error in percent, as a study does."""
        result = evaluate(self._eval_step, self._on_device, self._split, self._batch_size)
        assert result is not None  # nothing stops it
        return result

    def run(self, steps: int) -> None:
        if self._evaluates:
            for _ in range(steps):
                self.evaluate()
            return
        in_flight, most = deque[jax.Array](), steps_in_flight()
        for _ in range(steps):
            self._state, loss = self._step(self._state, self._split, self._order)
            in_flight.append(loss)
            if len(in_flight) > most:  # as in `train_run`
                in_flight.popleft().block_until_ready()
        jax.block_until_ready(self._state)

    def peak_bytes(self) -> int:
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]

    def device_kind(self) -> str:
        return jax.devices()[0].device_kind

    def multiply_adds(self) -> int:
        """Count the multiply-adds of one image's forward pass."""
        return count_cost(self._model, self._shape, 10).multiply_adds

    def host_seconds(self, steps: int) -> float:
        """Measure the median time until a train step's call returns, starting from an idle
        device."""
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            self._state, _ = self._step(self._state, self._split, self._order)
            times.append(time.perf_counter() - start)
            jax.block_until_ready(self._state)
        return statistics.median(times)

    def make_matmul(self, size: int) -> Callable[[], object]:
        matrix = jax.random.normal(jax.random.key(0), (size, size), self._dtype)
        multiply = jax.jit(jnp.matmul)
        return lambda: jax.block_until_ready(multiply(matrix, matrix))


def estimate_statistics(model: Any, variables: dict, images: np.ndarray) -> dict:
    """Return variables with running statistics updated ten times on normalised `images`.

    A new network's means of 0 and variances of 1 would hide mistakes with them.
    """

    @jax.jit
    def update(variables: dict) -> dict:
        _, statistics = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return {**variables, **statistics}

    for _ in range(10):
        variables = update(variables)
    return variables
