"""Data sets in memory or as streams, the examples of each training step, and augmentation."""

from flaxnets.data.batches import Augmentation, Batch, Preprocess, batch_indices, epoch_order
from flaxnets.data.crops import Crop
from flaxnets.data.datasets import Dataset, Split, find_dataset, load_dataset
from flaxnets.data.opening import UnreadDataset, from_arrays, inspect_dataset, open_dataset
from flaxnets.data.stream import StreamedDataset

__all__ = [
    "Augmentation",
    "Batch",
    "Crop",
    "Dataset",
    "Preprocess",
    "Split",
    "StreamedDataset",
    "UnreadDataset",
    "batch_indices",
    "epoch_order",
    "find_dataset",
    "from_arrays",
    "inspect_dataset",
    "load_dataset",
    "open_dataset",
]
