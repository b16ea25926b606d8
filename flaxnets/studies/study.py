"""A study: a grid of runs (kind x depth x seed) in one directory, and its table of results.

study.json                    what defines the study, and what it ran on
summary.csv                   a row a run
<kind>-<depth>/seed-<seed>/   one run: config.json, metrics.csv, checkpoints/

What a study is and has come to stands in the checkpoints, which are guarded by their manifests. The
other files are for people to read; damaged, they are written anew.
"""

import csv
import io
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

from flaxnets.errors import DamageWarning, InputError
from flaxnets.files import storage_errors, write_atomic
from flaxnets.parallel import gather_texts, is_primary, raise_on_all_processes
from flaxnets.studies.config import check_config
from flaxnets.studies.directory import (
    check_output_dir,
    check_shared,
    find_runs,
    list_differences,
    lock_directory,
    read_json,
    read_study_file,
    run_directory,
    run_key,
    set_foreign_aside,
    suggest_free_name,
    write_config,
    write_study,
)
from flaxnets.training.checkpoints import Checkpoints, read_newest
from flaxnets.training.loop import RunResult, write_metrics

FINAL_METRICS: tuple[str, ...] = ("train_error", "test_error", "train_loss", "test_loss")
SUMMARY: tuple[str, ...] = (
    *("kind", "depth", "seed", "status", "parameters"),
    *FINAL_METRICS,
    *("steps", "seconds", "diverged_step"),
)


@dataclass(frozen=True)
class Run:
    """One run of a study: its config, what it has come to, whether a checkpoint says so, and in
    which environments it was trained."""

    config: dict[str, Any]
    result: RunResult
    saved: bool = True
    environments: Sequence[dict[str, Any]] = ()

    @property
    def kind(self) -> str:
        return self.config["kind"]

    @property
    def depth(self) -> int:
        return self.config["depth"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def key(self) -> tuple[str, int, int]:
        """Kind, depth and seed: which run of the study it is."""
        return run_key(self.config)


@dataclass(frozen=True)
class Network:
    """All seeds of one kind at one depth. Means and spreads are over the finished runs alone;
    `status` says how many of how many that is."""

    kind: str
    depth: int
    runs: list[Run]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.result.status == "finished"]

    def mean(self, metric: str) -> float:
        """Mean of a final metric, NaN without a finished run."""
        values = [run.result.final(metric) for run in self.finished]
        return statistics.fmean(values) if values else math.nan

    def spread(self, metric: str) -> float:
        """Sample standard deviation of a final metric, NaN with fewer than two finished runs."""
        values = [run.result.final(metric) for run in self.finished]
        return statistics.stdev(values) if len(values) > 1 else math.nan

    @property
    def status(self) -> str:
        """`finished`, or `2 of 3 (1 diverged)`."""
        states = [run.result.status for run in self.runs]
        if len(states) == 1:
            return states[0]
        if set(states) == {"finished"}:
            return f"{len(states)} finished"
        others = ", ".join(
            f"{states.count(s)} {s}" for s in ("diverged", "unfinished") if s in states
        )
        return f"{states.count('finished')} of {len(states)} ({others})"


def check_study(
    out: Path, definition: dict[str, Any], configs: Iterable[dict[str, Any]]
) -> list[Run]:
    """Read what `out` holds, and refuse it if that is another study, or has other runs, than these.

    Nothing is written. A damaged study.json is no reason to refuse: the runs know better.

    Returns:
      All runs in `out`, as `read_runs`.

    Raises:
      InputError: with what differs and a free name.
    """
    definition, *configs = json.loads(json.dumps([definition, *configs]))
    planned = {run_directory(out, *run_key(config)) for config in configs}
    with raise_on_all_processes():
        runs = read_runs(out, planned) if is_primary() else []
    if jax.process_count() > 1:
        # One reads for all: a file that only some could read would set them apart.
        text = json.dumps(
            [[run.config, vars(run.result), run.saved, run.environments] for run in runs]
        )
        runs = [
            Run(config, RunResult.from_json(result), saved, environments)
            for config, result, saved, environments in json.loads(gather_texts(text)[0])
        ]
    stored = [{key: run.config.get(key) for key in definition} for run in runs if run.saved]
    study = read_json(out / "study.json")
    if not stored and study is not None and isinstance(study.get("study"), dict):
        stored = [study["study"]]
    known = {run.key: run.config for run in runs if run.saved}
    pairs = [(before, definition) for before in stored]
    pairs += [(known[run_key(config)], config) for config in configs if run_key(config) in known]
    for before, now in pairs:
        if differences := list_differences(before, now):
            raise InputError(
                f"--out {out} holds another study ({'; '.join(differences)}); "
                f"use --out {suggest_free_name(out)}"
            )
    return runs


