"""Train state, train step and evaluation: pure functions, jitted and sharded."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from flaxnets.data.batches import Augmentation, Batch, Preprocess, batch_indices
from flaxnets.data.datasets import Split
from flaxnets.models.stacking import is_scanned, stack_blocks, unscanned
from flaxnets.parallel import replicate, replicated, split_batch
from flaxnets.training.gpu_kernels import is_on_gpu, share_conversions, share_updates

# Batches that one call evaluates on an accelerator: enough to hide the time it takes to dispatch
# the call, few enough to stop quickly.
BATCHES_A_CALL = 16


class RunningMetrics(flax.struct.PyTreeNode):
    """Sums over the steps of the current epoch, and the first step with a non-finite loss or
    gradient.

    They are part of the state, so that a run resumed within an epoch reports the same numbers.
    """

    loss_sum: jax.Array
    errors: jax.Array
    examples: jax.Array
    diverged_step: jax.Array  # -1: none

    @classmethod
    def zero(cls) -> "RunningMetrics":
        return cls(jnp.zeros(()), jnp.int32(0), jnp.int32(0), jnp.int32(-1))


class TrainState(flax.struct.PyTreeNode):
    """Complete state of a run; with the data, it determines every later step.

    Attributes:
      step: int32, number of updates done.
      key: PRNG key of the run; batches and augmentation of step s depend on (key, s).
      params, batch_stats: the network's variables.
      opt_state: optimizer state.
      running: metrics of the current epoch.
    """

    step: jax.Array
    key: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    running: RunningMetrics

    @property
    def variables(self) -> dict[str, Any]:
        """Variables for `model.apply`."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_variables(model: nn.Module, key: jax.Array, image_shape: tuple[int, ...]) -> dict:
    """Initialise `params` and `batch_stats` of `model` for images `(height, width, channels)`.

    The forward pass is traced but never computed. A parameter depends only on `key`, its path and
    its shape, so the parameters that twins share start bit-identical.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    # Not in evaluation mode: normalising by the known running statistics would be computed.
    keys = {"params": key, "dropout": key}
    variables = unscanned(model).lazy_init(keys, images, train=True)
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    return stack_blocks(variables) if is_scanned(model) else variables


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    image_shape: tuple[int, ...],
    mesh: Mesh,
) -> TrainState:
    """Create the state before the first step, on every device of `mesh`."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    variables = init_variables(model, init_key, image_shape)
    state = TrainState(
        step=jnp.int32(0),
        key=run_key,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
        running=RunningMetrics.zero(),
    )
    return replicate(state, mesh)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the loss of each example, `(batch,)`, in float32 or wider.

    Args:
      logits: `(batch, classes)`.
      labels: int `(batch,)`.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


Step = Callable[..., tuple[TrainState, jax.Array]]


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    preprocess: Preprocess,
    augmentation: Augmentation | None,
    batch_size: int,
    mesh: Mesh,
    label_smoothing: float = 0.0,
    frozen: bool = False,
) -> Step:
    """Make the jitted `train_step(state, split, order) -> (state, loss)` for data on the devices.

    `split` is the training split and `order` the current epoch's `epoch_order`, both replicated on
    `mesh`. Batching, augmentation, forward and backward pass and update all happen inside, on the
    batch split over the devices. `state` is donated. `loss` is the batch's mean cross-entropy.
    With `frozen`, BatchNorm uses its running statistics without updating them, as in evaluation.
    """
    update = _make_update(
        model, optimizer, preprocess, augmentation, label_smoothing, frozen, is_on_gpu(mesh)
    )

    @partial(jax.jit, donate_argnums=0, out_shardings=replicated(mesh))
    def train_step(state: TrainState, split: Split, order: jax.Array):
        indices = batch_indices(order, state.step, batch_size)
        indices = jax.lax.with_sharding_constraint(indices, split_batch(mesh))
        batch = Batch(split.images[indices], split.labels[indices])
        return update(state, batch, order.shape[0] // batch_size)

    return train_step


def make_stream_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    preprocess: Preprocess,
    augmentation: Augmentation | None,
    steps_per_epoch: int,
    mesh: Mesh,
    label_smoothing: float = 0.0,
    frozen: bool = False,
) -> Step:
    """Make `train_step(state, batch)` for streamed batches; see `make_train_step`."""
    update = _make_update(
        model, optimizer, preprocess, augmentation, label_smoothing, frozen, is_on_gpu(mesh)
    )

    @partial(jax.jit, donate_argnums=0, out_shardings=replicated(mesh))
    def train_step(state: TrainState, batch: Batch):
        batch = jax.lax.with_sharding_constraint(batch, split_batch(mesh))
        return update(state, batch, steps_per_epoch)

    return train_step


