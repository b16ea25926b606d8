"""Parts shared by all diagnostics: their protocol, options and stored numbers."""

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from flaxnets.decoding import decode, encode
from flaxnets.diagnostics.study import DiagnosedStudy, Setting
from flaxnets.errors import InputError
from flaxnets.files import write_atomic
from flaxnets.reporting.findings import Finding
from flaxnets.training import Progress

LARGEST_FILE = 50_000_000  # bytes

T = TypeVar("T")


class NotPossibleError(Exception):
    """Raised when a study lacks what a diagnostic needs."""


class TrainingPlan(NamedTuple):
    """Facts about a run before it starts; `work` is the cost of a step, in any unit."""

    name: str
    work: float
    total_steps: int
    steps_per_epoch: int
    batch_size: int


@dataclass(frozen=True)
class MeasureOptions:
    """Options of the measurements.

    Attributes:
      batch: number of training images for the gradients.
      epochs: number of epochs to train a construction; None for as many as in the study, but at
        most `flaxnets.diagnostics.construction.CONTINUED_EPOCHS`.
      stop: returns whether training should stop and save.
      watch: context manager around training; the callable it gives is called with each progress.
    """

    batch: int
    epochs: int | None
    stop: Callable[[], bool]
    watch: Callable[[TrainingPlan], AbstractContextManager[Callable[[Progress], None]]]


class Diagnostic(Protocol):
    """The numbers of one diagnostic, a dataclass that its JSON file stores.

    `measure` returns None when `options.stop` interrupted it, and raises `NotPossibleError` when
    the study lacks what it needs.
    """

    @property
    def study(self) -> Setting: ...

    @classmethod
    def measure(cls, study: DiagnosedStudy, options: MeasureOptions) -> Self | None: ...

    def draw(self, path: Path) -> None: ...

    def describe(self) -> Finding: ...


def write_numbers(path: Path, numbers: Any) -> None:
    """Write the numbers of a diagnostic as JSON; NaN and infinities become null."""

    def drop(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_atomic(path, json.dumps(_map_leaves(drop, encode(numbers)), indent=1) + "\n")


def read_numbers(path: Path, kind: type[T]) -> T:
    """Read numbers of the dataclass `kind` written by `write_numbers`; null becomes NaN.

    Raises:
      InputError: the file cannot be read, or holds something else.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError("it is too large")
        content = json.loads(path.read_text(encoding="utf-8"))
        value = _map_leaves(lambda leaf: math.nan if leaf is None else leaf, content)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error})") from error
    return decode(kind, value, f"{path} is damaged, or of an earlier version: its content")


def _map_leaves(change: Callable[[Any], Any], value: Any) -> Any:
    # `jax.tree.map` would sort the layers by name.
    if isinstance(value, dict):
        return {key: _map_leaves(change, entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_map_leaves(change, entry) for entry in value]
    return change(value)
