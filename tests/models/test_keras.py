"""The Keras guides' networks, against the same built in Keras 3 with the same numbers."""

import os
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import pytest
from flax.traverse_util import flatten_dict

import flaxnets
from tests.helpers import quick_jit, random_images, random_variables, relative_error

keras = pytest.importorskip("keras")
layers = keras.layers

LEAVES = {
    "kernel": "kernel",
    "bias": "bias",
    "scale": "gamma",
    "mean": "moving_mean",
    "var": "moving_variance",
}


def check(model, network, *images):
    """The Keras `network`, whose layers are called by our paths, gives the model's logits."""
    variables = random_variables(model, *images)
    assigned = 0
    leaves: Any = flatten_dict(variables)
    for path, leaf in leaves.items():
        layer = network.get_layer("-".join(path[1:-1]))
        beta = path[-1] == "bias" and isinstance(layer, layers.BatchNormalization)
        getattr(layer, "beta" if beta else LEAVES[path[-1]]).assign(leaf)
        assigned += leaf.size
    assert assigned == network.count_params()
    theirs = network(images[0], training=False)
    assert relative_error(quick_jit(model.apply)(variables, *images), theirs) <= 1e-5
    return variables


def check_running_statistics(model, network, variables, images):
    """After one batch in training mode."""
    network(images, training=True)
    _, updates = quick_jit(lambda v: model.apply(v, images, train=True, mutable=["batch_stats"]))(
        variables
    )
    for path, ours in flatten_dict(updates["batch_stats"]).items():
        theirs = getattr(network.get_layer("-".join(path[:-1])), LEAVES[path[-1]])
        assert relative_error(ours, theirs) <= 1e-5, path


def conv(x, filters, size, stride, name):
    return layers.Conv2D(filters, size, stride, padding="same", name=name)(x)


def norm(x, name):
    return layers.BatchNormalization(name=name)(x)


@pytest.mark.parametrize("depth", [8, 20])
def test_keras_resnet_v1(depth):
    x = inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(norm(conv(x, 16, 3, 1, "conv1"), "bn1"))
    for i in (1, 2, 3):
        for j in range(1, (depth - 2) // 6 + 1):
            block, filters, stride = f"stage{i}_block{j}", 8 * 2**i, 2 if i > 1 and j == 1 else 1
            y = norm(conv(x, filters, 3, stride, f"{block}-conv1"), f"{block}-bn1")
            y = conv(layers.ReLU()(y), filters, 3, 1, f"{block}-conv2")
            y = norm(y, f"{block}-bn2")
            if stride == 2:
                x = conv(x, filters, 1, 2, f"{block}-shortcut_conv")
            x = layers.ReLU()(x + y)
    x = layers.Flatten()(layers.AveragePooling2D(8)(x))
    network = keras.Model(inputs, layers.Dense(10, name="head")(x))
    model = flaxnets.create_model(f"keras_resnet{depth}v1")
    images = random_images(2, 32, 32, 3)
    variables = check(model, network, images)
    if depth == 8:
        check_running_statistics(model, network, variables, images)


@pytest.mark.parametrize("depth", [11, 29])
def test_keras_resnet_v2(depth):
    x = inputs = keras.Input((32, 32, 3))
    x = conv(x, 16, 3, 1, "conv1")
    for i, (filters, out) in enumerate(((16, 64), (64, 128), (128, 256)), 1):
        for j in range(1, (depth - 2) // 9 + 1):
            block, stride = f"stage{i}_block{j}", 2 if i > 1 and j == 1 else 1
            y = layers.ReLU()(norm(x, f"{block}-bn1"))
            if i == j == 1:
                x = y  # the activation that Keras counts with the first convolution
            y = conv(y, filters, 1, stride, f"{block}-conv1")
            y = layers.ReLU()(norm(y, f"{block}-bn2"))
            y = conv(y, filters, 3, 1, f"{block}-conv2")
            y = layers.ReLU()(norm(y, f"{block}-bn3"))
            y = conv(y, out, 1, 1, f"{block}-conv3")
            if j == 1:
                x = conv(x, out, 1, stride, f"{block}-shortcut_conv")
            x = x + y
    x = layers.ReLU()(norm(x, "last_bn"))
    x = layers.Flatten()(layers.AveragePooling2D(8)(x))
    network = keras.Model(inputs, layers.Dense(10, name="head")(x))
    model = flaxnets.create_model(f"keras_resnet{depth}v2")
    check(model, network, random_images(2, 32, 32, 3))


def test_cnn():
    x = inputs = keras.Input((28, 28, 1))
    x = layers.MaxPooling2D()(layers.Conv2D(64, 3, activation="relu", name="conv1")(x))
    x = layers.MaxPooling2D()(layers.Conv2D(64, 3, activation="relu", name="conv2")(x))
    x = layers.Conv2D(64, 3, activation="relu", name="conv3")(x)
    x = layers.Dropout(0.3)(layers.Flatten()(x))
    network = keras.Model(inputs, layers.Dense(10, name="head")(x))
    assert network.count_params() == 80_266
    check(flaxnets.create_model("cnn"), network, random_images(2, 28, 28, 1))


@pytest.mark.parametrize("dilation_rate", [1, 2])
def test_ynet(dilation_rate):
    inputs = [keras.Input((28, 28, 1)), keras.Input((28, 28, 1))]
    branches = []
    for side, x, rate in zip(("left", "right"), inputs, (1, dilation_rate), strict=True):
        for i, filters in enumerate((32, 64, 128), 1):
            x = layers.Conv2D(
                filters,
                3,
                padding="same",
                activation="relu",
                dilation_rate=rate,
                name=f"{side}-conv{i}",
            )(x)
            x = layers.MaxPooling2D()(layers.Dropout(0.4)(x))
        branches.append(x)
    x = layers.Dropout(0.4)(layers.Flatten()(layers.Concatenate()(branches)))
    network = keras.Model(inputs, layers.Dense(10, name="head")(x))
    assert network.count_params() == 208_394
    model = flaxnets.create_model("ynet", dilation_rate=dilation_rate)
    pair = (random_images(2, 28, 28, 1), -random_images(2, 28, 28, 1))
    check(model, network, pair)
