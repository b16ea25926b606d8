import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxnets
from flaxnets.data import epoch_order
from flaxnets.parallel import data_mesh, replicate
from flaxnets.training import RECIPES, create_state, make_train_step, steps
from flaxnets.training.gpu_kernels import (
    LARGEST_GROUP,
    is_on_gpu,
    share_conversions,
    share_updates,
)


def make_tree(count: int = 3) -> dict:
    """Arrays of two dtypes; among them signed zeros and huge numbers."""
    special = jnp.array([-0.0, 0.0, 1e-30, 3e38, -1e-7], jnp.float32)
    kernels = {str(i): jax.random.normal(jax.random.key(i), (3, 3, 2, 4)) for i in range(count)}
    return {"kernels": kernels, "special": special, "half": special.astype(jnp.bfloat16)}


def assert_same_bits(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("count", [1, LARGEST_GROUP, 2 * LARGEST_GROUP + 1])
def test_gradients_keep_their_bits(count):
    tree = make_tree(count)
    shared, finite = jax.jit(share_updates)(tree)
    assert_same_bits(shared, tree)
    assert finite


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("path", ["special", "half", "kernels"])
def test_one_gradient_that_is_not_finite_is_found(bad, path):
    tree = make_tree(2 * LARGEST_GROUP)
    if path == "kernels":
        last = tree["kernels"]["9"]
        tree["kernels"]["9"] = last.at[2, 2, 1, 3].set(bad)
    else:
        tree[path] = tree[path].at[1].set(bad)
    assert not jax.jit(share_updates)(tree)[1]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_and_their_derivatives_keep_their_bits(dtype):
    tree = make_tree()
    converted = jax.jit(lambda tree: share_conversions(tree, dtype))(tree)
    assert_same_bits(converted, tree)


def test_devices_of_a_cpu_are_no_gpus():
    assert not is_on_gpu(data_mesh())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_train_step_for_gpus_computes_the_same(digits, monkeypatch, dtype):
    """Run on a CPU, where XLA may fuse it in other ways."""
    mesh = data_mesh()
    model = flaxnets.create_model("cifar_resnet8", num_classes=10, dtype=dtype)
    optimizer = RECIPES["digits"].make_optimizer(220, 8)
    train = replicate(digits.train, mesh)

    def run():
        step = make_train_step(model, optimizer, digits.preprocess, None, 128, mesh)
        state = create_state(model, optimizer, 0, (8, 8, 1), mesh)
        order = epoch_order(state.key, 0, len(digits.train.labels))
        return step(state, train, order)

    usual = run()
    monkeypatch.setattr(steps, "is_on_gpu", lambda mesh: True)
    (state, loss), (gpu_state, gpu_loss) = usual, run()
    np.testing.assert_allclose(gpu_loss, loss, rtol=1e-6)
    assert_same_bits(gpu_state.running, state.running)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (gpu_state.params, gpu_state.opt_state),
        (state.params, state.opt_state),
    )
