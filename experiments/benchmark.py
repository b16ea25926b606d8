"""Benchmark training throughput against the same networks in PyTorch and in plain Flax.

    python experiments/benchmark.py --models cifar_resnet20,resnet50 --against torch,flax-example

The timing covers the whole train step: random crops and flips, normalisation, forward and backward
pass, and update. All contenders must first compute the same loss for the same weights and images.
Each runs in its own process, and they take turns in rounds of about a second, so that other load on
the machine affects all of them.

Contenders besides this library ("ours"):

  torch            PyTorch, eager: channels_last, fused SGD, augmentation on the device
  torch-compile    the same with torch.compile
  torch-cudagraph  the same with torch.compile(mode="reduce-overhead"), for GPUs
  flax-example     plain Flax: nn.Conv, nn.relu(y + x), batches made by NumPy on the host
  seeds-together   ours, training the networks of 4 seeds as one; images/s counts all four
"""

import signal

if __name__ == "__main__":
    # Importing takes seconds: until `run_command`, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from flaxnets.cli.arguments import ArgumentParser, check_choice, positive, words
from flaxnets.cli.main import run_command
from flaxnets.cli.progress import plain_console
from flaxnets.errors import InputError
from flaxnets.files import write_atomic
from flaxnets.models import ResNet, create_model
from flaxnets.models.layers import batch_norm, conv
from flaxnets.reporting.figures import draw_benchmark

WORKER = Path(__file__).parent / "contenders" / "worker.py"
SEEDS_TOGETHER = 4
# Name -> module in experiments/contenders, and extra arguments of its `Contender`.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("ours", {}),
    "torch": ("torch_peer", {}),
    "torch-compile": ("torch_peer", {"compile": "default"}),
    "torch-cudagraph": ("torch_peer", {"compile": "reduce-overhead"}),
    "flax-example": ("flax_example", {}),
    "seeds-together": ("ours", {"seeds": SEEDS_TOGETHER}),
}
PRECISIONS = ("float32", "bfloat16")
TOLERANCES = {"float32": 1e-3, "bfloat16": 3e-2}  # loss differences, relative for losses above 1
SECONDS_A_ROUND = 0.75
# Small, so that training on noise stays finite.
LEARNING_RATE = 0.01


class FailureError(Exception):
    """Raised when a contender fails; the message is one line."""


class DisagreementError(Exception):
    """Raised when contenders compute different losses; the message is one line."""


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    args = parse_arguments(given)
    console = plain_console()
    deadline = time.monotonic() + args.seconds
    report: dict[str, Any] = {
        "command": shlex.join(["python", "experiments/benchmark.py", *given]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": cpu_model(),
            "cores": usable_cores(),
            "gpu": None,
            "load_average": os.getloadavg()[0],
        },
        "versions": versions(),
        "settings": {
            "image_size": args.image_size,
            "batch_size": args.batch_size,
            "precision": args.precision,
            "rounds": args.rounds,
        },
        "models": [],
        "left_out": [],
    }
    for name in args.models:
        if time.monotonic() > deadline:
            report["left_out"].append(name)
            continue
        try:
            report["models"].append(measure(name, args, deadline, report["hardware"], console))
        except DisagreementError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        write_atomic(args.out / "benchmark.json", json.dumps(report, indent=1))

    console.print(results_table(report))
    for line in remarks(report, args.seconds):
        console.print(line, soft_wrap=True)
    # Models may have been left out since the last write.
    write_atomic(args.out / "benchmark.json", json.dumps(report, indent=1))
    console.print(f"numbers: {args.out / 'benchmark.json'}", soft_wrap=True)
    rates = {model["model"]: rates_of(model) for model in report["models"] if rates_of(model)}
    if not rates:
        return 1
    draw_benchmark(rates, args.out / "benchmark.png", figure_title(report))
    console.print(f"figure: {args.out / 'benchmark.png'}", soft_wrap=True)
    return 0


def measure(
    name: str, args: argparse.Namespace, deadline: float, hardware: dict, console: Console
) -> dict[str, Any]:
    """Measure one model; failed contenders are reported with the reason.

    Raises:
      DisagreementError: their losses differ.
    """
    contenders = ["ours", *args.against]
    # Reserve time for the rounds, at most half of what is left.
    rounds_seconds = args.rounds * len(contenders) * SECONDS_A_ROUND
    ready_by = deadline - min(rounds_seconds, (deadline - time.monotonic()) / 2)
    with (
        tempfile.TemporaryDirectory(prefix="flaxnets-benchmark-") as directory,
        Field(contenders, Path(directory), ready_by) as field,
    ):
        try:
            report = race(name, args, deadline, field, hardware, console)
        except FailureError:  # ours failed, and the others need its weights
            report = {"model": name, "contenders": {}}
    for contender in contenders:
        reason = field.failures.get(contender, "ours failed, so there is nothing to compare with")
        report["contenders"].setdefault(contender, {"could_not_run": reason})
    return report


