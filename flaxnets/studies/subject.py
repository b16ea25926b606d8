"""A trained network together with the images to evaluate it on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import numpy as np

from flaxnets.data import Crop, Preprocess, Split, UnreadDataset
from flaxnets.data.batches import imagenet_statistics
from flaxnets.errors import InputError
from flaxnets.models import published_image_shape
from flaxnets.models.torch_weights import load_torch
from flaxnets.studies.restore import Restored


@dataclass(frozen=True)
class Subject:
    """A network to evaluate: `model.apply(variables, preprocess(split.images), train=False)`.

    Attributes:
      name: name of the network, for tables and figures.
      origin: where it comes from, for `evaluation.json`.
      dataset: name of the data set of `split`.
    """

    name: str
    origin: dict[str, Any]
    model: nn.Module
    variables: dict[str, Any]
    preprocess: Preprocess
    class_names: tuple[str, ...]
    dataset: str
    split: Split

    @classmethod
    def from_run(
        cls, run: Restored, path: Path, is_best: bool, dataset: str, split: Split
    ) -> "Subject":
        """Join a restored run and a split of `dataset`, which has its classes.

        Raises:
          InputError: the network takes images of another size.
        """
        # With a `size`, preprocessing resizes images of any size to the network's.
        preprocess = replace(run.preprocess, image_shape=split.images.shape[1:])
        if preprocess.input_shape != run.preprocess.input_shape:
            own, expected = (
                "x".join(map(str, shape))
                for shape in (preprocess.image_shape, run.preprocess.input_shape)
            )
            raise InputError(
                f"{dataset} has images of {own}, but the network takes {expected}; "
                "give a --dataset of such images, or folder:PATH"
            )
        return cls(
            name=f"{path}, checkpoint {run.step},",
            origin={"run": str(path), "best": is_best, "step": run.step},
            model=run.model,
            variables=run.variables,
            preprocess=preprocess,
            class_names=run.class_names,
            dataset=dataset,
            split=split,
        )


def load_weights(
    path: Path,
    network: str,
    inspect: Callable[[], UnreadDataset],
    split: Literal["train", "test"],
) -> Subject:
    """Load PyTorch weights of `network`, and a split preprocessed as in torchvision's evaluation.

    Args:
      inspect: looks up the data set, which may be slow; called once the weights are loaded.

    Raises:
      InputError: the weights do not fit the network, or the data set has other classes or channels.
    """
    model: Any
    model, variables = load_torch(network, path)
    size = published_image_shape(network)[0]
    stem = "stage1_conv1" if network.startswith("vgg") else "conv1"
    channels = variables["params"][stem]["kernel"].shape[2]
    if channels not in (1, 3):
        raise InputError(f"{path} takes {channels} channels; give weights for 1 or 3")
    unread = inspect()
    if len(unread.class_names) != model.num_classes:
        raise InputError(
            f"{unread.name} has {len(unread.class_names)} classes, but {path} has "
            f"{model.num_classes}; give a --dataset of the classes it was trained on"
        )
    fraction = Crop.RESIZED.evaluation_fraction
    images, labels = unread.load_split(split, (size, size, channels), fraction)
    if images.shape[3] == 1 and channels == 3:
        images = np.repeat(images, 3, axis=3)
    shape = images.shape[1:]
    if shape[2] != channels:
        raise InputError(
            f"{unread.name} has images of {shape[2]} channels, but {path} takes "
            f"{channels}; give a --dataset of such images, or folder:PATH"
        )
    mean, std = imagenet_statistics(channels)
    return Subject(
        name=str(path),
        origin={"weights": str(path), "model": network},
        model=model,
        variables=variables,
        preprocess=Preprocess(shape, mean, std, size=None if shape[:2] == (size, size) else size),
        class_names=unread.class_names,
        dataset=unread.name,
        split=Split(images, labels),
    )
