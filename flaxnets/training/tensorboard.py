"""TensorBoard logging of a run's metrics."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flaxnets.errors import InputError


@contextmanager
def open_tensorboard(directory: Path) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Yield a function that writes the new rows of `metrics.csv` as events below `directory`.

    A resumed run purges the events of its earlier processes, which may be ahead of its checkpoint,
    and writes all rows again.

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
                    if name not in ("epoch", "step") and value is not None:
                        writer.add_scalar(name, value, row["step"])
                written = row["step"]

        yield write
