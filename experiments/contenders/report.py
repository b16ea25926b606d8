"""Report of the benchmark: what benchmark.json stores, and its table, remarks and title."""

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from experiments.contenders.workload import Workload
from flaxnets.training.environment import count_cores

PACKAGES = ("flaxnets", "jax", "jaxlib", "flax", "optax", "numpy", "torch")


@dataclass(frozen=True)
class Hardware:
    cpu: str
    cores: int
    gpu: str | None
    load_average: float

    @classmethod
    def detect(cls) -> "Hardware":
        """Detect all but the GPU, which only the process of the contender `ours` knows."""
        return cls(cpu_model(), count_cores(), None, os.getloadavg()[0])


@dataclass(frozen=True)
class Timing:
    """Timing of a contender; `rounds` are images per second, `images_per_second` their median.

    `ours_over_this` is the median of `speed_ratios`.
    """

    images_per_second: float
    slowest_round: float
    fastest_round: float
    ours_over_this: float
    first_step_seconds: float
    peak_bytes: int
    share_of_matmul_peak: float
    loss: float
    rounds: Sequence[float]


@dataclass(frozen=True)
class Failure:
    could_not_run: str


@dataclass(frozen=True)
class Measurement:
    """Measurement of one workload, in which contenders other than ours may have failed.

    `matmul_flops_per_second` is the best of any contender. The host's time is measured in training
    only, because a call that evaluates returns when the device has finished.
    """

    workload: Workload
    device: str
    steps_per_round: int
    multiply_adds: int
    matmul_flops_per_second: float
    host_seconds_per_step: float | None
    host_share_of_step: float | None
    contenders: Mapping[str, Timing | Failure]

    def our_rounds(self) -> Sequence[float]:
        """Return our images per second in each round."""
        ours = self.contenders["ours"]
        assert isinstance(ours, Timing)
        return ours.rounds


@dataclass(frozen=True)
class FailedMeasurement:
    """A workload without measurements, because ours failed."""

    workload: Workload
    contenders: Mapping[str, Timing | Failure]


@dataclass(frozen=True)
class Report:
    command: str
    date: str
    hardware: Hardware
    versions: Mapping[str, str]
    rounds: int
    measurements: Sequence[Measurement | FailedMeasurement] = ()
    left_out: Sequence[Workload] = ()

    def ratios(self) -> dict[str, dict[str, Sequence[float]]]:
        """Return `speed_ratios`: workload, in two lines -> contender other than ours -> rounds."""
        return {
            "\n".join(measured.workload.lines): {
                name: speed_ratios(measured.our_rounds(), timing.rounds)
                for name, timing in measured.contenders.items()
                if isinstance(timing, Timing) and name != "ours"
            }
            for measured in self.measurements
            if isinstance(measured, Measurement)
        }

    def title(self) -> str:
        """Return the title of the figure."""
        hardware = self.hardware
        return "Speed of ours relative to other implementations\n" + (
            hardware.gpu or f"{hardware.cpu}, {hardware.cores} cores"
        )

    def table(self) -> Table:
        """Make a table with a row for each workload and contender."""
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("workload", no_wrap=True)
        table.add_column("contender", no_wrap=True)
        for heading in ("images/s", "min - max", "ours / it", "first step", "memory", "of peak"):
            table.add_column(heading, justify="right", no_wrap=True)
        for measured in self.measurements:
            headings = iter(measured.workload.lines)
            for name, entry in measured.contenders.items():
                cells = table_cells(entry) if isinstance(entry, Timing) else ["", "could not run"]
                table.add_row(next(headings, ""), name, *cells)
            table.add_section()
        return table

    def remarks(self, seconds: float) -> list[str]:
        """List everything that does not fit into the table, one line each.

        Args:
          seconds: limit after which no further workload or round was started.
        """
        lines = []
        for measured in self.measurements:
            name = measured.workload.name
            for contender, entry in measured.contenders.items():
                if isinstance(entry, Failure):
                    lines.append(f"{name}: {contender} could not run: {entry.could_not_run}")
            if isinstance(measured, FailedMeasurement):
                continue
            products = measured.matmul_flops_per_second / 1e9
            lines.append(f"{name}: matrix products reach {products:,.0f} GFLOP/s")
            if measured.host_seconds_per_step is not None:
                lines[-1] += (
                    f"; the host of ours spends {1e3 * measured.host_seconds_per_step:.2f} ms a "
                    f"step outside XLA, {measured.host_share_of_step:.1%} of the step"
                )
            rounds = len(measured.our_rounds())
            if rounds < self.rounds:
                lines.append(f"{name}: stopped after round {rounds}, at the limit of {seconds:g} s")
        if self.left_out:
            names = "; ".join(workload.name for workload in self.left_out)
            lines.append(f"left out, at the limit of {seconds:g} s: {names}")
        if self.hardware.load_average > 0.5:
            lines.append(
                f"other programs were running (load {self.hardware.load_average:.1f}): "
                "on CPUs they slow down some contenders far more than others"
            )
        return lines


def speed_ratios(ours: Sequence[float], it: Sequence[float]) -> list[float]:
    """Divide our images per second by a contender's, round by round.

    Both took turns in a round, so that a slow machine affects both. Their median is the ratio that
    table, figure and text show.
    """
    return [our_rate / its_rate for our_rate, its_rate in zip(ours, it, strict=True)]


def table_cells(timing: Timing) -> list[str]:
    return [
        format_rate(timing.images_per_second),
        f"{format_rate(timing.slowest_round)} - {format_rate(timing.fastest_round)}",
        f"{timing.ours_over_this:.2f}",
        f"{timing.first_step_seconds:.1f} s",
        f"{timing.peak_bytes / 1e9:.2f} GB",
        f"{timing.share_of_matmul_peak:.1%}",
    ]


def format_rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def find_versions() -> dict[str, str]:
    """Collect the versions of Python and of the installed packages that matter."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
