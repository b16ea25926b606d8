"""Errors and warnings that tell the user what to do, each in one printable line."""

import difflib
from collections.abc import Iterable

from flaxnets.text import printable


class InputError(ValueError):
    """What was asked for cannot be done; the message says what to do instead."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


class StorageError(OSError):
    """Something could not be written; the message names the path, the reason and the space it
    needs. What was saved before is intact."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


class FallbackWarning(UserWarning):
    """Something else is used in place of what was expected."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


class DamageWarning(FallbackWarning):
    """Something stored is not as it was written, and something older or repaired is used."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean X?"` for the known word nearest to `word`, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""
