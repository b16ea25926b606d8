"""Run a contender in its own process.

    python experiments/contenders/worker.py MODULE DESCRIPTOR keep-memory|default-malloc

Sets the allocator, imports the module, receives commands with their arguments through the
`multiprocessing` connection with this file descriptor until it is closed, and answers each with
`{"result": ...}` or `{"error": "one line"}`. `start` makes the module's `Contender`; the other
commands are defined below or are methods of the contender.

A module has a class
`Contender(model, data, batch_size, bfloat16, task, device, weights, **settings)`:

  model: a name for `flaxnets.create_model` (ours), or attributes from `describe_architecture` (the
    others).
  data: arrays from `make_data`.
  task: `"train"` or `"evaluate"`.
  device: `"cpu"` or `"gpu"`; None for whatever is available.
  weights: file with the variables of the `ours` process, by path, such as
    `params/stage1_block1/conv1/kernel`; None in that process itself.

It has an attribute `device` and the methods

  loss(): mean cross-entropy of these weights: in training mode on the common check batch, or of
    the evaluated split.
  run(steps): train for this many updates, or evaluate the split as many times. It returns when the
    device has finished.
  make_matmul(size): optional; a function that multiplies two square matrices in the precision of
    the workload and returns when the device has finished.
  peak_bytes(): for GPUs.
"""

import importlib
import resource
import runpy
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

MATRIX_SIZES = {"cpu": (1024, 2048), "gpu": (4096, 8192)}


class Worker:
    """The commands, as methods."""

    def __init__(self, module: str) -> None:
        self._contender: Any = None
        self._module = importlib.import_module(module)

    def start(self, data: str, **settings: Any) -> str:
        """Make the contender and return its device, `"cpu"` or `"gpu"`."""
        with np.load(data) as arrays:
            self._contender = self._module.Contender(data=dict(arrays), **settings)
        return self._contender.device

    def time(self, steps: int) -> float:
        """Measure the seconds that `steps` steps take."""
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

    def matmul_flops(self) -> float:
        """Measure operations a second in the best of a few products of square matrices.

        It is 0 for contenders that cannot tell.
        """
        best = 0.0
        if not hasattr(self._contender, "make_matmul"):
            return best
        for size in MATRIX_SIZES[self._contender.device]:
            multiply = self._contender.make_matmul(size)
            multiply()
            for _ in range(8):
                start = time.perf_counter()
                multiply()
                best = max(best, 2 * size**3 / (time.perf_counter() - start))
        return best

    def __getattr__(self, command: str) -> Any:
        return getattr(self._contender, command)


def keep_memory() -> None:
    # Importing the package would import JAX, which PyTorch's process does without.
    memory = Path(__file__).parents[2] / "flaxnets" / "cli" / "memory.py"
    runpy.run_path(str(memory))["keep_memory"]()


def main() -> None:
    module, descriptor, allocator = sys.argv[1:]
    if allocator == "keep-memory":
        keep_memory()
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
