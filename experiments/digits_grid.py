"""Grid search behind the `digits` recipe: final training error of the plain network of depth 56.

    python experiments/digits_grid.py

Trains this network from two seeds at each learning rate and warm-up length, and prints a table of
means. The recipe takes the cell with the *lowest* error, so that it is not tuned to make plain
networks look bad.
"""

import signal

if __name__ == "__main__":
    # Importing takes seconds: until `run_command`, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

import flaxnets
from flaxnets.cli.arguments import ArgumentParser
from flaxnets.cli.main import run_command
from flaxnets.data import load_dataset
from flaxnets.parallel import data_mesh
from flaxnets.training import RECIPES, TrainSetup, train_run

RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
WARMUPS = (0.0, 0.15)
SEEDS = (0, 1)


def main(arguments: list[str] | None = None) -> int:
    ArgumentParser(description=__doc__).parse(arguments)
    dataset = load_dataset("digits")
    model = flaxnets.create_model("cifar_plain56", num_classes=dataset.num_classes)
    console = Console(highlight=False)
    table = Table("learning rate", *(f"warm-up {warmup:.0%}" for warmup in WARMUPS))
    for rate in RATES:
        cells = []
        for warmup in WARMUPS:
            recipe = replace(RECIPES["digits"], learning_rate=rate, warmup=warmup)
            setup = TrainSetup.create(model, 56, recipe, dataset, data_mesh())
            errors = []
            for seed in SEEDS:
                with tempfile.TemporaryDirectory() as directory:
                    errors.append(train_run(setup, seed, Path(directory)).final("train_error"))
            listed = ", ".join(f"{error:.1f}" for error in errors)
            cells.append(f"{fmean(errors):.1f} % ({listed})")
            console.print(f"learning rate {rate}, warm-up {warmup:.0%}: {cells[-1]}")
        table.add_row(str(rate), *cells)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
