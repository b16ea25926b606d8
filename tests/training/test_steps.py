import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import flaxnets
from flaxnets.data import Augmentation, Split, epoch_order
from flaxnets.parallel import data_mesh, replicate
from flaxnets.training import RECIPES, create_state, evaluate, make_eval_step, make_train_step
from flaxnets.training.steps import Step, TrainState, cross_entropy, make_stream_step


class Trained(NamedTuple):
    model: nn.Module
    train_step: Step
    eval_step: Callable
    state: TrainState
    train: Split
    order: jax.Array


@pytest.fixture(scope="module", params=["plain", "resnet"])
def trained(request, digits) -> Trained:
    """A network after three steps, and the steps that train and evaluate it."""
    mesh = data_mesh()
    model = flaxnets.create_model(f"cifar_{request.param}8", num_classes=10)
    optimizer = RECIPES["digits"].make_optimizer(220, 8)
    train_step = make_train_step(
        model, optimizer, digits.preprocess, digits.augmentation, batch_size=128, mesh=mesh
    )
    state = create_state(model, optimizer, 0, (8, 8, 1), mesh)
    train = replicate(digits.train, mesh)
    order = epoch_order(state.key, 0, len(digits.train.labels))
    for _ in range(3):
        state, _ = train_step(state, train, order)
    eval_step = make_eval_step(model, digits.preprocess, mesh)
    return Trained(model, train_step, eval_step, state, train, order)


def copy(state):
    return replicate(state, data_mesh())


def test_running_metrics_are_sums_over_the_epoch(trained: Trained):
    state = trained.state
    assert state.step == 3
    assert state.running.examples == 3 * 128
    assert 0 < state.running.errors < 3 * 128
    assert 0.5 < state.running.loss_sum / state.running.examples < 5


def test_running_metrics_start_anew_with_each_epoch(trained: Trained):
    _, train_step, _, state, train, order = trained
    state = copy(state.replace(step=jnp.int32(11)))
    state, loss = train_step(state, train, order)
    assert state.running.examples == 128
    np.testing.assert_allclose(state.running.loss_sum, 128 * loss, rtol=1e-6)


def test_a_step_is_a_function_of_its_state(trained: Trained):
    _, train_step, _, state, train, order = trained
    first, second = (train_step(copy(state), train, order)[0] for _ in range(2))
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), first, second)
    assert jax.tree.all(equal)


@pytest.mark.parametrize("batch_size", [7, 100, 360, 512])
def test_evaluation_counts_every_image_once(trained: Trained, digits, batch_size):
    model, eval_step, state = trained.model, trained.eval_step, trained.state
    logits: Any = model.apply(state.variables, digits.preprocess(digits.test.images), train=False)
    labels = digits.test.labels
    wrong = int((np.argmax(logits, axis=-1) != labels).sum())
    loss = float(cross_entropy(logits, labels).mean())
    measured = evaluate(eval_step, state.variables, digits.test, batch_size)
    assert measured is not None
    assert measured[1] == 100 * wrong / 360
    np.testing.assert_allclose(measured[0], loss, rtol=1e-5)


def test_evaluation_of_a_part_is_of_that_part(trained: Trained, digits):
    eval_step, state = trained.eval_step, trained.state
    parts = [Split(*(array[rows] for array in digits.test)) for rows in (slice(90), slice(90, 360))]
    splits = (*parts, digits.test)
    measured = [evaluate(eval_step, state.variables, split, 100) for split in splits]
    first, second, whole = (pair[1] for pair in measured if pair)
    assert first * 90 + second * 270 == pytest.approx(whole * 360)


def test_an_accelerator_evaluates_several_batches_in_a_call(trained: Trained, digits, monkeypatch):
    """Two calls of up to 16 batches: the second has two whole batches and none after them."""
    expected = evaluate(trained.eval_step, trained.state.variables, digits.test, 20)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    calls = []

    def eval_step(variables, batch, weights):
        calls.append(trained.eval_step(variables, batch, weights))
        return calls[-1]

    measured = evaluate(eval_step, trained.state.variables, digits.test, 20)
    assert expected is not None
    assert measured is not None
    assert measured[1] == expected[1]
    np.testing.assert_allclose(measured[0], expected[0], rtol=1e-6)
    assert [losses.shape for losses, _ in calls] == [(16,), (16,)]
    np.testing.assert_array_equal(calls[1][0] > 0, np.arange(16) < 2)
    # `stop` is honoured between two calls.
    stop = lambda: len(calls) > 2  # noqa: E731
    assert evaluate(eval_step, trained.state.variables, digits.test, 20, stop) is None
    assert len(calls) == 3


def test_evaluation_compiles_once_for_splits_of_every_size(trained: Trained, digits):
    eval_step: Any = trained.eval_step

    def compiled(split):
        evaluate(eval_step, trained.state.variables, replicate(split, data_mesh()), 300)
        return eval_step._cache_size()

    first = compiled(digits.train)
    assert compiled(digits.test) == first
    assert compiled(Split(*(array[:7] for array in digits.test))) == first


