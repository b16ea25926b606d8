"""The errors that are the user's to mend."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What was asked for cannot be done; the message is one line that says what to do instead."""


class StorageError(OSError):
    """Something could not be written; the message is one line with the path, why, and the space
    it needs. What was saved before is intact."""


class DamageWarning(UserWarning):
    """Something stored is not as it was written, and something older or repaired is used."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean X?"` for the known word nearest to `word`, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""
