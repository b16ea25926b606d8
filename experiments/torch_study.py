"""Time the work of the study's default command in PyTorch.

    python experiments/torch_study.py

Trains the six networks of `degradation.py --depths 18,34,56` with the same batches, schedule and
evaluations, and with the settings that make PyTorch fast. Saves nothing, and uses PyTorch's own
random numbers.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the directory of the package `experiments`

import torch
import torch.nn.functional as F

from experiments.contenders.inputs import describe_architecture
from experiments.contenders.torch_peer import Network
from flaxnets.data import Split, load_dataset
from flaxnets.training import RECIPES

EVAL_BATCH = 256


def main() -> None:
    dataset, recipe = load_dataset("digits"), RECIPES["digits"]
    mean, std = torch.tensor(dataset.preprocess.mean), torch.tensor(dataset.preprocess.std)

    def on_device(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
        images = (torch.from_numpy(split.images).float() / 255 - mean) / std
        return images.permute(0, 3, 1, 2), torch.from_numpy(split.labels).long()

    train, test = on_device(dataset.train), on_device(dataset.test)
    total_steps = recipe.total_steps(len(train[1]))
    milestones = [round(at * total_steps) for at in recipe.decay_at]

    started = time.perf_counter()
    for kind in ("plain", "resnet"):
        for depth in (18, 34, 56):
            began = time.perf_counter()
            torch.manual_seed(0)
            architecture = describe_architecture(f"cifar_{kind}{depth}")
            network: Any = Network(**architecture, channels=1)
            network.to(memory_format=torch.channels_last)
            for module in network.modules():
                if isinstance(module, torch.nn.Conv2d):
                    torch.nn.init.kaiming_normal_(module.weight, mode="fan_out")
            optimizer = torch.optim.SGD(
                network.parameters(),
                lr=recipe.learning_rate,
                momentum=recipe.momentum,
                weight_decay=recipe.weight_decay,
                fused=True,
            )
            assert isinstance(recipe.decay_factor, float)
            schedule = torch.optim.lr_scheduler.MultiStepLR(
                optimizer, milestones, recipe.decay_factor
            )
            errors = {}
            for _ in range(recipe.epochs or 0):
                train_epoch(network, optimizer, schedule, *train, recipe.batch_size)
                errors = {"train": error(network, *train), "test": error(network, *test)}
            print(
                f"{kind}-{depth}: train error {errors['train']:.2f} %, test error "
                f"{errors['test']:.2f} %, {time.perf_counter() - began:.1f} s",
                flush=True,
            )
    print(f"total: {time.perf_counter() - started:.1f} s with PyTorch {torch.__version__}")


def train_epoch(
    network: Network,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    images: torch.Tensor,
    labels: torch.Tensor,
    batch_size: int,
) -> None:
    network.train()
    order = torch.randperm(len(labels))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        indices = order[start : start + batch_size]
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(images[indices]), labels[indices]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def error(network: Network, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Compute the percentage misclassified, in evaluation mode."""
    network.eval()
    pieces = range(0, len(labels), EVAL_BATCH)
    wrong = [
        (network(images[i : i + EVAL_BATCH]).argmax(1) != labels[i : i + EVAL_BATCH]).sum()
        for i in pieces
    ]
    return 100 * int(sum(wrong)) / len(labels)


if __name__ == "__main__":
    main()
