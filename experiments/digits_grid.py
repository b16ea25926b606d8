"""The grid that settled the `digits` recipe: final training error of the plain network of depth 56.

    python experiments/digits_grid.py

trains it from seed 0 at each learning rate and length of warm-up and prints a table. The recipe
takes the cell with the *lowest* error, so that it is not tuned to make plain networks look bad.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

import flaxnets
from flaxnets.console import run_command
from flaxnets.data import load_dataset
from flaxnets.parallel import data_mesh
from flaxnets.training import RECIPES, Program, train_run

RATES = (0.03, 0.1, 0.3)
WARMUPS = (0.0, 0.15, 0.3)


def main(arguments: list[str] | None = None) -> int:
    dataset = load_dataset("digits")
    model = flaxnets.create_model("cifar_plain56", num_classes=dataset.num_classes)
    console = Console(highlight=False)
    table = Table("learning rate", *(f"warm-up {warmup:.0%}" for warmup in WARMUPS))
    for rate in RATES:
        errors = []
        for warmup in WARMUPS:
            recipe = replace(RECIPES["digits"], learning_rate=rate, warmup=warmup)
            program = Program.create(model, 56, recipe, dataset, data_mesh())
            with tempfile.TemporaryDirectory() as directory:
                result = train_run(program, 0, Path(directory))
            errors.append(f"{result.final('train_error'):.1f} %")
            console.print(f"learning rate {rate}, warm-up {warmup:.0%}: train error {errors[-1]}")
        table.add_row(str(rate), *errors)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
