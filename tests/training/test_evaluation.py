"""Measures made from logits, against scikit-learn's and numbers made by hand."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from flaxnets.data import Preprocess
from flaxnets.training.evaluation import (
    compute_logits,
    compute_probabilities,
    evaluate_logits,
    evaluation_batch,
    evaluation_fraction,
    most_confidently_wrong,
)
from flaxnets.training.steps import count_errors
from tests.conftest import ROOT
from tests.factories import make_run_config


def made_up(count=300, classes=7):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (count, classes)).astype(np.float32)
    labels = rng.integers(0, classes, count)
    logits[np.arange(count), labels] += 2
    return logits, labels


def test_like_scikit_learn():
    logits, labels = made_up()
    evaluation = evaluate_logits(logits, labels)
    every, predicted = np.arange(7), logits.argmax(1)
    expected = 100 * (1 - metrics.accuracy_score(labels, predicted))
    assert 10 < evaluation.top1_error == pytest.approx(expected)
    expected = 100 * (1 - metrics.top_k_accuracy_score(labels, logits, k=5, labels=every))
    assert evaluation.top5_error is not None
    assert 0 < evaluation.top5_error == pytest.approx(expected)
    probabilities = compute_probabilities(logits)
    assert evaluation.loss == pytest.approx(metrics.log_loss(labels, probabilities), rel=1e-6)
    confusion = metrics.confusion_matrix(labels, predicted, labels=every)
    np.testing.assert_array_equal(evaluation.confusion, confusion)
    recall = metrics.precision_recall_fscore_support(labels, predicted)[1]
    np.testing.assert_allclose(evaluation.class_accuracy, 100 * np.asarray(recall))
    np.testing.assert_array_equal(evaluation.class_counts, np.bincount(labels))
    assert (evaluation.count, evaluation.undecided) == (300, 0)


def test_by_hand():
    logits = np.log([[0.5, 0.25, 0.25], [0.2, 0.5, 0.3], [0.7, 0.2, 0.1], [0.6, 0.3, 0.1]])
    evaluation = evaluate_logits(logits.astype(np.float32), np.array([0, 1, 1, 0]))
    assert evaluation.loss == pytest.approx(-np.log([0.5, 0.5, 0.2, 0.6]).mean(), rel=1e-6)
    assert evaluation.top1_error == 25.0
    assert evaluation.top5_error is None
    assert evaluation.confusion is not None
    assert evaluation.confusion.tolist() == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert evaluation.class_counts.tolist() == [2, 2, 0]
    np.testing.assert_array_equal(evaluation.class_accuracy, [100, 50, np.nan])


def test_nan_logits_are_errors():
    """As in training; an image that has them is taken for nothing, not for the first NaN."""
    logits, labels = made_up()
    right = np.flatnonzero(logits.argmax(1) == labels)[:3]
    before = evaluate_logits(logits, labels)
    logits[right[0], labels[right[0]]] = np.nan
    logits[right[1], (labels[right[1]] + 1) % 7] = np.nan
    logits[right[2]] = np.nan
    evaluation = evaluate_logits(logits, labels)
    errors = count_errors(jnp.asarray(logits), jnp.asarray(labels))
    assert evaluation.top1_error == 100 * int(errors.sum()) / 300
    assert evaluation.top1_error == pytest.approx(before.top1_error + 1)
    assert before.top5_error is not None
    assert evaluation.top5_error == pytest.approx(before.top5_error + 1)
    assert evaluation.confusion is not None
    assert (evaluation.confusion.sum(), evaluation.undecided) == (297, 3)
    assert np.isnan(evaluation.loss)
    lost = before.class_counts * (before.class_accuracy - evaluation.class_accuracy)
    np.testing.assert_allclose(lost, 100 * np.bincount(labels[right], minlength=7), atol=1e-9)


def test_of_equal_logits_the_first_counts():
    evaluation = evaluate_logits(np.zeros((6, 6), np.float32), np.arange(6))
    assert evaluation.confusion is not None
    assert evaluation.confusion[:, 0].tolist() == [1] * 6
    assert evaluation.top1_error == pytest.approx(500 / 6)
    assert evaluation.top5_error == pytest.approx(100 / 6)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (np.zeros((2, 3)), np.zeros(3, int)),
        (np.zeros(3), np.zeros(3, int)),
        (np.zeros((0, 3)), np.zeros(0, int)),
        (np.zeros((2, 3)), np.array([0, 3])),
        (np.zeros((2, 3)), np.array([-1, 0])),
    ],
)
def test_what_does_not_fit_is_refused(logits, labels):
    with pytest.raises(ValueError, match=r"do not match|must be from 0 to 2"):
        evaluate_logits(logits, labels)


def test_most_confidently_wrong():
    logits = np.array([[9, 0, 0], [2, 0, 0], [60, 0, 0], [0, 9, 0], [61, 0, 0], [2, 0, 0]])
    logits = np.vstack([logits, [[np.nan, 0, 9]] * 2]).astype(np.float32)
    labels = np.array([0, 1, 1, 0, 1, 2, 0, 1])
    # In float32 the second and the fourth have probability 1.
    assert most_confidently_wrong(logits, labels, 9).tolist() == [2, 4, 3, 1, 5]
    assert most_confidently_wrong(logits, labels, 2).tolist() == [2, 4]
    assert most_confidently_wrong(logits[:1], labels[:1], 9).tolist() == []
    assert most_confidently_wrong(logits[-1:], labels[-1:], 9).tolist() == []


def test_probabilities_of_large_logits():
    probabilities = compute_probabilities(np.array([[1e30, 0], [1000, 1001], [np.nan, 0]]))
    np.testing.assert_allclose(probabilities[0], [1, 0])
    np.testing.assert_allclose(probabilities[1], [1 / (1 + np.e), np.e / (1 + np.e)])
    assert np.isnan(probabilities[2]).all()
    # Apart where float32 would have them all at 1.
    close = compute_probabilities(np.array([[20, 0], [25, 0]], np.float32)).max(1)
    assert close[0] < close[1] < 1


SHAPES = []


class Tiny(nn.Module):
    """A dense layer that tells what it is traced with."""

    @nn.compact
    def __call__(self, images, train=False):
        SHAPES.append(images.shape)
        return nn.Dense(4, name="head", dtype=jnp.bfloat16)(images.reshape(len(images), -1))


@pytest.mark.parametrize(("count", "batch", "used"), [(10, 4, 4), (8, 4, 4), (3, 256, 3)])
def test_logits_batch_by_batch(count, batch, used):
    images = np.random.default_rng(0).integers(0, 256, (count, 2, 3, 1), dtype=np.uint8)
    preprocess = Preprocess((2, 3, 1), (0.5,), (0.25,))
    model = Tiny()
    variables: Any = model.init(jax.random.key(0), preprocess(images))
    expected: Any = model.apply(variables, preprocess(images))
    SHAPES.clear()
    logits = compute_logits(model, variables, preprocess, images, batch)
    assert set(SHAPES) == {(used, 2, 3, 1)}
    assert isinstance(logits, np.ndarray)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, expected.astype(jnp.float32))


SCRIPT = """
import flax.linen as nn, jax, numpy as np
from flaxnets.data import Preprocess
from flaxnets.training.evaluation import compute_logits

