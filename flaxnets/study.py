"""A study: a grid of runs (kind x depth x seed) in one directory, and its table of results.

study.json                    what defines the study, and what it ran on
summary.csv                   a row a run
<kind>-<depth>/seed-<seed>/   one run: config.json, metrics.csv, checkpoints/
"""

import csv
import fcntl
import io
import json
import math
import os
import socket
import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from flaxnets.errors import InputError
from flaxnets.files import write_atomic
from flaxnets.training.loop import RunResult, read_result

FINAL_METRICS: tuple[str, ...] = ("train_error", "test_error", "train_loss", "test_loss")
SUMMARY: tuple[str, ...] = (
    *("kind", "depth", "seed", "status", "parameters"),
    *FINAL_METRICS,
    *("steps", "seconds", "diverged_step"),
)


@dataclass(frozen=True)
class Run:
    """One run of a study: its `config.json` and what it has come to."""

    config: dict[str, Any]
    result: RunResult

    @property
    def kind(self) -> str:
        return self.config["kind"]

    @property
    def depth(self) -> int:
        return self.config["depth"]

    @property
    def seed(self) -> int:
        return self.config["seed"]


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


def run_directory(out: Path, kind: str, depth: int, seed: int) -> Path:
    """Where a study keeps one run."""
    return out / f"{kind}-{depth}" / f"seed-{seed}"


def environment() -> dict[str, Any]:
    """What the numbers were made with; recorded, never compared."""
    packages = ("flaxnets", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "packages": {name: version(name) for name in packages},
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
    }


def check_place(out: Path) -> None:
    """Refuse, without writing anything, an `out` that can hold no study at all.

    Raises:
      InputError: `out` is a file, cannot be written, or holds something that is not a study.
    """
    try:
        existing = out
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir() or out.is_symlink() > out.exists():
            raise InputError(f"--out {out}: {existing} is a file; give a directory")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(f"--out {out}: {existing} cannot be written; give another directory")
        foreign = out.exists() and not (out / "study.json").is_file()
        # What a crash in the first moment leaves is hidden, and ours.
        if foreign and any(not path.name.startswith(".") for path in out.iterdir()):
            raise InputError(
                f"--out {out} holds something that is not a study (no study.json); "
                f"use --out {_free_name(out)}"
            )
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}; give another directory") from error


def check_definition(out: Path, definition: dict[str, Any]) -> None:
    """Refuse, without writing anything, an `out` that holds another study than `definition`.

    Raises:
      InputError: with what differs and a free name.
    """
    if not (out / "study.json").is_file():
        return
    before = _read_study(out).get("study")
    differences = _differences(before, json.loads(json.dumps(definition)))
    if differences:
        raise InputError(
            f"--out {out} holds another study ({'; '.join(differences)}); "
            f"use --out {_free_name(out)}"
        )


def _read_study(out: Path) -> dict[str, Any]:
    try:
        study = json.loads((out / "study.json").read_text(encoding="utf-8"))
    except ValueError:
        study = None
    if not isinstance(study, dict):
        raise InputError(f"{out / 'study.json'} is damaged; use --out {_free_name(out)}")
    return study


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted(before.keys() | now.keys())
            for line in _differences(before.get(key), now.get(key), f"{name}.{key}".strip("."))
        ]
    if before == now:
        return []
    return [f"{name} is {_short(before)} there and {_short(now)} here"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}...{text[-4:]}"


def _free_name(out: Path) -> Path:
    if not out.name:  # such as `.`
        out = out.resolve()
    number = 2
    while out.with_name(f"{out.name}-{number}").exists():
        number += 1
    return out.with_name(f"{out.name}-{number}")


@contextmanager
def open_study(out: Path, definition: dict[str, Any]) -> Iterator[None]:
    """Make `out` the directory of this study, and this process the only one that writes to it.

    Raises:
      InputError: as `check_place` and `check_definition`, or another process is working on it.
    """
    check_place(out)
    check_definition(out, definition)
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise InputError(
                f"--out {out} is in use by another process ({lock.read().strip()}); "
                "wait for it or give another directory"
            ) from error
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        # A study may grow on another machine.
        environments = _read_study(out)["environments"] if (out / "study.json").exists() else []
        if environment() not in environments:
            environments.append(environment())
        text = json.dumps({"study": definition, "environments": environments}, indent=2)
        write_atomic(out / "study.json", text + "\n")
        yield


def check_config(directory: Path, config: dict[str, Any]) -> None:
    """Refuse a run directory that holds a run of another configuration (a changed network, say).

    Raises:
      InputError: with what differs.
    """
    path = directory / "config.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        differences = _differences(before, json.loads(json.dumps(config)))
        if differences:
            study = directory.parents[1]
            raise InputError(
                f"{directory} holds another run ({'; '.join(differences)}); "
                f"use --out {_free_name(study)}"
            )


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Write a run's `config.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / "config.json", json.dumps(config, indent=2) + "\n")


def read_runs(out: Path) -> list[Run]:
    """Every run in a study directory, in the order of kind, depth and seed."""
    runs = []
    for path in out.glob("*/seed-*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        result = read_result(path.parent) or RunResult("unfinished", [], 0, 0.0, None)
        runs.append(Run(config, result))
    first = {"plain": 0, "residual": 1}
    return sorted(runs, key=lambda run: (first.get(run.kind, 2), run.kind, run.depth, run.seed))


def group_runs(runs: Iterable[Run]) -> list[Network]:
    """Runs of one kind and depth together, in their order."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.kind, run.depth), []).append(run)
    return [Network(kind, depth, members) for (kind, depth), members in groups.items()]


def write_summary(out: Path, runs: Iterable[Run]) -> None:
    """`summary.csv`: a row a run; numbers are those at the end of the run, empty until then."""
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
