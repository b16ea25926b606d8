"""The command line of a study, reconstructed from the configs of its runs.

It is not stored: a study may have grown over several commands, each of which made only a part.
Configs may be untrusted: a command consists only of validated names and numbers.
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from flaxnets.training import RECIPES, Recipe, RunConfig
from flaxnets.training.config import comparable
from flaxnets.training.environment import Environment

# A config does not say whether a run used all training images, so their number is listed here.
TRAINING_IMAGES = {"digits": 1_437, "mnist": 60_000, "fashion_mnist": 60_000, "cifar10": 50_000}


def reproduce(
    configs: Sequence[RunConfig], environments: Sequence[Environment] = ()
) -> tuple[list[str], list[str]]:
    """Return the commands that reproduce runs of these configs, and remarks on them.

    There are several commands if the runs are not a full grid, and none if no command can do it.
    """
    if not configs:
        return [], ["There is no run yet to reconstruct the command from."]
    study = configs[0].study
    if any(comparable(config.study) != comparable(study) for config in configs):
        return [], ["The runs differ in more than the grid, so no command makes them all."]
    name, recipe = study.dataset.name, study.recipe.name
    if not study.dataset.can_be_opened or recipe not in RECIPES:
        return [], ["The command has no such data set or recipe."]

    options, remarks = _recipe_options(study.recipe)
    options |= {
        "family": (study.family, "cifar"),
        "shortcut": (study.shortcut, "A"),
        "stem": (study.stem, "small" if study.family == "cifar" else "imagenet"),
        "dataset": (name, "digits"),
        "train-examples": (study.dataset.train_examples, TRAINING_IMAGES.get(name)),
        "recipe": (recipe, "digits" if name == "digits" else "he2015-cifar"),
        "precision": (study.precision, "float32"),
        "evaluate-every": (study.evaluate_every, 1),
    }
    shared = [
        part
        for option, (value, default) in options.items()
        if value != default
        for part in (f"--{option}", str(value))
    ]
    if any("xla_gpu_deterministic_ops=true" in (each.xla_flags or "") for each in environments):
        shared.append("--deterministic")
    commands = [
        ["python", "experiments/degradation.py", *grid, *shared] for grid in _grids(configs)
    ]
    if not all(re.fullmatch(r"[\w-][\w.+/:,-]*", part) for command in commands for part in command):
        return [], ["The configuration holds values that no option of the command accepts."]
    if name != "digits" and not study.dataset.is_folder:
        remarks.append("Add --data-dir DIR if the TFDS data are not in the default directory.")
    for kind in sorted({config.kind for config in configs if ":" in config.kind}):
        remarks.append(f"{kind} is imported from the working directory and run.")
    return [shlex.join(command) for command in commands], remarks


def _recipe_options(recipe: Recipe) -> tuple[dict[str, tuple[Any, Any]], list[str]]:
    """Return option -> (value, default), and remarks on values without an option."""
    preset = RECIPES[recipe.name]
    names = [field.name for field in fields(Recipe)]
    differs = {name for name in names if getattr(recipe, name) != getattr(preset, name)}
    options = {
        name.replace("_", "-"): (getattr(recipe, name), None)
        for name in ("epochs", "batch_size", "learning_rate")
        if name in differs and getattr(recipe, name)
    }
    differs -= {option.replace("-", "_") for option in options}
    if "epochs" in options and recipe.steps is None:
        differs.discard("steps")  # replaced by a length in epochs
    remarks = [
        f"No option sets {name}: it was {plain(getattr(recipe, name))}, "
        f"and the recipe has {plain(getattr(preset, name))}."
        for name in sorted(differs)
    ]
    return options, remarks


def _grids(configs: Iterable[RunConfig]) -> list[list[str]]:
    """Return the grids of these runs as options; kinds of equal depths and seeds share one."""
    seeds: dict[tuple, list] = {}
    depths: dict[tuple, list] = {}
    kinds: dict[tuple, list] = {}
    for config in configs:
        seeds.setdefault((config.kind, config.depth), []).append(config.seed)
    for (kind, depth), numbers in seeds.items():
        depths.setdefault((kind, tuple(numbers)), []).append(depth)
    for (kind, numbers), members in depths.items():
        kinds.setdefault((tuple(members), numbers), []).append(kind)
    grids = []
    for (members, numbers), names in kinds.items():
        grid = ["--depths", ",".join(map(str, members))]
        grid += ["--kinds", ",".join(names)] if names != ["plain", "residual"] else []
        grid += ["--seeds", ",".join(map(str, numbers))] if numbers != (0,) else []
        grids.append(grid)
    return grids


def plain(value: Any) -> str:
    """Format a value of a config for people, without nested values."""
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value[:100])) if value else "none"
    if isinstance(value, dict):
        return "..."
    return {None: "none", True: "yes", False: "no", "": "none"}.get(
        value if value is None or isinstance(value, bool | str) else "other", str(value)
    )
