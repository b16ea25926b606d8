"""Errors and warnings that tell the user what to do, each in one printable line."""

import difflib
import re
from collections.abc import Iterable

from flaxnets.text import printable

ABBREVIATIONS = {"bs": "batchsize", "lr": "learningrate", "wd": "weightdecay"}


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
    """`"; did you mean X?"` for the known word nearest to `word`, or an empty string.

    Case, dashes and underscores do not count, and usual abbreviations are known.
    """

    def normalise(name: str) -> str:
        name = re.sub(r"[^a-z0-9]", "", name.casefold())
        return ABBREVIATIONS.get(name, name)

    names = {normalise(each): each for each in known}
    matches = difflib.get_close_matches(normalise(word), names, n=1, cutoff=0.5)
    return f"; did you mean {names[matches[0]]}?" if matches else ""
