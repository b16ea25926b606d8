"""A study: a grid of runs (kind x depth x seed) in one directory, and its table of results.

study.json                    the definition of the study, and its environments
summary.csv                   one row per run
<kind>-<depth>/seed-<seed>/   one run: config.json, metrics.csv, checkpoints/

The checkpoints, which are guarded by their manifests, hold the definition and results of a study.
The other files are for people to read and are rewritten if damaged.
"""

import json
import math
import statistics
import warnings
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from flaxnets.decoding import decode, encode
from flaxnets.errors import DamageWarning, InputError
from flaxnets.files import storage_errors, write_csv
from flaxnets.parallel import gather_texts, is_primary, raise_on_all_processes
from flaxnets.studies.directory import (
    check_output_dir,
    check_shared,
    find_runs,
    list_differences,
    lock_directory,
    read_json,
    read_study_file,
    run_directory,
    set_foreign_aside,
    suggest_free_name,
    write_config,
    write_study,
)
from flaxnets.training.checkpoints import Checkpoints, read_newest
from flaxnets.training.config import RunConfig, StudyConfig, comparable, read_config
from flaxnets.training.environment import Environment
from flaxnets.training.result import RunResult, write_metrics

FINAL_METRICS: tuple[str, ...] = ("train_error", "test_error", "train_loss", "test_loss")
SUMMARY: tuple[str, ...] = (
    *("kind", "depth", "seed", "status", "parameters"),
    *FINAL_METRICS,
    *("steps", "seconds", "diverged_step"),
)


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
      saved: whether config and result are from a checkpoint.
      environments: environments in which the run was trained.
    """

    config: RunConfig
    result: RunResult
    saved: bool = True
    environments: tuple[Environment, ...] = ()

    @property
    def kind(self) -> str:
        return self.config.kind

    @property
    def depth(self) -> int:
        return self.config.depth

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def key(self) -> tuple[str, int, int]:
        """Kind, depth and seed, which identify the run within its study."""
        return self.config.key


@dataclass(frozen=True)
class NetworkResults:
    """All seeds of one kind at one depth.

    Means and spreads are over the finished runs only; `status` has their number.
    """

    kind: str
    depth: int
    runs: list[Run]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.result.status == "finished"]

    def mean(self, metric: str) -> float:
        """Return the mean of a final metric, NaN without a finished run."""
        values = [run.result.final(metric) for run in self.finished]
        return statistics.fmean(values) if values else math.nan

    def spread(self, metric: str) -> float:
        """Return the sample standard deviation of a final metric, NaN below two finished runs."""
        values = [run.result.final(metric) for run in self.finished]
        return statistics.stdev(values) if len(values) > 1 else math.nan

    @property
    def status(self) -> str:
        """Status of the runs: `finished`, `3 finished` or `2 of 3 (1 diverged)`."""
        states = [run.result.status for run in self.runs]
        if len(states) == 1:
            return states[0]
        if set(states) == {"finished"}:
            return f"{len(states)} finished"
        others = ", ".join(
            f"{states.count(s)} {s}" for s in ("diverged", "unfinished") if s in states
        )
        return f"{states.count('finished')} of {len(states)} ({others})"


def check_study(out: Path, study: StudyConfig, configs: Iterable[RunConfig]) -> list[Run]:
    """Check that `out` holds no study but this one, without writing anything.

    A damaged study.json is not refused, because the runs hold the same definition.

    Returns:
      All runs in `out`, as returned by `read_runs`.

    Raises:
      InputError: it holds another study; the message lists the differences and a free name.
    """
    planned = {config.key: config for config in configs}
    with raise_on_all_processes():
        runs = read_runs(out, {run_directory(out, *key) for key in planned}) if is_primary() else []
    if jax.process_count() > 1:
        # The primary process reads for all: some processes may be unable to read a file.
        shared = json.loads(gather_texts(json.dumps(encode(runs)))[0])
        runs = decode(list[Run], shared, "the record of the runs")
    saved = [run.config for run in runs if run.saved]
    pairs: list[tuple[StudyConfig, StudyConfig]] = [(config.study, study) for config in saved]
    # Without a checkpoint there is nothing to use instead.
    stored = read_study_file(out, warn=bool(saved))
    if not saved and stored is not None:
        pairs = [(stored.study, study)]
    pairs += [(config, planned[config.key]) for config in saved if config.key in planned]
    for before, now in pairs:
        if differences := list_differences(comparable(before), comparable(now)):
            raise InputError(
                f"--out {out} holds another study ({'; '.join(differences)}); "
                f"use --out {suggest_free_name(out)}"
            )
    return runs


@contextmanager
def open_study(
    out: Path, study: StudyConfig, configs: Iterable[RunConfig] = ()
) -> Iterator[list[Run]]:
    """Open `out` as the directory of this study, with a lock against other writers.

    The lock ends with the process, even after a crash. Files that are damaged or older than the
    checkpoints are rewritten. Several processes open it together; the primary one locks and writes.

    Yields:
      All existing runs.

    Raises:
      InputError: as `check_output_dir` and `check_study`, or another process holds the lock.
      StorageError: `out` cannot be written.
    """
    with ExitStack() as stack:
        with raise_on_all_processes():
            check_output_dir(out)
            if is_primary():
                with storage_errors(out / "study.json", 0):
                    out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_directory(out))
        check_shared(out)
        runs = check_study(out, study, configs)
        if is_primary():
            if not runs and read_study_file(out, warn=False) is None:
                set_foreign_aside(out / "study.json")
            write_study(out, study, [each for run in runs for each in run.environments])
            for run in runs:
                if run.saved:
                    write_config(run_directory(out, *run.key), run.config)
                    write_metrics(run_directory(out, *run.key), run.result.rows)
        yield runs


def read_runs(out: Path, planned: Container[Path] = ()) -> list[Run]:
    """Read every run in a study directory, in the order of kind, depth and seed.

    Each run is read from its newest good checkpoint, with a warning if newer ones are damaged. A
    directory that does not hold the run it is named after is left out, with a warning.

    Raises:
      InputError: such a directory is one of the `planned` ones.
    """
    runs = []
    for directory in find_runs(out):
        try:
            run = read_newest(directory, partial(_read_run, out, directory))
        except InputError as error:
            if directory in planned:
                raise InputError(f"{directory}: {error}; move it away") from error
            warnings.warn(f"{directory} is left out: {error}", DamageWarning, stacklevel=2)
            continue
        if run is not None:
            runs.append(run)
    return sort_runs(runs)


def _read_run(out: Path, directory: Path, checkpoints: Checkpoints) -> Run | None:
    """Read the run in `directory`; None without a checkpoint or valid config."""
    checkpoints.warn_of_damage("the run restarts from scratch")
    if checkpoints.step is not None:
        config = checkpoints.read_config()
        _check_place(out, directory, config)
        result = checkpoints.read_result().check_splits()
        return Run(config, result, True, tuple(checkpoints.read_environments()))
    try:
        value = read_json(directory / "config.json")
        if value is None:
            return None
        config = read_config(value)
        _check_place(out, directory, config)
    except InputError as error:
        # Without a checkpoint there is nothing to lose, so a warning is enough.
        warnings.warn(f"{directory} is left out: {error}", DamageWarning, stacklevel=2)
        return None
    return Run(config, RunResult("unfinished", [], 0, 0.0, None), saved=False)


def _check_place(out: Path, directory: Path, config: RunConfig) -> None:
    if run_directory(out, *config.key) != directory:
        raise InputError(f"it holds the run {' '.join(map(str, config.key))}")


def sort_runs(runs: Iterable[Run]) -> list[Run]:
    """Sort runs by kind (plain, residual, others), depth and seed."""
    first = {"plain": 0, "residual": 1}
    return sorted(runs, key=lambda run: (first.get(run.kind, 2), *run.key))


def group_runs(runs: Iterable[Run]) -> list[NetworkResults]:
    """Group runs of one kind and depth, keeping their order."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.kind, run.depth), []).append(run)
    return [NetworkResults(kind, depth, members) for (kind, depth), members in groups.items()]


