"""What holds for every network: size, features, stages, types, gradients, names."""

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import flaxnets
from flaxnets.models import published_image_shape
from flaxnets.models.cost import list_layers
from flaxnets.training.steps import cross_entropy, init_variables
from tests.helpers import quick_jit, random_images, random_variables

slow = pytest.mark.slow

# Trainable parameters of every name in list_models(): 1,000 classes for ImageNet's networks and 10
# for the others; 3 input channels, but 1 for cnn and ynet.
PARAMETERS = {
    "alexnet2012": 60_965_224,  # Caffe's bvlc_alexnet; the paper says 60 million
    "alexnet": 61_100_840,  # torchvision
    "vgg11": 132_863_336,  # torchvision; the paper (Table 2) says 133 million
    "vgg11_lrn": 132_863_336,
    "vgg13": 133_047_848,  # torchvision; paper: 133 million
    # vgg16 with 1x1 instead of 3x3 kernels in three layers: 8 (256^2 + 2 512^2) fewer.
    "vgg16_1x1": 138_357_544 - 8 * (256**2 + 2 * 512**2),  # paper: 134 million
    "vgg16": 138_357_544,  # torchvision; paper: 138 million
    "vgg19": 143_667_240,  # torchvision; paper: 144 million
    "vgg11_bn": 132_868_840,  # torchvision, and the next three
    "vgg13_bn": 133_053_736,
    "vgg16_bn": 138_365_992,
    "vgg19_bn": 143_678_248,
    # Stage of c -> f filters: f (9 c + 3) + f (9 f + 3) + f (9 c + 3); then 512, 1024, 1024, 10.
    "vgg_residual": sum(f * (18 * c + 9 * f + 9) for c, f in ((3, 64), (64, 128)))
    + sum(f * (18 * c + 9 * f + 9) for c, f in ((128, 256), (256, 512)))
    + (513 * 1024 + 1025 * 1024 + 1025 * 10),
    # 3x3 convolutions 1-64-64-64, then 3 x 3 x 64 features.
    "cnn": 64 * (9 + 1) + 2 * 64 * (9 * 64 + 1) + 10 * (576 + 1),
    # Twice 3x3 convolutions 1-32-64-128, then 3 x 3 x 256 features.
    "ynet": 2 * (32 * 10 + 64 * (9 * 32 + 1) + 128 * (9 * 64 + 1)) + 10 * (2304 + 1),
    "resnet18": 11_689_512,  # torchvision, and the next four
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    # Without the projections: a 1x1 convolution and the scales and biases of its BatchNorm.
    "plain18": 11_689_512 - (64 * 128 + 128 * 256 + 256 * 512 + 2 * (128 + 256 + 512)),
    "plain34": 21_797_672 - (64 * 128 + 128 * 256 + 256 * 512 + 2 * (128 + 256 + 512)),
    "plain50": 25_557_032 - 2_776_576,
    "plain101": 44_549_160 - 2_776_576,
    "plain152": 60_192_808 - 2_776_576,
    # Version 2 has no BatchNorm in projections and the stem, one at the end instead, and the first
    # BatchNorm of a block as wide as its input.
    "resnet18v2": 11_687_720,
    "resnet34v2": 21_795_880,
    "resnet50v2": 25_549_352,
    "resnet101v2": 44_541_480,
    "resnet152v2": 60_185_128,
    "plain18v2": 11_687_720 - (64 * 128 + 128 * 256 + 256 * 512),
    "plain34v2": 21_795_880 - (64 * 128 + 128 * 256 + 256 * 512),
    "plain50v2": 25_549_352 - 2_768_896,
    "plain101v2": 44_541_480 - 2_768_896,
    "plain152v2": 60_185_128 - 2_768_896,
    "cifar_resnet20": 269_722,  # Table 6 of the paper: 0.27, 0.46, 0.66, 0.85, 1.7, 19.4 million
    "cifar_resnet32": 464_154,
    "cifar_resnet44": 658_586,
    "cifar_resnet56": 853_018,
    "cifar_resnet110": 1_727_962,
    "cifar_resnet1202": 19_421_274,
    "cifar_plain20": 269_722,
    "cifar_plain32": 464_154,
    "cifar_plain44": 658_586,
    "cifar_plain56": 853_018,
    "cifar_resnet110v2": 1_727_962,
    "cifar_resnet164v2": 1_703_258,  # 1.7 and 10.2 million in the authors' code
    "cifar_resnet1001v2": 10_327_706,
    "keras_resnet20v1": 273_066,  # as Keras's own model.summary() has them, trainable
    "keras_resnet32v1": 467_946,
    "keras_resnet44v1": 662_826,
    "keras_resnet56v1": 857_706,
    "keras_resnet110v1": 1_734_666,
    "keras_resnet20v2": 570_602,
    "keras_resnet56v2": 1_663_338,
    "keras_resnet110v2": 3_302_442,
}
DEEP = ("cifar_resnet1202", "cifar_resnet1001v2")  # 20 s and more to trace
NAMES = [pytest.param(name, marks=slow if name in DEEP else ()) for name in PARAMETERS]

