"""The diagnostics as functions, each against another way to compute it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxnets
from flaxnets import InputError
from flaxnets.diagnostics import (
    GradientLog,
    gradient_norms,
    insert_identities,
    layer_names,
    layer_responses,
    lesion_errors,
    loss_surface,
    random_direction,
    read_gradients,
    residual_ratios,
    without_batch_norm,
)
from flaxnets.diagnostics import construction as construction_module
from flaxnets.diagnostics.finding import NotPossibleError
from flaxnets.diagnostics.study import DiagnosedStudy, MeasuredNetwork
from flaxnets.models.resnet import ResNet
from flaxnets.models.stacking import stack_blocks
from flaxnets.parallel import data_mesh
from flaxnets.training import create_state
from tests.factories import make_run
from tests.helpers import quick_jit, random_images, random_variables

LABELS = np.arange(12) % 10


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(random_images(12, 8, 8, 1))


@pytest.fixture(scope="module")
def twins(images):
    """Plain and residual network of two blocks a stage, with the same variables."""
    plain, residual = (flaxnets.create_model(f"cifar_{kind}14") for kind in ("plain", "resnet"))
    return plain, residual, random_variables(plain, images)


def test_layers_come_in_the_order_of_the_signal(images):
    model = flaxnets.create_model("cifar_resnet8", shortcut="B")
    names = layer_names(random_variables(model, images)["params"])
    blocks = [f"stage{i}_block1/conv{j}" for i in (1, 2, 3) for j in (1, 2)]
    assert names == ["conv1", *blocks, "head"]
    deep = flaxnets.create_model("cifar_plain68")
    names = layer_names(jax.eval_shape(deep.init, jax.random.key(0), images)["params"])
    assert len(names) == 68
    assert names[18:22] == [
        f"stage1_block{i}/conv{j}" for i, j in ((9, 2), (10, 1), (10, 2), (11, 1))
    ]


def test_norms_of_gradients_are_slopes(twins, images):
    """Along its own direction, the gradient is the slope of the loss."""
    model, _, variables = twins
    norms = gradient_norms(model, variables, images, jnp.asarray(LABELS))
    assert list(norms) == layer_names(variables["params"])

    def loss_fn(params):
        logits, _ = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    loss, gradients = quick_jit(loss_fn), quick_jit(jax.grad(loss_fn))(variables["params"])
    for name in ("conv1", "stage2_block1/conv2", "head"):
        module, _, layer = name.partition("/")

        def moved(by, module=module, layer=layer, name=name):
            params = jax.tree.map(np.array, variables["params"])
            target = params[module][layer] if layer else params[module]
            gradient = gradients[module][layer] if layer else gradients[module]
            target["kernel"] = target["kernel"] + by / norms[name] * gradient["kernel"]
            return float(loss(params))

        slope = (moved(1e-3) - moved(-1e-3)) / 2e-3
        assert slope == pytest.approx(norms[name], rel=0.02)


def test_without_batch_norm_the_convolutions_stay(twins, images):
    model, _, variables = twins
    bare = without_batch_norm(model)
    params = bare.init(jax.random.key(0), images)["params"]
    shapes = jax.tree.map(np.shape, params)
    assert layer_names(params) == layer_names(variables["params"])
    assert set(shapes["stage1_block1"]) == {"conv1", "conv2"}
    norms = gradient_norms(bare, {"params": params}, images, jnp.asarray(LABELS))
    assert all(norm > 0 for norm in norms.values())


def test_responses_are_those_after_batch_norm(twins, images):
    _, model, variables = twins
    spreads = layer_responses(model, variables, images)
    _, seen = model.apply(variables, images, capture_intermediates=True)
    seen = seen["intermediates"]
    assert len(spreads) == 13
    assert spreads["conv1"] == pytest.approx(float(seen["bn1"]["__call__"][0].std()), rel=1e-5)
    for layer in (1, 2):
        response = seen["stage3_block2"][f"bn{layer}"]["__call__"][0]
        name = f"stage3_block2/conv{layer}"
        assert spreads[name] == pytest.approx(float(response.std()), rel=1e-5)


def test_responses_of_bottlenecks_are_those_of_3x3_layers(images):
    model = flaxnets.create_model("cifar_resnet11v2", preactivation=False, block="bottleneck")
    spreads = layer_responses(model, random_variables(model, images), images)
    assert list(spreads) == ["conv1", *(f"stage{i}_block1/conv2" for i in (1, 2, 3))]


def test_residuals_against_what_the_shortcut_brings(twins, images):
    _, model, variables = twins
    ratios = residual_ratios(model, variables, images)
    _, seen = model.apply(variables, images, capture_intermediates=True)
    seen = seen["intermediates"]

    def mean_ratio(block, before):
        residual = np.asarray(seen[block]["bn2"]["__call__"][0]).reshape(12, -1)
        x = np.asarray(seen[before]["__call__"][0])
        if x.shape[1] != seen[block]["__call__"][0].shape[1]:
            x = x[:, ::2, ::2]  # zeros in the new channels
        norms = [np.linalg.norm(array, axis=1) for array in (residual, x.reshape(12, -1))]
        return (norms[0] / norms[1]).mean()

    assert list(ratios) == [f"stage{i}_block{j}" for i in (1, 2, 3) for j in (1, 2)]
    assert ratios["stage1_block2"] == pytest.approx(mean_ratio("stage1_block2", "stage1_block1"))
    assert ratios["stage2_block1"] == pytest.approx(mean_ratio("stage2_block1", "stage1_block2"))


def test_projections_are_shortcuts_too(images):
    model = flaxnets.create_model("cifar_resnet8", shortcut="B")
    variables = random_variables(model, images)
    ratio = residual_ratios(model, variables, images)["stage2_block1"]
    _, seen = model.apply(variables, images, capture_intermediates=True)
    block = seen["intermediates"]["stage2_block1"]
    norms = [
        np.linalg.norm(np.asarray(block[name]["__call__"][0]).reshape(12, -1), axis=1)
        for name in ("bn2", "shortcut_bn")
    ]
    assert ratio == pytest.approx((norms[0] / norms[1]).mean(), rel=1e-5)


@pytest.mark.parametrize("kind", [0, 1])
def test_a_block_less_is_a_network_without_it(twins, images, kind):
    model, variables = twins[kind], jax.tree.map(np.array, twins[2])
    shorter = model.clone(stage_sizes=(2, 1, 2))

    def without(variables):
        return {
            part: {name: value for name, value in tree.items() if name != "stage2_block2"}
            for part, tree in variables.items()
        }

    # With the mean logit taken away, predictions differ from image to image.
    logits = np.asarray(shorter.apply(without(variables), images))
    variables["params"]["head"]["bias"] -= logits.mean(0)
    labels = (logits - logits.mean(0)).argmax(-1)
    assert len(set(labels.tolist())) > 3
    labels[:3] = (labels[:3] + 1) % 10
    errors = lesion_errors(model, variables, images, jnp.asarray(labels))
    assert list(errors) == [f"stage{i}_block{j}" for i in (1, 2, 3) for j in (1, 2)] + [None]
    assert errors["stage2_block2"] == 25.0
    wrong = np.asarray(model.apply(variables, images).argmax(-1)) != labels
    assert errors[None] == pytest.approx(100 * wrong.mean())
    assert errors[None] != 25.0


def create_resnet(name: str, **overrides: Any) -> ResNet:
    model = flaxnets.create_model(name, **overrides)
    assert isinstance(model, ResNet)
    return model


def test_identities_between_blocks_change_nothing(images):
    shallow, deep = (create_resnet(f"cifar_plain{depth}") for depth in (8, 26))
    variables = random_variables(shallow, images)
    found = insert_identities(shallow, variables, deep, images)
    expected = jax.eval_shape(deep.init, jax.random.key(0), images)
    assert jax.tree.map(np.shape, found) == jax.tree.map(lambda leaf: leaf.shape, dict(expected))
    logits = [
        np.asarray(model.apply(of, images)) for model, of in ((shallow, variables), (deep, found))
    ]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)
    # They have the statistics of these very images.
    stage = found["batch_stats"]["stage2_block3"]["bn1"]
    _, seen = shallow.apply(variables, images, mutable=["intermediates"])
    signal = np.asarray(seen["intermediates"]["stages"][1])
    np.testing.assert_allclose(stage["mean"], signal.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(stage["var"], signal.var((0, 1, 2)), atol=1e-4)


def test_identities_in_bfloat16_are_exact_too(images):
    models = (create_resnet(f"cifar_plain{d}", dtype=jnp.bfloat16) for d in (8, 14))
    shallow, deep = models
    variables = random_variables(shallow, images)
    found = insert_identities(shallow, variables, deep, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float32")}
    logits = [
        np.asarray(model.clone(dtype=jnp.float32).apply(of, images))
        for model, of in ((shallow, variables), (deep, found))
    ]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)
    # Whoever donates them may do so: no two are the same array.
    leaves = jax.tree.leaves(found)
    assert len({leaf.__array_interface__["data"][0] for leaf in leaves}) == len(leaves)


def test_maps_of_odd_sizes():
    """7x7 becomes 4x4, and 4x4 2x2: shortcuts take every second pixel all the same."""
    images = jnp.asarray(random_images(4, 7, 7, 1))
    model = flaxnets.create_model("cifar_resnet8")
    variables = random_variables(model, images)
    _, seen = model.apply(variables, images, capture_intermediates=True)
    seen = seen["intermediates"]
    residual = np.asarray(seen["stage2_block1"]["bn2"]["__call__"][0]).reshape(4, -1)
    x = np.asarray(seen["stage1_block1"]["__call__"][0])[:, ::2, ::2].reshape(4, -1)
    expected = (np.linalg.norm(residual, axis=1) / np.linalg.norm(x, axis=1)).mean()
    assert residual_ratios(model, variables, images)["stage2_block1"] == pytest.approx(expected)
    plain = flaxnets.create_model("cifar_plain8")
    assert len(lesion_errors(plain, variables, images, jnp.zeros(4, jnp.int32))) == 4


def test_only_plain_networks_of_a_family_are_made_deeper(images):
    shallow = create_resnet("cifar_plain14")
    variables = random_variables(shallow, images)
    for deep in ("cifar_resnet26", "cifar_plain8", "plain18"):
        with pytest.raises(ValueError, match="identities can only be inserted between"):
            insert_identities(shallow, variables, create_resnet(deep), images)


def test_directions_have_the_norms_of_the_filters(twins):
    params = twins[2]["params"]
    direction = random_direction(params, 3)
    for name in ("conv1", "head"):
        ours, theirs = direction[name]["kernel"], params[name]["kernel"]
        axes = tuple(range(ours.ndim - 1))
        np.testing.assert_allclose(
            np.square(ours).sum(axes), np.square(theirs).sum(axes), rtol=1e-4
        )
    assert not np.any(direction["bn1"]["scale"])
    assert not np.any(direction["head"]["bias"])
    other = random_direction(params, 4)["conv1"]["kernel"]
    assert not np.allclose(other, direction["conv1"]["kernel"])
    # Twins go the same way, each as far as its own filters are long.
    longer = random_direction(jax.tree.map(lambda leaf: 2 * leaf, params), 3)
    np.testing.assert_allclose(
        longer["conv1"]["kernel"], 2 * direction["conv1"]["kernel"], rtol=1e-5
    )


def test_the_surface_is_the_loss_of_moved_kernels(twins, images):
    model, _, variables = twins
    offsets = np.array([-0.5, 0.0, 0.25])
    surface = loss_surface(model, variables, images, jnp.asarray(LABELS), offsets, seed=1)

    def loss(x, y):
        first, second = (random_direction(variables["params"], seed) for seed in (2, 3))
        params = jax.tree.map(
            lambda leaf, a, b: leaf + x * a + y * b, variables["params"], first, second
        )
        logits, _ = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return float(optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean())

    assert surface.shape == (3, 3)
    assert surface[1, 1] == pytest.approx(loss(0, 0), rel=1e-4)
    assert surface[0, 2] == pytest.approx(loss(0.25, -0.5), rel=1e-3)


def test_gradients_are_logged_and_go_back_with_the_run(twins, images, tmp_path):
    _, model, variables = twins
    log = GradientLog(model, images, jnp.asarray(LABELS))
    state = create_state(model, optax.sgd(0.1), 0, (8, 8, 1), data_mesh()).replace(**variables)
    for epoch in (1, 2, 3):
        log.write(tmp_path, state, {"epoch": epoch, "step": 11 * epoch})
    # Taken up again after the first epoch.
    scanned = GradientLog(model.clone(scan_blocks=True), images, jnp.asarray(LABELS))
    state = state.replace(**stack_blocks(variables))
    scanned.write(tmp_path, state, {"epoch": 2, "step": 22})
    rows = read_gradients(tmp_path, layer_names(variables["params"]))
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 11), (2, 22)]
    norms = gradient_norms(model, variables, images, jnp.asarray(LABELS))
    for row in rows:
        assert list(row)[2:] == list(norms)
        for name, norm in norms.items():
            assert row[name] == pytest.approx(norm, rel=1e-4)


def test_a_damaged_log_is_named(tmp_path):
    (tmp_path / "gradients.csv").write_text("epoch,step,conv1\n1,11,x\n")
    with pytest.raises(InputError, match=r"gradients\.csv is damaged .*; move it away"):
        read_gradients(tmp_path, ["conv1"])
    with pytest.raises(InputError, match="its columns are not epoch, step and this network's"):
        read_gradients(tmp_path, ["conv1", "head"])
    assert read_gradients(tmp_path / "nowhere", ["conv1"]) == []


def test_a_batch_that_does_not_fit_skips_the_construction(digits, monkeypatch):
    """It is trained with the batch size of the study, whatever this machine's devices."""
    monkeypatch.setattr(construction_module.jax, "device_count", lambda: 7)
    untouched: Any = None
    network = MeasuredNetwork(make_run("plain", 8, 0), untouched, untouched)
    diagnosed = DiagnosedStudy(Path(), [network], (8,), digits, untouched, untouched)
    with pytest.raises(
        NotPossibleError, match="batches of 128 of 1437 images do not split evenly over"
    ):
        construction_module.continue_training(diagnosed, untouched, network, network, {})
