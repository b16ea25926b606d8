"""Files written whole or not at all, and what to say when they cannot be."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flaxnets.errors import StorageError
from flaxnets.text import megabytes

INTACT = "what was saved before is intact, and the same command goes on from there"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `path` so that whoever reads it, at any time, finds the old content or all of the new.

    Text is written in UTF-8.

    Raises:
      StorageError: it cannot be written; the old content is still there.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors(path, len(data)):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        try:
            temporary.unlink(missing_ok=True)  # never through a link, wherever it leads
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)  # half a file takes up space
            raise


def set_aside(path: Path, suffix: str) -> Path:
    """Rename `path` to the first free one of `path.suffix`, `path.suffix-2` ..., which is returned:
    what it holds may be needed by somebody."""
    aside, number = path.with_name(f"{path.name}.{suffix}"), 1
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = path.with_name(f"{path.name}.{suffix}-{number}")
    path.rename(aside)
    return aside


@contextmanager
def storage_errors(path: Path, size: int) -> Iterator[None]:
    """Turn any failure to write `size` bytes at `path` into one line that says what to do.

    Libraries report such failures in many ways (and hide the system's own error number in a text);
    so the place itself is asked what is wrong with it. An error that has another reason passes.

    Raises:
      StorageError: there is no space, no permission or no such directory any more.
    """
    try:
        yield
    except Exception as error:
        # The outer of two speaks: a checkpoint needs more than the file that was the last straw.
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
        needs = f"it needs about {megabytes(size)}, and {megabytes(free)} are free"
        return f"{needs}; make space; {INTACT}"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"no permission to write in {place}; {INTACT}"
    return os.strerror(number) if number else None
