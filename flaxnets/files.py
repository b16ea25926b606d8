"""Atomic file writes, and clear errors when they fail."""

import csv
import errno
import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from flaxnets.errors import InputError, StorageError
from flaxnets.text import megabytes

INTACT = "everything saved before is intact, and rerunning the command resumes from there"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `path` atomically: a reader finds either the old content or all of the new.

    Text is encoded as UTF-8.

    Raises:
      StorageError: the file cannot be written; the old content is intact.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors(path, len(data)):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        try:
            temporary.unlink(missing_ok=True)  # never write through a link
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)  # a partial file takes up space
            raise


def cache_directory() -> Path:
    """Return the directory of this library in the user's cache, which need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "flaxnets"


def write_cache(path: Path, content: str | bytes) -> bool:
    """Write to the cache, which nothing depends on, and return whether that succeeded."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError:
        return False
    return True


def set_aside(path: Path, suffix: str) -> Path:
    """Rename `path` to the first free one of `path.suffix`, `path.suffix-2` ..., and return that.

    The content is kept because somebody may still need it.
    """
    aside, number = path.with_name(f"{path.name}.{suffix}"), 1
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = path.with_name(f"{path.name}.{suffix}-{number}")
    path.rename(aside)
    return aside


def check_writable(out: Path) -> None:
    """Check that the directory `--out` can be written or created, without writing anything.

    Raises:
      InputError: it cannot.
    """
    try:
        existing = out
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if out.is_symlink() and not out.exists():
            raise InputError(f"--out {out} is a broken link; give a directory")
        if not existing.is_dir():
            raise InputError(f"--out {out}: {existing} is a file; give a directory")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(f"--out {out}: {existing} cannot be written; give another directory")
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}; give another directory") from error


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a CSV file atomically, floats in full precision and None as an empty cell.

    Raises:
      StorageError: as `write_atomic`.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


@contextmanager
def storage_errors(path: Path, size: int) -> Iterator[None]:
    """Turn any failure to write `size` bytes at `path` into one line that says what to do.

    Libraries report such failures in many ways, and some bury the system's error number in text, so
    the file system itself is checked for the cause. Errors with another cause propagate unchanged.

    Raises:
      StorageError: there is no space or no permission, or the directory no longer exists.
    """
    try:
        yield
    except Exception as error:
        # Report the outer path: its size is the whole checkpoint's, not the failed file's.
        cause = error.__cause__ if isinstance(error, StorageError) else error
        reason = _reason(path, size, cause)
        if reason is None:
            raise
        raise StorageError(f"{path} cannot be written: {reason}") from error


def _reason(path: Path, size: int, error: BaseException | None) -> str | None:
    place = path.parent
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"OS error (\d+)", str(error)):
        number = int(found[1])
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write in {place}; {INTACT}"
    if not place.is_dir():
        return f"the directory {place} is gone"
    free = shutil.disk_usage(place).free
    if number in (errno.ENOSPC, errno.EDQUOT) or free < size or "space left" in str(error):
        needs = f"it needs about {megabytes(size)}, and {megabytes(free)} is free"
        return f"{needs}; free up space; {INTACT}"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"no permission to write in {place}; {INTACT}"
    return os.strerror(number) if number else None
