"""Recipes, train state, train and evaluation steps, training loop and checkpoints."""

from flaxnets.training.checkpoints import Checkpoints
from flaxnets.training.config import RunConfig, StudyConfig
from flaxnets.training.loop import CheckpointEvery, Progress, TrainSetup, train_run
from flaxnets.training.recipes import RECIPES, Recipe
from flaxnets.training.result import RunResult
from flaxnets.training.steps import (
    TrainState,
    create_state,
    evaluate,
    init_variables,
    make_eval_step,
    make_train_step,
)

__all__ = [
    "RECIPES",
    "CheckpointEvery",
    "Checkpoints",
    "Progress",
    "Recipe",
    "RunConfig",
    "RunResult",
    "StudyConfig",
    "TrainSetup",
    "TrainState",
    "create_state",
    "evaluate",
    "init_variables",
    "make_eval_step",
    "make_train_step",
    "train_run",
]
