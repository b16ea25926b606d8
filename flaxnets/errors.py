"""Errors and warnings for the user: one printable line each, with advice on what to do."""

import difflib
import re
from collections.abc import Iterable

from flaxnets.text import printable

ABBREVIATIONS = {"bs": "batchsize", "lr": "learningrate", "wd": "weightdecay"}


class InputError(ValueError):
    """Invalid user input; the message says what to do instead."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


class SettingError(InputError):
    """A setting of a study is invalid; the message begins with its name."""


class StorageError(OSError):
    """A failed write; the message names the path, the reason and the space needed.

    Everything saved before is intact.
    """

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


class FallbackWarning(UserWarning):
    """A fallback is used in place of what was expected."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


class DamageWarning(FallbackWarning):
    """Stored data is damaged, and an older or repaired copy is used."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean X?"` for the known word nearest to `word`, or an empty string.

    Case, dashes and underscores are ignored, and common abbreviations are expanded.
    """

    def normalise(name: str) -> str:
        name = re.sub(r"[^a-z0-9]", "", name.casefold())
        return ABBREVIATIONS.get(name, name)

    names = {normalise(each): each for each in known}
    matches = difflib.get_close_matches(normalise(word), names, n=1, cutoff=0.5)
    return f"; did you mean {names[matches[0]]}?" if matches else ""
