"""Files written whole or not at all."""

import errno
import os
from pathlib import Path


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `path` so that whoever reads it, at any time, finds the old content or all of the new.

    Text is written in UTF-8.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
