"""The command line of a study, reconstructed from the configs of its runs.

Configs may be untrusted: a command consists only of validated names and numbers.
"""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from flaxnets.training import RECIPES
from flaxnets.training.config import DATASET_NAME

# Fields that all runs of a study share; see `experiments/degradation.py`.
DEFINITION = ("family", "shortcut", "stem", "precision", "dataset", "augmentation", "recipe")
# A config does not say whether a run used all training images, so their number is listed here.
TRAINING_IMAGES = {"digits": 1_437, "mnist": 60_000, "fashion_mnist": 60_000, "cifar10": 50_000}


def reproduce(
    configs: Sequence[dict[str, Any]], environments: Sequence[Any] = ()
) -> tuple[list[str], list[str]]:
    """Return the commands that reproduce runs of these configs, and remarks on them.

    There are several commands if the runs are not a full grid, and none if no command can do it.
    """
    if not configs:
        return [], ["There is no run yet to reconstruct the command from."]
    study = {key: configs[0].get(key) for key in DEFINITION}
    if any(config.get(key) != value for config in configs for key, value in study.items()):
        return [], ["The runs differ in more than the grid, so no command makes them all."]
    data: Any = study["dataset"] if isinstance(study["dataset"], dict) else {}
    recipe: Any = study["recipe"] if isinstance(study["recipe"], dict) else {}
    name, preset = str(data.get("name", "")), str(recipe.get("name"))
    if not DATASET_NAME.fullmatch(name) or preset not in RECIPES:
        return [], ["The command has no such data set or recipe."]

    options, remarks = _recipe_options(recipe)
    options |= {
        "family": (study["family"], "cifar"),
        "shortcut": (study["shortcut"], "A"),
        "stem": (study["stem"], "small" if study["family"] == "cifar" else "imagenet"),
        "dataset": (name, "digits"),
        "train-examples": (data.get("train_examples"), TRAINING_IMAGES.get(name)),
        "recipe": (preset, "digits" if name == "digits" else "he2015-cifar"),
        "precision": (study["precision"], "float32"),
    }
    shared = [
        part
        for option, (value, default) in options.items()
        if value != default
        for part in (f"--{option}", str(value))
    ]
    if "xla_gpu_deterministic_ops=true" in str(environments):
        shared.append("--deterministic")
    commands = [
        ["python", "experiments/degradation.py", *grid, *shared] for grid in _grids(configs)
    ]
    if not all(re.fullmatch(r"[\w-][\w.+/:,-]*", part) for command in commands for part in command):
        return [], ["The configuration holds values that no option of the command accepts."]
    if name != "digits":
        remarks.append("Add --data-dir DIR if the TFDS data are not in the default directory.")
    for kind in sorted({config["kind"] for config in configs if ":" in config["kind"]}):
        remarks.append(f"{kind} is imported from the working directory and run.")
    return [shlex.join(command) for command in commands], remarks


def _recipe_options(recipe: dict[str, Any]) -> tuple[dict[str, tuple[Any, Any]], list[str]]:
    """Return option -> (value, default), and remarks on values without an option."""
    preset = json.loads(json.dumps(asdict(RECIPES[recipe["name"]])))
    differs = {key for key in preset.keys() | recipe.keys() if recipe.get(key) != preset.get(key)}
    options = {
        key.replace("_", "-"): (recipe[key], None)
        for key in ("epochs", "batch_size", "learning_rate")
        if key in differs and recipe.get(key)
    }
    differs -= {option.replace("-", "_") for option in options}
    if "epochs" in options and recipe.get("steps") is None:
        differs.discard("steps")  # replaced by a length in epochs
    remarks = [
        f"No option sets {plain(key)}: it was {plain(recipe.get(key))}, "
        f"and the recipe has {plain(preset.get(key))}."
        for key in sorted(differs)
    ]
    return options, remarks


def _grids(configs: Iterable[dict[str, Any]]) -> list[list[str]]:
    """Return the grids of these runs as options; kinds of equal depths and seeds share one."""
    seeds: dict[tuple, list] = {}
    depths: dict[tuple, list] = {}
    kinds: dict[tuple, list] = {}
    for config in configs:
        seeds.setdefault((config["kind"], config["depth"]), []).append(config["seed"])
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
    """Format a name or value of a config for people, without nested values."""
    if isinstance(value, list):
        return ", ".join(map(plain, value[:100])) if value else "none"
    if isinstance(value, dict):
        return "..."
    return {None: "none", True: "yes", False: "no", "": "none"}.get(
        value if value is None or isinstance(value, bool | str) else "other", str(value)
    )
