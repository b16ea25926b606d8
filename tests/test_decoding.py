"""Typed values from JSON: strict, and one clear line for whatever does not fit."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from flaxnets.decoding import Count, Finite, decode, encode
from flaxnets.errors import InputError

pytestmark = pytest.mark.unit


@dataclass(frozen=True)
class Inner:
    mean: tuple[Finite, ...]


@dataclass(frozen=True)
class Outer:
    count: Count
    inner: Inner
    factor: float | tuple[float, ...] = 0.1

    def __post_init__(self) -> None:
        if self.count == 13:
            raise InputError("13 is no count")


GOOD = {"count": 1, "inner": {"mean": [1, 2.5]}, "factor": [1, 2]}


def test_values_survive_a_round_trip():
    value = decode(Outer, GOOD, "it")
    assert value == Outer(1, Inner((1.0, 2.5)), (1.0, 2.0))
    assert decode(Outer, encode(value), "it") == value


def test_defaults_are_encoded_too():
    """An earlier version stored no such field, and its configs are compared as encoded."""
    value = decode(Outer, {"count": 1, "inner": {"mean": []}}, "it")
    assert encode(value) == {"count": 1, "inner": {"mean": []}, "factor": 0.1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": True}, "count"),
        ({"count": 1.0}, "count"),
        ({"count": -1}, "count"),
        ({"count": 2**63}, "count"),
        ({"count": 13}, "13 is no count"),
        ({"inner": None}, "inner"),
        ({"inner": {"mean": [math.nan]}}, "mean"),
        ({"inner": {"mean": [math.inf]}}, "mean"),
        ({"inner": {"mean": "12"}}, "mean"),
        ({"inner": {"mean": [1], "std": [1]}}, "unknown field inner.std"),
        ({"factor": ["a"]}, "factor"),
        ({"more": 1}, "unknown field more"),
    ],
)
def test_anything_else_is_refused_by_name(change, words):
    with pytest.raises(InputError, match=words):
        decode(Outer, {**GOOD, **change}, "it")


def test_a_missing_field_and_another_kind_of_value_are_refused():
    with pytest.raises(InputError, match=r"it is invalid .*count"):
        decode(Outer, {"inner": {"mean": []}}, "it")
    with pytest.raises(InputError, match=r"it is invalid .*list|it is invalid .*array"):
        decode(Outer, [], "it")


def test_unknown_fields_are_found_in_lists_too():
    value = {"values": [{"mean": [1]}, {"mean": [1], "std": [1]}]}
    with pytest.raises(InputError, match=r"unknown field values\.std"):
        decode(dict[str, list[Inner]], value, "it")


@pytest.mark.parametrize(
    "value", [{**GOOD, "\ud800": 1}, {**GOOD, "inner": {"mean": "\ud800"}}, {"\ud800": "\ud800"}]
)
def test_text_that_is_no_unicode_is_refused(value):
    with pytest.raises(InputError, match="it is invalid") as raised:
        decode(Outer, value, "it")
    assert str(raised.value).encode()


def test_numpy_numbers_are_encoded_as_numbers():
    value: Any = [np.int64(3), np.float32(0.5), np.bool_(True)]
    assert encode(value) == [3, 0.5, True]


def test_deep_nesting_is_refused():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(InputError, match=r"it is invalid"):
        decode(Outer, {**GOOD, "inner": {"mean": nested}}, "it")