def curves(networks: Sequence[NetworkResults]) -> dict[str, list[NetworkResults]]:
    """Group networks that differ only in depth.

    A study of the ImageNet family may mix two-convolution blocks and bottlenecks, which get
    separate curves.
    """
    mixed = len({network.runs[0].config.block for network in networks} - {None}) > 1
    groups: dict[str, list[NetworkResults]] = {}
    for network in networks:
        block = network.runs[0].config.block
        of_blocks = f" of {block} blocks" if mixed and block else ""
        groups.setdefault(f"{network.kind} networks{of_blocks}", []).append(network)
    return groups


def summarise_runs(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Return the rows of `summary.csv`, keyed by `SUMMARY`: None where there is no value (yet)."""
    return [
        {
            "kind": run.kind,
            "depth": run.depth,
            "seed": run.seed,
            "status": run.result.status,
            "parameters": run.config.parameters,
            **{
                name: None if run.result.status == "unfinished" else run.result.final(name)
                for name in FINAL_METRICS
            },
            "steps": run.result.step,
            "seconds": run.result.seconds,
            "diverged_step": run.result.diverged_step,
        }
        for run in runs
    ]


def write_summary(out: Path, runs: Iterable[Run]) -> None:
    """Write `summary.csv`, one row per run; final metrics are empty until the run ends."""
    if not is_primary():
        return
    write_csv(out / "summary.csv", SUMMARY, summarise_runs(runs))