# One of every module and option, small: name, overrides, image shape.
SMALL = {
    "alexnet": ({"filters": (8, 8, 8, 8, 8)}, (80, 75, 3)),
    "alexnet2012": ({"filters": (8, 8, 8, 8, 8)}, (80, 75, 3)),
    "vgg11_lrn": ({"pool_size": 1, "classifier_width": 8}, (37, 32, 1)),
    "vgg11_bn": ({"pool_size": 1, "classifier_width": 8}, (32, 32, 3)),
    "vgg_residual": ({}, (16, 19, 3)),
    "cnn": ({"filters": 4}, (18, 21, 1)),
    "ynet": ({}, (9, 8, 3)),
    "resnet18": ({"stage_sizes": (1, 1, 1, 1), "width": 4, "shortcut": "A"}, (32, 32, 3)),
    "resnet50": ({"stage_sizes": (1, 1, 1, 1), "width": 4}, (31, 32, 3)),
    "plain50": ({"stage_sizes": (1, 1, 1, 1), "width": 4, "stem": "small"}, (32, 32, 3)),
    "resnet50v2": ({"stage_sizes": (1, 1, 1, 1), "width": 4}, (32, 32, 3)),
    "cifar_resnet8": ({"shortcut": "C"}, (8, 8, 3)),
    "cifar_plain8": ({}, (8, 8, 1)),
    "cifar_resnet8v2": ({}, (8, 8, 3)),
    "cifar_plain8v2": ({}, (8, 8, 3)),
    "cifar_resnet11v2": ({"block": "bottleneck"}, (8, 8, 3)),
    "keras_resnet8v1": ({}, (8, 8, 3)),
    "keras_resnet11v2": ({}, (8, 8, 3)),
}
# Feature maps to be had.
STAGES = {"alexnet": 5, "alexnet2012": 5, "vgg11_lrn": 5, "vgg11_bn": 5, "vgg_residual": 4}
STAGES |= {"cnn": 3, "ynet": 2, "resnet18": 4, "resnet50": 4, "plain50": 4, "resnet50v2": 4}


def small_model(name, **overrides):
    settings, image_shape = SMALL[name]
    return flaxnets.create_model(name, **{"num_classes": 10} | settings | overrides), image_shape


@pytest.mark.parametrize("name", NAMES)
def test_parameters(name):
    layers = list_layers(flaxnets.create_model(name), published_image_shape(name))
    assert sum(layer.cost.parameters for layer in layers) == PARAMETERS[name]


def test_every_name_has_its_number_of_parameters():
    assert [name for name in flaxnets.list_models() if "<" not in name] == list(PARAMETERS)


def test_projections_of_bottleneck_networks_are_what_their_plain_twins_lack():
    # 1x1 convolutions into 256, 512, 1024 and 2048 filters, and their BatchNorm in version 1.
    kernels = 64 * 256 + 256 * 512 + 512 * 1024 + 1024 * 2048
    assert kernels == 2_768_896
    assert kernels + 2 * (256 + 512 + 1024 + 2048) == 2_776_576


@pytest.mark.parametrize("name", SMALL)
def test_logits_features_and_stages(name):
    model, shape = small_model(name)
    key, images = jax.random.key(0), jnp.ones((2, *shape))

    def outputs(model):
        variables = model.init(key, images)
        return model.apply(variables, images, mutable=["intermediates"])

    logits, seen = jax.eval_shape(lambda: outputs(model))
    assert logits.shape == (2, 10)
    stages = seen["intermediates"]["stages"]
    assert all(len(stage.shape) == 4 for stage in stages)
    features = small_model(name, num_classes=None)[0]
    features, again = jax.eval_shape(lambda: outputs(features))
    assert features.ndim == 2
    assert features.shape[0] == 2
    assert [stage.shape for stage in again["intermediates"]["stages"]] == [
        stage.shape for stage in stages
    ]
    assert len(stages) == STAGES.get(name, 3)


