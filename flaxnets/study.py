"""Studies from Python: plain and residual networks at several depths, trained and compared."""

import importlib
import operator
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from matplotlib.figure import Figure
from rich.console import Console

from flaxnets.cli.arguments import check_choice
from flaxnets.cli.progress import StudyProgress, plain_console
from flaxnets.data import Dataset, inspect_dataset
from flaxnets.data.opening import short_name
from flaxnets.decoding import decode, encode
from flaxnets.diagnostics import GradientLog
from flaxnets.errors import InputError, SettingError
from flaxnets.models.resnet import IMAGENET_STAGES
from flaxnets.parallel import data_mesh, is_primary, replicate
from flaxnets.reporting.conclusion import conclude, count_seeds
from flaxnets.reporting.figures import draw_errors, set_title, write_png_and_svg
from flaxnets.studies.directory import check_output_dir, run_directory
from flaxnets.studies.grid import Plan, PlannedNetwork, plan_network, train_grid
from flaxnets.studies.own_data import describe_dataset
from flaxnets.studies.restore import Build
from flaxnets.studies.results import (
    NetworkResults,
    Run,
    group_runs,
    open_study,
    summarise_runs,
    write_summary,
)
from flaxnets.training import RECIPES, CheckpointEvery, Recipe
from flaxnets.training.config import (
    DEEPEST,
    Family,
    Precision,
    Shortcut,
    Stem,
    StudyConfig,
)
from flaxnets.training.recipes import check_batch_size

EXAMPLES = {"depths": (18, 34, 56), "kinds": ("plain", "residual"), "seeds": (0, 1, 2)}


