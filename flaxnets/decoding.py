"""Decoding of stored JSON into typed values: files may come from an untrusted source.

msgspec has no dependencies and decodes ordinary frozen dataclasses, which pydantic would need to
decorate or configure. It does not report unknown fields of dataclasses, so this module does.
"""

import json
from dataclasses import fields
from enum import Enum
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from flaxnets.errors import InputError

T = TypeVar("T")

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, msgspec.Meta(gt=0, le=2**63 - 1)]
# NaN and infinities are outside every range.
Finite = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]


def decode(kind: type[T], value: object, what: str) -> T:
    """Convert JSON data to a value of type `kind`: a dataclass, or a container of plain values.

    Nothing is coerced, apart from lists to tuples and whole numbers to floats.

    Args:
      what: name of the value in the error message, such as `its config`.

    Raises:
      InputError: a field is missing, unknown or invalid; the message names it.
    """
    try:
        decoded = msgspec.convert(value, kind, strict=True)
        unknown = _find_unknown(value, encode(decoded))
    except (msgspec.ValidationError, RecursionError, UnicodeError) as error:
        # msgspec calls the outermost value `$`.
        reason = str(error).replace(" - at `$.", " - at `").replace("`", "")
        raise InputError(f"{what} is invalid ({reason})") from error
    if unknown:
        raise InputError(f"{what} is invalid (it has an unknown field {unknown})")
    return decoded


def encode(value: object) -> Any:
    """Convert a typed value to JSON data, which `decode` turns back into an equal value."""
    # msgspec's own encoding leaves out fields that it decoded to their defaults, and turns NaN into
    # null.
    return json.loads(json.dumps(value, default=_to_json))


def _to_json(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, np.generic):
        return value.item()
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _find_unknown(given: Any, known: Any, name: str = "") -> str | None:
    """Return the name of a field that `given` has and `known` lacks, or None."""
    if isinstance(given, dict) and isinstance(known, dict):
        for key, entry in given.items():
            inner = f"{name}.{key}".strip(".")
            if key not in known:
                return inner
            if found := _find_unknown(entry, known[key], inner):
                return found
    if isinstance(given, list) and isinstance(known, list):
        for entry, known_entry in zip(given, known, strict=True):
            if found := _find_unknown(entry, known_entry, name):
                return found
    return None