def race(
    name: str,
    args: argparse.Namespace,
    deadline: float,
    field: "Field",
    hardware: dict,
    console: Console,
) -> dict[str, Any]:
    """Start, check and time the contenders.

    Raises:
      FailureError: ours fails.
      DisagreementError: losses differ.
    """
    data, weights = field.directory / "data.npz", field.directory / "weights.npz"
    arrays: Any = make_data(args.image_size, args.batch_size)
    np.savez(data, **arrays)
    field.ask("load", together=True)
    settings: dict[str, Any] = {
        "data": str(data),
        "batch_size": args.batch_size,
        "bfloat16": args.precision == "bfloat16",
    }
    settings |= {"model": name, "device": None, "weights": None}
    device = field.ask_ours("start", **settings, **CONTENDERS["ours"][1])
    field.ask_ours("save_weights", path=str(weights))
    if device == "gpu":
        hardware["gpu"] = field.ask_ours("device_kind")
    for contender in field.names[1:]:
        module, own = CONTENDERS[contender]
        model = name if module == "ours" else structure(name)
        settings |= {"model": model, "device": device, "weights": str(weights)}
        field.ask("start", [contender], **settings, **own)

    first_step = field.ask("time", steps=1)
    field.deadline = math.inf  # the remaining steps are short
    console.print(f"{name}: first step {listed(first_step, '{:.1f} s')}", soft_wrap=True)
    losses = field.ask("loss")
    check_losses(name, losses, TOLERANCES[args.precision])
    console.print(f"{name}: loss {listed(losses, '{:.5f}')}", soft_wrap=True)

    warm_up = field.ask("time", steps=2)
    steps = max(1, round(SECONDS_A_ROUND / (median(warm_up.values()) / 2)))
    rounds: list[dict[str, float]] = []
    while len(rounds) < args.rounds and (time.monotonic() < deadline or not rounds):
        rounds.append(field.ask("time_round", steps=steps))
    console.print(f"{name}: {len(rounds)} rounds of {steps} steps", soft_wrap=True)
    peak_bytes = field.ask("peak_bytes")
    matmul_flops = field.ask_ours("matmul_flops")
    multiply_adds = field.ask_ours("multiply_adds")
    host_seconds = field.ask_ours("host_seconds", steps=max(5, steps))

    rates = {
        contender: [steps * images_a_step(contender, args) / times[contender] for times in rounds]
        for contender in field.names
    }
    entries = {}
    for contender in field.names:
        ratios = [a / b for a, b in zip(rates["ours"], rates[contender], strict=True)]
        speed = median(rates[contender])
        entries[contender] = {
            "images_per_second": speed,
            "slowest_round": min(rates[contender]),
            "fastest_round": max(rates[contender]),
            "ours_over_this": median(ratios),
            "first_step_seconds": first_step[contender],
            "peak_bytes": peak_bytes[contender],
            # A step costs three forward passes, a multiply-add two operations.
            "share_of_matmul_peak": 3 * 2 * multiply_adds * speed / matmul_flops,
            "loss": losses[contender],
            "rounds": rates[contender],
        }
    step_seconds = args.batch_size / entries["ours"]["images_per_second"]
    return {
        "model": name,
        "device": device,
        "steps_per_round": steps,
        "multiply_adds": multiply_adds,
        "matmul_flops_per_second": matmul_flops,
        "host_seconds_per_step": host_seconds,
        "host_share_of_step": host_seconds / step_seconds,
        "contenders": entries,
    }


