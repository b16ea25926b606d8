"""Checkpoints of one run, written with Orbax.

A checkpoint is a directory named after its step. It holds the complete state of a run: `variables`
(params, batch_stats), `training` (optimizer state, step, key, running metrics) and, as JSON,
`progress` (the run's record so far), `config` (a copy of its config.json) and `trained_in` (the
environments of its steps). The manifest is written last: a directory without one is not a
checkpoint, and one that does not match its manifest is damaged.

Orbax overwrites a step (`force=True`) by deleting the old checkpoint first, which a crash would
lose. It is renamed instead until the new one is complete.
"""

import json
import os
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from flaxnets.decoding import decode, encode
from flaxnets.errors import DamageWarning, InputError, StorageError
from flaxnets.files import set_aside, storage_errors
from flaxnets.models.stacking import stack_blocks, unstack_blocks
from flaxnets.parallel import is_primary, process_max
from flaxnets.training.config import RunConfig, read_config
from flaxnets.training.environment import Environment
from flaxnets.training.manifest import MANIFEST, find_damage, write_manifest
from flaxnets.training.result import RunResult
from flaxnets.training.steps import TrainState

KEPT = 2
REPLACED = ".replaced"
OVERHEAD = 300_000  # approximate bytes of a checkpoint besides its arrays
# Serialises Orbax operations: checkpointers of different runs in one process interfere.
ORBAX_AT_WORK = threading.Lock()
# A reader retries before it reports damage, because a run in training adds and removes checkpoints
# at any moment.
LOOKS, AGREEING_LOOKS, SECONDS_BETWEEN_LOOKS = 20, 3, 0.05

Found = TypeVar("Found")