@dataclass(frozen=True)
class Study:
    """A grid of networks that differ only in kind, depth and seed, and their training.

    Attributes:
      depths: numbers of weighted layers.
      kinds: `plain`, `residual`, or networks of your own: a function `build(depth, num_classes,
        dtype)` that returns a Linen module, or its name `module:function`.
      seeds: each network is trained once from each seed.
      family: how depth becomes a network, `cifar` or `imagenet`.
      shortcut: `A`, `B` or `C` (He et al. 2015, section 3.3).
      stem: `imagenet` or `small`; None for the family's own.
      dataset: `digits`, a prepared TFDS data set, `folder:PATH` (see `flaxnets.data.folder`), or a
        data set in memory, such as `flaxnets.data.from_arrays` makes.
      data_dir: TFDS data directory; None for TFDS's own.
      train_examples: number of training images to use, always the same random ones; None for all.
      recipe: a recipe or its name; None for `digits` for the digits, otherwise `he2015-cifar`.
      precision: `float32` or `bfloat16`, the type of computations.
      evaluate_every: number of epochs from one evaluation to the next; the first and the last epoch
        are always evaluated. It does not change training.

    Raises:
      SettingError: a setting is invalid; the message says which values are valid.
    """

    depths: Sequence[int]
    _: KW_ONLY
    kinds: Sequence[str | Build] = ("plain", "residual")
    seeds: Sequence[int] = (0,)
    family: Family = "cifar"
    shortcut: Shortcut = "A"
    stem: Stem | None = None
    dataset: str | Dataset = "digits"
    data_dir: str | Path | None = None
    train_examples: int | None = None
    recipe: Recipe | str | None = None
    precision: Precision = "float32"
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        try:
            self._check_types()
            for name, example in EXAMPLES.items():
                object.__setattr__(self, name, _as_tuple(name, getattr(self, name), example))
            object.__setattr__(self, "depths", tuple(sorted(self.depths)))
            self._check_choices()
            self._check_grid()
        except InputError as error:
            raise SettingError(error) from error

    def _check_types(self) -> None:
        if not isinstance(self.dataset, str | Dataset):
            kind = type(self.dataset).__name__
            raise InputError(
                f"dataset must be a name or a data set in memory, not {kind}; "
                'open_dataset(..., storage="memory") reads one into memory'
            )
        if not isinstance(self.recipe, Recipe | str | None):
            raise InputError(f"recipe must be a Recipe or its name, not {self.recipe!r}")
        if not isinstance(self.evaluate_every, int) or self.evaluate_every < 1:
            raise InputError(
                f"evaluate_every must be a number of epochs above 0, not {self.evaluate_every!r}"
            )

    def _check_choices(self) -> None:
        check_choice("family", self.family, get_args(Family))
        check_choice("shortcut", self.shortcut, get_args(Shortcut))
        check_choice("stem", self.stem or "small", get_args(Stem))
        check_choice("precision", self.precision, get_args(Precision))
        if isinstance(self.recipe, str):
            check_choice("recipe", self.recipe, tuple(RECIPES))
        if self.chosen_recipe.schedule == "plateau":
            raise InputError(
                f"recipe {self.chosen_recipe.name} needs validation images, which a study does not "
                "have; choose another"
            )
        for kind in map(name_kind, self.kinds):
            if ":" in kind and not re.fullmatch(r"[\w.:]{1,200}", kind):
                raise InputError(f"kinds {kind}: give a function defined at the top of a module")
            if ":" not in kind:
                if found := re.fullmatch(r"([\w.]+)\.(\w+)", kind):
                    raise InputError(
                        f"kinds {kind}: separate module and function with a colon; "
                        f"did you mean {found[1]}:{found[2]}?"
                    )
                check_choice("kinds", kind, ("plain", "residual"), " or a custom module:function")

    def _check_grid(self) -> None:
        for name in ("depths", "kinds", "seeds"):
            values = getattr(self, name)
            if not values:
                raise InputError(f"{name} must name at least one")
            repeated = sorted({str(value) for value in values if values.count(value) > 1})
            if repeated:
                raise InputError(f"{name} repeats {', '.join(repeated)}; name each once")
        for depth in self.depths:
            if self.family == "cifar" and (depth % 2 or not 8 <= depth <= DEEPEST):
                raise InputError(
                    f"depths {depth}: the cifar family has even depths from 8 to {DEEPEST} "
                    "(the paper's are 20, 32, 44, 56, 110)"
                )
            if self.family == "imagenet" and depth not in IMAGENET_STAGES:
                valid = ", ".join(map(str, IMAGENET_STAGES))
                raise InputError(f"depths {depth}: the imagenet family has depths {valid}")
        if min(self.seeds) < 0 or max(self.seeds) >= 2**31:
            raise InputError("seeds must be from 0 to 2147483647")

    @property
    def chosen_recipe(self) -> Recipe:
        """The recipe of all runs."""
        if isinstance(self.recipe, Recipe):
            return self.recipe
        return RECIPES[self.recipe or default_recipe(self.dataset_name)]

    @property
    def dataset_name(self) -> str:
        return self.dataset if isinstance(self.dataset, str) else self.dataset.name

    @property
    def default_out(self) -> Path:
        """Directory of the study unless another one is given."""
        return Path("runs/degradation") / f"{short_name(self.dataset_name)}-{self.family}"

    def plan(self) -> Plan:
        """Read the data and build every network; nothing is trained or written.

        Raises:
          InputError: the data cannot be read, or a network cannot be built.
        """
        builders = {name_kind(kind): load_builder(kind) for kind in self.kinds}
        dataset = self._load()
        config = self._define(dataset)
        try:
            decode(StudyConfig, encode(config), "its configuration")
        except InputError as error:  # such as a batch size of 32.0
            raise SettingError(f"recipe or data cannot be stored: {error}") from error
        networks = [
            plan_network(config, kind, depth, self.seeds, dataset, build)
            for kind, build in builders.items()
            for depth in self.depths
        ]
        return Plan(config, dataset, tuple(networks))

    def _load(self) -> Dataset:
        size, dataset = self.chosen_recipe.image_size, self.dataset
        if isinstance(dataset, Dataset):
            if self.train_examples is not None:
                raise SettingError("train_examples is for a data set given by its name")
            self._check_size(dataset.name, len(dataset.train.labels))
            return dataset.resized(size)
        unread = inspect_dataset(dataset, self.data_dir)
        # Refused before the slow part.
        self._check_size(dataset, unread.num_train)
        if unread.image_shape is None and size is None:
            size = 32 if self.family == "cifar" else 224  # as published
        opened = unread.open(size, "memory", self.train_examples)
        assert isinstance(opened, Dataset)
        return opened

    def _check_size(self, name: str, num_train: int) -> None:
        recipe, examples = self.chosen_recipe, self.train_examples or num_train
        if examples > num_train:
            raise SettingError(f"train_examples {examples}: {name} has {num_train}")
        try:
            check_batch_size(recipe.batch_size, examples, "batch_size")
        except InputError as error:
            raise SettingError(error) from error
        if recipe.total_steps(examples) >= 2**31:
            raise SettingError("epochs: a run must have at most 2147483647 updates")

    def _define(self, dataset: Dataset) -> StudyConfig:
        return StudyConfig(
            family=self.family,
            shortcut=self.shortcut,
            stem=self.stem or ("small" if self.family == "cifar" else "imagenet"),
            precision=self.precision,
            dataset=describe_dataset(self.dataset_name, dataset, len(dataset.train.labels)),
            augmentation=dataset.augmentation,
            recipe=self.chosen_recipe,
            evaluate_every=self.evaluate_every,
        )

    def train(
        self,
        out: str | Path | None = None,
        *,
        workers: int | None = None,
        checkpoint_every: CheckpointEvery = CheckpointEvery(),
        log_gradients: bool = False,
    ) -> "StudyResults":
        """Train all runs that are not finished yet, with progress on the console.

        Args:
          out: directory of the study; None for `runs/degradation/<dataset>-<family>`. Finished runs
            in it are kept, unfinished ones resumed. It may already hold other kinds, depths and
            seeds, but nothing else may differ.
          workers: networks to train at a time; results do not change. None for 2 on a single CPU
            device, whose cores a small network does not fill, otherwise 1.
          checkpoint_every: interval between checkpoints.
          log_gradients: whether to log the norm of each layer's gradient after every epoch, to
            `gradients.csv` of each run.

        Raises:
          InputError: the data cannot be read, or `out` holds something else.
          StorageError: a file cannot be written; finished work is kept.
        """
        out = Path(self.default_out if out is None else out)
        check_output_dir(out)
        check_workers(workers)
        return train_plan(self.plan(), out, workers, checkpoint_every, log_gradients)


