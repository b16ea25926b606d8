"""The command that makes a study again, told from the configs of its runs.

They may be a stranger's: a command is made of names that the study knows, and of numbers.
"""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from flaxnets.studies.config import DATASET_NAME
from flaxnets.training import RECIPES

# What all runs of a study have in common; see `experiments/degradation.py`.
DEFINITION = ("family", "shortcut", "stem", "precision", "dataset", "augmentation", "recipe")
# A config does not tell whether a run had all training images; of these data sets it is known.
TRAINING_IMAGES = {"digits": 1_437, "mnist": 60_000, "fashion_mnist": 60_000, "cifar10": 50_000}


def reproduce(
    configs: Sequence[dict[str, Any]], environments: Sequence[Any] = ()
) -> tuple[list[str], list[str]]:
    """The commands that make runs of these configs, and what to know of them.

    There are several where the runs are no full grid, and none where no command can do it.
    """
    if not configs:
        return [], ["There is no run yet to tell the command from."]
    study = {key: configs[0].get(key) for key in DEFINITION}
    if any(config.get(key) != value for config in configs for key, value in study.items()):
        return [], ["The runs differ in more than the grid, so that no command makes them all."]
    data: Any = study["dataset"] if isinstance(study["dataset"], dict) else {}
    recipe: Any = study["recipe"] if isinstance(study["recipe"], dict) else {}
    name, preset = str(data.get("name", "")), str(recipe.get("name"))
    if not DATASET_NAME.fullmatch(name) or preset not in RECIPES:
        return [], ["The command knows no such data set or recipe."]

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
        return [], ["Its configuration holds what no option of the command takes."]
    if name != "digits":
        remarks.append("--data-dir DIR has to be added where TFDS has the data in a place apart.")
    for kind in sorted({config["kind"] for config in configs if ":" in config["kind"]}):
        remarks.append(f"{kind} is imported from the directory in which it is started, and run.")
    return [shlex.join(command) for command in commands], remarks


def _recipe_options(recipe: dict[str, Any]) -> tuple[dict[str, tuple[Any, Any]], list[str]]:
    """Option -> value and default, and in words what there is no option for."""
    preset = json.loads(json.dumps(asdict(RECIPES[recipe["name"]])))
    differs = {key for key in preset.keys() | recipe.keys() if recipe.get(key) != preset.get(key)}
    options = {
        key.replace("_", "-"): (recipe[key], None)
        for key in ("epochs", "batch_size", "learning_rate")
        if key in differs and recipe.get(key)
    }
    differs -= {option.replace("-", "_") for option in options}
    if "epochs" in options and recipe.get("steps") is None:
        differs.discard("steps")  # which a length in epochs replaces
    remarks = [
        f"No option sets {plain(key)}: it was {plain(recipe.get(key))}, "
        f"and the recipe has {plain(preset.get(key))}."
        for key in sorted(differs)
    ]
    return options, remarks


def _grids(configs: Iterable[dict[str, Any]]) -> list[list[str]]:
    """The grids that these runs are, as options: kinds of the same depths and seeds are in one."""
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
    """A name or a value of a config for people; what is nested in it is not shown."""
    if isinstance(value, list):
        return ", ".join(map(plain, value[:100])) if value else "none"
    if isinstance(value, dict):
        return "..."
    return {None: "none", True: "yes", False: "no", "": "none"}.get(
        value if value is None or isinstance(value, bool | str) else "other", str(value)
    )
