"""Networks that torchvision lacks, against PyTorch code written from their papers."""

import pytest

import flaxnets
from flaxnets.models.layers import adaptive_average_pool
from tests.helpers import quick_jit, random_images, random_variables, relative_error
from tests.reference import TorchLayers, to_torch, torchvision

torch = pytest.importorskip("torch")
F = torch.nn.functional


def check(model, images, reference):
    """`reference(layers, images)` in PyTorch, with random numbers, gives the model's output."""
    variables = random_variables(model, images)
    layers = TorchLayers(variables)
    with torch.no_grad():
        theirs = reference(layers, to_torch(images))
    assert not layers.unused
    assert relative_error(quick_jit(model.apply)(variables, images), theirs) <= 1e-4


def flat(x):
    """Flattened pixel by pixel, as dense layers here expect it."""
    return x.permute(0, 2, 3, 1).flatten(1)


def three_dense_layers(layers, x):
    x = F.relu(layers.dense("dense1", x))
    x = F.relu(layers.dense("dense2", x))
    return layers.dense("head", x)


@pytest.mark.parametrize(("size", "outside"), [(224, 2), (227, 0)])
def test_alexnet2012(size, outside):
    def reference(layers, x):
        for i in (1, 2):
            stride, padding, groups = ((4, outside, 1), (1, 2, 2))[i - 1]
            x = F.relu(layers.conv(f"conv{i}", x, stride, padding, groups))
            assert x.shape[2] == (55, 27)[i - 1]
            # torch divides alpha by the number of channels.
            x = F.local_response_norm(x, size=5, alpha=5 * 1e-4, beta=0.75, k=2.0)
            x = F.max_pool2d(x, 3, 2)
        for i, groups in ((3, 1), (4, 2), (5, 2)):
            x = F.relu(layers.conv(f"conv{i}", x, 1, 1, groups))
        return three_dense_layers(layers, flat(F.max_pool2d(x, 3, 2)))

    model = flaxnets.create_model("alexnet2012", num_classes=10, padding=outside)
    # Of the size of pixels in 2012 (mean subtracted, no division), so that normalisation matters.
    check(model, 100 * random_images(2, size, size, 3), reference)


@pytest.mark.parametrize("name", ["vgg11_lrn", "vgg16_1x1"])
def test_vgg_configurations_that_torchvision_lacks(name):
    stage_sizes = {"vgg11_lrn": (1, 1, 2, 2, 2), "vgg16_1x1": (2, 2, 3, 3, 3)}[name]

    def reference(layers, x):
        for i, convolutions in enumerate(stage_sizes, 1):
            for j in range(1, convolutions + 1):
                padding = 0 if name == "vgg16_1x1" and j == 3 else 1
                x = F.relu(layers.conv(f"stage{i}_conv{j}", x, 1, padding))
                if name == "vgg11_lrn" and i == 1:
                    x = F.local_response_norm(x, size=5, alpha=5 * 1e-4, beta=0.75, k=2.0)
            x = F.max_pool2d(x, 2, 2)
        return three_dense_layers(layers, flat(F.adaptive_avg_pool2d(x, 3)))

    model = flaxnets.create_model(name, num_classes=10, pool_size=3, classifier_width=32)
    check(model, 10 * random_images(2, 70, 101, 3), reference)


@pytest.mark.parametrize("residual", [True, False])
def test_vgg_residual(residual):
    def reference(layers, x):
        for stage in ("stage1", "stage2", "stage3", "stage4"):
            y = F.relu(layers.norm(f"{stage}/bn1", layers.conv(f"{stage}/conv1", x, 1, 1)))
            y = F.relu(layers.norm(f"{stage}/bn2", layers.conv(f"{stage}/conv2", y, 1, 1)))
            y = F.max_pool2d(y, 2)
            if residual:
                s = layers.norm(
                    f"{stage}/shortcut_bn", layers.conv(f"{stage}/shortcut_conv", x, 1, 1)
                )
                y = y + F.max_pool2d(F.relu(s), 2)
            x = y
        return three_dense_layers(layers, x.mean((2, 3)))

    check(
        flaxnets.create_model("vgg_residual", residual=residual),
        random_images(2, 33, 48, 3),
        reference,
    )


