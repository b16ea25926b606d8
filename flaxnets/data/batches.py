"""Which examples make a step, and what is done to them; pure functions that run on the device."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


@partial(jax.jit, static_argnames="num_examples")
def epoch_order(key: jax.Array, epoch: jax.Array | int, num_examples: int) -> jax.Array:
    """A fresh order of all examples for each epoch: int32 `(num_examples,)`, from `key` alone."""
    key = jax.random.fold_in(jax.random.fold_in(key, 0), epoch)
    return jax.random.permutation(key, num_examples).astype(jnp.int32)


def batch_indices(order: jax.Array, step: jax.Array | int, batch_size: int) -> jax.Array:
    """The examples of training step `step` (counted over the whole run): int32 `(batch_size,)`.

    `order` is that of the step's epoch. Examples left over at the end of an epoch are dropped.
    """
    steps_per_epoch = order.shape[0] // batch_size
    return jax.lax.dynamic_slice_in_dim(order, step % steps_per_epoch * batch_size, batch_size)


@dataclass(frozen=True)
class Augmentation:
    """Random crops and mirror images, as in He et al. (2015), section 4.2.

    Attributes:
      pad: black pixels added on every side before a crop of the original size; 0 for no crop.
      flip: whether half of the images are mirrored left to right.
    """

    pad: int = 0
    flip: bool = False

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Augment `(batch, height, width, channels)` of any type, each image on its own."""
        crop_key, flip_key = jax.random.split(key)
        if self.pad:
            pad = ((self.pad, self.pad), (self.pad, self.pad), (0, 0))
            corners = jax.random.randint(crop_key, (len(images), 2), 0, 2 * self.pad + 1)

            def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
                start = (corner[0], corner[1], 0)
                return jax.lax.dynamic_slice(jnp.pad(image, pad), start, image.shape)

            images = jax.vmap(crop)(images, corners)
        if self.flip:
            mirrored = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
            images = jnp.where(mirrored, images[:, :, ::-1], images)
        return images


@dataclass(frozen=True)
class Preprocess:
    """Raw images to what a network was trained on.

    Attributes:
      image_shape: height, width and channels.
      mean, std: of each channel over the training images, on a scale of 0 to 1.
    """

    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: jax.Array | np.ndarray) -> jax.Array:
        """uint8 `(batch, height, width, channels)` -> normalised float32 of the same shape.

        Raises:
          ValueError: the images are not uint8 or of another shape.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(
                f"expected uint8 images (batch, {expected}), got {images.dtype} {images.shape}"
            )
        mean, std = jnp.float32(self.mean), jnp.float32(self.std)
        return (jnp.asarray(images).astype(jnp.float32) / 255 - mean) / std
