"""Results of an evaluation as tables, and as `evaluation.json` and `confusion.csv`."""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from flaxnets.files import write_atomic
from flaxnets.text import shorten, spreadsheet_text
from flaxnets.training.evaluation import Evaluation

MOST_CLASSES = 20  # in a table; with more, it shows the worst and the best 10


def evaluation_tables(evaluation: Evaluation, class_names: Sequence[str]) -> list[Table | str]:
    """Make tables of loss and errors, and of the accuracy of each class or the worst and best."""
    tables: list[Table | str] = [_measures_table(evaluation)]
    if len(class_names) <= MOST_CLASSES:
        return [*tables, _classes_table(evaluation, class_names, range(len(class_names)))]
    accuracy = evaluation.class_accuracy
    order = [i for i in np.argsort(accuracy, kind="stable").tolist() if accuracy[i] >= 0]
    half = MOST_CLASSES // 2
    return [
        *tables,
        "\nthe worst classes",
        _classes_table(evaluation, class_names, order[:half]),
        "the best classes",
        _classes_table(evaluation, class_names, order[half:][-half:]),
    ]


def _measures_table(evaluation: Evaluation) -> Table:
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_row("loss", f"{evaluation.loss:.4f}")
    table.add_row("top-1 error, %", f"{evaluation.top1_error:.2f}")
    if evaluation.top5_error is not None:
        table.add_row("top-5 error, %", f"{evaluation.top5_error:.2f}")
    if evaluation.undecided:
        table.add_row("images with NaN logits", f"{evaluation.undecided:,}")
    return table


def _classes_table(
    evaluation: Evaluation, class_names: Sequence[str], classes: Iterable[int]
) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("class", no_wrap=True)
    for heading in ("images", "accuracy, %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for i in classes:
        accuracy = evaluation.class_accuracy[i]
        shown = "-" if math.isnan(accuracy) else f"{accuracy:.2f}"
        table.add_row(shorten(class_names[i], 60), f"{evaluation.class_counts[i]:,}", shown)
    return table


def write_evaluation(
    path: Path, evaluation: Evaluation, class_names: Sequence[str], subject: dict[str, Any]
) -> None:
    """Write `evaluation.json`, which begins with the entries of `subject`.

    Raises:
      StorageError: the file cannot be written.
    """
    classes = [
        {"class": name, "images": int(count), "accuracy": _finite(accuracy)}
        for name, count, accuracy in zip(
            class_names, evaluation.class_counts, evaluation.class_accuracy, strict=True
        )
    ]
    content = {
        **subject,
        "images": evaluation.count,
        "loss": _finite(evaluation.loss),
        "top1_error": evaluation.top1_error,
        "top5_error": evaluation.top5_error,
        "undecided": evaluation.undecided,
        "classes": classes,
    }
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def write_confusion(path: Path, confusion: np.ndarray, class_names: Sequence[str]) -> None:
    """Write `confusion.csv`, with a row for each true class.

    Raises:
      StorageError: the file cannot be written.
    """
    names = [spreadsheet_text(name) for name in class_names]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true", *names])
    for name, row in zip(names, confusion.tolist(), strict=True):
        writer.writerow([name, *row])
    write_atomic(path, text.getvalue())


def _finite(number: float) -> float | None:
    """Replace NaN and infinity by None, because JSON has neither."""
    return float(number) if math.isfinite(number) else None