def _make_update(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    preprocess: Preprocess,
    augmentation: Augmentation | None,
    label_smoothing: float,
    frozen: bool,
    on_gpu: bool,
) -> Callable[[TrainState, Batch, int], tuple[TrainState, jax.Array]]:
    def update(state: TrainState, batch: Batch, steps_per_epoch: int):
        images, labels = batch
        augment_key, dropout_key = jax.random.split(
            jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
        )
        if augmentation is not None:
            images = augmentation(augment_key, images)
        images = preprocess.normalise(images)

        def loss_fn(params):
            logits: Any
            logits, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=not frozen,
                mutable=[] if frozen else ["batch_stats"],
                rngs={"dropout": dropout_key},
            )
            loss = cross_entropy(logits, labels).mean()
            objective = loss
            if label_smoothing:
                # Probability spread over all classes gives the mean of their cross-entropies.
                spread = -jax.nn.log_softmax(logits.astype(loss.dtype)).mean()
                objective = (1 - label_smoothing) * loss + label_smoothing * spread
            return objective, (loss, logits, updates.get("batch_stats", state.batch_stats))

        params = state.params
        if on_gpu:
            params = share_conversions(params, getattr(model, "dtype", jnp.float32))
        gradients, (loss, logits, batch_stats) = jax.grad(loss_fn, has_aux=True)(params)
        if on_gpu:
            gradients, finite = share_updates(gradients)
        else:
            finite = all_finite(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)

        running = state.running
        keep = state.step % steps_per_epoch != 0  # reset at an epoch's first step
        finite &= jnp.isfinite(loss)
        first_divergence = (running.diverged_step < 0) & ~finite
        batch_size = len(labels)
        running = RunningMetrics(
            loss_sum=jnp.where(keep, running.loss_sum, 0) + loss * batch_size,
            errors=keep * running.errors + count_errors(logits, labels).sum(),
            examples=keep * running.examples + batch_size,
            diverged_step=jnp.where(first_divergence, state.step + 1, running.diverged_step),
        )
        state = TrainState(
            step=state.step + 1,
            key=state.key,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            running=running,
        )
        return state, loss

    return update


def all_finite(tree: Any) -> jax.Array:
    """Return whether no array of `tree` contains NaN or infinity."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def count_errors(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return int32 `(batch,)`: 1 where the largest logit is not the label's.

    Examples with NaN logits count as errors.
    """
    wrong = jnp.argmax(logits, axis=-1) != labels
    return (wrong | jnp.isnan(logits).any(axis=-1)).astype(jnp.int32)


def make_eval_step(
    model: nn.Module, preprocess: Preprocess, mesh: Mesh
) -> Callable[[dict, Batch, Any], tuple[jax.Array, jax.Array]]:
    """Make the jitted `eval_step(variables, batch, weights) -> (loss_sum, errors)`.

    The network is in evaluation mode. `weights` `(batch,)` is 1 for examples and 0 for padding.
    If `weights` is `(batches, batch)` and the arrays of `batch` have the same leading axes, the
    batches are evaluated in turn, up to the last one with an example, and both results have the
    shape `(batches,)`.
    """

    def measure(variables: dict, batch: Batch, weights: jax.Array):
        batch, weights = jax.lax.with_sharding_constraint((batch, weights), split_batch(mesh))
        logits: Any = model.apply(variables, preprocess.normalise(batch.images), train=False)
        losses = cross_entropy(logits, batch.labels)
        errors = count_errors(logits, batch.labels)
        return jnp.where(weights, losses, 0).sum(), jnp.where(weights, errors, 0).sum()

    @partial(jax.jit, out_shardings=replicated(mesh))
    def eval_step(variables: dict, batch: Batch, weights: jax.Array):
        if weights.ndim == 1:
            return measure(variables, batch, weights)

        def measure_one(i: jax.Array, sums: Any):
            one = jax.tree.map(lambda array: array[i], (batch, weights))
            return jax.tree.map(lambda x, new: x.at[i].set(new), sums, measure(variables, *one))

        first = jax.tree.map(lambda array: array[0], (batch, weights))
        sums = jax.tree.map(
            lambda x: jnp.zeros(len(weights), x.dtype), jax.eval_shape(measure, variables, *first)
        )
        used = jnp.max(jnp.where(weights.any(axis=1), jnp.arange(1, len(weights) + 1), 0))
        return jax.lax.fori_loop(0, used, measure_one, sums)

    return eval_step


@partial(jax.jit, static_argnames="shape")
def _padded_batch(split: Split, start: jax.Array, shape: tuple[int, ...]) -> Batch:
    indices = start + jnp.arange(math.prod(shape)).reshape(shape)
    indices = jnp.minimum(indices, len(split.labels) - 1)
    return Batch(split.images[indices], split.labels[indices])


def padded_batches(split: Split, shape: tuple[int, ...]) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield a split on the devices in order: batches, and masks of the examples that count.

    `shape` is `(batch,)`, or `(batches, batch)` for several batches at a time.
    """
    # Slice here, not in `eval_step`, which then compiles once for splits of every size.
    for start in range(0, len(split.labels), math.prod(shape)):
        counts = np.arange(start, start + math.prod(shape)) < len(split.labels)
        yield _padded_batch(split, start, shape), counts.reshape(shape)


def evaluate(
    eval_step: Callable,
    variables: dict,
    split: Split,
    batch_size: int,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, float] | None:
    """Compute mean cross-entropy and error in percent over a split, each image counted once.

    Returns None if `stop()` became true before the end.
    """
    # In a loop, convolutions are more than ten times slower on CPUs.
    on_cpus = jax.default_backend() == "cpu"
    shape = (batch_size,) if on_cpus else (BATCHES_A_CALL, batch_size)
    return evaluate_batches(eval_step, variables, padded_batches(split, shape), stop)


def evaluate_batches(
    eval_step: Callable,
    variables: dict,
    batches: Iterable[tuple[Batch, np.ndarray]],
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, float] | None:
    """Evaluate batches, given with the weights of their examples; see `evaluate`."""
    totals, count = [], 0
    for batch, weights in batches:
        if stop():
            return None
        totals.append(eval_step(variables, batch, weights))
        count += int(weights.sum())
        jax.block_until_ready(totals[-2:-1])  # keeps `stop` responsive
    losses, errors = (
        np.concatenate([np.atleast_1d(sums) for sums in each])
        for each in zip(*jax.device_get(totals), strict=True)
    )
    return float(losses.sum(dtype=np.float64)) / count, 100 * int(errors.sum()) / count
