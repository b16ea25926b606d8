"""Contenders of the benchmark, each in its own process that answers commands."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Contender:
    """A module in experiments/contenders, and extra arguments of its `Contender`.

    With `keep_memory`, its process has the allocator settings of this library's commands.
    """

    module: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    keep_memory: bool = True

    @property
    def networks(self) -> int:
        """Number of networks that each step trains, each on a batch."""
        return self.arguments.get("seeds", 1)


class WorkerError(Exception):
    """Raised when a contender fails; the message is one line."""


class WorkerPool:
    """Contenders that can still run, each in its own process.

    Attributes:
      contenders: by name, `ours` first.
      failures: reason of each failed contender.
      directory: place of the workers' logs and the data they read.
      deadline: latest time for an answer, on the clock `time.monotonic`.
    """

    def __init__(
        self, contenders: Mapping[str, Contender], directory: Path, deadline: float
    ) -> None:
        self.contenders, self.failures = dict(contenders), dict[str, str]()
        self.directory, self.deadline = directory, deadline
        self._workers: dict[str, _Worker] = {}
        try:
            for name, contender in contenders.items():
                self._workers[name] = _Worker(contender, directory / name)
        except BaseException:  # such as Ctrl-C; `__exit__` does not run before `__enter__`
            self.__exit__()
            raise

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.stop()

    def call(self, command: str, names: Iterable[str] = (), **arguments: Any) -> dict[str, Any]:
        """Send a command of `worker.py` to all contenders (or `names`) in turn.

        Contenders that fail are removed from the pool.

        Returns:
          Their answers.

        Raises:
          WorkerError: ours fails.
        """
        answers = {}
        for name in names or tuple(self.contenders):
            try:
                answers[name] = self._workers[name].call(command, arguments, self.deadline)
            except WorkerError as error:
                self.failures[name] = str(error)
                del self.contenders[name]
                self._workers.pop(name).stop()
                if name == "ours":
                    raise
        return answers

    def call_ours(self, command: str, **arguments: Any) -> Any:
        """Like `call`, for ours alone."""
        return self.call(command, ["ours"], **arguments)["ours"]


class _Worker:
    """A process that runs `worker.py`."""

    def __init__(self, contender: Contender, path: Path) -> None:
        self._log = path.with_name(f"{path.name}.log")
        environment = os.environ | {
            # Several processes share the GPU.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "TORCHINDUCTOR_CACHE_DIR": f"{path}-inductor",
        }
        # First steps must include compilation, and cacheable programs cannot use oneDNN.
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        self._connection, theirs = Pipe()
        with theirs, self._log.open("wb") as log:
            script, number = str(Path(__file__).with_name("worker.py")), theirs.fileno()
            allocator = "keep-memory" if contender.keep_memory else "default-malloc"
            self._process = subprocess.Popen(
                [sys.executable, script, contender.module, str(number), allocator],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=[number],
                start_new_session=True,  # Ctrl-C reaches only this process, which stops the workers
            )

    def call(self, command: str, arguments: Mapping[str, Any], deadline: float) -> Any:
        answer = None
        # A process that has exited is reported below.
        with contextlib.suppress(EOFError, ConnectionError):
            self._connection.send((command, arguments))
            # The children of a dead process may hold the pipe open, so its `poll` is needed too.
            while not self._connection.poll(0.5) and self._process.poll() is None:
                if time.monotonic() > deadline:
                    raise WorkerError("it was not ready within --seconds")
            if self._connection.poll():
                answer = self._connection.recv()
        if answer is None:
            status = self._process.wait()
            log = self._log.read_text(errors="replace").strip().splitlines()
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise WorkerError(f"it ended with {how}; last output: {log[-1] if log else 'none'}")
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    def stop(self) -> None:
        """Kill the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
