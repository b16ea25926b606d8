"""The grid of a study: one network for each kind and depth, trained once for each seed."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import flax.linen as nn
from jax.sharding import Mesh

from flaxnets.data import Dataset
from flaxnets.errors import SettingError
from flaxnets.models.cost import Cost, count_cost
from flaxnets.models.resnet import ResNet
from flaxnets.parallel import data_mesh
from flaxnets.studies.directory import begin_run, run_directory, write_study
from flaxnets.studies.restore import Build, build_model
from flaxnets.studies.results import Run, sort_runs, write_summary
from flaxnets.text import duration
from flaxnets.training import (
    CheckpointEvery,
    Progress,
    RunResult,
    TrainSetup,
    TrainState,
    train_run,
)
from flaxnets.training.config import ModelConfig, RunConfig, StudyConfig
from flaxnets.training.environment import record_environment
from flaxnets.training.result import Row

# Deeper cifar networks are scanned: unrolled, they take minutes to compile and much memory.
DEEPEST_UNROLLED = 110


@dataclass(frozen=True, eq=False)
class PlannedNetwork:
    """A network of the grid, to be trained once for each of `configs` (one per seed)."""

    kind: str
    depth: int
    model: nn.Module
    cost: Cost
    configs: tuple[RunConfig, ...]


@dataclass(frozen=True)
class Plan:
    """Plan of a study: its networks, data and recipe."""

    config: StudyConfig
    dataset: Dataset
    networks: tuple[PlannedNetwork, ...]

    @property
    def configs(self) -> list[RunConfig]:
        """Configs of all runs of the grid."""
        return [config for planned in self.networks for config in planned.configs]

    @property
    def total_steps(self) -> int:
        """Number of updates of each run."""
        return self.config.recipe.total_steps(self.config.dataset.train_examples)

    def unfinished(self, runs: Iterable[Run]) -> list[tuple[PlannedNetwork, RunConfig]]:
        """List the planned runs that have not ended among the existing `runs`."""
        ended = {run.config.key for run in runs if run.result.status != "unfinished"}
        return [
            (planned, config)
            for planned in self.networks
            for config in planned.configs
            if config.key not in ended
        ]


def plan_network(
    study: StudyConfig,
    kind: str,
    depth: int,
    seeds: Iterable[int],
    dataset: Dataset,
    build: Build | None = None,
) -> PlannedNetwork:
    """Build a network, count its cost and make the config of each of its runs.

    Args:
      build: makes the network of a custom kind.

    Raises:
      SettingError: the custom network cannot be built.
    """
    model_config = _model_config(study, kind, depth, dataset.num_classes, custom=build is not None)
    config = RunConfig(
        **{each.name: getattr(study, each.name) for each in fields(StudyConfig)},
        kind=kind,
        depth=depth,
        seed=0,
        model=model_config,
        blocks=(),
        block=None,
        parameters=0,
        class_names=dataset.class_names,
        preprocess=dataset.preprocess,
        total_steps=study.recipe.total_steps(len(dataset.train.labels)),
    )
    try:
        model = build_model(config, build)
        cost = count_cost(model, dataset.preprocess.input_shape, dataset.num_classes)
    except Exception as error:
        if build is None:
            raise
        raise SettingError(
            f"kinds {kind} at depth {depth}: {type(error).__name__}: {error}"
        ) from error
    config = replace(config, parameters=cost.parameters)
    if isinstance(model, ResNet):
        config = replace(config, blocks=tuple(model.stage_sizes), block=model.block)
    configs = tuple(replace(config, seed=seed) for seed in seeds)
    return PlannedNetwork(kind, depth, model, cost, configs)


def _model_config(
    study: StudyConfig, kind: str, depth: int, num_classes: int, custom: bool
) -> ModelConfig:
    if custom:
        return ModelConfig(num_classes, build=kind)
    overrides: dict[str, Any] = {"shortcut": study.shortcut, "stem": study.stem}
    cifar = study.family == "cifar"
    if cifar and depth > DEEPEST_UNROLLED:
        overrides |= {"scan_blocks": True, "remat": True}
    prefix, name = "cifar_" if cifar else "", {"plain": "plain", "residual": "resnet"}[kind]
    return ModelConfig(num_classes, f"{prefix}{name}{depth}", overrides)


class RunObserver(Protocol):
    """Shows one run in training."""

    def update(self, progress: Progress) -> None: ...

    def end(self, summary: str) -> None: ...


class Observer(Protocol):
    """Shows the runs in training, such as a progress bar; called from several threads."""

    def start_run(
        self, name: str, work: float, total_steps: int, steps_per_epoch: int, batch: int
    ) -> RunObserver: ...


class EpochLog(Protocol):
    """Adds a row to a file of a run, such as `gradients.csv`, at the end of each epoch."""

    def check(self, directory: Path) -> None: ...

    def write(self, directory: Path, state: TrainState, row: Row) -> None: ...


def train_grid(
    plan: Plan,
    out: Path,
    runs: Iterable[Run],
    observer: Observer,
    workers: int = 1,
    checkpoint_every: CheckpointEvery = CheckpointEvery(),
    stop: Callable[[], bool] = lambda: False,
    make_log: Callable[[PlannedNetwork], EpochLog] | None = None,
) -> list[Run]:
    """Train the runs of `plan` that are unfinished among `runs`, in the open study `out`.

    Workers are threads: the device is busy with one network while another compiles or leaves cores
    free. Each run has the same bits as when trained alone.

    Args:
      workers: number of networks to train at a time.
      make_log: makes the log that writes a file of its own for each run of a network, or None.
      stop: called at every step; once it returns true, all runs in training are saved and end.

    Returns:
      All runs of the study, sorted.
    """
    training = _GridTraining(
        plan,
        out,
        {run.key: run for run in runs},
        observer,
        checkpoint_every,
        stop,
        make_log,
        data_mesh(),
    )
    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in [pool.submit(training.train, planned) for planned in plan.networks]:
                future.result()
        except BaseException:
            training.failed.set()  # the workers save their state and start no new run
            _wait_for_workers(pool)
            raise
    return sort_runs(training.runs.values())


def _wait_for_workers(pool: ThreadPoolExecutor) -> None:
    """Wait until all workers have saved, also if Ctrl-C is pressed again meanwhile.

    The directory must not be unlocked before.
    """
    while True:
        try:
            pool.shutdown(cancel_futures=True)
            return
        except KeyboardInterrupt:
            continue


@dataclass
class _GridTraining:
    """State that the workers of `train_grid` share; `runs` maps keys to results so far."""

    plan: Plan
    out: Path
    runs: dict[tuple[str, int, int], Run]
    observer: Observer
    checkpoint_every: CheckpointEvery
    stop: Callable[[], bool]
    make_log: Callable[[PlannedNetwork], EpochLog] | None
    mesh: Mesh
    failed: threading.Event = field(default_factory=threading.Event)
    writing: threading.Lock = field(default_factory=threading.Lock)

    def must_stop(self) -> bool:
        return self.failed.is_set() or self.stop()

    def train(self, planned: PlannedNetwork) -> None:
        """Train the unfinished seeds of a network one after the other."""
        try:
            self._train_seeds(planned)
        except BaseException:
            self.failed.set()
            raise

    def _train_seeds(self, planned: PlannedNetwork) -> None:
        left = [config for other, config in self.plan.unfinished(self._known()) if other is planned]
        if not left:
            return
        log = None if self.make_log is None else self.make_log(planned)
        setup = None
        for config in left:
            if self.must_stop():
                return
            directory = run_directory(self.out, *config.key)
            begin_run(directory, config)
            if log is not None:
                log.check(directory)
            name = f"{planned.kind}-{planned.depth} seed {config.seed}"
            recipe, examples = self.plan.config.recipe, self.plan.config.dataset.train_examples
            shown = self.observer.start_run(
                name,
                planned.cost.work,
                self.plan.total_steps,
                examples // recipe.batch_size,
                recipe.batch_size,
            )
            setup = setup or TrainSetup.create(
                planned.model,
                planned.depth,
                recipe,
                self.plan.dataset,
                self.mesh,
                evaluate_every=config.evaluate_every,
            )
            result = train_run(
                setup,
                config.seed,
                directory,
                shown.update,
                self.must_stop,
                self.checkpoint_every,
                config,
                on_epoch=None if log is None else partial(log.write, directory),
            )
            with self.writing:
                self.runs[config.key] = Run(config, result)
                write_summary(self.out, sort_runs(self.runs.values()))
                write_study(self.out, self.plan.config, [record_environment()])
                shown.end(f"{name}: {describe(result)}")

    def _known(self) -> list[Run]:
        with self.writing:
            return list(self.runs.values())


def describe(result: RunResult) -> str:
    """Describe the outcome of a run in a few words."""
    if result.status == "diverged":
        return f"diverged at step {result.diverged_step}, {duration(result.seconds)}"
    if result.status == "unfinished":
        return f"stopped at step {result.step}"
    return (
        f"train error {result.final('train_error'):.2f} %, "
        f"test error {result.final('test_error'):.2f} %, {duration(result.seconds)}"
    )
