"""Tables of plans, results and recipes for the console."""

import math
from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table

from flaxnets.reporting.comparison import compare_depths, describe_differences
from flaxnets.studies.grid import Plan
from flaxnets.studies.results import NetworkResults
from flaxnets.text import duration, millions
from flaxnets.training import RunConfig
from flaxnets.training.recipes import PRESETS


def network_name(config: RunConfig) -> str:
    """Return `cifar_resnet18`, or `my_nets:build 18` for a custom network."""
    return config.model.name or f"{config.kind} {config.depth}"


def blocks(config: RunConfig) -> str:
    """Return the number of blocks in each stage, such as `3-3-2`."""
    return "-".join(map(str, config.blocks)) or "-"


def plan_table(plan: Plan) -> Table:
    """Make a table of the networks that a study trains."""
    table = Table("kind", "network", "blocks", "parameters", "multiply-adds", "seeds", "steps")
    for planned in plan.networks:
        config = planned.configs[0]
        table.add_row(
            planned.kind,
            network_name(config),
            blocks(config),
            millions(planned.cost.parameters),
            millions(planned.cost.multiply_adds),
            ",".join(str(config.seed) for config in planned.configs),
            f"{plan.total_steps:,}",
        )
    return table


def results_table(networks: Sequence[NetworkResults]) -> Table:
    """Make a table 80 columns wide, one row per network.

    Errors and loss are those at the end of training, mean ± standard deviation over finished seeds.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("network", no_wrap=True)
    for heading in ("train\nerror, %", "test\nerror, %", "train\nloss"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("status")
    table.add_column("time", justify="right", no_wrap=True)
    for network in networks:
        config = network.runs[0].config
        table.add_row(
            f"{network_name(config)}\n  {blocks(config)}, {millions(config.parameters)}",
            _mean_and_spread(network, "train_error", 2),
            _mean_and_spread(network, "test_error", 2),
            _mean_and_spread(network, "train_loss", 3),
            network.status,
            duration(sum(run.result.seconds for run in network.runs)),
        )
    return table


def differences_table(curves: Iterable[list[NetworkResults]]) -> Table | None:
    """Make a table of how training error changes with depth, seed by seed.

    From five seeds on, it shows the mean and its 95 % bootstrap interval. A curve is a list of
    networks that differ in depth. Returns None if there is nothing to compare.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("more depth", no_wrap=True)
    table.add_column("training error changes, paired by seed, points")
    for name, differences in compare_depths(curves, "train_error"):
        table.add_row(name, describe_differences(differences))
    return table if table.rows else None


def _mean_and_spread(network: NetworkResults, metric: str, digits: int) -> str:
    mean, spread = network.mean(metric), network.spread(metric)
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def recipes_table() -> Table:
    """Make a table of all recipes, with their sources."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("recipe", no_wrap=True)
    for heading in ("length", "batch", "optimizer", "schedule", "source"):
        table.add_column(heading)
    for recipe, source in PRESETS:
        length = f"{recipe.steps:,} steps" if recipe.steps else f"{recipe.epochs} epochs"
        rule = f"{recipe.optimizer} {recipe.learning_rate:g}"
        table.add_row(recipe.name, length, str(recipe.batch_size), rule, recipe.schedule, source)
    return table
