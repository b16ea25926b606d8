"""Figures of a network's mistakes: the confusion matrix and misclassified images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from flaxnets.reporting.figures import write_figure
from flaxnets.text import shorten
from flaxnets.training.evaluation import compute_probabilities, most_confidently_wrong

# Confusion matrix: inches per class, and the smallest and largest side.
CELL, SMALLEST, LARGEST = 0.46, 2.6, 14.0
MOST_COUNTED = 25  # most classes with the number of images in each cell
MOST_NAMED = 120  # most classes with names next to rows and columns
# Contact sheet: columns, and inches of a column, of a picture and above the first row.
COLUMNS, WIDTH, PICTURE, TITLE = 5, 1.65, 1.25, 0.55
MOST_WRONG = 25  # images on the sheet of mistakes


def draw_confusion(
    confusion: np.ndarray, class_names: Sequence[str], path: Path, title: str
) -> None:
    """Draw a confusion matrix, true classes in rows, to `path`, whose suffix gives the format.

    Colour is the share of the row's images, so that rare classes show as well as frequent ones, on
    a scale that separates small shares. With up to 25 classes, each cell shows its number of
    images. With up to 120, rows and columns are named.

    Args:
      confusion: int `(classes, classes)`, images of each class (row) predicted as each (column).
      class_names: names of rows and columns.

    Raises:
      StorageError: the figure cannot be written.
    """
    classes = len(confusion)
    shares = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(CELL * classes, SMALLEST, LARGEST))
    figure = Figure(figsize=(side + 2.6, side + 1.6), layout="constrained")
    ax = figure.subplots()
    # "auto" keeps enlarged cells sharp and interpolates shrunken ones.
    image = ax.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="auto")
    if classes <= MOST_COUNTED:
        for (row, column), number in np.ndenumerate(confusion):
            if number:
                colour = "white" if shares[row, column] > 35 else "black"
                size = 9 if number < 10_000 else 6
                place = {"ha": "center", "va": "center_baseline", "fontsize": size}
                ax.text(column, row, f"{number}", color=colour, **place)
    if classes <= MOST_NAMED:
        _name_classes(ax, class_names, side / classes)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    bar = figure.colorbar(image, ax=ax, shrink=min(1.0, 4 / side), label="share of the class, %")
    bar.set_ticks([0, 1, 5, 10, 25, 50, 75, 100])
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    ax.spines[:].set_color("0.8")
    write_figure(figure, path, title)


def _name_classes(ax: Axes, class_names: Sequence[str], cell: float) -> None:
    """Write the names next to rows and columns, each of which is `cell` inches wide."""
    names = [shorten(name, 20) for name in class_names]
    size = min(9.0, 0.8 * 72 * cell)
    fits = max(map(len, names)) * 0.65 * size < 72 * cell
    style: dict[str, Any] = {"fontsize": size, "parse_math": False}
    ax.set_xticks(range(len(names)), names, rotation=0 if fits else 90, **style)
    ax.set_yticks(range(len(names)), names, **style)
    ax.tick_params(length=0)


def draw_mistakes(
    images: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
    class_names: Sequence[str],
    path: Path,
    title: str,
) -> None:
    """Draw the images that were misclassified with the greatest confidence; see
    `draw_contact_sheet`.

    Args:
      images: uint8 `(n, height, width, channels)`, with 1 or 3 channels.
      labels: int `(n,)`.
      logits: `(n, classes)`.
    """
    shown = drop_copies(images, most_confidently_wrong(logits, labels, len(labels)), MOST_WRONG)
    captions = []
    for index, row in zip(shown, compute_probabilities(logits[shown]), strict=True):
        true, predicted = (
            shorten(class_names[int(i)], 24) for i in (labels[index], logits[index].argmax())
        )
        separator = " → " if len(true) + len(predicted) <= 20 else "\n→ "
        captions.append(f"{true}{separator}{predicted}\n{100 * row.max():.1f} %")
    found = f"the {len(shown)} most confident mistakes" if len(shown) else "no mistakes to show"
    draw_contact_sheet(list(images[shown]), captions, path, f"{title}; {found}")


def drop_copies(images: np.ndarray, rows: np.ndarray, most: int) -> np.ndarray:
    """Return the first rows, at most `most`, whose images all differ.

    A data set may have one picture several times.
    """
    different: dict[bytes, int] = {}
    for row in rows:
        different.setdefault(images[row].tobytes(), row)
        if len(different) == most:
            break
    return np.array(list(different.values()), int)


def draw_contact_sheet(
    images: Sequence[np.ndarray], captions: Sequence[str], path: Path, title: str
) -> None:
    """Draw small pictures in rows of five, each with a caption above it, to `path`, whose suffix
    gives the format. Without pictures, only the title is drawn.

    Args:
      images: uint8 `(height, width, channels)` each, with 1 or 3 channels.
      captions: captions of the images, of one or more lines.

    Raises:
      StorageError: the figure cannot be written.
    """
    lines = max((caption.count("\n") + 1 for caption in captions), default=0)
    rows = -(-len(images) // COLUMNS)
    height = PICTURE + 0.14 * lines + 0.16  # inches of a picture with its caption
    figure = Figure(figsize=(WIDTH * COLUMNS, TITLE + height * rows))
    # One pair of axes in inches: one pair per picture would take five times as long.
    ax = figure.add_axes((0, 0, 1, 1))
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(i, COLUMNS)
        x, bottom = WIDTH * (column + 0.5), height * (rows - 1 - row) + 0.08
        tall, wide = PICTURE * np.array(image.shape[:2]) / max(image.shape[:2])
        box = (x - wide / 2, x + wide / 2, bottom, bottom + tall)
        grey = image.shape[-1] == 1
        ax.imshow(image[..., 0] if grey else image, cmap="gray", vmin=0, vmax=255, extent=box)
        ax.add_patch(Rectangle((box[0], bottom), wide, tall, fill=False, ec="0.7", lw=0.6))
        place = {"ha": "center", "va": "bottom", "fontsize": 7, "parse_math": False}
        ax.text(x, bottom + tall + 0.04, caption, **place)
    ax.set_xlim(0, figure.get_figwidth())
    ax.set_ylim(0, figure.get_figheight())
    ax.axis("off")
    write_figure(figure, path, title, y=1 - 0.1 / figure.get_figheight(), va="top")
