"""Validation of a run's config before use: it may come from an untrusted source."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from flaxnets.errors import InputError

# No `namespace:name`: TFDS would fetch and run community code for it.
DATASET_NAME = re.compile(r"\w[\w.+-]*(/[\w.+-]+)?(:[\d.]+)?")

DEEPEST = 1202  # the paper's deepest; building deeper networks takes minutes

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_valid, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    """Return whether `value` is a plain name or `module:function`, safe to print and draw."""
    return isinstance(value, str) and re.fullmatch(r"[\w.:]{1,200}", value) is not None


def _is_depth(value: Any) -> bool:
    # Early runs of alexnet2012 have the year as their depth.
    return _is_count(value) and (value <= DEEPEST or value == 2012)


def is_network(value: Any) -> bool:
    """Return whether `value` is a name for `create_model` with a depth that can be built."""
    if not _is_name(value):
        return False
    return all(number.isascii() and _is_depth(int(number)) for number in re.findall(r"\d+", value))


def _is_model(value: Any) -> bool:
    """Check for a library model (`name`, plain `overrides`) or a custom one (`build`)."""
    if not isinstance(value, dict) or not _is_count(value.get("num_classes")):
        return False
    if "build" in value:
        return _is_name(value["build"])
    overrides = value.get("overrides")
    return (
        is_network(value.get("name"))
        and isinstance(overrides, dict)
        and all(isinstance(entry, str | int | float | None) for entry in overrides.values())
    )


def _is_preprocess(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"image_shape", "mean", "std", "size"}
        and (value["size"] is None or (_is_count(value["size"]) and value["size"] > 0))
        and _are(_is_count)(value["image_shape"])
        and len(value["image_shape"]) == 3
        and all(
            _are(_is_number)(value[name]) and len(value[name]) == value["image_shape"][2]
            for name in ("mean", "std")
        )
    )


FIELDS: dict[str, Callable[[Any], bool]] = {
    "kind": _is_name,
    "depth": _is_depth,
    "seed": _is_count,
    "model": _is_model,
    "blocks": _are(_is_count),
    "block": lambda value: value is None or _is_name(value),
    "parameters": _is_count,
    "precision": lambda value: value in tuple(DTYPES),
    "class_names": _are(_is_text),
    "preprocess": _is_preprocess,
}


def check_config(config: Any) -> None:
    """Check that `config` is the config of a run.

    Raises:
      InputError: a field is missing or invalid; the message names it.
    """
    if not isinstance(config, dict):
        raise InputError("its config is not that of a run")
    for name, is_valid in FIELDS.items():
        if name not in config or not is_valid(config[name]):
            raise InputError(f"its config has no valid {name}")
