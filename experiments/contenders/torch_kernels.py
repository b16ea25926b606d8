"""Number of kernels that PyTorch launches in eager mode for a train step on a GPU.

It is counted on a CPU, from the operations that PyTorch dispatches while it runs the step of
`torch_peer.py`: gather, augmentation, forward and backward pass, and fused SGD.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.contenders.torch_peer import Contender, Network

# Operations that allocate, or return the tensor itself.
FREE = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "alias", "lift_fresh")
# Operations of several kernels on a GPU: a constant is filled in before the copy, and gradients
# are zeroed before they are scattered.
SEVERAL = {"constant_pad_nd": 2, "slice_backward": 2, "nll_loss_backward": 2}
# Limits of one launch of a fused update with three lists (parameters, gradients, momentum), from
# PyTorch's MultiTensorApply.cuh: tensors, blocks, elements of a block.
TENSORS, BLOCKS, CHUNK = 48, 320, 65_536


def count_torch_kernels(architecture: Mapping[str, Any], size: int, bfloat16: bool) -> int:
    """Count kernels of the step of the network with `architecture`; see `describe_architecture`.

    Each operation on data counts as one kernel: BatchNorm with its statistics (as
    `cudnn_batch_norm`) as one forward and one backward, a convolution as one forward and one for
    each gradient. Views and allocations count as none. It is a lower bound: cuDNN and cuBLAS may
    launch auxiliary kernels. The batch size does not matter, so it is 2.
    """
    network: Any = Network(**architecture)
    network = network.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True
    )
    data = torch.zeros(4, size, size, 3, dtype=torch.uint8)
    labels, indices = torch.zeros(4, dtype=torch.long), torch.arange(2)
    peer: Any = Contender.__new__(Contender)  # only for its preparation of images
    peer._mean, peer._std = torch.zeros(3), torch.ones(3)
    counter = _Counter()
    for _ in range(2):  # the first step creates the momentum
        counter.kernels = 0
        with counter:
            images = peer.prepare(data[indices])
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = F.cross_entropy(network(images), labels[indices])
            loss.backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return counter.kernels


class _Counter(TorchDispatchMode):
    """Counts the kernels of all operations that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.kernels += _count(func, args)
        return func(*args, **(kwargs or {}))


def _count(func: Any, args: tuple) -> int:
    namespace, _, name = func._schema.name.partition("::")
    if namespace != "aten" or func.is_view or name in FREE:
        return 0
    if name == "_fused_sgd_":
        return count_fused_launches([tensor.numel() for tensor in args[0]])
    if name == "convolution_backward":
        return sum(args[-1])  # the mask of the gradients that are needed
    return SEVERAL.get(name, 1)


def count_fused_launches(sizes: list[int]) -> int:
    """Count the launches of one fused update of tensors with these numbers of elements."""
    launches = tensors = blocks = 0
    for i, size in enumerate(sizes):
        tensors += 1
        chunks = -(-size // CHUNK)
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if (tensors == TENSORS and last) or blocks == BLOCKS:
                launches += 1
                # A tensor that goes on fills the first place of the next launch.
                tensors, blocks = (0 if last else 1), 0
            elif last and i == len(sizes) - 1:
                launches += 1
    return launches
