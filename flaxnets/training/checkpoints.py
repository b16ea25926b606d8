"""Checkpoints of one run, through Orbax.

A checkpoint holds everything a run consists of: `variables` (params, batch_stats), `training`
(optimizer state, step, key, running metrics) and `progress`, the run's record so far as JSON.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from flaxnets.training.steps import TrainState

KEPT = 2


class Checkpoints:
    """The checkpoints below a run directory: written in the background, the latest two kept."""

    def __init__(self, run_directory: str | Path, read_only: bool = False) -> None:
        self.directory = Path(run_directory).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else KEPT, create=not read_only, read_only=read_only
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest checkpoint's step, or None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, progress: dict[str, Any]) -> None:
        """Copy the state and write it in the background; `close` or the next `save` waits."""
        step = int(state.step)
        if step == self.latest_step():
            if self.read_progress()["rows"] == progress["rows"]:
                return
            # Stopped before the epoch was measured, and gone on from there: the record has grown.
            self._manager.delete(step)
        training = {
            "step": state.step,
            "key": state.key,
            "opt_state": state.opt_state,
            "running": state.running,
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                variables=ocp.args.StandardSave(state.variables),
                training=ocp.args.StandardSave(training),
                progress=ocp.args.JsonSave(progress),
            ),
        )

    def wait(self) -> None:
        """Return once everything saved is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state, on the devices and of the shapes of `like`, and its progress."""
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
        return TrainState(**restored.variables, **restored.training), restored.progress

    def restore_variables(self, like: dict[str, Any]) -> dict[str, Any]:
        """The newest `params` and `batch_stats`, on the devices and of the shapes of `like`."""
        return self._restore(variables=ocp.args.StandardRestore(like)).variables

    def read_progress(self) -> dict[str, Any]:
        """The newest checkpoint's record of the run."""
        return self._restore(progress=ocp.args.JsonRestore()).progress

    def _restore(self, **items: Any) -> Any:
        return self._manager.restore(self.latest_step(), args=ocp.args.Composite(**items))
