"""Inputs shared by all contenders of the benchmark: the network's architecture and the data."""

from typing import Any

import numpy as np

from experiments.contenders.workload import Workload
from flaxnets.errors import InputError
from flaxnets.models import ResNet, create_model
from flaxnets.models.layers import batch_norm, conv

ARCHITECTURE = (
    *("stage_sizes", "num_classes", "width", "block", "stem"),
    *("shortcut", "residual", "stride_in_3x3"),
)
# Small, so that training on noise stays finite.
LEARNING_RATE = 0.01


def describe_architecture(name: str) -> dict[str, Any]:
    """Return the attributes of the `ResNet` called `name`, from which the peers build it.

    Raises:
      InputError: it is not a ResNet of version 1 with shortcut A or B.
    """
    model: Any = create_model(name, num_classes=10)
    if (
        not isinstance(model, ResNet)
        or model.preactivation
        or model.shortcut == "C"
        or (model.conv, model.norm) != (conv, batch_norm)
    ):
        raise InputError(
            f"--models: torch and flax-example support only ResNets of version 1 and plain "
            f"networks, such as cifar_resnet20 or plain34, not {name}; --against seeds-together "
            f"supports all"
        )
    return {attribute: getattr(model, attribute) for attribute in ARCHITECTURE}


def make_data(workload: Workload) -> dict[str, np.ndarray]:
    """Make random images and labels, and the batch for the loss check in training.

    Evaluation covers all images once. Returns `images` uint8 `(n, height, width, 3)`, `labels`
    int32 `(n,)`, `mean` and `std` per channel on a scale of 0 to 1, the learning rate as `rate`,
    and `check_images`, the first batch after normalisation.
    """
    rng = np.random.default_rng(0)
    image_size, batch_size = workload.image_size, workload.batch_size
    trained_on = max(1024, 2 * batch_size)
    count = workload.images_per_step if workload.task == "evaluate" else trained_on
    images = rng.integers(0, 256, (count, image_size, image_size, 3), np.uint8)
    mean, std = np.full(3, 0.5, np.float32), np.full(3, 0.29, np.float32)
    return {
        "images": images,
        "labels": rng.integers(0, 10, count, np.int32),
        "mean": mean,
        "std": std,
        "rate": np.array(LEARNING_RATE, np.float32),
        "check_images": (images[:batch_size].astype(np.float32) / 255 - mean) / std,
    }
