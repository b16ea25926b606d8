import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import flaxnets
from tests.helpers import quick_jit, random_images, random_variables, relative_error
from tests.reference import to_torch, torchvision_network

torch = pytest.importorskip("torch")
F = torch.nn.functional
safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def resnet18():
    return torchvision_network("resnet18").state_dict()


def cifar_state(depth, head="linear", classes=10, channels=3, seed=0):
    """Random weights of a CIFAR ResNet in the common PyTorch layout, shortcuts A."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5

    def norm(name, filters):
        return {
            f"{name}.weight": 0.5 + torch.rand(filters, generator=generator),
            f"{name}.bias": 0.1 * torch.randn(filters, generator=generator),
            f"{name}.running_mean": 0.1 * torch.randn(filters, generator=generator),
            f"{name}.running_var": 0.5 + torch.rand(filters, generator=generator),
            f"{name}.num_batches_tracked": torch.tensor(7),
        }

    state = {"conv1.weight": draw(16, channels, 3, 3)} | norm("bn1", 16)
    before = 16
    for stage, filters in enumerate((16, 32, 64), 1):
        for block in range((depth - 2) // 6):
            name = f"layer{stage}.{block}"
            state[f"{name}.conv1.weight"] = draw(filters, before, 3, 3)
            state |= norm(f"{name}.bn1", filters)
            state[f"{name}.conv2.weight"] = draw(filters, filters, 3, 3)
            state |= norm(f"{name}.bn2", filters)
            before = filters
    return state | {f"{head}.weight": draw(classes, 64), f"{head}.bias": draw(classes)}


def cifar_logits(state, x):
    """The forward pass of He et al. (2015), section 4.2, on such weights."""

    def norm(name, x):
        mean, var, weight, bias = (
            state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-5)

    x = F.relu(norm("bn1", F.conv2d(x, state["conv1.weight"], padding=1)))
    for name in sorted({key.rsplit(".", 2)[0] for key in state if key.startswith("layer")}):
        stride = 2 if name in ("layer2.0", "layer3.0") else 1
        y = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
        y = F.conv2d(F.relu(norm(f"{name}.bn1", y)), state[f"{name}.conv2.weight"], padding=1)
        y = norm(f"{name}.bn2", y)
        if stride == 2:
            new = y.shape[1] - x.shape[1]
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, new // 2, new // 2))
        x = F.relu(x + y)
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def same(a, b):
    ours: Any = flatten_dict(a)
    theirs: Any = flatten_dict(b)
    assert ours.keys() == theirs.keys()
    for path in ours:
        assert np.array_equal(ours[path], theirs[path]), path


def test_cifar_resnet_of_the_common_layout():
    state = cifar_state(20, classes=7, channels=1)
    model, variables = flaxnets.load_torch("cifar_resnet20", state)
    assert model.num_classes == 7
    images = random_images(2, 32, 32, 1)
    theirs = cifar_logits(state, to_torch(images))
    assert relative_error(quick_jit(model.apply)(variables, images), theirs) <= 1e-4


@pytest.mark.parametrize(
    "name",
    ["alexnet", pytest.param("vgg11_bn", marks=pytest.mark.slow), "resnet18", "resnet50"],
)
def test_round_trip_is_exact_and_loads_into_torchvision(name, tmp_path):
    network = torchvision_network(name, num_classes=5)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    _, variables = flaxnets.load_torch(name, state)
    path = tmp_path / "weights.safetensors"
    flaxnets.save_torch(variables, name, path)
    written = safetensors_torch.load_file(path)
    network.load_state_dict(written, strict=True)
    assert written.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(written[key], value), key
    same(flaxnets.load_torch(name, path)[1], variables)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cifar_resnet8", {}),
        ("cifar_resnet8", {"shortcut": "B"}),
        ("vgg11", {"pool_size": 1, "classifier_width": 16, "num_classes": 3}),
    ],
)
def test_round_trip_with_options(name, options, tmp_path):
    variables = random_variables(
        flaxnets.create_model(name, **options), np.ones((1, 32, 32, 3), np.float32)
    )
    path = tmp_path / "weights.safetensors"
    flaxnets.save_torch(variables, name, path, **options)
    same(flaxnets.load_torch(name, path, **options)[1], variables)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".safetensors"])
def test_files(suffix, tmp_path):
    state = cifar_state(8)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors_torch.save_file(state, path)
    else:
        nested = {f"module.{key}": value for key, value in state.items()}
        torch.save({"state_dict": nested, "best_prec1": 91.5}, path)
    expected = flaxnets.load_torch("cifar_resnet8", state)[1]
    same(flaxnets.load_torch("cifar_resnet8", path)[1], expected)
    same(flaxnets.load_torch("cifar_resnet8", str(path))[1], expected)
    same(flaxnets.load_torch("cifar_resnet8", {"model": state})[1], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_become_float32(dtype, tmp_path):
    state = cifar_state(8)
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    path = tmp_path / "weights.safetensors"
    safetensors_torch.save_file(state, path)
    for weights in (state, path):
        _, variables = flaxnets.load_torch("cifar_resnet8", weights)
        kernel = variables["params"]["conv1"]["kernel"]
        assert kernel.dtype == jnp.float32
        expected = state["conv1.weight"].float().permute(2, 3, 1, 0)
        assert np.array_equal(kernel, expected)


def test_another_number_of_classes_keeps_the_backbone(resnet18):
    _, variables = flaxnets.load_torch("resnet18", resnet18)
    model, changed = flaxnets.load_torch("resnet18", resnet18, num_classes=3)
    assert model.num_classes == 3
    head = changed["params"].pop("head")
    assert head["kernel"].shape == (512, 3)
    assert float(jnp.abs(head["kernel"]).max()) > 0
    old_head = variables["params"].pop("head")
    same(changed, variables)
    # The same number of classes is no other number: the head stays.
    _, kept = flaxnets.load_torch("resnet18", resnet18, num_classes=1000)
    same(kept["params"]["head"], old_head)


def test_features_alone(resnet18):
    model, variables = flaxnets.load_torch("resnet18", resnet18, num_classes=None)
    assert "head" not in variables["params"]
    features = quick_jit(model.apply)(variables, random_images(1, 64, 64, 3))
    assert features.shape == (1, 512)
    vgg = torchvision_network("vgg11", num_classes=2).state_dict()
    assert "dense1" not in flaxnets.load_torch("vgg11", vgg, num_classes=None)[1]["params"]


def refused(match, name, weights, **overrides):
    with pytest.raises(flaxnets.InputError, match=match) as error:
        flaxnets.load_torch(name, weights, **overrides)
    assert len(" ".join(str(error.value).split())) < 500


def test_weights_that_do_not_fit_are_named():
    state = cifar_state(8)
    without = {key: value for key, value in state.items() if key != "layer2.0.conv1.weight"}
    refused(r"layer2\.0\.conv1\.weight is missing", "cifar_resnet8", without)
    refused("extra.weight is unexpected", "cifar_resnet8", state | {"extra.weight": torch.ones(1)})
    changed = state | {"layer1.0.conv2.weight": torch.ones(16, 16, 1, 1)}
    message = r"layer1\.0\.conv2\.weight is \(16, 16, 1, 1\), not \(16, 16, 3, 3\)"
    refused(message, "cifar_resnet8", changed)
    refused(r"layer1\.1\.bn1\..* is missing.* more", "cifar_resnet20", state)
    refused("is unexpected.* more", "cifar_resnet8", cifar_state(20))
    refused("fc.weight is missing; it has conv1.weight, bn1.weight", "resnet18", state)
    refused("features.0.weight is missing", "vgg16", state)
    refused(
        "conv1.weight has 1 dimensions, not 4",
        "cifar_resnet8",
        state | {"conv1.weight": torch.ones(3)},
    )
    vgg = {
        "features.0.weight": torch.ones(64, 3, 3, 3),
        "classifier.6.weight": torch.ones(10, 4096),
    }
    refused("is missing and 20 more", "vgg11", vgg, stage_sizes=(2, 2, 2, 2, 2))
    refused("no PyTorch layout is known for 'cifar_plain8'", "cifar_plain8", state)
    refused("no PyTorch layout is known for 'vgg11_lrn'", "vgg11_lrn", state)
    refused("holds no state dict", "cifar_resnet8", {})
    refused("'epoch' is a int, not a tensor", "cifar_resnet8", {"epoch": 3})
    refused("linear.bias twice", "cifar_resnet8", state | {"module.linear.bias": torch.ones(10)})
    refused("give its state_dict", "cifar_resnet8", torch.nn.Linear(1, 1))
    refused("a file or a state dict, not int", "cifar_resnet8", 5)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(16, dtype=torch.int8),
        torch.ones(16, dtype=torch.complex64),
        torch.ones(16, device="meta"),
        torch.ones(16).to_sparse(),
        torch.ones(16).to(torch.float8_e4m3fn),
        torch.ones(0),
        np.array(["a"] * 16),
        np.array([None] * 16),
    ],
)
def test_tensors_that_are_no_numbers_are_refused(tensor):
    refused(
        "bn1.bias (cannot be read|is .* not floating)",
        "cifar_resnet8",
        cifar_state(8) | {"bn1.bias": tensor},
    )


def test_the_weights_are_a_copy():
    state = {key: value.clone() for key, value in cifar_state(8).items()}
    _, variables = flaxnets.load_torch("cifar_resnet8", state)
    before = {path: np.array(leaf) for path, leaf in flatten_dict(variables).items()}
    for value in state.values():
        value.add_(1)
    leaves: Any = flatten_dict(variables)
    for path, leaf in leaves.items():
        assert np.array_equal(leaf, before[path]), path


def test_weights_without_a_head(tmp_path):
    state = {k: v for k, v in cifar_state(8).items() if not k.startswith("linear")}
    refused("linear.weight is missing", "cifar_resnet8", state)
    _, variables = flaxnets.load_torch("cifar_resnet8", state, num_classes=None)
    assert "head" not in variables["params"]
    _, new = flaxnets.load_torch("cifar_resnet8", state, num_classes=3)
    assert new["params"].pop("head")["kernel"].shape == (64, 3)
    same(new, variables)
    flaxnets.save_torch(variables, "cifar_resnet8", tmp_path / "backbone.safetensors")
    again = flaxnets.load_torch(
        "cifar_resnet8", tmp_path / "backbone.safetensors", num_classes=None
    )
    same(again[1], variables)


def test_files_that_cannot_be_read(tmp_path):
    refused("there is no file", "cifar_resnet8", tmp_path / "none.pth")
    refused("there is no file", "cifar_resnet8", tmp_path)
    (tmp_path / "weights.npz").write_bytes(b"1")
    refused(
        r"\.safetensors, \.pth, \.pt or \.th file, not 'weights.npz'",
        "resnet18",
        tmp_path / "weights.npz",
    )

    state = cifar_state(8)
    torch.save(state, tmp_path / "whole.pth")
    safetensors_torch.save_file(state, tmp_path / "whole.safetensors")
    for suffix in ("pth", "safetensors"):
        content = (tmp_path / f"whole.{suffix}").read_bytes()
        path = tmp_path / f"part.{suffix}"
        for part in (
            b"",
            b"not weights",
            content[:100],
            content[: len(content) // 2],
            content[:-1],
        ):
            path.write_bytes(part)
            refused("is damaged or", "cifar_resnet8", path)
    torch.save([1, 2], tmp_path / "list.pth")
    refused("holds no state dict", "cifar_resnet8", tmp_path / "list.pth")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_nothing_but_tensors_is_unpickled(tmp_path):
    torch.save({"state_dict": cifar_state(8), "args": Bomb()}, tmp_path / "bomb.pth")
    refused("never unpickled", "cifar_resnet8", tmp_path / "bomb.pth")


def test_safetensors_need_no_torch_and_pth_says_so(tmp_path, monkeypatch):
    state = cifar_state(8)
    safetensors_torch.save_file(state, tmp_path / "weights.safetensors")
    torch.save(state, tmp_path / "weights.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    _, variables = flaxnets.load_torch("cifar_resnet8", tmp_path / "weights.safetensors")
    flaxnets.save_torch(variables, "cifar_resnet8", tmp_path / "again.safetensors")
    refused("needs torch: pip install torch", "cifar_resnet8", tmp_path / "weights.pth")


def test_variables_that_are_not_the_networks_are_refused(tmp_path):
    _, variables = flaxnets.load_torch("cifar_resnet8", cifar_state(8))
    path = tmp_path / "weights.safetensors"
    with pytest.raises(flaxnets.InputError, match=r"stage1_block2/.* is missing"):
        flaxnets.save_torch(variables, "cifar_resnet20", path)
    with pytest.raises(flaxnets.InputError, match="no params/stage1_conv1"):
        flaxnets.save_torch(variables, "vgg16", path)
    for wrong in (None, [1], {"params": {"conv1": {"kernel": np.ones(3)}}}):
        with pytest.raises(flaxnets.InputError, match="no params/conv1"):
            flaxnets.save_torch(wrong, "cifar_resnet8", path)  # pyright: ignore[reportArgumentType]
    stacked = {
        **variables,
        "params": {**variables["params"], "bn1": {"scale": np.ones((2, 16)), "bias": np.ones(16)}},
    }
    with pytest.raises(flaxnets.InputError, match=r"bn1/scale is \(2, 16\), not \(16,\)"):
        flaxnets.save_torch(stacked, "cifar_resnet8", path)
    for place in (tmp_path / "none" / "w.safetensors", tmp_path):
        with pytest.raises(flaxnets.InputError, match=r"written"):
            flaxnets.save_torch(variables, "cifar_resnet8", place)
    with pytest.raises(flaxnets.InputError, match=r"batch_stats/.* is missing"):
        flaxnets.save_torch({"params": variables["params"]}, "cifar_resnet8", path)
    with pytest.raises(flaxnets.InputError, match=r"written as .safetensors"):
        flaxnets.save_torch(variables, "cifar_resnet8", tmp_path / "weights.pth")
    assert not list(tmp_path.iterdir())
