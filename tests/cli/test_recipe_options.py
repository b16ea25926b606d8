"""Options for the fields of a recipe, parsed by the types of the fields."""

import typing
from dataclasses import fields
from typing import Any

import pytest

from flaxnets.cli.arguments import ArgumentParser
from flaxnets.cli.recipe_options import add_recipe_options, choose_recipe, parse_field
from flaxnets.errors import InputError
from flaxnets.training import RECIPES, Recipe

pytestmark = pytest.mark.unit

TYPES = typing.get_type_hints(Recipe)


def choose(*arguments: str) -> Recipe:
    parser = ArgumentParser()
    parser.add_argument("--recipe", default="digits")
    add_recipe_options(parser)
    return choose_recipe(parser.parse([*arguments]))


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("learning_rate", "0.05", 0.05),
        ("learning_rate", "1", 1.0),
        ("batch_size", "64", 64),
        ("epochs", "3", 3),  # or None
        ("nesterov", "true", True),
        ("nesterov", "false", False),
        ("optimizer", "adam", "adam"),
        ("decay_at", "0.5,0.75", (0.5, 0.75)),
        ("decay_at", "0.5", (0.5,)),
        ("decay_at", "", ()),
        ("decay_factor", "0.2", 0.2),  # one number, or one for each
        ("decay_factor", "0.2,0.5", (0.2, 0.5)),
    ],
)
def test_a_field_is_parsed_by_its_type(field: str, text: str, value: object) -> None:
    parsed = parse_field(field, TYPES[field], text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("learning_rate", "fast", "--learning-rate 'fast' is not a number such as 0.1"),
        ("learning_rate", "nan", "--learning-rate 'nan' is not a number such as 0.1"),
        ("learning_rate", "inf", "--learning-rate 'inf' is not a number such as 0.1"),
        ("batch_size", "1.5", "--batch-size '1.5' is not a number such as 3"),
        ("epochs", "none", "--epochs 'none' is not a number such as 3"),
        ("nesterov", "yes", "--nesterov must be one of true, false, not 'yes'"),
        (
            "optimizer",
            "adamw",
            "--optimizer must be one of sgd, adam, not 'adamw'; did you mean adam?",
        ),
        ("decay_at", "0.5;0.75", "--decay-at '0.5;0.75' is not a number such as 0.5,0.75"),
        ("decay_factor", "0.2,x", "--decay-factor '0.2,x' is not a number such as 0.5,0.75"),
    ],
)
def test_anything_else_is_refused(field: str, text: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_field(field, TYPES[field], text)
    assert str(refused.value) == message


def test_only_what_is_given_changes() -> None:
    assert choose() == RECIPES["digits"]
    changed = choose("--recipe", "he2015-cifar", "--weight-decay", "0.001", "--nesterov", "true")
    differences: dict[str, Any] = {
        field.name: getattr(changed, field.name)
        for field in fields(Recipe)
        if getattr(changed, field.name) != getattr(RECIPES["he2015-cifar"], field.name)
    }
    assert differences == {"weight_decay": 0.001, "nesterov": True}
    with pytest.raises(InputError, match=r"--recipe must be one of .* did you mean digits"):
        choose("--recipe", "digit")


def test_epochs_and_steps_replace_each_other() -> None:
    for given, other in (("epochs", "steps"), ("steps", "epochs")):
        recipe = choose(f"--{given}", "7")
        assert getattr(recipe, given) == 7
        assert getattr(recipe, other) is None
    with pytest.raises(InputError, match="give either steps or epochs"):
        choose("--epochs", "7", "--steps", "7")
