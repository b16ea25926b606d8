"""Directories of studies and runs: ownership checks, locks and JSON files."""

import fcntl
import json
import os
import socket
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from flaxnets.decoding import decode, encode
from flaxnets.errors import DamageWarning, InputError
from flaxnets.files import check_writable, set_aside, storage_errors, write_atomic
from flaxnets.parallel import gather_texts, is_primary, raise_on_all_processes
from flaxnets.training.checkpoints import Checkpoints
from flaxnets.training.config import RunConfig, StudyConfig, comparable, read_config, upgrade
from flaxnets.training.environment import Environment

RUN_FILES: tuple[str, ...] = ("config.json", "checkpoints")


def run_directory(out: Path, kind: str, depth: int, seed: int) -> Path:
    """Return the directory of one run of a study."""
    return out / f"{kind}-{depth}" / f"seed-{seed}"


def check_output_dir(out: Path, what: Literal["study", "run"] = "study") -> None:
    """Check that `out` can hold a study, or a run, without writing anything.

    Raises:
      InputError: `out` is a file, cannot be written, or holds something else.
    """
    try:
        str(out.absolute()).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"--out {out}: checkpoints need a path in UTF-8; give another directory"
        ) from error
    check_writable(out)
    try:
        if what == "study":
            known, mark = any(out.glob("study.json")) or any(find_runs(out)), "study.json"
        else:
            known, mark = any((out / name).exists() for name in RUN_FILES), "config.json"
        foreign = out.exists() and not known
        # Hidden files are ours: an early crash may leave them behind.
        if foreign and any(not path.name.startswith(".") for path in out.iterdir()):
            raise InputError(
                f"--out {out} holds something that is not a {what} (no {mark}); "
                f"use --out {suggest_free_name(out)}"
            )
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}; give another directory") from error


def check_run(out: Path, config: RunConfig) -> None:
    """Check that `out` holds no run but that of `config`, without writing anything.

    Raises:
      InputError: it holds another run; the message lists the differences and a free name.
    """
    with Checkpoints(out, read_only=True) as checkpoints:
        if checkpoints.step is None:
            return
        try:
            before = comparable(checkpoints.read_config())
            differences = list_differences(before, comparable(config))
        except InputError as error:
            differences = [str(error)]
        if differences:
            raise InputError(
                f"--out {out} holds another run ({'; '.join(differences)}); "
                f"use --out {suggest_free_name(out)}"
            )


def check_processes_agree(work: Mapping[str, object]) -> None:
    """Check that all processes of a study were given the same `work`.

    Raises:
      InputError: in all processes; the message lists the differences.
    """
    first, *others = map(json.loads, gather_texts(json.dumps(encode(work))))
    for number, other in enumerate(others, 1):
        if differences := list_differences(first, other):
            raise InputError(
                f"the processes were given different work ({'; '.join(differences[:3])}; 'there' "
                f"is process 0, 'here' is process {number}); give all of them the same command"
            )


def read_json(path: Path) -> object:
    """Read JSON; None if there is no file.

    Raises:
      InputError: the file is damaged.
    """
    try:
        # A link could lead elsewhere, and reading a pipe could block forever.
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError("it is no regular file")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} is damaged") from error


@dataclass(frozen=True)
class StudyFile:
    """Content of `study.json`: the definition of the study, and where its runs were trained."""

    study: StudyConfig
    environments: list[Environment]


def read_study_file(out: Path, warn: bool = True) -> StudyFile | None:
    """Read `study.json`; None if there is none or, with a warning, if it is damaged or foreign."""
    path = out / "study.json"
    try:
        value = read_json(path)
        if value is None:
            return None
        if isinstance(value, dict) and "study" in value:
            value = {**value, "study": upgrade(value["study"])}
        return decode(StudyFile, value, f"{path} is damaged: it")
    except InputError as error:
        if warn:
            message = f"{error}; the checkpoints are used instead"
            warnings.warn(message, DamageWarning, stacklevel=3)
        return None


def list_differences(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted(before.keys() | now.keys())
            for line in list_differences(before.get(key), now.get(key), f"{name}.{key}".strip("."))
        ]
    if before == now:
        return []
    return [f"{name} is {_short(before)} there and {_short(now)} here"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}...{text[-4:]}"


def suggest_free_name(out: Path) -> Path:
    if not out.name:  # such as `.`
        out = out.resolve()
    number = 2
    while out.with_name(f"{out.name}-{number}").exists():
        number += 1
    return out.with_name(f"{out.name}-{number}")


def write_study(out: Path, study: StudyConfig, environments: Iterable[Environment]) -> None:
    """Write `study.json` in the primary process, adding `environments` to those it lists."""
    if is_primary():
        stored = read_study_file(out)
        known = [*(stored.environments if stored is not None else []), *environments]
        known = [each for i, each in enumerate(known) if each not in known[:i]]
        text = json.dumps(encode(StudyFile(study, known)), indent=2)
        write_atomic(out / "study.json", text + "\n")


def _lock_text() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


@contextmanager
def lock_directory(out: Path) -> Iterator[None]:
    """Lock the existing directory `out` for this process; the lock ends with the process.

    Raises:
      InputError: another process holds the lock, or the file system has no locks.
    """
    path = out / ".lock"
    with storage_errors(path, 0):
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with open(number, "r+b", buffering=0) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = lock.read().decode(errors="replace")
            raise InputError(
                f"--out {out} is in use by another process ({holder}); "
                "wait for it or give another directory"
            ) from error
        except OSError as error:
            raise InputError(
                f"--out {out} is on a file system without locks ({error.strerror}); "
                "give a directory on another one"
            ) from error
        with storage_errors(path, 0):
            lock.truncate(0)
            lock.write(_lock_text().encode())
        yield


def check_shared(out: Path) -> None:
    """Check, in all processes, that `out` is the same directory for each."""
    holder = gather_texts(_lock_text())[0]
    with raise_on_all_processes():
        path = out / ".lock"
        if not path.is_file() or path.read_bytes() != holder.encode():
            raise InputError(
                f"--out {out} is not the same directory for process {jax.process_index()} as for "
                "process 0; give one on a file system that all processes share"
            )


def set_foreign_aside(path: Path) -> None:
    """Rename a file that has one of our names but was not written by us, and warn of it."""
    if path.exists():
        aside = set_aside(path, "damaged")
        warnings.warn(f"{path} is set aside as {aside}", DamageWarning, stacklevel=3)


def begin_run(directory: Path, config: RunConfig) -> None:
    """Write the `config.json` of a run to be trained, in the primary process.

    Without checkpoints, an existing file that is not a run's config is set aside.
    """
    if is_primary() and not any(directory.glob("checkpoints/*")):
        try:
            read_config(read_json(directory / "config.json"))
        except InputError:
            set_foreign_aside(directory / "config.json")
    write_config(directory, config)


def write_config(directory: Path, config: RunConfig) -> None:
    """Write a run's `config.json`, in the primary process."""
    if is_primary():
        with storage_errors(directory, 0):
            # Do not recreate the study's directory: if it is gone, so are its files.
            directory.parent.mkdir(exist_ok=True)
            directory.mkdir(exist_ok=True)
        write_atomic(directory / "config.json", json.dumps(encode(config), indent=2) + "\n")


def find_runs(out: Path) -> list[Path]:
    """List directories that may hold a run, in a fixed order."""
    return sorted({path.parent for name in RUN_FILES for path in out.glob(f"*/seed-*/{name}")})