@pytest.mark.parametrize(
    ("name", "stages", "features"),
    [
        # 28 pixels lose 2 to each convolution without padding and half to each pooling.
        ("cnn", [(1, 26, 26, 64), (1, 11, 11, 64), (1, 3, 3, 64)], 3 * 3 * 64),
        # 28, 14, 7, 3 pixels after the three poolings of a branch.
        ("ynet", [(1, 3, 3, 128), (1, 3, 3, 128)], 3 * 3 * 256),
    ],
)
def test_shapes_of_the_tutorial_networks(name, stages, features):
    model = flaxnets.create_model(name, num_classes=None)
    images = jnp.ones((1, 28, 28, 1))
    variables = random_variables(model, images)
    output, seen = jax.eval_shape(lambda: model.apply(variables, images, mutable=["intermediates"]))
    assert output.shape == (1, features)
    assert [stage.shape for stage in seen["intermediates"]["stages"]] == stages


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_computes_in_bfloat16_and_keeps_float32(name):
    model, shape = small_model(name, dtype=jnp.bfloat16)
    images = jnp.ones((2, *shape))
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), shape))
    logits, updates = jax.eval_shape(
        lambda v: model.apply(
            v, images, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)}
        ),
        variables,
    )
    assert logits.dtype == jnp.bfloat16
    for leaf in jax.tree.leaves((variables, updates)):
        assert leaf.dtype == jnp.float32


def gradients(model, variables, images):
    """Of the cross-entropy in training mode."""

    def loss(params):
        logits, _ = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return cross_entropy(logits, jnp.arange(len(images))).mean()

    return quick_jit(jax.grad(loss))(variables["params"])


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name):
    without_dropout = {"dropout": 0.0} if hasattr(small_model(name)[0], "dropout") else {}
    model, shape = small_model(name, **without_dropout)
    images = random_images(4, *shape)
    variables = random_variables(model, images)
    leaves: Any = flatten_dict(gradients(model, variables, images))
    for path, gradient in leaves.items():
        assert np.isfinite(gradient).all(), path
        assert np.any(np.asarray(gradient) != 0), path


@pytest.mark.parametrize("name", ["alexnet", "vgg11_lrn", "vgg_residual", "cnn", "ynet"])
def test_dropout_in_training_alone(name):
    model, shape = small_model(name)
    images = random_images(2, *shape)
    variables = random_variables(model, images)

    def apply(train, dropout=None):
        rngs = None if dropout is None else {"dropout": jax.random.key(dropout)}
        settings = {"train": train, "rngs": rngs, "mutable": ["batch_stats"]}
        return model.apply(variables, images, **settings)[0]

    assert (apply(False) == apply(False, 1)).all()
    assert (apply(True, 1) == apply(True, 1)).all()
    assert (apply(True, 1) != apply(True, 2)).any()


@pytest.mark.parametrize("name", ["alexnet", "alexnet2012"])
def test_dropout_comes_before_the_hidden_layers_in_torchvisions_alexnet_and_after_in_the_papers(
    name,
):
    model, shape = small_model(name, dropout=1.0)  # everything is dropped
    images = random_images(1, *shape)
    variables = random_variables(model, images)
    logits = model.apply(variables, images, train=True, rngs={"dropout": jax.random.key(0)})
    dense2, head = variables["params"]["dense2"], variables["params"]["head"]
    features = np.maximum(dense2["bias"], 0) if name == "alexnet" else np.zeros(4096)
    np.testing.assert_allclose(logits[0], features @ head["kernel"] + head["bias"], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "stds"),
    [
        # Kernel -> standard deviation: the paper's; torch's default; fan-out He; Glorot; Keras's.
        ("alexnet2012", {"conv1": 0.01, "dense1": 0.01, "head": 0.01}),
        ("alexnet", {"conv1": (1 / 3 / 363) ** 0.5, "head": (1 / 3 / 4096) ** 0.5}),
        ("vgg11_bn", {"stage2_conv1": (2 / 9 / 128) ** 0.5, "dense1": 0.01}),
        ("cnn", {"conv2": (2 / 9 / (4 + 4)) ** 0.5}),
        ("keras_resnet8v1", {"stage3_block1/conv2": (2 / 9 / 64) ** 0.5, "head": (2 / 64) ** 0.5}),
    ],
)
def test_initialisation(name, stds):
    model, shape = small_model(name)

    @quick_jit
    def draw():
        leaves = flatten_dict(init_variables(model, jax.random.key(0), shape)["params"])
        leaves = {"/".join(path): leaf for path, leaf in leaves.items()}
        return {
            path: leaf
            for path, leaf in leaves.items()
            if path.endswith("/bias") or path.removesuffix("/kernel") in stds
        }

    leaves = draw()
    for layer, std in stds.items():
        assert np.std(leaves[f"{layer}/kernel"]) == pytest.approx(std, rel=0.1), layer
    ones = {"conv2", "conv4", "conv5", "dense1", "dense2"} if name == "alexnet2012" else set()
    for path, leaf in leaves.items():
        if path.endswith("/bias"):
            assert (np.asarray(leaf) == (path.split("/")[0] in ones)).all(), path


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_resnet8v2"])
def test_remat_changes_nothing_but_the_memory(name):
    images = random_images(4, 8, 8, 3)
    variables = random_variables(flaxnets.create_model(name), images)
    results, kept = [], []
    for remat in (False, True):
        model = flaxnets.create_model(name, remat=remat)
        results.append(gradients(model, variables, images))
        # What the backward pass is handed by the forward pass, besides the parameters.
        _, backward = jax.eval_shape(
            lambda params, model=model: jax.vjp(
                lambda params: model.apply(
                    {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
                )[0],
                params,
            ),
            variables["params"],
        )
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(backward)))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert kept[1] - parameters < (kept[0] - parameters) / 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)


