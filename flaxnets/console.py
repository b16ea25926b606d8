"""What the commands share: arguments and errors in one line, signals, progress."""

import argparse
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

import tensorflow_datasets as tfds
from absl import logging as absl_logging
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flaxnets.errors import InputError, nearest
from flaxnets.training.loop import Progress


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with every error an `InputError` in one line and unknown flags set right."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the options)")

    def parse(self, arguments: list[str] | None) -> argparse.Namespace:
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            flag = unknown[0].split("=")[0]
            flags = [name for action in self._actions for name in action.option_strings]
            self.error(f"unknown argument {flag}{nearest(flag, flags)}")
        return known


def run_command(main: Callable[[list[str] | None], int], arguments: list[str] | None = None) -> int:
    """Run `main` and give the process's exit status: the user's mistakes are one line and 2."""
    # TFDS and Orbax tell of their own inner life.
    absl_logging.set_verbosity(absl_logging.ERROR)
    tfds.disable_progress_bar()
    try:
        return main(arguments)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there was anything to save
        return 130


def plain_console() -> Console:
    """A console that prints text as it is."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 120  # a file or a pipe has no width of its own
    return console


def whole_numbers(text: str) -> list[int]:
    """Argument type: `18,34,56`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers such as 18,34,56"
        ) from None


def words(text: str) -> list[str]:
    """Argument type: `plain,residual`."""
    return [part.strip() for part in text.split(",")]


def positive(number: type) -> Callable[[str], Any]:
    """Argument type: a finite `number` (int or float) above 0."""

    def parse(text: str) -> Any:
        try:
            value = number(text)
        except ValueError:
            value = math.nan
        if not (0 < value < math.inf):
            what = "a whole number" if number is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} above 0")
        return value

    return parse


def check_choice(flag: str, value: str, choices: tuple[str, ...], more: str = "") -> None:
    """Refuse a `value` that is none of `choices`, with the nearest of them."""
    if value not in choices:
        raise InputError(
            f"{flag} is one of {', '.join(choices)}{more}, not {value!r}{nearest(value, choices)}"
        )


class Interruption:
    """While entered, SIGINT and SIGTERM ask the work to stop; a second one leaves at once.

    A thread listens, because Python runs signal handlers between its own instructions only, and
    compiling a network is one long call.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def requested(self) -> bool:
        """Whether to stop."""
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """130 after SIGINT, 143 after SIGTERM."""
        return 128 + (self.signal or 0)

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
            if self.signal is not None:
                if sys.stdout.isatty():
                    os.write(
                        sys.stdout.fileno(), b"\x1b[?25h"
                    )  # the progress display hid the cursor
                os._exit(128 + data[0])
            self.signal = data[0]
            print("\nstopping and saving; once more to leave at once", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:10:00`."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


class StudyProgress:
    """Live progress of a study: three lines on a terminal, else a line now and then.

    `work` is what each run costs, in any one unit; the time left is told from it.
    """

    SECONDS_BETWEEN_LINES = 10

    def __init__(self, console: Console, work: list[float]) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._work, self._work_done, self._finished = work, 0.0, 0
        self._seconds_spent = 0.0
        self._last_shown = 0.0

    def __enter__(self) -> "StudyProgress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def start_run(self, name: str, total_steps: int, steps_per_epoch: int, batch: int) -> None:
        """The next run begins."""
        self._name, self._total, self._per_epoch, self._batch = (
            name,
            total_steps,
            steps_per_epoch,
            batch,
        )
        self._started = self._last_step_at = time.perf_counter()
        self._first_step: int | None = None
        self._steps_seen = 0
        self._intervals: deque[float] = deque(maxlen=32)
        self.update(Progress(0, 0.0, []), force=True)

    def end_run(self, summary: str) -> None:
        """The run is over: say what came of it, above the live lines."""
        self._seconds_spent += time.perf_counter() - self._started
        self._work_done += self._work[self._finished]
        self._finished += 1
        self._console.print(summary, soft_wrap=True)

    def skip_run(self) -> None:
        """The next run needs no work."""
        self._work[self._finished] = 0.0
        self._finished += 1

    def update(self, progress: Progress, force: bool = False) -> None:
        """The run has got to `progress`."""
        now = time.perf_counter()
        if self._first_step is None and progress.step:
            self._first_step, self._first_step_at = progress.step, now
        elif progress.step > self._steps_seen:
            self._intervals.append(now - self._last_step_at)
        self._steps_seen, self._last_step_at = progress.step, now
        wait = 0.2 if self._console.is_terminal else self.SECONDS_BETWEEN_LINES
        if force or now - self._last_shown > wait:
            self._last_shown = now
            self._show(progress, now)

    def _show(self, progress: Progress, now: float) -> None:
        epochs = -(-self._total // self._per_epoch)
        epoch = min(progress.step // self._per_epoch + 1, epochs)
        facts = "compiling" if self._first_step is None else f"epoch {epoch} of {epochs}"
        if progress.rows:
            row = progress.rows[-1]
            facts += (
                f"  loss {row['train_loss']:.3f}  train error {row['train_error']:.1f} %"
                f"  test error {row['test_error']:.1f} %"
            )
        rate = (
            f"{self._batch / statistics.median(self._intervals):,.0f}" if self._intervals else "-"
        )
        run_left, study_left = self._time_left(progress.step, now)
        place = f"run {self._finished + 1} of {len(self._work)}"
        if not self._console.is_terminal:
            self._console.print(
                f"{self._name} ({place})  {facts}  {rate} images/s  "
                f"left: run {run_left}, study {study_left}",
                soft_wrap=True,
            )
            return
        bars = Table.grid(padding=(0, 1))
        bars.add_row(
            Text(self._name, style="bold"),
            ProgressBar(self._total, progress.step, width=24),
            f"{run_left} left, {rate} images/s",
        )
        done = self._work_done + self._work[self._finished] * progress.step / self._total
        bars.add_row(
            f"study, {place}",
            ProgressBar(sum(self._work) or 1.0, done, width=24),
            f"{study_left} left",
        )
        self._live.update(Group(bars, Text(facts)), refresh=True)

    def _time_left(self, step: int, now: float) -> tuple[str, str]:
        """Of the run, from its own steps since the first; of the study, from all work so far."""
        if self._first_step is None or step <= self._first_step:
            return "?", "?"
        per_step = (now - self._first_step_at) / (step - self._first_step)
        run_left = per_step * (self._total - step)
        done = (step - self._first_step + 1) / self._total
        spent = self._seconds_spent + now - self._started
        per_work = spent / (self._work_done + self._work[self._finished] * done)
        later = sum(self._work[self._finished + 1 :])
        return duration(run_left), duration(run_left + later * per_work)
