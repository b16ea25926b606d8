"""Manifests: the sha256 of every file in a directory, as `sha256sum -c manifest.sha256` reads."""

import hashlib
import os
import stat
from pathlib import Path

from flaxnets.files import write_atomic

MANIFEST = "manifest.sha256"


def write_manifest(directory: Path) -> None:
    """Write the manifest of `directory`."""
    digests = {name: _sha256(path) for name, path in _files(directory).items()}
    write_atomic(directory / MANIFEST, _text(digests))


def _text(digests: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def find_damage(directory: Path) -> str | None:
    """Describe one difference between `directory` and its manifest, or return None.

    Nothing outside `directory` is read: links count as damage.
    """
    if not (directory / MANIFEST).is_file() or (directory / MANIFEST).is_symlink():
        return f"it has no {MANIFEST}: it is being written, or was never completed"
    try:
        text = (directory / MANIFEST).read_bytes().decode()
    except UnicodeDecodeError:
        return f"{MANIFEST} is damaged"
    lines = [line.partition("  ") for line in text.splitlines()]
    expected = {name: digest for digest, _, name in lines}
    found = _files(directory)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is not in the manifest"
        if not stat.S_ISREG(found[name].lstat().st_mode):
            return f"{name} is not a file"
        if _sha256(found[name]) != expected[name]:
            return f"{name} has been changed"
    return None if text == _text(expected) else f"{MANIFEST} is damaged"


def _files(directory: Path) -> dict[str, Path]:
    """Map relative paths to all that is in `directory` except folders, without following links."""
    return {
        path.relative_to(directory).as_posix(): path
        for folder, folders, names in os.walk(directory, onerror=_raise)
        for path in (Path(folder, name) for name in (*folders, *names))
        if (path.is_symlink() or not path.is_dir()) and path != directory / MANIFEST
    }


def _raise(error: OSError) -> None:
    raise error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
