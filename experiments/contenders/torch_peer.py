"""The same network and train step in PyTorch, with the settings that make it fast."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

LEAVES = {"scale": "weight", "kernel": "weight", "mean": "running_mean", "var": "running_var"}


def conv(inputs: int, filters: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, filters, size, stride, (size - 1) // 2, bias=False)


class Block(nn.Module):
    """Convolutions with BatchNorm and an optional shortcut around them."""

    def __init__(
        self, inputs: int, layers: list[tuple[int, int, int]], shortcut: str | None
    ) -> None:
        super().__init__()
        self.depth = len(layers)
        self.residual = shortcut is not None
        self.stride, before = 1, inputs
        for i, (filters, size, stride) in enumerate(layers, 1):
            self.add_module(f"conv{i}", conv(before, filters, size, stride))
            self.add_module(f"bn{i}", nn.BatchNorm2d(filters))
            self.stride, before = self.stride * stride, filters
        self.new_channels = before - inputs
        changes_shape = self.stride != 1 or self.new_channels
        self.project = shortcut == "B" and changes_shape
        self.pad = shortcut == "A" and changes_shape
        if self.project:
            self.shortcut_conv = conv(inputs, before, 1, self.stride)
            self.shortcut_bn = nn.BatchNorm2d(before)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.depth:
                y = F.relu(y, inplace=True)
        if self.project:
            x = self.shortcut_bn(self.shortcut_conv(x))
        elif self.pad:
            before = self.new_channels // 2
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))
        if self.residual:
            y += x
        return F.relu(y, inplace=True)


class Network(nn.Module):
    """ResNet: `(batch, channels, height, width)` -> logits.

    The arguments are attributes of flaxnets's `ResNet`, version 1 with shortcut A or B, and the
    submodules have the same names as there.
    """

    def __init__(
        self,
        stage_sizes: list[int],
        num_classes: int,
        width: int,
        block: str,
        stem: str,
        shortcut: str,
        residual: bool,
        stride_in_3x3: bool,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.large_stem = stem == "imagenet"
        self.conv1 = conv(channels, width, *((7, 2) if self.large_stem else (3, 1)))
        self.bn1 = nn.BatchNorm2d(width)
        self.blocks: list[str] = []
        before = width
        for i, count in enumerate(stage_sizes, 1):
            filters = width * 2 ** (i - 1)
            for j in range(1, count + 1):
                stride = 2 if i > 1 and j == 1 else 1
                if block == "basic":
                    layers = [(filters, 3, stride), (filters, 3, 1)]
                else:
                    first, second = (1, stride) if stride_in_3x3 else (stride, 1)
                    layers = [(filters, 1, first), (filters, 3, second), (4 * filters, 1, 1)]
                self.blocks.append(f"stage{i}_block{j}")
                around = shortcut if residual else None
                self.add_module(self.blocks[-1], Block(before, layers, around))
                before = layers[-1][0]
        self.head = nn.Linear(before, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.large_stem:
            x = F.max_pool2d(x, 3, 2, 1)
        for name in self.blocks:
            x = getattr(self, name)(x)
        return self.head(x.mean((2, 3)))

    @torch.no_grad()
    def load(self, variables: Mapping[str, np.ndarray]) -> None:
        """Load Flax variables, given by path, such as `params/conv1/kernel`."""
        missing = {key for key in self.state_dict() if not key.endswith("num_batches_tracked")}
        for path, values in variables.items():
            _, *modules, leaf = path.split("/")
            key = ".".join([*modules, LEAVES.get(leaf, leaf)])
            if leaf == "kernel":
                values = values.transpose((3, 2, 0, 1) if values.ndim == 4 else (1, 0))
            self.state_dict()[key].copy_(torch.from_numpy(np.array(values)))
            missing.remove(key)
        if missing:
            raise ValueError(f"no weights for {', '.join(sorted(missing))}")


class Contender:
    """See `worker.py`. `compile` is None for eager mode, or the mode of `torch.compile`."""

    def __init__(
        self,
        model: Mapping[str, Any],
        data: Mapping[str, np.ndarray],
        batch_size: int,
        bfloat16: bool,
        task: str,
        device: str,
        weights: str,
        compile: str | None = None,
    ) -> None:
        self.device = device
        if device not in ("cpu", "gpu") or (device == "gpu" and not torch.cuda.is_available()):
            raise RuntimeError(f"this PyTorch cannot use the {device} that ours runs on")
        self._marks_steps = compile == "reduce-overhead"
        if self._marks_steps and device != "gpu":
            raise RuntimeError("CUDA graphs need a GPU")
        if device == "gpu":
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")  # TF32
        # XLA does the same. The threads of OpenMP start later, and take it over.
        torch.set_flush_denormal(True)
        place = torch.device("cuda" if device == "gpu" else "cpu")
        torch.manual_seed(0)
        with np.load(weights) as arrays:
            self._weights = dict(arrays)
        network: Any = Network(**model)
        network.load(self._weights)
        self._evaluates = task == "evaluate"
        self._network = network.to(place, memory_format=torch.channels_last)
        self._network.train(not self._evaluates)
        # PyTorch's default number of threads is the number of cores.
        self._optimizer = torch.optim.SGD(
            self._network.parameters(),
            lr=float(data["rate"]),
            momentum=0.9,
            weight_decay=1e-4,
            fused=True,
        )

        def on_device(name: str) -> torch.Tensor:
            return torch.from_numpy(data[name]).to(place)

        # NHWC, the memory layout of channels_last.
        self._images, self._labels = on_device("images"), on_device("labels").long()
        self._check_images = on_device("check_images").permute(0, 3, 1, 2)
        self._mean, self._std = on_device("mean"), on_device("std")
        self._order = torch.randperm(len(self._labels), device=place)
        self._batch_size, self._steps_done = batch_size, 0
        self._place, self._dtype = place, torch.bfloat16 if bfloat16 else torch.float32
        self._autocast = torch.autocast(place.type, torch.bfloat16, enabled=bfloat16)
        self._prepare, self._loss, self._count = self.prepare, self.cross_entropy, self.count
        if compile is not None:
            self._prepare = torch.compile(self.prepare, mode=compile)
            self._loss = torch.compile(self.cross_entropy, mode=compile)
            self._count = torch.compile(self.count, mode=compile)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Crop, flip and normalise images: uint8 NHWC -> float NCHW in channels_last."""
        count, height, width, _ = images.shape
        place = images.device
        padded = F.pad(images, (0, 0, 4, 4, 4, 4))
        top, left = torch.randint(0, 9, (2, count, 1), device=place)
        rows = top + torch.arange(height, device=place)
        columns = left + torch.arange(width, device=place)
        mirrored = torch.rand(count, 1, device=place) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
        which = torch.arange(count, device=place)[:, None, None]
        return self.normalise(padded[which, rows[:, :, None], columns[:, None, :]])

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        return ((images.float() / 255 - self._mean) / self._std).permute(0, 3, 1, 2)

    def cross_entropy(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with self._autocast:
            return F.cross_entropy(self._network(images), labels)

    def count(
        self, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the loss and the errors of a batch."""
        logits = self._network(self.normalise(images)).float()
        return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) != labels).sum()

    def loss(self) -> float:
        if self._evaluates:
            return self.evaluate()[0]
        # Load in place, because the compiled function refers to these tensors. It was compiled in
        # training mode, so the network stays in that mode.
        self._network.load(self._weights)
        return self._loss(self._check_images, self._labels[: self._batch_size]).item()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            if self._evaluates:
                self.evaluate()
            else:
                self._train_step()
        self._wait()

    def _train_step(self) -> None:
        if self._marks_steps:
            torch.compiler.cudagraph_mark_step_begin()
        start = self._steps_done % (len(self._order) // self._batch_size) * self._batch_size
        indices = self._order[start : start + self._batch_size]
        self._optimizer.zero_grad(set_to_none=True)
        self._loss(self._prepare(self._images[indices]), self._labels[indices]).backward()
        self._optimizer.step()
        self._steps_done += 1

    @torch.inference_mode()
    def evaluate(self) -> tuple[float, float]:
        """Compute mean cross-entropy and error in percent over the split."""
        loss, errors = torch.zeros((), device=self._place), torch.zeros((), device=self._place)
        with self._autocast:  # once, because leaving it discards the weights it has cast
            for start in range(0, len(self._labels), self._batch_size):
                if self._marks_steps:
                    torch.compiler.cudagraph_mark_step_begin()
                batch = slice(start, start + self._batch_size)
                batch_loss, batch_errors = self._count(self._images[batch], self._labels[batch])
                loss += batch_loss
                errors += batch_errors
        count = len(self._labels)
        return loss.item() / count, 100 * errors.item() / count

    def _wait(self) -> None:
        if self.device == "gpu":
            torch.cuda.synchronize()

    def make_matmul(self, size: int) -> Callable[[], None]:
        matrix = torch.randn(size, size, dtype=self._dtype, device=self._place)

        def multiply() -> None:
            torch.matmul(matrix, matrix)
            self._wait()

        return multiply

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def give_memory_back(self) -> None:
        """Release unused GPU memory, so that all contenders fit on one GPU."""
        if self.device == "gpu":
            torch.cuda.empty_cache()
