"""A contender in a process of its own.

    python experiments/contenders/worker.py MODULE

reads a command and its arguments as a JSON line, does it, and answers with a JSON line, `{"result":
...}` or `{"error": "one line"}`, until there are no more. `load` imports the module and `start`
makes its `Contender`; the other commands are below or methods of the contender.

A module has a class `Contender(model, data, batch_size, bfloat16, device, weights, **settings)`:

  model: for ours a name that `flaxnets.create_model` takes, for the others what their network is
    built from, see `structure` of the benchmark.
  data: arrays, see `make_data` of the benchmark.
  device: `"cpu"` or `"gpu"`; None for whatever is there.
  weights: file of the `ours` process with its variables, each by its path, as
    `params/stage1_block1/conv1/kernel`; None in that process itself.

with `device` and the methods `loss()`, the training-mode cross-entropy of those weights on the
batch that all are checked with; `run(steps)`, which returns when the device is done; and, for GPUs,
`peak_bytes()`.
"""

import importlib
import json
import os
import resource
import sys
import time
from typing import Any

import numpy as np


class Worker:
    """The commands."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._contender: Any = None

    def load(self) -> None:
        # Ours calls for it as its users do; those of the others would not have it.
        if self._module == "ours":
            from flaxnets.cli.memory import keep_memory

            keep_memory()
        importlib.import_module(self._module)

    def start(self, data: str, **settings: Any) -> str:
        """Make the contender; what it runs on, `"cpu"` or `"gpu"`."""
        with np.load(data) as arrays:
            module = importlib.import_module(self._module)
            self._contender = module.Contender(data=dict(arrays), **settings)
        return self._contender.device

    def time(self, steps: int) -> float:
        """Seconds that `steps` train steps take."""
        start = time.perf_counter()
        self._contender.run(steps)
        return time.perf_counter() - start

    def time_round(self, steps: int) -> float:
        """As `time`; a GPU's memory, which others have used since, is taken again before."""
        if self._contender.device == "gpu":
            self._contender.run(1)
        seconds = self.time(steps)
        if hasattr(self._contender, "give_memory_back"):
            self._contender.give_memory_back()
        return seconds

    def peak_bytes(self) -> int:
        """Most memory that was in use: the GPU's, or that of this process."""
        if self._contender.device == "gpu":
            return self._contender.peak_bytes()
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __getattr__(self, command: str) -> Any:
        return getattr(self._contender, command)


def main() -> None:
    # Libraries print; the answers have a stream of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        command, arguments = json.loads(line)
        try:
            answer = {"result": getattr(worker, command)(**arguments)}
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            answer = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
