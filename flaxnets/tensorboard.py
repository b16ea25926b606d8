"""Metrics as events that TensorBoard reads."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flaxnets.errors import InputError


@contextmanager
def open_tensorboard(
    directory: Path, step: int | None
) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """A function that writes what is new in the rows of `metrics.csv`, below `directory`.

    `step` is the one from which a run goes on: later events of its earlier processes do not count.

    Raises:
      InputError: tensorboardX is not installed.
    """
    try:
        tensorboardx: Any = importlib.import_module("tensorboardX")
    except ImportError as error:
        raise InputError(
            "--tensorboard needs tensorboardX: pip install -e '.[tensorboard]'"
        ) from error
    written = -1 if step is None else step
    purge = None if step is None else step + 1
    with tensorboardx.SummaryWriter(str(directory / "tensorboard"), purge_step=purge) as writer:

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