@pytest.mark.slow
def test_1202_layers_initialise_run_and_take_a_step():
    """Three minutes, operation by operation; compiling it whole took seven.

    In training mode: at the start the running statistics are those of no batch, every block doubles
    the variance, and 600 of them overflow.
    """
    model = flaxnets.create_model("cifar_resnet1202")
    images = random_images(2, 8, 8, 3)
    variables = init_variables(model, jax.random.key(0), (8, 8, 3))

    def loss(params):
        logits, _ = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return cross_entropy(logits, jnp.arange(2)).mean()

    before, gradient = jax.value_and_grad(loss)(variables["params"])
    assert jnp.isfinite(before)
    after = jax.tree.map(lambda p, g: p - 1e-4 * g, variables["params"], gradient)
    assert loss(after) < before


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *[("alexnet", 32), ("vgg11", 31), ("vgg_residual", 15), ("cnn", 17), ("ynet", 7)],
        *[("alexnet2012", 5), ("vgg11", 8), ("vgg_residual", 1), ("cnn", 1), ("ynet", 1)],
    ],
)
def test_images_that_are_too_small_are_refused(name, size):
    model = flaxnets.create_model(name)
    images = jnp.ones((1, size, size, 3))
    with pytest.raises(flaxnets.InputError, match=f"{size}x{size} pixels are too small"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), images))


def test_names():
    names = flaxnets.list_models()
    assert {"cifar_plain<depth>", "cifar_resnet<depth>v2", "keras_resnet<depth>v1"} <= set(names)
    assert flaxnets.create_model("cifar_plain26").residual is False
    assert flaxnets.create_model("plain18v2").residual is False
    assert flaxnets.create_model("plain18v2").preactivation is True
    assert flaxnets.create_model("vgg16", num_classes=None).num_classes is None
    assert flaxnets.create_model("vgg16").num_classes == 1000


@pytest.mark.parametrize("num_classes", [0, -1, "10", 3.5, True])
def test_numbers_of_classes_that_are_none_are_refused(num_classes):
    with pytest.raises(flaxnets.InputError, match="must be a positive integer"):
        flaxnets.create_model("resnet18", num_classes)


def test_unknown_attributes_are_refused():
    with pytest.raises(
        flaxnets.InputError, match="no attribute 'shortcuts'; did you mean shortcut"
    ):
        flaxnets.create_model("resnet18", shortcuts="A")
    with pytest.raises(flaxnets.InputError, match="no attribute 'stem'"):
        flaxnets.create_model("vgg11", stem="small")


def test_ynet_takes_equal_pairs():
    model = flaxnets.create_model("ynet")
    left, right = jnp.ones((1, 8, 8, 1)), jnp.ones((1, 8, 8, 3))
    jax.eval_shape(lambda: model.init(jax.random.key(0), (left, right)))
    for images in ((left,), (left, right, left), (left, jnp.ones((1, 9, 8, 1)))):
        with pytest.raises(flaxnets.InputError, match="ynet takes images, or a pair"):
            jax.eval_shape(lambda images=images: model.init(jax.random.key(0), images))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar_resnet<depth>", "write a number for <depth>"),
        ("resnet_18", "did you mean resnet18?"),
        ("vgg12", "did you mean vgg1"),
        ("resnet19", "18, 34, 50, 101, 152"),
        ("resnet200v2", "18, 34, 50, 101, 152"),
        ("cifar_resnet21", "even depths from 8"),
        ("cifar_plain6", "even depths from 8"),
        ("cifar_resnet166v2", "depths 9n + 2"),
        ("keras_resnet22v1", "depths 6n + 2"),
        ("keras_resnet22v2", "depths 9n + 2"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(flaxnets.InputError, match=message.replace("?", r"\?").replace("+", r"\+")):
        flaxnets.create_model(name)


@pytest.mark.parametrize("name", [name for name in flaxnets.list_models() if "<" not in name])
def test_networks_can_be_sent_to_other_processes(name):
    model = flaxnets.create_model(name, num_classes=7)
    assert pickle.loads(pickle.dumps(model)) == model
