"""Crops: the part of a picture that a network sees, in training and in evaluation.

Pictures are cropped with NumPy while they are decoded, and images in memory with JAX on the device.
"""

import math
from enum import StrEnum

import jax
import jax.numpy as jnp
import numpy as np

from flaxnets.errors import InputError

# Part of a picture, in possibly fractional pixels: left, top, right, bottom.
Box = tuple[float, float, float, float]

# Crop size for which He et al. (2015) and Simonyan and Zisserman (2014) state their scales, and
# the shorter side of the picture in the usual evaluation with it.
REFERENCE_CROP, REFERENCE_SHORTER = 224, 256
# Range of a resized crop's share of the area, and its widest shape.
AREA, WIDEST = (0.08, 1.0), 4 / 3


class Crop(StrEnum):
    """Random crop of a training image; its value is stored in configs.

    `RESIZED` takes a random area (8 to 100 %) and shape (3:4 to 4:3) and resizes it (Szegedy et al.
    2014, arXiv:1409.4842, section 6). `SCALED` takes a random square of 224 pixels of a picture
    with a shorter side of 256 to 480, or the same part for other sizes (He et al. 2015, section
    3.4). `FIXED` is the same with a shorter side of 256 (Krizhevsky et al. 2012, section 4.1).
    `NONE` takes the largest centred square.
    """

    RESIZED = "resized"
    SCALED = "scaled"
    FIXED = "fixed"
    NONE = "none"

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise InputError(f"crop must be one of {', '.join(cls)}, not {value!r}")

    @property
    def evaluation_fraction(self) -> float:
        """Share of the shorter side seen in evaluation: 224 of 256 if training takes crops."""
        return 1.0 if self is Crop.NONE else REFERENCE_CROP / REFERENCE_SHORTER

    @property
    def _shorter(self) -> tuple[float, float]:
        """Range of the shorter side of which a square crop has 224 pixels."""
        return (REFERENCE_SHORTER, 480 if self is Crop.SCALED else REFERENCE_SHORTER)

    def draw_box(self, rng: np.random.Generator, size: int, width: int, height: int) -> Box:
        """Draw the box of a `width` x `height` picture that becomes an image of `size` pixels."""
        if self is Crop.NONE:
            return fit_box(width, height, size, size, 1.0)
        if self is Crop.RESIZED:
            return resized_box(rng, width, height)
        side = min(width, height) * REFERENCE_CROP / rng.uniform(*self._shorter)
        left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
        return left, top, left + side, top + side

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Crop images `(batch, height, width, channels)`, each at random: float32 of this shape.

        `NONE` returns them unchanged.
        """
        if self is Crop.NONE:
            return images
        count, height, width, _ = images.shape
        size_key, shape_key, place_key = jax.random.split(key, 3)
        if self is Crop.RESIZED:
            area = jax.random.uniform(size_key, (count,), minval=AREA[0], maxval=AREA[1])
            log_ratio = jax.random.uniform(
                shape_key, (count,), minval=-math.log(WIDEST), maxval=math.log(WIDEST)
            )
            # Shares of the image's sides; a crop that would not fit gets the whole side.
            root = jnp.exp(log_ratio / 2)
            shares = jnp.minimum(jnp.sqrt(area)[:, None] * jnp.stack([1 / root, root], -1), 1.0)
        else:
            low, high = (side / REFERENCE_CROP for side in self._shorter)
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


def fit_box(width: int, height: int, new_height: int, new_width: int, fraction: float) -> Box:
    """Return the centred box of a `width` x `height` picture that becomes a new image.

    It covers `fraction` of the limiting side.
    """
    scale = fraction * min(width / new_width, height / new_height)
    left = max(0.0, (width - scale * new_width) / 2)
    top = max(0.0, (height - scale * new_height) / 2)
    return left, top, width - left, height - top


def resized_box(
    rng: np.random.Generator, width: int, height: int, area: tuple[float, float] = AREA
) -> Box:
    """Draw the box of a `RESIZED` crop, as torchvision does.

    Args:
      area: range of the crop's share of the area, sampled uniformly.
    """
    for _ in range(10):
        pixels = width * height * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(WIDEST)))
        box_width, box_height = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(rng.integers(width - box_width + 1))
            top = int(rng.integers(height - box_height + 1))
            return left, top, left + box_width, top + box_height
    box_width, box_height = min(width, height * WIDEST), min(height, width / (3 / 4))
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height
