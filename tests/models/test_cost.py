import flax.linen as nn
import pytest

from flaxnets.models import create_model, published_image_shape
from flaxnets.models.cost import Cost, count_cost, count_depth, list_layers

pytestmark = pytest.mark.unit


class Positions(nn.Module):
    """A module that takes nothing."""

    @nn.compact
    def __call__(self):
        return self.param("embedding", nn.initializers.zeros, (4,))


class OnesOwn(nn.Module):
    """Modules called by keyword, in whatever order."""

    @nn.compact
    def __call__(self, x, train=False):
        x = x.mean((1, 2)) + Positions(name="positions")()
        x = nn.BatchNorm(name="bn")(use_running_average=not train, x=x)
        return nn.Dense(5, name="head")(inputs=x)


def test_networks_of_ones_own_are_counted():
    layers = list_layers(OnesOwn(), (8, 8, 4))
    assert [(layer.path, layer.kind, layer.cost) for layer in layers] == [
        (("positions",), "Positions", Cost(4, 0)),
        (("bn",), "batch norm", Cost(8, 0)),
        (("head",), "dense, 5", Cost(25, 20)),
    ]
    assert count_cost(OnesOwn(), (8, 8, 4), 5) == Cost(37, 20)


def test_an_output_that_is_no_logits_is_refused():
    with pytest.raises(ValueError, match=r"gives \(1, 5\), not logits \(1, 7\)"):
        count_cost(OnesOwn(), (8, 8, 4), 7)


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("alexnet2012", 8),
        ("alexnet", 8),
        ("vgg11_lrn", 11),
        ("vgg16_1x1", 16),
        ("vgg_residual", 11),
        ("cnn", 4),
        ("ynet", 4),
        ("resnet18", 18),
        ("resnet50v2", 50),
        ("plain34", 34),
        ("cifar_resnet20", 20),
        ("cifar_plain56", 56),
        ("keras_resnet20v1", 20),
        ("keras_resnet20v2", 20),
    ],
)
def test_depth_is_the_weighted_layers_on_the_longest_path(name, depth):
    assert count_depth(create_model(name), published_image_shape(name)) == depth


@pytest.mark.parametrize("how", ["remat", "scan_blocks"])
def test_depth_is_the_same_however_a_network_is_run(how):
    model = create_model("cifar_resnet20", shortcut="C", **{how: True})
    assert count_depth(model, (32, 32, 3)) == 20