@contextmanager
def open_study(
    out: Path, definition: dict[str, Any], configs: Iterable[dict[str, Any]] = ()
) -> Iterator[list[Run]]:
    """Make `out` the directory of this study, and this process the only one that writes to it.

    The lock goes with the process, however it ends. Files that are damaged or that a crash left
    behind the checkpoints are written anew. Several processes open it together; the primary one
    locks and writes.

    Yields:
      All runs that are there.

    Raises:
      InputError: as `check_output_dir` and `check_study`, or another process is working on it.
      StorageError: nothing can be written there.
    """
    with ExitStack() as stack:
        with raise_on_all_processes():
            check_output_dir(out)
            if is_primary():
                with storage_errors(out / "study.json", 0):
                    out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_directory(out))
        check_shared(out)
        runs = check_study(out, definition, configs)
        if is_primary():
            if not isinstance(read_study_file(out).get("study"), dict) and not runs:
                set_foreign_aside(out / "study.json")
            write_study(out, definition, [each for run in runs for each in run.environments])
            for run in runs:
                if run.saved:
                    write_config(run_directory(out, *run.key), run.config)
                    write_metrics(run_directory(out, *run.key), run.result.rows)
        yield runs


def read_runs(out: Path, planned: Container[Path] = ()) -> list[Run]:
    """Every run in a study directory, in the order of kind, depth and seed.

    Each is read from its newest good checkpoint; damage is warned of. A directory that does not
    hold the run that its name says is warned of and left out.

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
    """The run in `directory`; None where nothing has come of it yet."""
    checkpoints.warn_of_damage("the run starts anew")
    saved = checkpoints.step is not None
    result = RunResult("unfinished", [], 0, 0.0, None)
    if saved:
        config = checkpoints.read_config()
        result = RunResult.from_json(checkpoints.read_progress())
    elif (config := read_json(directory / "config.json")) is None:
        return None
    try:
        check_config(config)
        if run_directory(out, *run_key(config)) != directory:
            raise InputError(f"it is the run {' '.join(map(str, run_key(config)))}")
    except InputError as error:
        if saved:
            raise
        # A run that has nothing to lose yet, whoever's config that is.
        warnings.warn(f"{directory} is left out: {error}", DamageWarning, stacklevel=2)
        return None
    environments = checkpoints.read_environments() if saved else []
    return Run(config, result, saved, environments)


def sort_runs(runs: Iterable[Run]) -> list[Run]:
    """In the order of kind (plain, residual, others), depth and seed."""
    first = {"plain": 0, "residual": 1}
    return sorted(runs, key=lambda run: (first.get(run.kind, 2), *run.key))


def group_runs(runs: Iterable[Run]) -> list[Network]:
    """Runs of one kind and depth together, in their order."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.kind, run.depth), []).append(run)
    return [Network(kind, depth, members) for (kind, depth), members in groups.items()]


def curves(networks: Sequence[Network]) -> dict[str, list[Network]]:
    """Networks that differ in depth alone. A study of the ImageNet family may mix two-convolution
    blocks and bottlenecks; those are not one curve."""
    mixed = len({network.runs[0].config["block"] for network in networks} - {None}) > 1
    groups: dict[str, list[Network]] = {}
    for network in networks:
        block = network.runs[0].config["block"]
        of_blocks = f" of {block} blocks" if mixed and block else ""
        groups.setdefault(f"{network.kind} networks{of_blocks}", []).append(network)
    return groups


def write_summary(out: Path, runs: Iterable[Run]) -> None:
    """`summary.csv`: a row a run; numbers are those at the end of the run, empty until then."""
    if not is_primary():
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, SUMMARY, lineterminator="\n")
    writer.writeheader()
    for run in runs:
        result = run.result
        metrics = {
            name: result.final(name) if result.status != "unfinished" else ""
            for name in FINAL_METRICS
        }
        writer.writerow(
            {
                "kind": run.kind,
                "depth": run.depth,
                "seed": run.seed,
                "status": result.status,
                "parameters": run.config["parameters"],
                **metrics,
                "steps": result.step,
                "seconds": result.seconds,
                "diverged_step": result.diverged_step,
            }
        )
    write_atomic(out / "summary.csv", text.getvalue())