def resnet_v2(stage_sizes, block, imagenet_stem, option, stride_in, residual=True):
    """He et al. (2016): BN, ReLU, convolution; the first unit of a stage activates before the
    split, and projects the activated signal."""

    def reference(layers, x):
        x = layers.conv("conv1", x, *((2, 3) if imagenet_stem else (1, 1)))
        if imagenet_stem:
            x = F.max_pool2d(x, 3, 2, 1)
        for i, units in enumerate(stage_sizes, 1):
            for j in range(1, units + 1):
                unit, stride = f"stage{i}_block{j}", 2 if i > 1 and j == 1 else 1
                sizes = {"basic": (3, 3), "bottleneck": (1, 3, 1)}[block]
                activated = F.relu(layers.norm(f"{unit}/bn1", x))
                shortcut = activated if j == 1 else x
                y = activated
                for k, size in enumerate(sizes, 1):
                    if k > 1:
                        y = F.relu(layers.norm(f"{unit}/bn{k}", y))
                    here = stride if k == stride_in else 1
                    y = layers.conv(f"{unit}/conv{k}", y, here, size // 2)
                if shortcut.shape != y.shape and option == "B" and residual:
                    shortcut = layers.conv(f"{unit}/shortcut_conv", shortcut, stride)
                elif shortcut.shape != y.shape:
                    new = y.shape[1] - shortcut.shape[1]
                    shortcut = shortcut[:, :, ::stride, ::stride]
                    shortcut = F.pad(shortcut, (0, 0, 0, 0, new // 2, new // 2))
                x = y + shortcut if residual else y
        x = F.relu(layers.norm("last_bn", x))
        return layers.dense("head", x.mean((2, 3)))

    return reference


@pytest.mark.parametrize(
    ("name", "overrides", "reference"),
    [
        ("cifar_resnet20v2", {}, resnet_v2((3, 3, 3), "basic", False, "A", 1)),
        ("cifar_plain20v2", {}, resnet_v2((3, 3, 3), "basic", False, "A", 1, residual=False)),
        (
            "cifar_resnet20v2",
            {"block": "bottleneck"},
            resnet_v2((2, 2, 2), "bottleneck", False, "B", 1),
        ),
        ("resnet18v2", {}, resnet_v2((2, 2, 2, 2), "basic", True, "B", 1)),
        ("resnet50v2", {}, resnet_v2((3, 4, 6, 3), "bottleneck", True, "B", 2)),
    ],
)
def test_resnet_v2(name, overrides, reference):
    model = flaxnets.create_model(name, num_classes=10, **overrides)
    check(model, random_images(2, *((64, 80) if name[0] == "r" else (32, 32)), 3), reference)


def test_strides_of_the_paper_and_of_torchvision():
    """`stride_in_3x3=False` is the paper's bottleneck: its first 1x1 convolution strides."""
    network = torchvision.models.resnet50(weights=None).eval()
    for module in network.modules():
        if isinstance(module, torchvision.models.resnet.Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    model, variables = flaxnets.load_torch("resnet50", network.state_dict(), stride_in_3x3=False)
    images = random_images(1, 64, 64, 3)
    with torch.no_grad():
        theirs = network(to_torch(images))
    assert relative_error(quick_jit(model.apply)(variables, images), theirs) <= 1e-4


def test_adaptive_pooling_is_torchs():
    for height, width, size in ((7, 7, 7), (13, 5, 6), (1, 2, 7), (9, 11, 1), (6, 12, 3)):
        images = random_images(2, height, width, 3)
        ours = quick_jit(adaptive_average_pool, static_argnums=1)(images, size)
        theirs = F.adaptive_avg_pool2d(to_torch(images), size).permute(0, 2, 3, 1)
        assert relative_error(ours, theirs) <= 1e-6
