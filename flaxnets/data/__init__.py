"""Data sets as arrays, the examples of each training step, and augmentation."""

from flaxnets.data.batches import Augmentation, Preprocess, batch_indices, epoch_order
from flaxnets.data.datasets import Dataset, Split, find_dataset, load_dataset

__all__ = [
    "Augmentation",
    "Dataset",
    "Preprocess",
    "Split",
    "batch_indices",
    "epoch_order",
    "find_dataset",
    "load_dataset",
]
