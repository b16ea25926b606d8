"""Options for the fields of a recipe."""

import argparse
import contextlib
import types
import typing
from dataclasses import fields, replace
from typing import Any

from flaxnets.cli.arguments import ArgumentParser, check_choice
from flaxnets.errors import InputError
from flaxnets.training import RECIPES, Recipe
from flaxnets.training.recipes import CHOICES, describe_fields

FIELDS = [field.name for field in fields(Recipe) if field.name != "name"]


def option_of(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def add_recipe_options(parser: ArgumentParser) -> None:
    """Add an option for each field of a recipe."""
    group = parser.add_argument_group("overrides of the recipe's fields")
    descriptions = describe_fields()
    for name in FIELDS:
        text = descriptions.get(name, "").replace("%", "%%")
        group.add_argument(option_of(name), metavar="X", help=text)


def choose_recipe(args: argparse.Namespace) -> Recipe:
    """Return the recipe `args.recipe`, with the fields given on the command line."""
    check_choice("--recipe", args.recipe, tuple(RECIPES))
    hints = typing.get_type_hints(Recipe)
    given = {
        name: parse_field(name, hints[name], getattr(args, name))
        for name in FIELDS
        if getattr(args, name) is not None
    }
    # A recipe has either `epochs` or `steps`: giving one unsets the other.
    if "epochs" in given and "steps" not in given:
        given["steps"] = None
    if "steps" in given and "epochs" not in given:
        given["epochs"] = None
    return replace(RECIPES[args.recipe], **given)


def parse_field(name: str, kind: Any, text: str) -> Any:
    """Parse the value of a recipe's field by its annotated type."""
    flag = option_of(name)
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if name in CHOICES:
        check_choice(flag, text, CHOICES[name])
        return text
    if bool in kinds:
        check_choice(flag, text, ("true", "false"))
        return text == "true"
    listed = [k for k in kinds if typing.get_origin(k) is tuple]
    with contextlib.suppress(ValueError):
        if listed and ("," in text or float not in kinds):
            return tuple(float(part) for part in text.split(",") if part)
        value = (int if int in kinds else float)(text)
        if value != value or abs(value) == float("inf"):
            raise ValueError
        return value
    example = "0.5,0.75" if listed else "3" if int in kinds else "0.1"
    raise InputError(f"{flag} {text!r} is not a number such as {example}")
