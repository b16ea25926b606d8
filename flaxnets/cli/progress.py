"""Progress of long work: live in a terminal, occasional lines elsewhere.

rich's `Progress` would only replace `StudyProgress.draw`: it has no lines for logs, and its time
left counts compilation and restored steps.
"""

import statistics
import sys
import threading
import time
from collections import deque
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flaxnets.text import duration, shorten
from flaxnets.training.loop import Progress
from flaxnets.training.result import is_evaluated


def plain_console(quiet: bool = False) -> Console:
    """Return a console that prints text verbatim, or nothing if `quiet`."""
    console = Console(highlight=False, markup=False, emoji=False, quiet=quiet)
    if not console.is_terminal:
        console.width = 120  # a file or a pipe has no width of its own
    return console


class CheckProgress:
    """`on_progress` callback of `inspect_dataset`: prints a line on stderr every ten seconds."""

    def __init__(self) -> None:
        self._shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if done < total and time.monotonic() > self._shown + 10:
            self._shown = time.monotonic()
            print(f"{done:,} of {total:,} pictures decoded to check them", file=sys.stderr)


def print_folder(folder: str) -> None:
    """Name the folder that a run's config names before it is read: the config may be untrusted."""
    print(f"reading the folder that the run names: {shorten(folder, 1000)}", flush=True)


class StudyProgress:
    """Live progress of a study: two lines per run on a terminal, occasional lines elsewhere.

    `finished` counts the runs that were already done. `work` is the total cost of the `unfinished`
    ones, in any unit, from which the time left is estimated. Runs with steps that are not saved yet
    are in the set `unsaved`.
    """

    SECONDS_BETWEEN_LINES = 10
    # Training time before the study's time left is estimated.
    SECONDS_OF_EVIDENCE = 5

    def __init__(
        self,
        console: Console,
        finished: int,
        unfinished: int,
        work: float,
        unsaved: set[Any] | None = None,
    ) -> None:
        self.console = console
        self.unsaved = set() if unsaved is None else unsaved
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
        """Add the next run to the display."""
        with self.lock:
            self._begun += 1
            place = f"run {self._begun} of {self.total}"
            run = RunProgress(self, name, place, work, total_steps, steps_per_epoch, batch)
            self._runs.append(run)
            run.update(Progress(0, 0.0, []), force=True)
            return run

    def end_run(self, run: "RunProgress", summary: str) -> None:
        """Remove a run from the display and print its summary above the live lines."""
        with self.lock:
            self._runs.remove(run)
            self._work_done += run.work
            self.console.print(summary, soft_wrap=True)
        self.unsaved.discard(run)

    def draw(self) -> None:
        """Draw the lines of all runs, and the bar of the study."""
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
        """Estimate the study's time left from the work done since the first train step."""
        if self._evidence is None:
            return "?"
        since, done_then = self._evidence
        seconds, done = time.perf_counter() - since, self._done()
        if seconds < self.SECONDS_OF_EVIDENCE or done <= done_then:
            return "?"
        return duration((self._work - done) * seconds / (done - done_then))

    def begin_steps(self, run: "RunProgress") -> None:
        """Note a run's first train step: compilation and restored steps come before it."""
        if self._evidence is None:
            self._evidence = (time.perf_counter(), self._done())
        else:
            since, done_then = self._evidence
            restored = run.work * (run.step - 1) / run.total_steps
            self._evidence = (since, done_then + restored)


class RunProgress:
    """Progress of one active run of a study; see `StudyProgress`."""

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
        """Record `progress`, and redraw or print it when due."""
        if progress.step:
            # Until its first step a run compiles and has nothing to save.
            self._study.unsaved.add(self)
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
        """Remove the run from the display and print its summary."""
        self._study.end_run(self, summary)

    def facts(self) -> str:
        """Describe the epoch, loss and errors of the run so far."""
        epochs = -(-self.total_steps // self._per_epoch)
        epoch = min(self.step // self._per_epoch + 1, epochs)
        facts = "compiling" if self._first_step is None else f"epoch {epoch} of {epochs}"
        if self._rows:
            # In early epochs, a sound network's evaluation loss may be 1e5.
            facts += f"  running loss {self._rows[-1]['running_train_loss']:.3f}"
            # The errors are those of the last evaluated epoch.
            row = next(filter(is_evaluated, reversed(self._rows)))
            if "train_error" not in row:
                row = {**row, "train_error": self._rows[-1]["running_train_error"]}
            facts += f"  train error {row['train_error']:.1f} %"
            for split in ("validation", "test"):
                if f"{split}_error" in row:
                    facts += f"  {split} error {row[f'{split}_error']:.1f} %"
        return facts

    def rate(self) -> str:
        """Return the throughput in images per second."""
        if not self._intervals:
            return "-"
        return f"{self._batch / statistics.median(self._intervals):,.0f}"

    def time_left(self) -> str:
        """Estimate the run's time left from its own steps since the first."""
        if self._first_step is None or self.step <= self._first_step:
            return "?"
        per_step = (time.perf_counter() - self._first_step_at) / (self.step - self._first_step)
        return duration(per_step * (self.total_steps - self.step))
