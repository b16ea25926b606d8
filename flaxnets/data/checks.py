"""Decoding checks of the pictures in a folder, cached between runs."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import PIL

from flaxnets.data.images import check_picture
from flaxnets.files import cache_directory, write_cache

READ_AT_ONCE = 16
# Ctrl-C takes effect after at most this many pictures.
CHECKED_TOGETHER = 256


class Check(NamedTuple):
    """Outcome of decoding a picture.

    Attributes:
      size, modified: size of the file in bytes and its modification time in nanoseconds; -1 if it
        could not be opened.
      mode: mode of the picture in Pillow.
      digest: hash of the file's content.
      reason: why the picture cannot be decoded; empty if it can.
    """

    size: int
    modified: int
    mode: str
    digest: str
    reason: str


def check_pictures(
    root: Path, names: Sequence[str], on_progress: Callable[[int, int], None]
) -> dict[str, Check]:
    """Check all pictures `names` in `root`, decoding only those that have changed since last time.

    Args:
      on_progress: called now and then with the number of checked pictures and the total.
    """
    memory = cache_path(root, ".json")
    known = _recall(memory)
    checks: dict[str, Check] = {}
    try:
        with ThreadPoolExecutor(READ_AT_ONCE) as executor:
            for start in range(0, len(names), CHECKED_TOGETHER):
                some = names[start : start + CHECKED_TOGETHER]
                found = executor.map(lambda name: _check(root / name, known.get(name)), some)
                checks.update(zip(some, found, strict=True))
                on_progress(len(checks), len(names))
    finally:
        # Save after Ctrl-C too, so that these pictures need not be decoded again.
        if any(known.get(name) != check for name, check in checks.items()):
            _remember(memory, known | checks)
    return checks


def cache_path(root: Path, suffix: str) -> Path:
    """Return the path of a file about the folder `root` in the user's cache directory."""
    digest = hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()
    return cache_directory() / f"pictures-{digest[:16]}{suffix}"


def _check(path: Path, known: Check | None) -> Check:
    try:
        status = path.stat()
        if known and known[:2] == (status.st_size, status.st_mtime_ns):
            return known
        data = path.read_bytes()
    except OSError as error:
        # Size -1 makes the next run try again: permissions may change without a new size or time.
        return Check(-1, -1, "", "", error.strerror or "it cannot be opened")
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    mode, reason = "", "it is empty"
    if data:
        try:
            mode, reason = check_picture(data), ""
        except ValueError as error:
            reason = str(error)
    return Check(status.st_size, status.st_mtime_ns, mode, digest, reason)


def _recall(path: Path) -> dict[str, Check]:
    """Read what `_remember` wrote; empty if it is damaged or from another version of Pillow."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["pillow"] != PIL.__version__:
            return {}
        entries: dict[Any, Any] = content["pictures"]
        checks = {name: Check(*entry) for name, entry in entries.items()}
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return {}
    kinds = [int, int, str, str, str]
    valid = all([type(value) for value in check] == kinds for check in checks.values())
    return checks if valid else {}


def _remember(path: Path, checks: dict[str, Check]) -> None:
    # `json.dumps` escapes names that are not UTF-8.
    write_cache(path, json.dumps({"pillow": PIL.__version__, "pictures": checks}))