class Field:
    """Contenders of one model that can still run, each in its own process.

    Attributes:
      names: names of these contenders, ours first.
      failures: failed contenders, with the reason.
      directory: place of the workers' logs (stderr) and the data they read.
      deadline: latest time for an answer, on the clock `time.monotonic`.
    """

    def __init__(self, names: list[str], directory: Path, deadline: float) -> None:
        self.names, self.directory, self.deadline = list(names), directory, deadline
        self.failures: dict[str, str] = {}
        self._processes: dict[str, subprocess.Popen] = {}
        try:
            for name in names:
                self._processes[name] = self._start(name)
        except BaseException:  # such as Ctrl-C; `__exit__` does not run before `__enter__`
            self.__exit__()
            raise

    def __enter__(self) -> "Field":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            stop(process)

    def ask(
        self,
        command: str,
        names: list[str] | None = None,
        together: bool = False,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Send a command to all contenders (or `names`) and return their answers.

        With `together`, all receive the command before the first answer is awaited. Contenders that
        fail are removed from the field.

        Raises:
          FailureError: ours fails.
        """
        names = names or list(self.names)
        if together:
            for name in names:
                self._send(name, command, arguments)
        answers = {}
        for name in names:
            if not together:
                self._send(name, command, arguments)
            try:
                answers[name] = self._receive(name)
            except FailureError as error:
                self.failures[name] = str(error)
                self.names.remove(name)
                stop(self._processes[name])
                if name == "ours":
                    raise
        return answers

    def ask_ours(self, command: str, **arguments: Any) -> Any:
        """Like `ask`, for ours alone."""
        return self.ask(command, ["ours"], **arguments)["ours"]

    def _start(self, name: str) -> subprocess.Popen:
        environment = os.environ | {
            # Several processes share the GPU.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "TORCHINDUCTOR_CACHE_DIR": str(self.directory / f"{name}-inductor"),
        }
        # First steps must include compilation, and cacheable programs cannot use oneDNN.
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        with self._log(name).open("wb") as log:
            return subprocess.Popen(
                [sys.executable, str(WORKER), CONTENDERS[name][0]],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches only this process, which stops the workers
            )

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def _send(self, name: str, command: str, arguments: dict[str, Any]) -> None:
        stdin: Any = self._processes[name].stdin
        # If the worker has exited, `_receive` reports it.
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps([command, arguments]).encode() + b"\n")

    def _receive(self, name: str) -> Any:
        process = self._processes[name]
        stdout: Any = process.stdout
        # A dead worker's children may hold the pipe open, so `poll` is needed too.
        while not select.select([stdout], [], [], 0.5)[0] and process.poll() is None:
            if time.monotonic() > self.deadline:
                raise FailureError("it was not ready within --seconds")
        line = stdout.readline() if select.select([stdout], [], [], 0)[0] else b""
        if not line:
            status = process.wait()
            words = self._log(name).read_text(errors="replace").strip().splitlines()
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise FailureError(
                f"it ended with {how}; last output: {words[-1] if words else 'none'}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise FailureError(answer["error"])
        return answer["result"]


def stop(process: subprocess.Popen) -> None:
    """Kill a worker and its child processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


def make_data(image_size: int, batch_size: int) -> dict[str, Any]:
    """Make random images and labels, and the batch for the loss check.

    Returns `images` uint8 `(n, height, width, 3)`, `labels` int32 `(n,)`, `mean` and `std` per
    channel on a scale of 0 to 1, the learning rate as `rate`, and `check_images`, the first batch
    after normalisation.
    """
    rng = np.random.default_rng(0)
    count = max(1024, 2 * batch_size)
    images = rng.integers(0, 256, (count, image_size, image_size, 3), np.uint8)
    mean, std = np.full(3, 0.5, np.float32), np.full(3, 0.29, np.float32)
    return {
        "images": images,
        "labels": rng.integers(0, 10, count, np.int32),
        "mean": mean,
        "std": std,
        "rate": np.float32(LEARNING_RATE),
        "check_images": (images[:batch_size].astype(np.float32) / 255 - mean) / std,
    }


def check_losses(model: str, losses: dict[str, float], tolerance: float) -> None:
    """Check that all losses equal ours.

    Raises:
      DisagreementError: a loss differs by more than `tolerance`, relative for losses above 1.
    """
    ours = losses["ours"]
    for contender, loss in losses.items():
        difference = abs(loss - ours) / max(1.0, abs(ours))
        if not difference <= tolerance:  # also refuses NaN
            raise DisagreementError(
                f"{model}: {contender} computes a different function: its loss is {loss:.6g}, ours "
                f"is {ours:.6g}, a difference of {difference:.2g}, which is more than {tolerance:g}"
            )


def structure(name: str) -> dict[str, Any]:
    """Return the attributes of the `ResNet` called `name`, from which the peers build theirs.

    Raises:
      InputError: it is not a ResNet of version 1 with shortcut A or B.
    """
    model: Any = create_model(name, num_classes=10)
    if (
        not isinstance(model, ResNet)
        or model.preactivation
        or model.shortcut == "C"
        or (model.conv, model.norm) != (conv, batch_norm)
    ):
        raise InputError(
            f"--models: torch and flax-example support only ResNets of version 1 and plain "
            f"networks, such as cifar_resnet20 or plain34, not {name}; --against seeds-together "
            f"supports all"
        )
    names = ("stage_sizes", "num_classes", "width", "block", "stem", "shortcut", "residual")
    return {name: getattr(model, name) for name in (*names, "stride_in_3x3")}


def images_a_step(contender: str, args: argparse.Namespace) -> int:
    return args.batch_size * CONTENDERS[contender][1].get("seeds", 1)


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def versions() -> dict[str, str]:
    """Collect the versions of Python and of the installed packages that matter."""
    found = {"python": platform.python_version()}
    for package in ("flaxnets", "jax", "jaxlib", "flax", "optax", "numpy", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def listed(answers: dict[str, float], form: str) -> str:
    return ", ".join(f"{name} {form.format(value)}" for name, value in answers.items())


def results_table(report: dict[str, Any]) -> Table:
    """Make a table with a row for each model and contender."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    table.add_column("contender", no_wrap=True)
    headings = ("images/s", "min - max", "ours / it", "first step", "memory", "of peak")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for model in report["models"]:
        for i, (contender, entry) in enumerate(model["contenders"].items()):
            cells = ["", "could not run"]
            if "could_not_run" not in entry:
                cells = [
                    images(entry["images_per_second"]),
                    f"{images(entry['slowest_round'])} - {images(entry['fastest_round'])}",
                    f"{entry['ours_over_this']:.2f}",
                    f"{entry['first_step_seconds']:.1f} s",
                    f"{entry['peak_bytes'] / 1e9:.2f} GB",
                    f"{entry['share_of_matmul_peak']:.1%}",
                ]
            table.add_row("" if i else model["model"], contender, *cells)
        table.add_section()
    return table


def images(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def remarks(report: dict[str, Any], seconds: float) -> list[str]:
    """List everything that does not fit into the table, one line each."""
    lines = []
    for model in report["models"]:
        name = model["model"]
        for contender, entry in model["contenders"].items():
            if "could_not_run" in entry:
                lines.append(f"{name}, {contender}: could not run: {entry['could_not_run']}")
        if "could_not_run" in model["contenders"]["ours"]:
            continue
        lines.append(
            f"{name}, ours: the host spends {1e3 * model['host_seconds_per_step']:.2f} ms a step "
            f"outside XLA, {model['host_share_of_step']:.1%} of the step; matrix products reach "
            f"{model['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s"
        )
        rounds = len(model["contenders"]["ours"]["rounds"])
        if rounds < report["settings"]["rounds"]:
            lines.append(f"{name}: stopped after round {rounds}, at the limit of {seconds:g} s")
    if report["left_out"]:
        lines.append(f"left out, at the limit of {seconds:g} s: {', '.join(report['left_out'])}")
    if report["hardware"]["load_average"] > 0.5:
        lines.append(
            f"other programs were running (load {report['hardware']['load_average']:.1f}): "
            "on CPUs they slow down some contenders far more than others"
        )
    return lines


def rates_of(model: dict[str, Any]) -> dict[str, list[float]]:
    """Return images per second in each round, for each contender that ran."""
    entries = model["contenders"].items()
    return {name: entry["rounds"] for name, entry in entries if "rounds" in entry}


def figure_title(report: dict[str, Any]) -> str:
    settings, hardware = report["settings"], report["hardware"]
    size = settings["image_size"]
    device = hardware["gpu"] or f"{hardware['cpu']}, {hardware['cores']} cores"
    return (
        f"Training, images {size}x{size}, batch {settings['batch_size']}, "
        f"{settings['precision']}\n{device}"
    )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models",
        type=words,
        default="cifar_resnet20,cifar_resnet56,cifar_plain56,resnet50",
        metavar="NAMES",
        help="comma-separated networks (%(default)s)",
    )
    parser.add_argument(
        "--image-size",
        type=positive(int),
        default=32,
        metavar="N",
        help="side in pixels (%(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive(int),
        default=128,
        metavar="N",
        help="images per step (%(default)s)",
    )
    parser.add_argument(
        "--precision", default="float32", metavar="TYPE", help="float32 (the default) or bfloat16"
    )
    parser.add_argument(
        "--against",
        type=words,
        default="torch,torch-compile,flax-example",
        metavar="NAMES",
        help="comma-separated contenders (%(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=positive(int),
        default=10,
        metavar="N",
        help="rounds per contender (%(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=positive(float),
        default=math.inf,
        metavar="N",
        help="start no further model or round after N seconds",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/benchmark"),
        metavar="DIR",
        help="directory for benchmark.json and benchmark.png (%(default)s)",
    )
    args = parser.parse(arguments)
    args.models, args.against = (list(dict.fromkeys(x)) for x in (args.models, args.against))
    check_choice("--precision", args.precision, PRECISIONS)
    peers = tuple(name for name in CONTENDERS if name != "ours")
    for contender in args.against:
        check_choice("--against", contender, peers)
        if CONTENDERS[contender][0] == "torch_peer" and not importlib.util.find_spec("torch"):
            raise InputError(
                f"--against {contender}: PyTorch is not installed: pip install -e '.[benchmark]', "
                "or choose --against flax-example"
            )
    for name in args.models:
        create_model(name, num_classes=10)
        if any(CONTENDERS[contender][0] != "ours" for contender in args.against):
            structure(name)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {args.out}: {error.strerror}") from error
    return args


if __name__ == "__main__":
    sys.exit(run_command(main))