def _as_tuple(name: str, values: Any, example: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return any sequence of whole numbers, or of names and functions, as a tuple."""
    try:
        if isinstance(values, str):
            raise TypeError
        return tuple(values if name == "kinds" else map(operator.index, values))
    except TypeError as error:
        raise InputError(f"{name} must be a sequence such as {example}, not {values!r}") from error


@dataclass(frozen=True)
class StudyResults:
    """Results of all runs in a study's directory, including those of earlier calls."""

    out: Path
    plan: Plan
    runs: list[Run]

    @property
    def networks(self) -> list[NetworkResults]:
        """Runs grouped by kind and depth."""
        return group_runs(self.runs)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row per run, as in `summary.csv`; errors are in percent, at the end of the run."""
        return summarise_runs(self.runs)

    @property
    def conclusion(self) -> str:
        """What the numbers show about training error and depth, in sentences."""
        return conclude(self.networks, self.plan.total_steps)

    @property
    def title(self) -> str:
        config = self.plan.config
        return (
            f"{config.dataset.name}, {config.family} family, {self.plan.total_steps:,} updates, "
            f"{count_seeds(self.networks)}"
        )

    def figure(self) -> Figure:
        """Draw training and test error against epoch, a panel per kind, a colour per depth."""
        figure = draw_errors(self.networks)
        set_title(figure, self.title)
        return figure

    def write(self) -> Path:
        """Write `summary.csv` and `degradation.png` to the study's directory, in the primary
        process; return the path of the figure."""
        write_summary(self.out, self.runs)
        path = self.out / "degradation.png"
        if is_primary():
            write_png_and_svg(draw_errors(self.networks), path, self.title)
        return path


def train_plan(
    plan: Plan,
    out: Path,
    workers: int | None = None,
    checkpoint_every: CheckpointEvery = CheckpointEvery(),
    log_gradients: bool = False,
    stop: Callable[[], bool] = lambda: False,
    console: Console | None = None,
    unsaved: set[Any] | None = None,
) -> StudyResults:
    """Train the unfinished runs of `plan` in the directory `out`, and write table and figure.

    Args:
      stop: called at every step; once it returns true, runs in training are saved and end.
      console: console for the progress.
      unsaved: set of the work that is not saved yet, by which a command knows whether it can exit
        at once.
    """
    console, unsaved = console or plain_console(), set() if unsaved is None else unsaved
    with open_study(out, plan.config, plan.configs) as runs:
        left = plan.unfinished(runs)
        make_log = None
        if log_gradients:
            make_log = partial(make_gradient_log, plan, data_mesh())
            _print_unlogged(plan, out, runs, console)
        work = sum(float(planned.cost.work) for planned, _ in left)
        with StudyProgress(
            console, len(plan.configs) - len(left), len(left), work, unsaved
        ) as progress:
            runs = train_grid(
                plan,
                out,
                runs,
                progress,
                workers or default_workers(),
                checkpoint_every,
                stop,
                make_log,
            )
        unsaved.add("the table and the figure")
        results = StudyResults(out, plan, runs)
        results.write()
    return results


def make_gradient_log(plan: Plan, mesh: Mesh, planned: PlannedNetwork) -> GradientLog:
    """Make a log of the gradient on the first training images, as many as a batch has."""
    dataset, batch_size = plan.dataset, plan.config.recipe.batch_size
    images, labels = (array[:batch_size] for array in dataset.train)
    batch = replicate((dataset.preprocess(images), jnp.asarray(labels)), mesh)
    return GradientLog(planned.model, *batch)


def _print_unlogged(plan: Plan, out: Path, runs: list[Run], console: Console) -> None:
    left = {config.key for _, config in plan.unfinished(runs)}
    finished = [run_directory(out, *each.key) for each in plan.configs if each.key not in left]
    without = [str(path) for path in finished if not (path / "gradients.csv").exists()]
    if without:
        line = f"already finished, so no gradients are logged: {', '.join(without)}"
        console.print(line, soft_wrap=True)


def default_recipe(dataset: str) -> str:
    """Return the name of the recipe for a data set if none is given."""
    return "digits" if dataset == "digits" else "he2015-cifar"


def default_workers() -> int:
    """Return 2 for a single CPU device, whose cores a small network does not fill, else 1.

    Faster devices need no second network, and several processes must run the same programs in the
    same order.
    """
    return 2 if jax.default_backend() == "cpu" and jax.device_count() == 1 else 1


def check_workers(workers: int | None) -> None:
    """Check that this many networks can be trained at a time.

    Raises:
      SettingError: there are several devices.
    """
    if workers and workers > 1 and jax.device_count() > 1:
        # Devices could receive the programs of two threads in different orders, and programs that
        # communicate across devices would then deadlock.
        raise SettingError(
            f"workers {workers} is for a single device, but there are "
            f"{jax.device_count()}, which train one network together; leave it out"
        )


def name_kind(kind: str | Build) -> str:
    """Return the name of a kind: `module:function` for a function."""
    if isinstance(kind, str):
        return kind
    module, name = (getattr(kind, each, "<unknown>") for each in ("__module__", "__qualname__"))
    return f"{module}:{name}"


def load_builder(kind: str | Build) -> Build | None:
    """Return the function that builds a custom network, or None for the library's own kinds.

    A function given by name is imported, also from the working directory.

    Raises:
      SettingError: it cannot be imported.
    """
    if not isinstance(kind, str):
        return kind
    if ":" not in kind:
        return None
    module_name, _, function = kind.partition(":")
    sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        build: Any = getattr(importlib.import_module(module_name), function)
    except Exception as error:  # the user's code may raise anything
        raise SettingError(f"kinds {kind}: {type(error).__name__}: {error}") from error
    if not callable(build):
        raise SettingError(f"kinds {kind}: it is {build!r}, not a function")
    return cast(Build, build)
