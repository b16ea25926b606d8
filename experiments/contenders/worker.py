"""Run a contender in its own process.

    python experiments/contenders/worker.py MODULE DESCRIPTOR

Imports the module, receives commands with their arguments through the `multiprocessing` connection
with this file descriptor until it is closed, and answers each with `{"result": ...}` or
`{"error": "one line"}`. `start` makes the module's `Contender`; the other commands are defined
below or are methods of the contender.

A module has a class `Contender(model, data, batch_size, bfloat16, device, weights, **settings)`:

  model: a name for `flaxnets.create_model` (ours), or attributes from `describe_architecture` (the
    others).
  data: arrays from `make_data`.
  device: `"cpu"` or `"gpu"`; None for whatever is available.
  weights: file with the variables of the `ours` process, by path, such as
    `params/stage1_block1/conv1/kernel`; None in that process itself.

It has an attribute `device` and the methods `loss()`, the training-mode cross-entropy of these
weights on the common check batch; `run(steps)`, which returns when the device has finished; and,
for GPUs, `peak_bytes()`.
"""

import importlib
import resource
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np


class Worker:
    """The commands, as methods."""

    def __init__(self, module: str) -> None:
        self._contender: Any = None
        # The commands of flaxnets set this for their users; nothing sets it for the others.
        if module == "ours":
            from flaxnets.cli.memory import keep_memory

            keep_memory()
        self._module = importlib.import_module(module)

    def start(self, data: str, **settings: Any) -> str:
        """Make the contender and return its device, `"cpu"` or `"gpu"`."""
        with np.load(data) as arrays:
            self._contender = self._module.Contender(data=dict(arrays), **settings)
        return self._contender.device

    def time(self, steps: int) -> float:
        """Measure the seconds that `steps` train steps take."""
        start = time.perf_counter()
        self._contender.run(steps)
        return time.perf_counter() - start

    def time_round(self, steps: int) -> float:
        """Like `time`, after one untimed step that reallocates GPU memory released to others."""
        if self._contender.device == "gpu":
            self._contender.run(1)
        seconds = self.time(steps)
        if hasattr(self._contender, "give_memory_back"):
            self._contender.give_memory_back()
        return seconds

    def peak_bytes(self) -> int:
        """Return the peak memory: the GPU's, or that of this process."""
        if self._contender.device == "gpu":
            return self._contender.peak_bytes()
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __getattr__(self, command: str) -> Any:
        return getattr(self._contender, command)


def main() -> None:
    module, descriptor = sys.argv[1:]
    connection, worker = Connection(int(descriptor)), Worker(module)
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = {"result": getattr(worker, command)(**arguments)}
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            answer = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
        connection.send(answer)


if __name__ == "__main__":
    main()