class Checkpoints:
    """Checkpoints of a run, written in the background; the latest `kept` are kept.

    With several processes, all of them must construct and call it together, unless it is read-only.

    Attributes:
      step: step of the newest good checkpoint, or None.
      damage: description of the damage of each newer checkpoint.
    """

    def __init__(
        self,
        run_directory: str | Path,
        read_only: bool = False,
        name: str = "checkpoints",
        kept: int = KEPT,
    ) -> None:
        self.directory = Path(run_directory).absolute() / name
        self._kept = kept
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        self._handle: int | None = None
        self.step, self.damage = None, []
        if self.directory.is_symlink():
            raise InputError(f"{self.directory} is a link; link to the whole study instead")
        if read_only:
            self.step, self.damage = self._find_newest_at_rest()
            return
        if is_primary():
            with storage_errors(self.directory, 0):
                self.directory.mkdir(parents=True, exist_ok=True)
                self._recover()
                self.step, self.damage = self._find_newest()
                self._clean_up()
            self._handle = os.open(self.directory, os.O_RDONLY)
        # All processes resume from the same checkpoint.
        step = process_max(-1 if self.step is None else self.step)
        self.step = None if step < 0 else step

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._thread.shutdown()
        try:
            self._checkpointer.close()
        except Exception:
            if kind is None:
                raise
            # Keep the original exception: Orbax's error only follows from it.
        if self._handle is not None:
            os.close(self._handle)
            if kind is not None and is_primary():
                self._remove_unfinished()  # to free disk space
                self._recover()

    def warn_of_damage(self, otherwise: str) -> None:
        """Warn of each damaged checkpoint; `otherwise` says what happens without an older one."""
        instead = otherwise if self.step is None else f"checkpoint {self.step} is used"
        for damage in self.damage:
            warnings.warn(f"{damage}; {instead}", DamageWarning, stacklevel=3)

    def set_aside(self, reason: str) -> None:
        """Rename the newest good checkpoint, which belongs to another run, and warn of it."""
        path = self.directory / str(self.step)
        if is_primary():
            set_aside(path, "other")
            warnings.warn(f"{path} is set aside: {reason}", DamageWarning, stacklevel=3)
        self.step = None

    def save(
        self,
        state: TrainState,
        result: RunResult,
        config: RunConfig | None = None,
        environments: Sequence[Environment] = (),
    ) -> None:
        """Copy the state and write it in the background; `wait` or the next `save` waits for it.

        Raises:
          StorageError: this checkpoint or the previous one cannot be written.
        """
        step = int(state.step)
        state = unstack_blocks(state)
        training = {
            "step": state.step,
            "key": state.key,
            "opt_state": state.opt_state,
            "running": state.running,
        }
        self.wait()
        path = self.directory / str(step)
        size = OVERHEAD + sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        ORBAX_AT_WORK.acquire()
        try:
            with self._storage_errors(path, size):
                if self._is_gone():  # Orbax would recreate it
                    raise FileNotFoundError
                # A run stopped before its epoch was evaluated saves the same step again.
                if is_primary() and path.exists():
                    path.rename(path.with_name(f"{step}{REPLACED}"))
                self._checkpointer.save(
                    path,
                    args=ocp.args.Composite(
                        variables=ocp.args.StandardSave(state.variables),
                        training=ocp.args.StandardSave(training),
                        progress=ocp.args.JsonSave(encode(result)),
                        config=ocp.args.JsonSave({} if config is None else encode(config)),
                        trained_in=ocp.args.JsonSave({"environments": encode(environments)}),
                    ),
                )
        except BaseException:
            ORBAX_AT_WORK.release()
            raise
        self._saving = self._thread.submit(self._end_save, path, size)

    def _end_save(self, path: Path, size: int) -> None:
        try:
            self._complete(path, size)
        finally:
            ORBAX_AT_WORK.release()

    def _complete(self, path: Path, size: int) -> None:
        """Wait for Orbax, write the manifest and remove the checkpoints that `path` replaces."""
        try:
            with self._storage_errors(path, size):
                self._checkpointer.wait_until_finished()
                if is_primary():
                    write_manifest(path)
                    self._recover()
                    # Keep the checkpoint just written, even if an older one has a higher step.
                    others = [step for step in self._steps() if step != int(path.name)]
                    for step in others[: max(0, len(others) + 1 - self._kept)]:
                        _remove(self.directory / str(step))
        except Exception:
            if is_primary() and find_damage(path):
                shutil.rmtree(path, ignore_errors=True)  # to free disk space
            raise

    @contextmanager
    def _storage_errors(self, path: Path, size: int) -> Iterator[None]:
        try:
            with storage_errors(path, size):
                yield
        except Exception as error:
            if not self._is_gone():
                raise
            # Report the missing directory, whatever Orbax raised because of it.
            raise StorageError(
                f"{path} cannot be written: {self.directory} is gone; rerun the same command "
                "to restart this run"
            ) from error

    def _is_gone(self) -> bool:
        """Return whether the directory has been removed or replaced since it was opened."""
        if self._handle is None:
            return False
        if not self.directory.is_dir():
            return True
        return not os.path.samestat(os.fstat(self._handle), self.directory.stat())

    def check(self) -> None:
        """Raise the error of the background save, if it has failed."""
        if self._saving is not None and self._saving.done():
            self._saving.result()

    def wait(self) -> None:
        """Block until the last save is on disk.

        Raises:
          StorageError: the checkpoint cannot be written.
        """
        if self._saving is not None:
            self._saving.result()

    def is_still_good(self) -> bool:
        """Return whether the newest good checkpoint is still intact."""
        return self.step is not None and self._find_damage(self.step) is None

    def restore(self, like: TrainState) -> TrainState:
        """Restore the newest good state, with the shapes and on the devices of `like`."""
        one_by_one = unstack_blocks(like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, one_by_one)
        training = {
            "step": abstract.step,
            "key": abstract.key,
            "opt_state": abstract.opt_state,
            "running": abstract.running,
        }
        restored = self._restore(
            variables=ocp.args.StandardRestore(abstract.variables),
            training=ocp.args.StandardRestore(training),
        )
        state = TrainState(**restored.variables, **restored.training)
        return state if one_by_one is like else stack_blocks(state)

    def restore_variables(self, like: dict[str, Any]) -> dict[str, Any]:
        """Restore the newest good `params` and `batch_stats`, on the devices of `like`."""
        return self._restore(variables=ocp.args.StandardRestore(like)).variables

    def read_result(self) -> RunResult:
        """Read the run's record so far from the newest good checkpoint."""
        return decode(RunResult, self._read_json("progress", self.step), "its record of the run")

    def read_config(self) -> RunConfig:
        """Read the copy of config.json in the newest good checkpoint."""
        return read_config(self._read_json("config", self.step))

    def has_config(self) -> bool:
        """Return whether the newest good checkpoint belongs to a run that has a config."""
        return self._read_json("config", self.step) != {}

    def read_environments(self) -> list[Environment]:
        """Read the environments in which the newest good checkpoint was trained, in order.

        Checkpoints from before environments were recorded have none.
        """
        if not (self.directory / str(self.step) / "trained_in").exists():
            return []
        stored = self._read_json("trained_in", self.step)
        return decode(dict[str, list[Environment]], stored, "its record of environments").get(
            "environments", []
        )

    def _read_json(self, item: str, step: int | None) -> Any:
        # Orbax's own JSON restore waits for all processes.
        path = self.directory / str(step) / item / "metadata"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read: {type(error).__name__}: {error}") from error

    def _restore(self, **items: Any) -> Any:
        path = self.directory / str(self.step)
        try:
            with ORBAX_AT_WORK:
                return self._checkpointer.restore(path, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax raises many kinds of error for unexpected files
            # Orbax's message may list every array of the network.
            reason = (str(error).splitlines() or [""])[0][:300]
            raise InputError(f"{path} cannot be read: {type(error).__name__}: {reason}") from error

    def _find_newest_at_rest(self) -> tuple[int | None, list[str]]:
        """Call `_find_newest` until `AGREEING_LOOKS` calls agree that there is damage or nothing.

        A directory that changes while it is listed may look empty.
        """
        found, agreeing = self._find_newest(), 1
        for _ in range(LOOKS):
            good = found[0] is not None and not found[1]
            # A manifest is written last, after all files have been read for it.
            unfinished = any(f"no {MANIFEST}" in damage for damage in found[1])
            agreed = agreeing == AGREEING_LOOKS and not unfinished
            if good or agreed or not self.directory.is_dir():
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
            before, found = found, self._find_newest()
            agreeing = agreeing + 1 if found == before else 1
        return found

    def _find_newest(self) -> tuple[int | None, list[str]]:
        """Return the newest good step and a description of the damage of newer ones."""
        damage = []
        try:
            for step in reversed(self._steps()):
                reason = self._find_damage(step) or self._misnamed(step)
                if reason is None:
                    return step, damage
                what = "checkpoint" if self.directory.name == "checkpoints" else "best state"
                damage.append(f"{what} {step} of {self.directory.parent} is damaged ({reason})")
        except OSError as error:
            raise InputError(f"{self.directory} cannot be read: {error}") from error
        return None, damage

    def _find_damage(self, step: int) -> str | None:
        try:
            return find_damage(self.directory / str(step))
        except FileNotFoundError:
            return "it is being removed"

    def _misnamed(self, step: int) -> str | None:
        try:
            progress = self._read_json("progress", step)
        except InputError:
            if reason := self._find_damage(step):
                return reason
            raise
        recorded = progress.get("step") if isinstance(progress, dict) else None
        if type(recorded) is not int or recorded < 0 or recorded == step:
            return None
        return f"it holds step {recorded}"

    def _steps(self) -> list[int]:
        """List the steps of all checkpoints, good or damaged, in ascending order."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if _is_checkpoint(path))

    def _recover(self) -> None:
        """Finish or undo the replacement of a checkpoint by another of the same step."""
        for replaced in self.directory.glob(f"*{REPLACED}"):
            path = replaced.with_name(replaced.name.removesuffix(REPLACED))
            if find_damage(path) is None:
                _remove(replaced)
            else:
                shutil.rmtree(path, ignore_errors=True)
                replaced.rename(path)

    def _clean_up(self) -> None:
        """Remove leftovers of a crash and set damaged checkpoints aside.

        The run is about to write these steps again.
        """
        self._remove_unfinished()
        for step in self._steps():
            if self.step is not None and step <= self.step:
                continue
            path = self.directory / str(step)
            if (path / MANIFEST).exists():
                set_aside(path, "damaged")
            else:
                shutil.rmtree(path)

    def _remove_unfinished(self) -> None:
        for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)


def read_newest(
    run_directory: Path, read: Callable[[Checkpoints], Found], name: str = "checkpoints"
) -> Found:
    """Return `read(checkpoints)`, retrying if a run in training removes the checkpoint meanwhile.

    Raises:
      InputError: raised by `read`.
    """
    while True:
        with Checkpoints(run_directory, read_only=True, name=name) as checkpoints:
            try:
                return read(checkpoints)
            except InputError:
                if checkpoints.step is None or checkpoints.is_still_good():
                    raise


def _is_checkpoint(path: Path) -> bool:
    """Return whether `path` is named after a step and looks like a checkpoint, good or damaged."""
    if not re.fullmatch(r"0|[1-9][0-9]{0,17}", path.name) or path.is_symlink() or not path.is_dir():
        return False
    try:
        names = {child.name for child in path.iterdir()}
    except FileNotFoundError:  # removed meanwhile
        return False
    return not names or bool(names & {MANIFEST, "_CHECKPOINT_METADATA", "variables", "training"})


def _remove(path: Path) -> None:
    # The manifest goes first, so that a half-removed checkpoint does not count.
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)