class Mean(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        show = lambda sharding: print(sharding.shard_shape((6, 2, 2, 1)))
        jax.debug.inspect_array_sharding(images, callback=show)
        return images.mean((1, 2))

images = np.arange(44, dtype=np.uint8).reshape(11, 2, 2, 1)
logits = compute_logits(Mean(), {}, Preprocess((2, 2, 1), (0.0,), (1 / 255,)), images, 5)
print(logits[:, 0].tolist() == [4 * i + 1.5 for i in range(11)], logits.shape)
"""


def test_over_several_devices(monkeypatch):
    """Eleven images, six a batch, three on each of two devices; the last place is padding."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert finished.stdout == "(3, 2, 2, 1)\nTrue (11, 1)\n", finished.stderr


def test_large_images_are_fewer_at_a_time():
    assert evaluation_batch((32, 32, 3)) == evaluation_batch((96, 96, 3)) == 256
    assert evaluation_batch((224, 224, 3)) == 47
    assert evaluation_batch((10_000, 10_000, 3)) == 1


@pytest.mark.parametrize(
    ("streamed", "augment", "fraction"),
    [
        (True, "resized-crop", 0.875),
        (True, "default", 1.0),
        (False, "scaled-crop", 1.0),
        (False, "default", 1.0),
    ],
)
def test_what_is_seen_of_a_picture(streamed, augment, fraction):
    config = make_run_config()
    dataset = replace(config.dataset, streamed=streamed)
    config = replace(config, dataset=dataset, recipe=replace(config.recipe, augment=augment))
    assert evaluation_fraction(config) == fraction


def test_a_hundred_thousand_classes():
    """Their confusion matrix would take 80 GB."""
    classes = 100_000
    logits = np.zeros((3, classes), np.float32)
    logits[[0, 1, 2], [7, 7, 99_999]] = 1
    evaluation = evaluate_logits(logits, np.array([7, 8, 99_999]))
    assert evaluation.confusion is None
    assert evaluation.top1_error == pytest.approx(100 / 3)
    assert evaluation.class_accuracy[[7, 8, 99_999]].tolist() == [100, 0, 100]
