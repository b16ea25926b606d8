"""The values of crops in stored configs, and what recipes make of them."""

import json
from dataclasses import asdict, replace

import pytest

from flaxnets import InputError
from flaxnets.data import Augmentation, Crop
from flaxnets.decoding import decode, encode
from flaxnets.training import RECIPES

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", ["resized", "scaled", "fixed", "none"])
def test_crops_are_stored_by_name(name):
    augmentation = Augmentation(crop=Crop(name))
    assert augmentation == Augmentation(crop=name)
    assert augmentation.crop is Crop(name)
    for stored in (asdict(augmentation), encode(augmentation)):
        text = json.dumps(stored)
        assert json.loads(text)["crop"] == name
        assert decode(Augmentation, json.loads(text), "it") == augmentation
    assert json.loads(text) == asdict(augmentation)  # configs are compared in this way


def test_an_unknown_crop_is_refused():
    with pytest.raises(InputError, match="crop must be one of resized, scaled, fixed, none, not"):
        Augmentation(crop="random")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="it is invalid"):
        decode(Augmentation, {**asdict(Augmentation()), "crop": "random"}, "it")


@pytest.mark.parametrize("augment", ["default", "none", "keras"])
def test_recipes_without_a_crop_see_whole_pictures(augment):
    recipe = replace(RECIPES["adam"], augment=augment)
    assert recipe.crop is Crop.NONE
    assert recipe.augmentation(Augmentation(), 32).crop is Crop.NONE
    assert recipe.crop.evaluation_fraction == 1


@pytest.mark.parametrize("crop", ["resized", "scaled", "fixed"])
def test_recipes_with_a_crop_see_seven_eighths(crop):
    recipe = replace(RECIPES["adam"], augment=f"{crop}-crop")
    assert recipe.crop is Crop(crop)
    assert recipe.augmentation(Augmentation(), 32) == Augmentation(crop=Crop(crop), flip=True)
    assert recipe.crop.evaluation_fraction == 0.875
