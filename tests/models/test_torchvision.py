"""Networks that torchvision has, with the same weights: the same numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import flaxnets
from tests.helpers import quick_jit, random_images, relative_error
from tests.reference import to_torch, torchvision_network

torch = pytest.importorskip("torch")

slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        "alexnet",
        "resnet18",
        "resnet50",
        *(pytest.param(name, marks=slow) for name in ("vgg11", "vgg13", "vgg16", "vgg19")),
        *(pytest.param(name, marks=slow) for name in ("vgg11_bn", "vgg16_bn", "vgg19_bn")),
        *(pytest.param(name, marks=slow) for name in ("resnet34", "resnet101", "resnet152")),
    ],
)
def test_evaluation(name):
    network = torchvision_network(name)
    model, variables = flaxnets.load_torch(name, network.state_dict())
    apply = quick_jit(model.apply)
    for size in ((224, 224), (193, 225)):
        images = random_images(1, *size, 3)
        with torch.no_grad():
            theirs = network(to_torch(images))
        assert relative_error(apply(variables, images), theirs) <= 1e-4, size


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", *(pytest.param(n, marks=slow) for n in ("resnet50", "vgg11_bn"))]
)
def test_training(name):
    """Logits, every gradient and the running statistics of one step, in float64."""
    network: Any = torchvision_network(name, num_classes=10)
    options = {}
    if name == "vgg11_bn":  # 25,088 x 4,096 weights in float64 would be a gigabyte a copy
        network.avgpool = torch.nn.AdaptiveAvgPool2d(2)
        network.classifier[0] = torch.nn.Linear(512 * 2 * 2, 64)
        network.classifier[3] = torch.nn.Linear(64, 64)
        network.classifier[6] = torch.nn.Linear(64, 10)
        options = {"pool_size": 2, "classifier_width": 64, "dropout": 0.0}
    network = network.double().train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    images = random_images(4, 96, 96, 3).astype(np.float64)
    labels = np.array([3, 1, 4, 1])

    pixels = {}  # that a BatchNorm averages over
    for path, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(
                lambda module, inputs, _, path=path: pixels.update(
                    {path: inputs[0].numel() // inputs[0].shape[1]}
                )
            )
    before = {key: value.clone() for key, value in network.state_dict().items()}
    logits = network(to_torch(images))
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
    after = {key: value.clone() for key, value in network.state_dict().items()}
    for path, count in pixels.items():
        # torch's running variance takes in the unbiased variance of the batch, ours the biased one.
        key = f"{path}.running_var"
        batch = (after[key] - 0.9 * before[key]) / 0.1 * (count - 1) / count
        after[key] = 0.9 * before[key] + 0.1 * batch
    gradients = {key: value.grad for key, value in network.named_parameters()}

    with jax.enable_x64(True):
        options |= {"dtype": jnp.float64, "param_dtype": jnp.float64}
        model, variables = flaxnets.load_torch(name, before, **options)
        expected = flaxnets.load_torch(name, after | gradients, **options)[1]

        @quick_jit
        def step(variables):
            def loss(params):
                logits, updates = model.apply(
                    {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
                )
                picked = jax.nn.log_softmax(logits)[jnp.arange(4), labels]
                return -picked.mean(), (logits, updates["batch_stats"])

            return jax.grad(loss, has_aux=True)(variables["params"])

        gradient, (ours, batch_stats) = step(variables)

    assert relative_error(ours, logits.detach()) <= 1e-8
    gradient: Any = flatten_dict(gradient)
    expected_gradient: Any = flatten_dict(expected["params"])
    assert gradient.keys() == expected_gradient.keys()
    whole = np.sqrt(sum(np.square(g).sum() for g in expected_gradient.values()))
    for path, theirs in expected_gradient.items():
        difference = np.linalg.norm(np.ravel(gradient[path] - theirs))
        norm = np.linalg.norm(np.ravel(theirs))
        if name == "vgg11_bn" and "conv" in path[0] and path[1] == "bias":
            # BatchNorm takes away what a bias adds: the true gradient is 0, both are rounding.
            assert norm <= 1e-12 * whole, path
            assert difference <= 1e-12 * whole, path
        else:
            assert difference <= 1e-8 * norm, path
    expected_statistics: Any = flatten_dict(expected["batch_stats"])
    batch_stats: Any = flatten_dict(batch_stats)
    for path, statistics in batch_stats.items():
        theirs = expected_statistics[path]
        np.testing.assert_allclose(statistics, theirs, rtol=1e-8, atol=1e-10, err_msg=str(path))
