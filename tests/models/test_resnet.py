from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

import flaxnets
from flaxnets.models.cost import count_cost
from flaxnets.models.layers import he_normal_fan_out, relu
from flaxnets.models.resnet import IMAGENET_STAGES, cifar_stage_sizes
from flaxnets.training.steps import init_variables


def shapes_of(name: str, image_shape=(32, 32, 3), **overrides):
    """Name -> shape of every parameter and statistic, nothing computed."""
    model = flaxnets.create_model(name, **overrides)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False)
    )
    leaves: Any = flatten_dict(variables)
    return {path: leaf.shape for path, leaf in leaves.items()}


@pytest.mark.parametrize(("depth", "parameters"), [(8, 75_290), (18, 195_738), (34, 468_826)])
@pytest.mark.parametrize("kind", ["resnet", "plain"])
def test_parameters_at_depths_that_are_not_the_papers(kind, depth, parameters):
    model = flaxnets.create_model(f"cifar_{kind}{depth}")
    assert count_cost(model, (32, 32, 3), 10).parameters == parameters


@pytest.mark.parametrize("depth", IMAGENET_STAGES)
def test_multiply_adds(depth):
    model = flaxnets.create_model(f"resnet{depth}", stride_in_3x3=False)
    # Table 1 of the paper; the dense layer is counted here.
    published = {18: 1.8e9, 34: 3.6e9, 50: 3.8e9, 101: 7.6e9, 152: 11.3e9}[depth]
    assert count_cost(model, (224, 224, 3), 1000).multiply_adds == pytest.approx(
        published, rel=0.02
    )


def test_depth_counts_the_weighted_layers():
    for depth in (8, 18, 34, 56):
        shapes = shapes_of(f"cifar_plain{depth}")
        assert sum(path[-1] == "kernel" for path in shapes) == depth
    for depth in IMAGENET_STAGES:
        shapes = shapes_of(f"plain{depth}", (64, 64, 3))
        assert sum(path[-1] == "kernel" for path in shapes) == depth


def test_blocks_are_shared_out_earlier_stages_first():
    stages = {d: cifar_stage_sizes(d) for d in (8, 18, 20, 34, 56, 110)}
    assert stages == {
        8: (1, 1, 1),
        18: (3, 3, 2),
        20: (3, 3, 3),
        34: (6, 5, 5),
        56: (9, 9, 9),
        110: (18, 18, 18),
    }


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
@pytest.mark.parametrize("name", ["cifar_{}20", "{}18", "{}50"])
def test_plain_tree_is_residual_tree_without_shortcuts(name, shortcut):
    residual = shapes_of(name.format("resnet"), shortcut=shortcut)
    plain = shapes_of(name.format("plain"), shortcut=shortcut)
    without = {
        path: shape
        for path, shape in residual.items()
        if not any(part.startswith("shortcut") for part in path)
    }
    assert plain == without
    projections = sum(path[-2] == "shortcut_conv" for path in residual)
    expected = {"A": 0, "B": {"cifar_{}20": 2, "{}18": 3, "{}50": 4}[name]}
    expected["C"] = {"cifar_{}20": 9, "{}18": 8, "{}50": 16}[name]
    assert projections == expected[shortcut]


def test_twins_start_bit_identical():
    key = jax.random.key(7)
    for shortcut in ("A", "B"):
        twins: Any = [
            flatten_dict(
                init_variables(
                    flaxnets.create_model(f"cifar_{kind}8", shortcut=shortcut), key, (8, 8, 1)
                )
            )
            for kind in ("plain", "resnet")
        ]
        assert twins[0].keys() <= twins[1].keys()
        for path, value in twins[0].items():
            assert (value == twins[1][path]).all(), path


def test_initialisation_without_a_forward_pass_is_init():
    model = flaxnets.create_model("cifar_resnet8")
    key = jax.random.key(1)
    expected = model.init(key, jnp.zeros((1, 8, 8, 3)), train=False)
    variables = init_variables(model, key, (8, 8, 3))
    jax.tree.map(lambda a, b: (a == b).all() or pytest.fail("differs"), expected, variables)


def test_he_normal_is_untruncated_with_the_fan_out_variance():
    kernel = he_normal_fan_out(jax.random.key(0), (3, 3, 64, 128))
    std = (2 / (9 * 128)) ** 0.5
    assert abs(float(kernel.std()) / std - 1) < 0.01
    assert float(jnp.abs(kernel).max()) > 3 * std  # a truncated normal ends at 2


def test_zero_padded_shortcut_puts_channels_in_the_middle():
    model = flaxnets.create_model("cifar_resnet8", zero_init_last_scale=True)
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = init_variables(model, jax.random.key(0), (8, 8, 3))
    _, seen = model.apply(variables, images, capture_intermediates=True)
    outputs: Any = seen["intermediates"]
    before = outputs["stage1_block1"]["__call__"][0]
    after = outputs["stage2_block1"]["__call__"][0]
    # With the last scale at zero a block is its shortcut: 16 channels, then 32.
    assert after.shape == (2, 4, 4, 32)
    assert (after[..., 8:24] == before[:, ::2, ::2]).all()
    assert (after[..., :8] == 0).all()
    assert (after[..., 24:] == 0).all()


def test_stems():
    small = shapes_of("resnet18", stem="small")
    assert small["params", "conv1", "kernel"] == (3, 3, 3, 64)
    ordinary = shapes_of("resnet18")
    assert ordinary["params", "conv1", "kernel"] == (7, 7, 3, 64)


def test_relu_keeps_nan_and_has_no_gradient_at_zero():
    assert jnp.isnan(relu(jnp.float32(jnp.nan)))
    assert jax.grad(relu)(0.0) == 0
    assert jax.grad(relu)(2.0) == 1
    assert relu(jnp.float32([-1, 0, 3])).tolist() == [0, 0, 3]


@pytest.mark.parametrize("option", [{"shortcut": "b"}, {"stem": "Small"}, {"block": "wide"}])
def test_unknown_options_are_refused(option):
    with pytest.raises(flaxnets.InputError, match=f"{next(iter(option))} must be one of"):
        flaxnets.create_model("resnet18", **option)
