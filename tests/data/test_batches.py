import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxnets.data import Augmentation, Preprocess, batch_indices, epoch_order


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
