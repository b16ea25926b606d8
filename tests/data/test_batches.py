import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flaxnets.data import Augmentation, Preprocess, batch_indices, epoch_order
from flaxnets.data.batches import COLOUR_DIRECTIONS, COLOUR_SCALES

pytestmark = pytest.mark.unit


def test_an_epoch_visits_each_example_at_most_once_and_epochs_differ():
    key = jax.random.key(0)
    orders = [epoch_order(key, epoch, 103) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(103))
    assert orders[0].tolist() != orders[1].tolist()
    batches = [i for step in range(5, 10) for i in batch_indices(orders[1], step, 20).tolist()]
    assert batches == orders[1][:100].tolist()  # the three left over are dropped


def test_batches_depend_on_seed_and_step_alone():
    def order(seed):
        return epoch_order(jax.random.key(seed), 4, 50)

    assert (order(1) == order(1)).all()
    assert (order(1) != order(2)).any()


def test_crops_and_mirrors_come_from_the_padded_image():
    images = jnp.asarray(np.random.RandomState(0).randint(1, 255, (64, 6, 5, 2)), jnp.uint8)
    augmented = np.asarray(Augmentation(pad=2, flip=True)(jax.random.key(3), images))
    assert augmented.dtype == np.uint8
    seen = set()
    for before, after in zip(np.asarray(images), augmented, strict=True):
        padded = np.pad(before, ((2, 2), (2, 2), (0, 0)))
        places = [
            (top, left, mirrored)
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            for crop in [padded[top : top + 6, left : left + 5]]
            if (after == (crop[:, ::-1] if mirrored else crop)).all()
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(5))
    assert {mirrored for _, _, mirrored in seen} == {False, True}


def test_no_augmentation_changes_nothing():
    images = jnp.ones((2, 4, 4, 1), jnp.uint8)
    assert (Augmentation()(jax.random.key(0), images) == images).all()


def test_preprocess_normalises_each_channel():
    preprocess = Preprocess((1, 1, 2), mean=(0.5, 0.2), std=(0.25, 0.1))
    values = preprocess(np.array([[[[255, 51]]]], np.uint8))
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, [[[[2.0, 0.0]]]], atol=1e-6)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 1, 1, 2), np.float32),
        np.zeros((2, 1, 1, 3), np.uint8),
        np.zeros((1, 1, 2), np.uint8),
    ],
)
def test_preprocess_refuses_other_images(images):
    preprocess = Preprocess((1, 1, 2), mean=(0.5, 0.2), std=(0.25, 0.1))
    with pytest.raises(ValueError, match=r"expected uint8 images \(batch, 1, 1, 2\)"):
        preprocess(images)


def ramp(height, width):
    """An image whose first channel is the row and whose second the column, 0 to 1, three times."""
    rows = np.linspace(0, 255, height)[:, None] * np.ones((1, width))
    columns = np.linspace(0, 255, width)[None] * np.ones((height, 1))
    return np.tile(np.stack([rows, columns, np.zeros_like(rows)], -1)[None], (64, 1, 1, 1))


@pytest.mark.parametrize("crop", ["resized", "scaled", "fixed"])
def test_crops_are_resized_parts(crop):
    """Seen on a ramp: its ends tell where a crop begins and ends."""
    images = ramp(48, 48).astype(np.uint8)
    crops = Augmentation(crop=crop)(jax.random.key(3), jnp.asarray(images))
    assert crops.shape == images.shape
    assert crops.min() >= 0
    assert crops.max() <= 255
    rows = np.ptp(np.asarray(crops[:, :, 24, 0]), axis=1) / 255
    columns = np.ptp(np.asarray(crops[:, 24, :, 1]), axis=1) / 255
    tops = np.asarray(crops[:, 0, 24, 0]) / 255
    area, ratio = rows * columns, columns / rows
    if crop == "resized":
        assert 0.05 < area.min() < 0.3
        assert 0.75 < area.max() <= 1.01
        assert 0.6 < ratio.min() < 0.9
        assert 1.1 < ratio.max() < 1.6
    else:
        low, high = (224 / 480, 224 / 256) if crop == "scaled" else (224 / 256, 224 / 256)
        np.testing.assert_allclose(ratio, 1, atol=0.05)
        np.testing.assert_allclose([rows.min(), rows.max()], [low, high], atol=0.05)
    assert np.ptp(tops) > 0.1  # not all at one place


def test_shifts_may_repeat_the_edge():
    images = jnp.full((16, 8, 8, 1), 200, jnp.uint8)
    key = jax.random.key(0)
    assert (Augmentation(pad=2, edge=True)(key, images) == 200).all()
    assert (Augmentation(pad=2)(key, images) == 0).any()


def test_colour_noise_is_the_same_all_over_an_image():
    """Of the known covariance: that of ImageNet's colours times the square of the amount."""
    images = jnp.full((20_000, 2, 2, 3), 100, jnp.uint8)
    noise = np.asarray(Augmentation(colour_noise=0.1)(jax.random.key(0), images)) - 100
    assert np.ptp(noise.reshape(len(noise), 4, 3), axis=1).max() < 1e-4
    directions, scales = np.array(COLOUR_DIRECTIONS), np.array(COLOUR_SCALES)
    expected = 0.01 * directions @ np.diag(scales**2) @ directions.T
    np.testing.assert_allclose(np.cov(noise[:, 0, 0].T), expected, rtol=0.05, atol=0.02)
    grey = jnp.full((2, 2, 2, 1), 100, jnp.uint8)
    assert (Augmentation(colour_noise=0.1)(jax.random.key(0), grey) == 100).all()


def test_preprocessing_resizes():
    images = np.random.default_rng(0).integers(0, 256, (2, 7, 7, 1), np.uint8)
    preprocess = Preprocess((7, 7, 1), (0.5,), (0.25,), size=14)
    assert preprocess.input_shape == (14, 14, 1)
    whole = np.asarray(preprocess(images))[..., 0] * 0.25 + 0.5
    pictures = [Image.fromarray(image[..., 0]).resize((14, 14), 2) for image in images]
    expected = list(map(np.asarray, pictures))
    np.testing.assert_allclose(255 * whole, np.stack(expected), atol=1.01)  # Pillow rounds twice
