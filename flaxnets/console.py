"""What the commands share: arguments and errors in one line, signals, progress."""

import argparse
import contextlib
import io
import logging
import math
import os
import re
import signal
import statistics
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import jax
import tensorflow_datasets as tfds
from absl import logging as absl_logging
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flaxnets.errors import FallbackWarning, InputError, StorageError, nearest
from flaxnets.parallel import greatest
from flaxnets.text import printable
from flaxnets.training.loop import CheckpointEvery, Progress

QUESTIONS_BETWEEN_AGREEMENTS = 10


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with every error an `InputError` in one line and unknown flags set right."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the options)")

    def parse(self, arguments: list[str] | None) -> argparse.Namespace:
        flags = [name for action in self._actions for name in action.option_strings]
        given = sys.argv[1:] if arguments is None else arguments
        # Before anything that is missing: it may only be misspelt.
        options = given[: given.index("--")] if "--" in given else given
        unknown = [argument.split("=")[0] for argument in options if argument.startswith("--")]
        unknown = [flag for flag in unknown if flag not in flags]
        if not unknown:
            known, rest = self.parse_known_args(given)
            unknown = [argument.split("=")[0] for argument in rest]
            if not unknown:
                return known
        self.error(f"unknown argument {unknown[0]}{nearest(unknown[0], flags)}")


class _LenientFile(io.FileIO):
    """A standard stream whose failures are ignored: a full disk below a log, a reader that has
    left or a vanished terminal must not end work of hours."""

    def write(self, data: Any) -> int:
        try:
            # A non-blocking stream that is full returns None.
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def _make_output_safe() -> None:
    """Let no failure to print, nor a character that the encoding lacks, end this process."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # Closed. The next file to be opened would get this number, and all that is printed.
            os.open(os.devnull, os.O_RDWR)
        if name == "stdin":
            continue
        stream = getattr(sys, name)
        file = io.BufferedWriter(_LenientFile(number, "w", closefd=False))
        encoding = stream.encoding if stream is not None else "utf-8"
        safe = io.TextIOWrapper(file, encoding, errors="replace", line_buffering=True)
        setattr(sys, name, safe)


def _check_devices() -> None:
    """Refuse a JAX_PLATFORMS that this machine does not have."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # the former without a plugin for it
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"JAX finds no device for JAX_PLATFORMS={platforms}; unset it, or set JAX_PLATFORMS=cpu"
            + (f" ({reason})" if reason else "")
        ) from error


def run_command(main: Callable[[list[str] | None], int], arguments: list[str] | None = None) -> int:
    """Run `main` and give the process's exit status: the user's mistakes are one line and 2.

    Without `arguments` the process is the command's own, with its output and signals.
    """
    if arguments is None:
        _make_output_safe()
        # Scripts leave it to the system while they import.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # TFDS and Orbax tell of their own inner life; what goes wrong there is raised as well.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _show_unraisable
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    tfds.disable_progress_bar()
    warnings.showwarning = partial(_show_warning, set())
    warnings.simplefilter("always", FallbackWarning)
    try:
        try:
            return main(arguments)
        except (AssertionError, RuntimeError):
            if not jax.distributed.is_initialized():
                _check_devices()  # where there are none, every use of them fails in its own way
            raise
    except InputError as error:
        _print_error(error)
        return 2
    except StorageError as error:
        _print_error(error)
    except KeyboardInterrupt:  # before there was anything to save
        return 130
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if not isinstance(error, jax.errors.JaxRuntimeError) and "Gloo" not in str(error):
            traceback.print_exc()
        _print_error(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on: {error}"
        )
        print(
            "when another process is lost, start all of them again to continue from the newest "
            "checkpoint",
            file=sys.stderr,
        )
    if arguments is None or jax.distributed.is_initialized():
        # An orderly end would wait for other processes, which may be gone or wait for this one,
        # and for Orbax's threads, which tell at length of what has just been said in a line.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    return 1


def _show_unraisable(event: Any) -> None:
    """All but what Orbax's tasks say when their loop has ended with an error."""
    if str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


def _print_error(error: Exception | str) -> None:
    print(f"error: {printable(error)}", file=sys.stderr)


def _show_warning(
    shown: set[str], message: Warning | str, category: type[Warning], *place: Any, **_: Any
) -> None:
    """The library's own warnings in a line each, once; others as Python shows them."""
    text = warnings.formatwarning(message, category, place[0], place[1])
    if issubclass(category, FallbackWarning):
        text = f"warning: {printable(message)}\n"
        if text in shown:
            return
        shown.add(text)
    sys.stderr.write(text)


class CheckProgress:
    """`on_progress` of `find_folder`: a line on stderr every ten seconds, the last one not."""

    def __init__(self) -> None:
        self._shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if done < total and time.monotonic() > self._shown + 10:
            self._shown = time.monotonic()
            print(f"{done:,} of {total:,} pictures decoded to check them", file=sys.stderr)


