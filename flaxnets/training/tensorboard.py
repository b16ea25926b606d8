"""Metrics as events that TensorBoard reads."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flaxnets.errors import InputError


@contextmanager
def open_tensorboard(directory: Path) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """A function that writes what is new in the rows of `metrics.csv`, below `directory`.

    All rows are written anew by a process that goes on with a run, and what its earlier processes
    wrote no longer counts: they may have come further than the checkpoint.

    Raises:
      InputError: tensorboardX is not installed.
    """
    try:
        tensorboardx: Any = importlib.import_module("tensorboardX")
    except ImportError as error:
        raise InputError(
            "--tensorboard needs tensorboardX: pip install -e '.[tensorboard]'"
        ) from error
    written = -1
    with tensorboardx.SummaryWriter(str(directory / "tensorboard"), purge_step=0) as writer:

        def write(rows: list[dict[str, Any]]) -> None:
            nonlocal written
            for row in rows:
                if row["step"] <= written:
                    continue
                for name, value in row.items():
                    if name not in ("epoch", "step"):
                        writer.add_scalar(name, value, row["step"])
                written = row["step"]

        yield write
