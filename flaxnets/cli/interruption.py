"""Handling of SIGINT and SIGTERM: work stops at its next step and is saved."""

import contextlib
import os
import signal
import sys
import threading
from typing import Any

import jax

from flaxnets.parallel import process_max

QUESTIONS_BETWEEN_AGREEMENTS = 10


class Interruption:
    """Context in which SIGINT and SIGTERM ask the work to stop; a second signal exits at once.

    A thread listens, because Python runs signal handlers only between its own instructions, and
    compiling a network is one long call.

    Attributes:
      unsaved: unsaved work, added and discarded by the code that does it. While it is empty, the
        first signal exits at once too.
    """

    def __init__(self, command: str) -> None:
        self.unsaved: set[Any] = set()
        self.signal: int | None = None
        self._command = command
        self._agreed: int | None = None
        self._asked = 0

    def requested(self) -> bool:
        """Return whether to stop; processes that ask at the same points get the same answer."""
        if jax.process_count() == 1:
            self._agreed = self.signal
        elif self._agreed is None:
            if self._asked % QUESTIONS_BETWEEN_AGREEMENTS == 0:
                self._agreed = process_max(self.signal or 0) or None
            self._asked += 1
        return self._agreed is not None

    @property
    def exit_status(self) -> int:
        """130 after SIGINT, 143 after SIGTERM."""
        return 128 + (self._agreed or 0)

    def print_resume_hint(self) -> None:
        """Print the command that resumes the stopped work."""
        print(f"stopped and saved; continue with: {self._command}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Interruption":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write)
        self._handlers = {
            number: signal.signal(number, lambda *_: None)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _listen(self) -> None:
        while data := os.read(self._read, 1):
            if data[0] not in self._handlers:
                continue
            leave = self.signal is not None
            self.signal = data[0]
            if not leave and not self.unsaved and jax.process_count() == 1:
                leave = True
                self.print_resume_hint()
            if leave:
                with contextlib.suppress(OSError):  # a terminal may vanish at any time
                    if sys.stdout.isatty():
                        # The progress display hid the cursor.
                        os.write(sys.stdout.fileno(), b"\x1b[?25h")
                os._exit(128 + data[0])
            print(
                "\nstopping and saving; interrupt again to exit at once",
                file=sys.stderr,
                flush=True,
            )
