"""Batch selection, augmentation and preprocessing: pure functions that run on the device."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from flaxnets.decoding import Count, Finite, Positive
from flaxnets.errors import InputError

# Channel statistics of ImageNet's training images, on a scale of 0 to 1, as in torchvision.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Principal components of the colours of ImageNet's training images, on a scale of 0 to 255: their
# scales, and their directions in columns (fb.resnet.torch, after Krizhevsky et al. 2012).
COLOUR_SCALES = (255 * 0.2175, 255 * 0.0188, 255 * 0.0045)
COLOUR_DIRECTIONS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)
# Range of the image's shorter side, relative to the crop size.
SCALED_CROP = {"scaled": (256 / 224, 480 / 224), "fixed": (256 / 224, 256 / 224)}


def imagenet_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation for images of 3 or 1 channels, on a scale of 0 to 1."""
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)


@partial(jax.jit, static_argnames="num_examples")
def epoch_order(key: jax.Array, epoch: jax.Array | int, num_examples: int) -> jax.Array:
    """Shuffle all examples for an epoch: int32 `(num_examples,)`, fixed by `key` and `epoch`."""
    key = jax.random.fold_in(jax.random.fold_in(key, 0), epoch)
    return jax.random.permutation(key, num_examples).astype(jnp.int32)


def batch_indices(order: jax.Array, step: jax.Array | int, batch_size: int) -> jax.Array:
    """Return the example indices of training step `step`: int32 `(batch_size,)`.

    Steps count over the whole run, and `order` is that of the step's epoch. Examples left over at
    the end of an epoch are dropped.
    """
    steps_per_epoch = order.shape[0] // batch_size
    return jax.lax.dynamic_slice_in_dim(order, step % steps_per_epoch * batch_size, batch_size)


@dataclass(frozen=True)
class Augmentation:
    """Random crops, mirroring and colour noise.

    Attributes:
      pad: pixels added on every side before a crop of the original size; 0 for none.
      edge: repeat the edge in these pixels; otherwise they are black (He et al. 2015, section 4.2).
      flip: mirror each image left to right with probability 1/2.
      crop: `resized`, a random area (8 to 100 %) and shape (3:4 to 4:3) resized to the image's
        (Szegedy et al. 2014, arXiv:1409.4842, section 6); `scaled`, a random square of 224 pixels
        for a shorter side of 256 to 480 (He et al. 2015, section 3.4); `fixed`, the same for a
        shorter side of 256 (Krizhevsky et al. 2012, section 4.1); or `none`.
      colour_noise: standard deviation of the noise along the principal components of ImageNet's
        colours, in units of their scales (0.1 in Krizhevsky et al. 2012, section 4.1). Images of
        one channel get none.
    """

    pad: int = 0
    flip: bool = False
    edge: bool = False
    crop: Literal["none", "resized", "scaled", "fixed"] = "none"
    colour_noise: float = 0.0

    def with_colour_noise(self, colour_noise: float) -> "Augmentation":
        """Return a copy with this colour noise."""
        return replace(self, colour_noise=colour_noise)

    @property
    def seen_at_evaluation(self) -> float:
        """Share of the shorter side seen at evaluation: 224 of 256 if training takes crops."""
        return 1.0 if self.crop == "none" else 224 / 256

    def without_crops(self) -> "Augmentation":
        """Return the augmentation that remains for images already cropped and mirrored."""
        return replace(self, flip=False, crop="none")

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Augment `(batch, height, width, channels)` on a scale of 0 to 255.

        Each image is augmented independently. uint8 images stay uint8 unless their colours or sizes
        change, which gives float32.
        """
        crop_key, flip_key = jax.random.split(key)
        if self.crop != "none":
            images = self._crop(crop_key, images)
        if self.pad:
            pad = ((self.pad, self.pad), (self.pad, self.pad), (0, 0))
            corners = jax.random.randint(crop_key, (len(images), 2), 0, 2 * self.pad + 1)

            def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
                start = (corner[0], corner[1], 0)
                padded = jnp.pad(image, pad, mode="edge" if self.edge else "constant")
                return jax.lax.dynamic_slice(padded, start, image.shape)

            images = jax.vmap(crop)(images, corners)
        if self.flip:
            mirrored = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
            images = jnp.where(mirrored, images[:, :, ::-1], images)
        if self.colour_noise and images.shape[-1] == 3:
            images = images + self._noise(jax.random.fold_in(key, 2), len(images))
        return images

    def _noise(self, key: jax.Array, count: int) -> jax.Array:
        """Draw a colour shift for each image: `(count, 1, 1, 3)`."""
        amounts = self.colour_noise * jax.random.normal(key, (count, 3))
        shifts = (amounts * jnp.float32(COLOUR_SCALES)) @ jnp.float32(COLOUR_DIRECTIONS).T
        return shifts[:, None, None]

    def _crop(self, key: jax.Array, images: jax.Array) -> jax.Array:
        count, height, width, _ = images.shape
        size_key, shape_key, place_key = jax.random.split(key, 3)
        if self.crop == "resized":
            area = jax.random.uniform(size_key, (count,), minval=0.08, maxval=1.0)
            log_ratio = jax.random.uniform(
                shape_key, (count,), minval=-math.log(4 / 3), maxval=math.log(4 / 3)
            )
            # Shares of the image's sides; a crop that would not fit gets the whole side.
            root = jnp.exp(log_ratio / 2)
            shares = jnp.minimum(jnp.sqrt(area)[:, None] * jnp.stack([1 / root, root], -1), 1.0)
        else:
            low, high = SCALED_CROP[self.crop]
            shorter = jax.random.uniform(size_key, (count,), minval=low, maxval=high)
            shares = jnp.tile(1 / shorter[:, None], 2)
        sides = jnp.float32([height, width])
        starts = jax.random.uniform(place_key, (count, 2)) * (1 - shares) * sides

        def crop(image: jax.Array, share: jax.Array, start: jax.Array) -> jax.Array:
            scale = 1 / share
            return jax.image.scale_and_translate(
                image, image.shape, (0, 1), scale, -start * scale, "linear"
            )

        return jax.vmap(crop)(images.astype(jnp.float32), shares, starts)


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing of raw images, the same as in training.

    Attributes:
      image_shape: height, width and channels.
      mean, std: channel statistics of the training images, on a scale of 0 to 1.
      size: height and width that images are resized to (bilinear), or None to keep their size.
    """

    image_shape: tuple[Count, Count, Count]
    mean: tuple[Finite, ...]
    std: tuple[Finite, ...]
    size: Positive | None = None

    def __post_init__(self) -> None:
        if {len(self.mean), len(self.std)} != {self.image_shape[2]}:
            raise InputError("mean and std need one number for each channel")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the network's input."""
        if self.size is None:
            return self.image_shape
        return (self.size, self.size, self.image_shape[2])

    def __call__(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Normalise uint8 `(batch, height, width, channels)` to float32 of `input_shape`.

        Raises:
          ValueError: the images are not uint8 or have another shape.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(
                f"expected uint8 images (batch, {expected}), got {images.dtype} {images.shape}"
            )
        return self.normalise(images)

    def normalise(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Do the same for images of any dtype on a scale of 0 to 255."""
        mean, std = jnp.float32(self.mean), jnp.float32(self.std)
        normalised = (jnp.asarray(images).astype(jnp.float32) / 255 - mean) / std
        if self.size is None:
            return normalised
        return jax.image.resize(normalised, (len(images), *self.input_shape), "linear")
