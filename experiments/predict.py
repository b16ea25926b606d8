"""Classify pictures with a trained network.

    python experiments/predict.py runs/train/pictures-resnet18-adam/seed-0 cat.jpg dog.png

Pictures are cropped and resized like the test pictures behind the run's test error. A picture that
cannot be read is named on stderr, and the others are still classified.

Exit status: 0 if all pictures were classified, 1 if only some of the pictures could be read, 2 if
none could or the arguments are wrong.
"""

import signal

if __name__ == "__main__":
    # Importing takes seconds: until `run_command`, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table

from flaxnets.cli.arguments import ArgumentParser, positive
from flaxnets.cli.main import run_command
from flaxnets.cli.progress import plain_console
from flaxnets.data.crops import fit_box
from flaxnets.data.images import decode_crop
from flaxnets.errors import InputError
from flaxnets.studies.restore import restore
from flaxnets.text import shorten
from flaxnets.training.evaluation import (
    compute_logits,
    compute_probabilities,
    evaluation_batch,
    evaluation_fraction,
    require_logits,
)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    run = restore(args.run, which="best" if args.best else "latest")
    shape, fraction = run.preprocess.image_shape, evaluation_fraction(run.config)
    if shape[2] not in (1, 3):
        raise InputError(f"the network takes {shape[2]} channels, but pictures have 1 or 3")
    names, images, problems = read_pictures(args.images, shape, fraction)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not images:
        return 2

    batch_size = evaluation_batch(run.preprocess.input_shape)
    logits = compute_logits(run.model, run.variables, run.preprocess, np.stack(images), batch_size)
    require_logits(logits, run.class_names, args.run)
    if not np.isfinite(logits).all():
        raise InputError(
            f"the network of {args.run} outputs NaN or infinity: its training diverged"
        )
    console = plain_console()
    for name, probabilities in zip(names, compute_probabilities(logits), strict=True):
        console.print(shorten(name, 300), soft_wrap=True)
        console.print(predictions_table(probabilities, run.class_names, args.top))
    return 1 if problems else 0


def read_pictures(
    names: list[str], image_shape: tuple[int, int, int], fraction: float
) -> tuple[list[str], list[np.ndarray], list[str]]:
    """Read pictures; return names and images of the readable ones and a line on each other one."""
    height, width, channels = image_shape
    centre = partial(fit_box, new_height=height, new_width=width, fraction=fraction)
    readable, images, problems = [], [], []
    for name in names:
        try:
            data = Path(name).read_bytes()
            images.append(decode_crop(data, channels, height, width, centre))
            readable.append(name)
        except OSError as error:
            problems.append(f"{shorten(name, 200)} cannot be read: {error.strerror}")
        except ValueError as error:
            problems.append(f"{shorten(name, 200)} cannot be read: {shorten(str(error), 200)}")
    return readable, images, problems


def predictions_table(probabilities: np.ndarray, class_names: tuple[str, ...], top: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("class", no_wrap=True)
    table.add_column("probability, %", justify="right", no_wrap=True)
    for i in np.argsort(-probabilities, kind="stable")[:top]:
        table.add_row(shorten(class_names[i], 60), f"{100 * probabilities[i]:.2f}")
    return table


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR", help="run directory of train.py or a study")
    add("images", nargs="+", metavar="image", help="JPEG, PNG, WebP or BMP pictures")
    add("--best", action="store_true", help="use the state at the run's lowest validation error")
    add(
        "--top",
        type=positive(int),
        default=5,
        metavar="N",
        help="number of classes to show (default: %(default)s)",
    )
    return parser.parse(arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