def plain_console(quiet: bool = False) -> Console:
    """A console that prints text as it is, or nothing."""
    console = Console(highlight=False, markup=False, emoji=False, quiet=quiet)
    if not console.is_terminal:
        console.width = 120  # a file or a pipe has no width of its own
    return console


def whole_numbers(text: str) -> list[int]:
    """Argument type: `18,34,56`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        example = "18,34,56"
        if found := re.fullmatch(r"(\d{1,9})(?:-|:|\.\.)(\d{1,9})", text):
            first, last = map(int, found.groups())
            if first < last < first + 100:
                example = ",".join(map(str, range(first, last + 1)))
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers such as {example}"
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


def checkpoint_every(text: str) -> CheckpointEvery:
    """Argument type: `500s` or `2000steps`."""
    try:
        if text.endswith("steps"):
            return CheckpointEvery(steps=positive(int)(text.removesuffix("steps")))
        if text.endswith("s"):
            return CheckpointEvery(seconds=positive(float)(text.removesuffix("s")))
    except argparse.ArgumentTypeError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a time or steps, such as 500s or 2000steps")


def process_group(text: str) -> tuple[str | None, int | None, int | None]:
    """Argument type: `10.0.0.1:1234,4,0`, or nothing for what the cluster says."""
    if not text:
        return None, None, None
    found = re.fullmatch(r"(\S+:\d+),(\d+),(\d+)", text)
    if not found or int(found[3]) >= int(found[2]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not HOST:PORT,PROCESSES,INDEX, such as 10.0.0.1:1234,4,0"
        )
    return found[1], int(found[2]), int(found[3])


def check_choice(flag: str, value: str, choices: tuple[str, ...], more: str = "") -> None:
    """Refuse a `value` that is none of `choices`, with the nearest of them."""
    if value not in choices:
        raise InputError(
            f"{flag} is one of {', '.join(choices)}{more}, not {value!r}{nearest(value, choices)}"
        )


def check_batch_size(batch_size: int, num_train: int) -> None:
    """Refuse a `--batch-size` that does not fit the training images or the devices."""
    devices = jax.device_count()
    if batch_size > num_train:
        raise InputError(
            f"--batch-size {batch_size} is more than the {num_train} training images; "
            f"give at most {num_train}"
        )
    if batch_size % devices:
        raise InputError(
            f"--batch-size {batch_size} does not divide by the {devices} devices; "
            f"give a multiple of {devices}"
        )


class Interruption:
    """While entered, SIGINT and SIGTERM ask the work to stop; a second one leaves at once.

    A thread listens, because Python runs signal handlers between its own instructions only, and
    compiling a network is one long call.

    Attributes:
      unsaved: what there is to save, added and discarded by whoever does the work. While there is
        nothing, the first signal leaves at once too.
    """

    def __init__(self, command: str) -> None:
        self.unsaved: set[Any] = set()
        self.signal: int | None = None
        self._command = command
        self._agreed: int | None = None
        self._asked = 0

    def requested(self) -> bool:
        """Whether to stop. Several processes ask at the same points, and are told the same."""
        if jax.process_count() == 1:
            self._agreed = self.signal
        elif self._agreed is None:
            if self._asked % QUESTIONS_BETWEEN_AGREEMENTS == 0:
                self._agreed = greatest(self.signal or 0) or None
            self._asked += 1
        return self._agreed is not None

    @property
    def exit_status(self) -> int:
        """130 after SIGINT, 143 after SIGTERM."""
        return 128 + (self._agreed or 0)

    def say_how_to_continue(self) -> None:
        """The last words of work that was stopped."""
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
                self.say_how_to_continue()
            if leave:
                with contextlib.suppress(OSError):  # a terminal may vanish at any time
                    if sys.stdout.isatty():
                        # The progress display hid the cursor.
                        os.write(sys.stdout.fileno(), b"\x1b[?25h")
                os._exit(128 + data[0])
            print("\nstopping and saving; once more to leave at once", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:10:00`."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


class StudyProgress:
    """Live progress of a study: two lines a run on a terminal, else a line now and then.

    `finished` runs were there before, and `work` is what the `unfinished` ones cost in all, in any
    one unit; the time left is estimated from it.
    """

    SECONDS_BETWEEN_LINES = 10
    # Of training before the time left of the study is estimated.
    SECONDS_OF_EVIDENCE = 5

    def __init__(self, console: Console, finished: int, unfinished: int, work: float) -> None:
        self.console = console
        self.total, self._begun = finished + unfinished, finished
        self._work, self._work_done = work, 0.0
        self._runs: list[RunProgress] = []
        self._live = Live(console=console, auto_refresh=False, transient=True)
        # When the first train step ended, and the work that was done by then.
        self._evidence: tuple[float, float] | None = None
        self.lock = threading.RLock()

    def __enter__(self) -> "StudyProgress":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def start_run(
        self, name: str, work: float, total_steps: int, steps_per_epoch: int, batch: int
    ) -> "RunProgress":
        """The next run begins."""
        with self.lock:
            self._begun += 1
            place = f"run {self._begun} of {self.total}"
            run = RunProgress(self, name, place, work, total_steps, steps_per_epoch, batch)
            self._runs.append(run)
            run.update(Progress(0, 0.0, []), force=True)
            return run

    def end_run(self, run: "RunProgress", summary: str) -> None:
        """A run is over: say what came of it, above the live lines."""
        with self.lock:
            self._runs.remove(run)
            self._work_done += run.work
            self.console.print(summary, soft_wrap=True)

    def draw(self) -> None:
        """The lines of all runs, and the bar of the study."""
        bars, facts = Table.grid(padding=(0, 1)), []
        for run in self._runs:
            rate = f"{run.time_left()} left, {run.rate()} images/s"
            bars.add_row(
                Text(run.name, style="bold"), ProgressBar(run.total_steps, run.step, width=24), rate
            )
            facts.append(Text(f"{run.name}: {run.facts()}"))
        if self.total > 1:
            bars.add_row(
                f"study, {self._begun} of {self.total}",
                ProgressBar(self._work or 1.0, self._done(), width=24),
                f"{self.time_left()} left",
            )
        self._live.update(Group(bars, *facts), refresh=True)

    def _done(self) -> float:
        return self._work_done + sum(run.work * run.step / run.total_steps for run in self._runs)

    def time_left(self) -> str:
        """Estimated time left of the study, from the work done since the first train step."""
        if self._evidence is None:
            return "?"
        since, done_then = self._evidence
        seconds, done = time.perf_counter() - since, self._done()
        if seconds < self.SECONDS_OF_EVIDENCE or done <= done_then:
            return "?"
        return duration((self._work - done) * seconds / (done - done_then))

    def begin_steps(self, run: "RunProgress") -> None:
        """A run has done its first train step: what was before is compilation, or restored."""
        if self._evidence is None:
            self._evidence = (time.perf_counter(), self._done())
        else:
            since, done_then = self._evidence
            restored = run.work * (run.step - 1) / run.total_steps
            self._evidence = (since, done_then + restored)


class RunProgress:
    """One of the runs of a study that are at work; see `StudyProgress`."""

    def __init__(
        self,
        study: StudyProgress,
        name: str,
        place: str,
        work: float,
        total_steps: int,
        steps_per_epoch: int,
        batch: int,
    ) -> None:
        self.name, self.work, self.total_steps, self.step = name, work, total_steps, 0
        self._study, self._place, self._per_epoch, self._batch = (
            study,
            place,
            steps_per_epoch,
            batch,
        )
        self._last_step_at = time.perf_counter()
        self._last_shown = 0.0
        self._first_step: int | None = None
        self._intervals: deque[float] = deque(maxlen=32)
        self._rows: list[dict[str, Any]] = []

    def update(self, progress: Progress, force: bool = False) -> None:
        """The run has got to `progress`."""
        with self._study.lock:
            now = time.perf_counter()
            begins = self._first_step is None and progress.step > 0
            if begins:
                self._first_step, self._first_step_at = progress.step, now
            elif progress.step > self.step:
                self._intervals.append(now - self._last_step_at)
            self.step, self._last_step_at, self._rows = progress.step, now, progress.rows
            if begins:
                self._study.begin_steps(self)
            on_terminal = self._study.console.is_terminal
            wait = 0.2 if on_terminal else self._study.SECONDS_BETWEEN_LINES
            if not force and now - self._last_shown <= wait:
                return
            self._last_shown = now
            if on_terminal:
                self._study.draw()
                return
            name, left = f"{self.name} ({self._place})", f"run {self.time_left()}"
            left += f", study {self._study.time_left()}"
            if self._study.total == 1:
                name, left = self.name, self.time_left()
            self._study.console.print(
                f"{name}  {self.facts()}  {self.rate()} images/s  left: {left}", soft_wrap=True
            )

    def end(self, summary: str) -> None:
        """The run is over."""
        self._study.end_run(self, summary)

    def facts(self) -> str:
        """What is known of the network so far."""
        epochs = -(-self.total_steps // self._per_epoch)
        epoch = min(self.step // self._per_epoch + 1, epochs)
        facts = "compiling" if self._first_step is None else f"epoch {epoch} of {epochs}"
        if self._rows:
            row = self._rows[-1]
            seen = "train" if "train_error" in row else "running_train"
            # Evaluation's loss, in the first epochs, may be 1e5 of a sound network.
            facts += f"  running loss {row['running_train_loss']:.3f}"
            facts += f"  train error {row[f'{seen}_error']:.1f} %"
            for split in ("validation", "test"):
                if f"{split}_error" in row:
                    facts += f"  {split} error {row[f'{split}_error']:.1f} %"
        return facts

    def rate(self) -> str:
        """Images a second."""
        if not self._intervals:
            return "-"
        return f"{self._batch / statistics.median(self._intervals):,.0f}"

    def time_left(self) -> str:
        """Estimated time left of the run, from its own steps since the first."""
        if self._first_step is None or self.step <= self._first_step:
            return "?"
        per_step = (time.perf_counter() - self._first_step_at) / (self.step - self._first_step)
        return duration(per_step * (self.total_steps - self.step))
