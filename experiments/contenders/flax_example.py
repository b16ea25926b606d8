"""Network and train step as customarily written in Flax.

It uses stock Linen layers, `nn.relu(y + x)`, a `TrainState` with BatchNorm's statistics, and
batches that NumPy makes on the host for a jitted step.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from flax.traverse_util import unflatten_dict


class Block(nn.Module):
    layers: Sequence[tuple[int, int, int]]  # filters, kernel size and stride of each convolution
    shortcut: str | None
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        y = x
        for i, (filters, size, stride) in enumerate(self.layers, 1):
            padding = (size - 1) // 2
            y = self.conv(filters, (size, size), stride, padding=padding, name=f"conv{i}")(y)
            y = self.norm(name=f"bn{i}")(y)
            if i < len(self.layers):
                y = nn.relu(y)
        if self.shortcut is None:
            return nn.relu(y)
        if x.shape != y.shape:
            stride = max(stride for _, _, stride in self.layers)
            if self.shortcut == "B":
                x = self.conv(y.shape[-1], (1, 1), stride, name="shortcut_conv")(x)
                x = self.norm(name="shortcut_bn")(x)
            else:
                new = y.shape[-1] - x.shape[-1]
                zeros = ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2))
                x = jnp.pad(x[:, ::stride, ::stride], zeros)
        return nn.relu(y + x)


class Network(nn.Module):
    """ResNet with the attributes of flaxnets's `ResNet`, version 1 with shortcut A or B."""

    stage_sizes: Sequence[int]
    num_classes: int
    width: int
    block: str
    stem: str
    shortcut: str
    residual: bool
    stride_in_3x3: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, train: bool):
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
        )
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = conv(self.width, (size, size), stride, padding=(size - 1) // 2, name="conv1")(x)
        x = nn.relu(norm(name="bn1")(x))
        if self.stem == "imagenet":
            padding: Any = ((1, 1), (1, 1))  # annotated as str in Flax
            x = nn.max_pool(x, (3, 3), (2, 2), padding)
        for i, blocks in enumerate(self.stage_sizes, 1):
            filters = self.width * 2 ** (i - 1)
            for j in range(1, blocks + 1):
                stride = 2 if i > 1 and j == 1 else 1
                layers = [(filters, 3, stride), (filters, 3, 1)]
                if self.block == "bottleneck":
                    first, second = (1, stride) if self.stride_in_3x3 else (stride, 1)
                    layers = [(filters, 1, first), (filters, 3, second), (4 * filters, 1, 1)]
                shortcut = self.shortcut if self.residual else None
                x = Block(layers, shortcut, conv, norm, name=f"stage{i}_block{j}")(x)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


class TrainState(train_state.TrainState):
    batch_stats: Any


def loss_fn(params, batch_stats, apply_fn, images, labels):
    logits, updates = apply_fn(
        {"params": params, "batch_stats": batch_stats}, images, train=True, mutable=["batch_stats"]
    )
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, updates["batch_stats"]


@jax.jit
def train_step(state: TrainState, images, labels):
    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, batch_stats), gradients = gradient_fn(
        state.params, state.batch_stats, state.apply_fn, images, labels
    )
    return state.apply_gradients(grads=gradients, batch_stats=batch_stats), loss


@jax.jit
def eval_step(state: TrainState, images, labels):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, images, train=False).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.sum(), (jnp.argmax(logits, -1) != labels).sum()


def augment(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Crop images randomly after padding them with 4 black pixels, and flip half of them."""
    count, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    top, left = rng.integers(0, 9, (2, count, 1))
    columns = left + np.arange(width)
    columns = np.where(rng.random((count, 1)) < 0.5, columns[:, ::-1], columns)
    rows = top + np.arange(height)
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


class Contender:
    """See `worker.py`."""

    def __init__(
        self,
        model: Mapping[str, Any],
        data: Mapping[str, np.ndarray],
        batch_size: int,
        bfloat16: bool,
        task: str,
        device: str | None,
        weights: str,
    ) -> None:
        self.device = jax.devices()[0].platform
        network = Network(**model, dtype=jnp.bfloat16 if bfloat16 else jnp.float32)
        with np.load(weights) as arrays:
            self._variables = unflatten_dict(dict(arrays), sep="/")
        optimizer = optax.chain(
            optax.add_decayed_weights(1e-4), optax.sgd(float(data["rate"]), momentum=0.9)
        )
        self._state = TrainState.create(
            apply_fn=network.apply,
            params=self._variables["params"],
            tx=optimizer,
            batch_stats=self._variables["batch_stats"],
        )
        self._data, self._batch_size, self._steps_done = data, batch_size, 0
        self._evaluates = task == "evaluate"
        self._rng = np.random.default_rng(0)
        self._order = self._rng.permutation(len(data["labels"]))

    def loss(self) -> float:
        if self._evaluates:
            return self.evaluate()[0]
        labels = self._data["labels"][: self._batch_size]
        loss = jax.jit(loss_fn, static_argnums=2)(
            self._variables["params"],
            self._variables["batch_stats"],
            self._state.apply_fn,
            self._data["check_images"],
            labels,
        )[0]
        return float(loss)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            if self._evaluates:
                self.evaluate()
            else:
                self._train_step()
        jax.block_until_ready(self._state)

    def _train_step(self) -> None:
        start = self._steps_done % (len(self._order) // self._batch_size) * self._batch_size
        indices = self._order[start : start + self._batch_size]
        images = self._normalise(augment(self._rng, self._data["images"][indices]))
        self._state, _ = train_step(self._state, images, self._data["labels"][indices])
        self._steps_done += 1

    def _normalise(self, images: np.ndarray) -> np.ndarray:
        return (images.astype(np.float32) / 255 - self._data["mean"]) / self._data["std"]

    def evaluate(self) -> tuple[float, float]:
        """Compute mean cross-entropy and error in percent over the split."""
        images, labels = self._data["images"], self._data["labels"]
        totals = []
        for start in range(0, len(labels), self._batch_size):
            batch = slice(start, start + self._batch_size)
            totals.append(eval_step(self._state, self._normalise(images[batch]), labels[batch]))
        losses, errors = zip(*jax.device_get(totals), strict=True)
        return float(sum(losses)) / len(labels), 100 * int(sum(errors)) / len(labels)

    def peak_bytes(self) -> int:
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
