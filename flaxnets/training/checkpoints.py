"""Checkpoints of one run, through Orbax.

A checkpoint is a directory named by its step. It holds everything a run consists of: `variables`
(params, batch_stats), `training` (optimizer state, step, key, running metrics) and, as JSON,
`progress`, the run's record so far, and `config`, a copy of its config.json. Its manifest is
written last: a directory without one is no checkpoint, and one that differs from it is damaged.
"""

import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from flaxnets.errors import DamageWarning, InputError, StorageError
from flaxnets.files import explained
from flaxnets.manifest import MANIFEST, find_damage, write_manifest
from flaxnets.parallel import is_primary
from flaxnets.training.steps import TrainState

KEPT = 2
OVERHEAD = 300_000  # bytes of a checkpoint beside its arrays, about


class Checkpoints:
    """The checkpoints below a run directory: written in the background, the latest two kept.

    Attributes:
      step: of the newest good checkpoint, or None.
      damage: what is wrong with each newer one, in words.

    With several processes, all of them make and call it together.
    """

    def __init__(self, run_directory: str | Path, read_only: bool = False) -> None:
        self.directory = Path(run_directory).absolute() / "checkpoints"
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        self._handle: int | None = None
        self._saved: tuple[Any, ...] | None = None
        self.step, self.damage = self._find_newest()
        if not read_only and is_primary():
            with explained(self.directory, 0):
                self.directory.mkdir(parents=True, exist_ok=True)
                self._clean_up()
            self._handle = os.open(self.directory, os.O_RDONLY)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        if self._handle is not None:
            os.close(self._handle)
        self._checkpointer.close()

    def warn_of_damage(self, otherwise: str) -> None:
        """Say which checkpoints are damaged, and that an older one or `otherwise` takes over."""
        instead = otherwise if self.step is None else f"checkpoint {self.step} is used"
        for damage in self.damage:
            warnings.warn(f"{damage}; {instead}", DamageWarning, stacklevel=3)

    def save(
        self, state: TrainState, progress: dict[str, Any], config: dict[str, Any] | None = None
    ) -> None:
        """Copy the state and write it in the background; `wait` or the next `save` waits for it.

        Raises:
          StorageError: this one, or the one before, cannot be written.
        """
        step = int(state.step)
        content = (step, progress["status"], len(progress["rows"]))
        if content == self._saved:
            return
        training = {
            "step": state.step,
            "key": state.key,
            "opt_state": state.opt_state,
            "running": state.running,
        }
        self.wait()
        path = self.directory / str(step)
        size = OVERHEAD + sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        with self._explained(path, size):
            if self._is_gone():  # Orbax would make it anew
                raise FileNotFoundError
            # Stopped before its epoch was measured, and gone on from there: the record has grown.
            if is_primary() and path.exists():
                _remove(path)
            self._checkpointer.save(
                path,
                args=ocp.args.Composite(
                    variables=ocp.args.StandardSave(state.variables),
                    training=ocp.args.StandardSave(training),
                    progress=ocp.args.JsonSave(progress),
                    config=ocp.args.JsonSave(config or {}),
                ),
            )
        self._saved = content
        self._saving = self._thread.submit(self._complete, path, size)

    def _complete(self, path: Path, size: int) -> None:
        """Once Orbax has written `path`, make it a checkpoint and remove what it replaces."""
        try:
            with self._explained(path, size):
                self._checkpointer.wait_until_finished()
                if is_primary():
                    write_manifest(path)
                    for step in self._steps()[:-KEPT]:
                        _remove(self.directory / str(step))
        except StorageError:
            self._remove_unfinished()  # they take up space
            if find_damage(path):
                shutil.rmtree(path, ignore_errors=True)
            raise

    @contextmanager
    def _explained(self, path: Path, size: int) -> Iterator[None]:
        try:
            with explained(path, size):
                yield
        except Exception as error:
            if not self._is_gone():
                raise
            # Whatever Orbax has made of it, and of the path, since.
            raise StorageError(
                f"{path} cannot be written: {self.directory} is gone; the same command starts "
                "this run anew"
            ) from error

    def _is_gone(self) -> bool:
        """Whether the directory is no longer the one that was opened."""
        if self._handle is None:
            return False
        if not self.directory.is_dir():
            return True
        return not os.path.samestat(os.fstat(self._handle), self.directory.stat())

    def check(self) -> None:
        """Raise what has gone wrong in the background, if anything has yet."""
        if self._saving is not None and self._saving.done():
            self._saving.result()

    def wait(self) -> None:
        """Return once everything saved is on disk.

        Raises:
          StorageError: it cannot be written.
        """
        if self._saving is not None:
            self._saving.result()

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest good state, on the devices and of the shapes of `like`, and its progress."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        training = {
            "step": abstract.step,
            "key": abstract.key,
            "opt_state": abstract.opt_state,
            "running": abstract.running,
        }
        restored = self._restore(
            variables=ocp.args.StandardRestore(abstract.variables),
            training=ocp.args.StandardRestore(training),
            progress=ocp.args.JsonRestore(),
        )
        progress = restored.progress
        self._saved = (self.step, progress["status"], len(progress["rows"]))
        return TrainState(**restored.variables, **restored.training), progress

    def restore_variables(self, like: dict[str, Any]) -> dict[str, Any]:
        """The newest good `params` and `batch_stats`, on the devices of `like`."""
        return self._restore(variables=ocp.args.StandardRestore(like)).variables

    def read_progress(self) -> dict[str, Any]:
        """The newest good checkpoint's record of the run."""
        return self._restore(progress=ocp.args.JsonRestore()).progress

    def read_config(self) -> dict[str, Any]:
        """The newest good checkpoint's copy of config.json."""
        return self._restore(config=ocp.args.JsonRestore()).config

    def _restore(self, **items: Any) -> Any:
        path = self.directory / str(self.step)
        try:
            return self._checkpointer.restore(path, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax has no one error for files that are not as expected
            raise InputError(f"{path} cannot be read: {type(error).__name__}: {error}") from error

    def _find_newest(self) -> tuple[int | None, list[str]]:
        """The newest good step and what is wrong with newer ones."""
        damage = []
        found = None
        for step in reversed(self._steps()) if is_primary() else ():
            reason = find_damage(self.directory / str(step))
            if reason is None:
                found = step
                break
            damage.append(f"checkpoint {step} of {self.directory.parent} is damaged ({reason})")
        # All processes go on from the same one.
        if jax.process_count() > 1:
            step = int(
                multihost_utils.broadcast_one_to_all(np.int64(-1 if found is None else found))
            )
            found = None if step < 0 else step
        return found, damage

    def _steps(self) -> list[int]:
        """The steps of all checkpoints, good or not, in order."""
        if not self.directory.is_dir():
            return []
        paths = [path for path in self.directory.iterdir() if not path.is_symlink()]
        names = [path.name for path in paths if path.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal() and len(name) < 19)

    def _clean_up(self) -> None:
        """Remove what a crash left and what is damaged, which the run is about to write again."""
        self._remove_unfinished()
        for step in self._steps():
            if self.step is None or step > self.step:
                _remove(self.directory / str(step))

    def _remove_unfinished(self) -> None:
        for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    (path / MANIFEST).unlink(missing_ok=True)  # first: a checkpoint half removed is none
    shutil.rmtree(path)
