"""The outcome of a run, epoch by epoch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from flaxnets.decoding import Count
from flaxnets.errors import InputError
from flaxnets.files import write_csv
from flaxnets.parallel import is_primary

Status = Literal["finished", "diverged", "unfinished"]
Row = dict[str, Count | float | None]
EvaluatedRow = dict[str, Count | float]


def metrics_of(splits: Iterable[str]) -> tuple[str, ...]:
    """Return the columns of `metrics.csv` if these splits are evaluated every epoch."""
    return (
        *("epoch", "step", "learning_rate", "running_train_loss", "running_train_error"),
        *(f"{split}_{metric}" for split in splits for metric in ("loss", "error")),
        "seconds",
    )


METRICS = metrics_of(("train", "test"))  # columns for the runs of a study


@dataclass(frozen=True)
class RunResult:
    """Outcome of a run.

    `rows` has one entry per finished epoch, keyed by `metrics_of(splits)`. An epoch that was not
    evaluated has None for the metrics of the splits; the first epoch, and the last one of a run
    that has ended, are evaluated.
    """

    status: Status
    rows: list[Row]
    step: Count
    seconds: float
    diverged_step: Count | None

    def __post_init__(self) -> None:
        columns = set(self.columns)
        if not columns >= set(metrics_of(())) or any(row.keys() != columns for row in self.rows):
            raise InputError("its rows do not have the columns of metrics.csv")
        always = metrics_of(())
        if any(row[name] is None for row in self.rows for name in always):
            raise InputError(f"its rows lack one of {', '.join(always)}")
        if any({None} < {row[name] for name in columns.difference(always)} for row in self.rows):
            raise InputError("one of its rows has some of the evaluated metrics and lacks others")
        needed = [*self.rows[:1], *(self.rows[-1:] if self.status != "unfinished" else [])]
        if not all(map(is_evaluated, needed)):
            raise InputError("its first or its last epoch was not evaluated")

    @property
    def evaluated(self) -> list[EvaluatedRow]:
        """The rows of evaluated epochs."""
        return [cast(EvaluatedRow, row) for row in self.rows if is_evaluated(row)]

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of `metrics.csv`; those of a study's run before the first epoch has ended."""
        return tuple(self.rows[0]) if self.rows else METRICS

    def check_splits(self, columns: Sequence[str] = METRICS) -> "RunResult":
        """Return the result itself if its rows have these columns.

        Raises:
          InputError: other splits were evaluated.
        """
        if self.rows and set(self.columns) != set(columns):
            raise InputError("its rows do not have the columns of metrics.csv")
        return self

    def final(self, metric: str) -> float:
        """Return the metric at the end of the run; NaN if the run has not ended."""
        ended = self.rows and self.status != "unfinished"
        return self.evaluated[-1][metric] if ended else float("nan")


def is_evaluated(row: Mapping[str, object]) -> bool:
    """Return whether the splits were evaluated at the end of this epoch."""
    return None not in row.values()


def count_evaluations(epochs: int, every: int) -> int:
    """Count the evaluated epochs of a run: every `every`-th one, the first and the last."""
    return len({1, *range(every, epochs + 1, every), epochs})


def write_metrics(directory: Path, rows: list[Row], columns: Sequence[str] = METRICS) -> None:
    """Write `metrics.csv` to a run directory: one row per epoch, floats in full precision."""
    if not is_primary():
        return
    write_csv(directory / "metrics.csv", columns, rows)


def best_epoch(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the index of the first finite row with the lowest validation error, or None."""
    evaluated = [row if is_evaluated(row) else {} for row in rows]
    errors = [row.get("validation_error", math.nan) for row in evaluated]
    losses = [row.get("validation_loss", math.nan) for row in evaluated]
    finite = [i for i in range(len(rows)) if math.isfinite(errors[i]) and math.isfinite(losses[i])]
    return min(finite, key=lambda i: errors[i], default=None)
