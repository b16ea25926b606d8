"""Configs, runs and networks of made-up studies."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from flaxnets.data import Augmentation, Preprocess
from flaxnets.studies.results import Run
from flaxnets.training import RECIPES, RunConfig, RunResult, StudyConfig
from flaxnets.training.config import DatasetConfig, ModelConfig
from flaxnets.training.result import METRICS, Row, Status


def make_study_config(**changes: Any) -> StudyConfig:
    """Make the config of a study of the digits."""
    config = StudyConfig(
        family="cifar",
        shortcut="A",
        stem="small",
        precision="float32",
        dataset=DatasetConfig(
            name="digits", version="1.0.0", train_examples=1437, test_examples=360, sha256="0" * 64
        ),
        augmentation=Augmentation(),
        recipe=RECIPES["digits"],
    )
    return replace(config, **changes)


def make_run_config(
    kind: str = "plain", depth: int = 8, seed: int = 0, **changes: Any
) -> RunConfig:
    """Make the config of a run of that study."""
    study = make_study_config()
    names = {"plain": f"cifar_plain{depth}", "residual": f"cifar_resnet{depth}"}
    model = ModelConfig(10, names.get(kind), {}, None if kind in names else kind)
    config = RunConfig(
        **{field.name: getattr(study, field.name) for field in fields(StudyConfig)},
        kind=kind,
        depth=depth,
        seed=seed,
        model=model,
        blocks=(1, 1, 1),
        block="basic",
        parameters=75_290,
        class_names=tuple("0123456789"),
        preprocess=Preprocess((8, 8, 1), (0.5,), (0.25,)),
        total_steps=220,
    )
    return replace(config, **changes)


def make_rows(errors: Sequence[float], steps: int = 10) -> list[Row]:
    """Make rows of `metrics.csv` with these training errors and test errors 5 points higher."""
    return [
        {
            **dict.fromkeys(METRICS, 0.5),
            "epoch": epoch,
            "step": steps * epoch,
            "train_error": error,
            "test_error": min(100.0, error + 5),
        }
        for epoch, error in enumerate(errors, 1)
    ]


def make_run(
    kind: str,
    depth: int,
    seed: int,
    status: Status = "finished",
    errors: Sequence[float] = (80.0, 40.0, 20.0, 19.5),
    steps: int = 10,
    **changes: Any,
) -> Run:
    """Make a run with these training errors, an epoch each; `changes` are those of its config.

    An epoch has `steps` steps. Epochs that the config does not evaluate have no errors.
    """
    rows = make_rows(errors, steps)
    every = changes.get("evaluate_every", 1)
    missing: Row = dict.fromkeys(("train_loss", "train_error", "test_loss", "test_error"))
    for epoch in range(2, len(rows)):
        if epoch % every:
            rows[epoch - 1] |= missing
    diverged_step = 17 if status == "diverged" else None
    result = RunResult(status, rows, steps * len(rows), 12.5, diverged_step)
    return Run(make_run_config(kind, depth, seed, **changes), result)