def test_nan_in_any_kernel_gives_a_loss_that_is_not_finite(trained: Trained):
    _, train_step, _, state, train, order = trained
    flat: Any = flatten_dict(state.params)
    for path, kernel in flat.items():
        if path[-1] != "kernel":
            continue
        broken = unflatten_dict({**flat, path: kernel.at[(0,) * kernel.ndim].set(jnp.nan)})
        after, loss = train_step(copy(state.replace(params=broken)), train, order)
        assert not jnp.isfinite(loss), path
        assert after.running.diverged_step == 4, path
        # The record is of the first one.
        again, _ = train_step(after, train, order)
        assert again.running.diverged_step == 4


class FiniteLoss(nn.Module):
    """Its loss is finite when its gradient is not: the root of 0 has an infinite slope."""

    @nn.compact
    def __call__(self, x, train=False):
        root = jnp.sqrt(self.param("root", nn.initializers.zeros, (10,)))
        return nn.Dense(10, name="head")(x.reshape(len(x), -1)) + root


def test_a_gradient_that_is_not_finite_is_found_at_its_step(digits):
    mesh, model = data_mesh(), FiniteLoss()
    optimizer = RECIPES["digits"].make_optimizer(220, 8)
    step = make_train_step(model, optimizer, digits.preprocess, None, 128, mesh)
    state = create_state(model, optimizer, 0, (8, 8, 1), mesh)
    train = replicate(digits.train, mesh)
    state, loss = step(state, train, epoch_order(state.key, 0, len(digits.train.labels)))
    assert jnp.isfinite(loss)
    assert state.running.diverged_step == 1


class Plain(nn.Module):
    """Keeps the last batch it was trained on."""

    residual: ClassVar = False

    @nn.compact
    def __call__(self, x, train=False):
        seen = self.variable("batch_stats", "seen", jnp.zeros, (128, 8, 8, 1))
        if train and not self.is_initializing():
            seen.value = x
        y = nn.Dense(10, name="head")(x.reshape(len(x), -1))
        return y + nn.Dense(10, name="shortcut")(x.reshape(len(x), -1)) if self.residual else y


class Residual(Plain):
    residual: ClassVar = True


def test_twins_see_identical_batches(digits):
    def batch(model, seed):
        mesh = data_mesh()
        optimizer = RECIPES["digits"].make_optimizer(220, 8)
        step = make_train_step(
            model, optimizer, digits.preprocess, Augmentation(1, True), 128, mesh
        )
        state = create_state(model, optimizer, seed, (8, 8, 1), mesh)
        train = replicate(digits.train, mesh)
        for _ in range(3):
            state, _ = step(state, train, epoch_order(state.key, 0, len(digits.train.labels)))
        return np.asarray(state.batch_stats["seen"])

    assert (batch(Plain(), 5) == batch(Residual(), 5)).all()
    assert (batch(Plain(), 5) != batch(Plain(), 6)).any()


@pytest.mark.slow
def test_eight_devices_equal_one():
    """In a process of its own: the number of devices and float64 are settled at the start."""
    script = Path(__file__).with_name("eight_devices.py")
    finished = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=600, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


class Affine(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(10, name="head")(x.reshape(len(x), -1))


def test_label_smoothing_is_in_the_gradient_and_not_in_the_loss(digits):
    """Against Optax's own smoothed labels, after one update of plain gradient descent."""
    mesh, model, optimizer = data_mesh(), Affine(), optax.sgd(0.5)
    step = make_train_step(model, optimizer, digits.preprocess, None, 128, mesh, 0.1)
    state = create_state(model, optimizer, 0, (8, 8, 1), mesh)
    order = epoch_order(state.key, 0, len(digits.train.labels))
    images = digits.preprocess(digits.train.images[order[:128]])
    labels = digits.train.labels[order[:128]]

    def smoothed(params):
        logits: Any = model.apply({"params": params}, images)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)
        return optax.softmax_cross_entropy(logits, targets).mean()

    gradients = jax.grad(smoothed)(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, state.params, gradients)
    logits: Any = model.apply({"params": state.params}, images)
    plain = cross_entropy(logits, labels).mean()
    after, loss = step(state, replicate(digits.train, mesh), order)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after.params, expected)
    np.testing.assert_allclose(loss, plain, rtol=1e-5)
    np.testing.assert_allclose(after.running.loss_sum, 128 * plain, rtol=1e-5)


def test_a_streamed_step_is_one_from_memory(digits, trained: Trained):
    """The same batch, given or gathered, makes the same state."""
    model, train_step, _, state, train, order = trained
    state = copy(state)
    rows = np.asarray(order[3 * 128 : 4 * 128])
    batch = Split(*(array[rows] for array in digits.train))
    stream_step = make_stream_step(
        model,
        RECIPES["digits"].make_optimizer(220, 8),
        digits.preprocess,
        digits.augmentation,
        len(order) // 128,
        data_mesh(),
    )
    streamed, loss = stream_step(copy(state), batch)
    gathered, other = train_step(copy(state), train, order)
    np.testing.assert_allclose(loss, other, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        (streamed.params, streamed.batch_stats, streamed.running),
        (gathered.params, gathered.batch_stats, gathered.running),
    )
