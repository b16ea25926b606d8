"""`scan_blocks`: the same network, compiled in a time that does not grow with depth."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxnets
from flaxnets.models.cost import count_cost
from flaxnets.models.stacking import stack_blocks, unscanned, unstack_blocks
from flaxnets.parallel import data_mesh
from flaxnets.training import (
    RECIPES,
    Checkpoints,
    TrainSetup,
    create_state,
    init_variables,
    train_run,
)
from tests.helpers import quick_jit, random_images, relative_error

NETWORKS = {
    "basic": ("cifar_resnet14", {"shortcut": "C"}),
    "version 2": ("cifar_plain10v2", {}),
    "bottlenecks": ("resnet50", {"stage_sizes": (3,), "width": 8, "remat": True}),
}


def assert_same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_network(name):
    name, settings = NETWORKS[name]
    model = flaxnets.create_model(name, num_classes=10, **settings)
    scanned = model.clone(scan_blocks=True)
    images = random_images(4, 8, 8, 3)
    variables = init_variables(model, jax.random.key(0), (8, 8, 3))
    stacked = init_variables(scanned, jax.random.key(0), (8, 8, 3))
    assert_same(unstack_blocks(stacked), variables)
    assert_same(stack_blocks(variables), stacked)

    def value_and_gradient(model, variables):
        def loss(params):
            logits, updates = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return (logits**2).sum(), (logits, updates)

        gradients, seen = jax.grad(loss, has_aux=True)(variables["params"])
        return seen, gradients, model.apply(variables, images, train=False)

    ours = quick_jit(lambda v: value_and_gradient(scanned, v))(stacked)
    theirs = quick_jit(lambda v: value_and_gradient(model, v))(variables)
    leaves = zip(jax.tree.leaves(unstack_blocks(ours)), jax.tree.leaves(theirs), strict=True)
    assert max(relative_error(a, b) for a, b in leaves) < 1e-4


def compile_gradient(depth, **settings):
    model = flaxnets.create_model(f"cifar_resnet{depth}", num_classes=10, **settings)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)

    def loss(params, variables, images):
        logits, _ = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return (logits**2).sum()

    return quick_jit(jax.grad(loss)).lower(variables["params"], variables, images).compile()


@pytest.mark.slow
def test_operations_grow_in_proportion_to_depth():
    # Six blocks more, and again six. Recomputing the residual stream in every later block, as XLA
    # does when the rectifier is a maximum, gives 1.26.
    costs = [compile_gradient(depth).cost_analysis() for depth in (8, 20, 32)]
    first, second, third = (cost["flops"] for cost in costs if cost)
    assert 0.9 < (third - second) / (second - first) < 1.1


@pytest.mark.slow
def test_a_scanned_program_does_not_grow():
    programs = [compile_gradient(depth, scan_blocks=True).as_text() for depth in (20, 32)]
    instructions = [
        len(re.findall(r"^ .* = ", program, re.MULTILINE)) for program in programs if program
    ]
    assert instructions[0] == instructions[1]


def test_counted_in_full():
    scanned = flaxnets.create_model("cifar_resnet20", num_classes=10, scan_blocks=True)
    expected = count_cost(unscanned(scanned), (32, 32, 3), 10)
    assert count_cost(scanned, (32, 32, 3), 10) == expected


@pytest.mark.slow
def test_runs_and_checkpoints(digits, tmp_path):
    """A run of a scanned network is that of the same network, and its checkpoints fit both."""
    recipe = replace(RECIPES["digits"], epochs=None, steps=3)
    model = flaxnets.create_model("cifar_resnet10", num_classes=10)
    states = []
    for name, each in (("one", model), ("scanned", model.clone(scan_blocks=True))):
        setup = TrainSetup.create(each, 10, recipe, digits, data_mesh())
        train_run(setup, 0, tmp_path / name)
        state = create_state(model, setup.optimizer, 0, setup.image_shape, setup.mesh)
        with Checkpoints(tmp_path / name, read_only=True) as checkpoints:
            states.append(checkpoints.restore(state))
    ours, theirs = ({"params": s.params, "opt_state": s.opt_state} for s in states)
    leaves = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    assert max(relative_error(a, b) for a, b in leaves) < 1e-3

    # From the other's checkpoint, which is the end already.
    state = create_state(
        model.clone(scan_blocks=True), setup.optimizer, 0, setup.image_shape, setup.mesh
    )
    with Checkpoints(tmp_path / "one", read_only=True) as checkpoints:
        assert_same(unstack_blocks(checkpoints.restore(state)).params, states[0].params)


def test_torch_weights(tmp_path):
    model = flaxnets.create_model("cifar_resnet14", num_classes=10)
    variables = init_variables(model, jax.random.key(0), (32, 32, 3))
    path = tmp_path / "weights.safetensors"
    flaxnets.save_torch(stack_blocks(variables), "cifar_resnet14", path)
    scanned, stacked = flaxnets.load_torch("cifar_resnet14", path, scan_blocks=True)
    assert scanned.scan_blocks
    assert_same(unstack_blocks(stacked), variables)


def test_more_than_nine_blocks_stay_in_their_order():
    tree = {f"stage1_block{i}": {"bias": jnp.full(3, i)} for i in range(1, 13)}
    stacked = stack_blocks(tree)
    assert stacked["stage1_blocks"]["bias"][:, 0].tolist() == list(range(2, 13))
    again = unstack_blocks(stacked)
    assert again.keys() == tree.keys()
    assert all((again[name]["bias"] == tree[name]["bias"]).all() for name in tree)
