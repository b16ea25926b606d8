"""Evaluation of trained networks: logits on a split, and the measures computed from them."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxnets.data.batches import Augmentation, Preprocess
from flaxnets.parallel import data_mesh, replicate, replicated, split_batch
from flaxnets.training.config import RunConfig
from flaxnets.training.steps import cross_entropy

MOST_CONFUSED = 2_000


@dataclass(frozen=True)
class Evaluation:
    """Measures over all images of a split, each counted once.

    Attributes:
      count: number of images.
      loss: mean cross-entropy.
      top1_error: percent of the images whose largest logit is not the label's.
      top5_error: percent whose label's logit is not among the five largest; None with five
        classes or fewer.
      class_counts: int `(classes,)`, number of images of each class.
      class_accuracy: float `(classes,)`, percent of each class's images that are classified
        correctly; NaN for a class without images.
      confusion: int `(classes, classes)`, number of images of each class (row) predicted as each
        class (column); None for more than `MOST_CONFUSED` classes, as it would fill the memory.
      undecided: number of images with NaN logits. They count as errors and are in no column of
        `confusion`.
    """

    count: int
    loss: float
    top1_error: float
    top5_error: float | None
    class_counts: np.ndarray
    class_accuracy: np.ndarray
    confusion: np.ndarray | None
    undecided: int


def evaluate_logits(logits: np.ndarray, labels: np.ndarray) -> Evaluation:
    """Compute the measures from logits `(n, classes)` and int labels `(n,)`.

    Among equal logits, the first one counts as the largest.

    Raises:
      ValueError: there are no images, the shapes do not match or a label is out of range.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not logits.size:
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} do not match")
    count, classes = logits.shape
    if labels.min() < 0 or labels.max() >= classes:
        found = f"{labels.min()} to {labels.max()}"
        raise ValueError(f"labels must be from 0 to {classes - 1}, not from {found}")
    decided = ~np.isnan(logits).any(axis=1)
    rank = np.where(decided, _rank(logits, labels), classes)
    confusion = None
    if classes <= MOST_CONFUSED:
        confusion = np.zeros((classes, classes), np.int64)
        np.add.at(confusion, (labels[decided], logits[decided].argmax(axis=1)), 1)
    class_counts = np.bincount(labels, minlength=classes)
    losses = cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    with np.errstate(invalid="ignore"):
        class_accuracy = 100 * np.bincount(labels[rank == 0], minlength=classes) / class_counts
    return Evaluation(
        count=count,
        loss=float(np.asarray(losses, np.float64).mean()),
        top1_error=100 * int((rank >= 1).sum()) / count,
        top5_error=100 * int((rank >= 5).sum()) / count if classes > 5 else None,
        class_counts=class_counts,
        class_accuracy=class_accuracy,
        confusion=confusion,
        undecided=count - int(decided.sum()),
    )


def _rank(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the number of classes ranked above the label's by their logits, int `(n,)`."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(axis=1)


def compute_probabilities(logits: np.ndarray) -> np.ndarray:
    """Compute the softmax of logits `(n, classes)`; NaN where logits are NaN.

    Float64 keeps the probabilities of confident predictions apart.
    """
    logits = np.asarray(logits, np.float64)
    with np.errstate(invalid="ignore"):
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def most_confidently_wrong(logits: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Return indices of at most `count` misclassified images, by decreasing probability of the
    predicted class.

    Images with NaN logits are left out, because they have no prediction.

    Args:
      logits: `(n, classes)`.
      labels: int `(n,)`.
    """
    decided = ~np.isnan(logits).any(axis=1)
    wrong = np.flatnonzero(decided & (logits.argmax(axis=1) != labels))
    confidence = compute_probabilities(logits[wrong]).max(axis=1, initial=0)
    return wrong[np.argsort(-confidence, kind="stable")[:count]]


def evaluation_fraction(config: RunConfig) -> float:
    """Return the share of a picture's shorter side that a run was evaluated on in training.

    The run's config decides: 224 of 256 if it was trained on crops of streamed pictures.
    """
    crops = config.dataset.streamed and config.recipe.augment.endswith("-crop")
    return Augmentation(crop="resized" if crops else "none").seen_at_evaluation


def evaluation_batch(image_shape: tuple[int, int, int]) -> int:
    """Return the evaluation batch size for images `(height, width, channels)`.

    It is 256, or less for images larger than 96x96, so that a batch has no more pixels than 256 of
    those: feature maps of large images take much memory.
    """
    height, width, _ = image_shape
    return int(np.clip(256 * 96 * 96 // (height * width), 1, 256))


def compute_logits(
    model: nn.Module,
    variables: dict[str, Any],
    preprocess: Preprocess,
    images: np.ndarray,
    batch_size: int,
) -> np.ndarray:
    """Compute the logits of one or more images in evaluation mode.

    Images are processed in batches, each split over all devices.

    Args:
      model: a Linen module for classification.
      variables: its `params` and `batch_stats`.
      preprocess: converts `images` to the network's input.
      images: uint8 `(n, height, width, channels)`.
      batch_size: images per batch over all devices, rounded up to a multiple of their number and
        no larger than needed.

    Returns:
      float32 `(n, classes)`.
    """
    mesh = data_mesh()
    batch_size = -(-min(batch_size, len(images)) // mesh.size) * mesh.size
    variables = replicate(variables, mesh)

    @partial(jax.jit, out_shardings=replicated(mesh))
    def apply(variables: dict[str, Any], batch: jax.Array) -> jax.Array:
        logits: Any = model.apply(variables, preprocess(batch), train=False)
        return logits.astype(jnp.float32)

    logits: list[jax.Array] = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        padding = ((0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0))
        batch = jax.device_put(np.pad(batch, padding), split_batch(mesh))
        logits.append(apply(variables, batch))
        # Keep two batches in flight: waiting for each one would leave the device idle.
        jax.block_until_ready(logits[-2:-1])
    return np.concatenate(jax.device_get(logits))[: len(images)]
