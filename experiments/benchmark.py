"""Benchmark throughput against the same networks in PyTorch and in plain Flax.

    python experiments/benchmark.py
    python experiments/benchmark.py --models cifar_resnet20,resnet50 --against torch,flax-example
    python experiments/benchmark.py --models cifar_resnet20 --task evaluate --batch-size 256

Without --models, --image-size, --batch-size, --precision and --task, it measures nine workloads.

A training step is timed as a whole: random crops and flips, normalisation, forward and backward
pass, and update. Evaluation is a pass over 8 batches in evaluation mode, which ends with the loss
and the error. All contenders must first compute the same loss for the same weights and images; in
evaluation, the running statistics are those of the images.

Each contender runs in its own process, and they take turns in rounds of about a second, so that
other load on the machine affects all of them. The ratio "ours / it" is the median over rounds of
the round's ratio.

Contenders besides this library ("ours"):

  torch                 PyTorch, eager, with its best settings
  torch-default-malloc  the same with glibc's default allocator
  torch-compile         torch with torch.compile
  torch-cudagraph       torch with torch.compile(mode="reduce-overhead"), for GPUs
  flax-example          plain Flax: nn.Conv, nn.relu(y + x), batches made by NumPy on the host
  seeds-together        ours, training the networks of 4 seeds as one; images/s counts all four

All but torch-default-malloc have the allocator settings of this library's commands: glibc keeps
freed memory. All use every core and flush denormal numbers to zero. PyTorch gets channels_last,
fused SGD, gradients set to None, data and augmentation on the device, autocast for bfloat16,
inference_mode in evaluation, and TF32 and cuDNN's autotuning on GPUs.
"""

import signal

if __name__ == "__main__":
    # Importing takes seconds: until `run_command`, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import importlib.util
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the directory of the package `experiments`

from experiments.contenders.comparison import DisagreementError, compare
from experiments.contenders.inputs import describe_architecture
from experiments.contenders.pool import Contender
from experiments.contenders.report import Hardware, Report, find_versions
from experiments.contenders.workload import PRECISIONS, TASKS, Workload
from flaxnets.cli.arguments import ArgumentParser, check_choice, positive, words
from flaxnets.cli.main import run_command
from flaxnets.cli.progress import plain_console
from flaxnets.decoding import encode
from flaxnets.errors import InputError
from flaxnets.files import write_atomic
from flaxnets.models import create_model
from flaxnets.reporting.figures import draw_benchmark

CONTENDERS = {
    "ours": Contender("ours"),
    "torch": Contender("torch_peer"),
    "torch-default-malloc": Contender("torch_peer", keep_memory=False),
    "torch-compile": Contender("torch_peer", {"compile": "default"}),
    "torch-cudagraph": Contender("torch_peer", {"compile": "reduce-overhead"}),
    "flax-example": Contender("flax_example"),
    "seeds-together": Contender("ours", {"seeds": 4}),
}
MODELS = ("cifar_resnet20", "cifar_resnet56", "cifar_plain56", "resnet50")
WORKLOADS = (
    *(Workload(model) for model in MODELS),
    Workload("cifar_resnet56", image_size=8),
    Workload("cifar_resnet20", image_size=8),
    Workload("resnet18", image_size=64, batch_size=64),
    Workload("cifar_resnet20", precision="bfloat16"),
    Workload("cifar_resnet20", batch_size=256, task="evaluate"),
)
AGAINST = "torch,torch-default-malloc"


@dataclass(frozen=True)
class Options:
    workloads: tuple[Workload, ...]
    against: tuple[str, ...]
    rounds: int
    seconds: float
    out: Path


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(given)
    console = plain_console()
    show = partial(console.print, soft_wrap=True)
    numbers, figure = options.out / "benchmark.json", options.out / "benchmark.png"
    deadline = time.monotonic() + options.seconds
    contenders = {name: CONTENDERS[name] for name in ("ours", *options.against)}
    report = Report(
        command=shlex.join(["python", "experiments/benchmark.py", *given]),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=Hardware.detect(),
        versions=find_versions(),
        rounds=options.rounds,
    )
    for workload in options.workloads:
        if time.monotonic() > deadline:
            report = replace(report, left_out=[*report.left_out, workload])
        else:
            try:
                measured, gpu = compare(workload, contenders, options.rounds, deadline, show)
            except DisagreementError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
            hardware = replace(report.hardware, gpu=gpu or report.hardware.gpu)
            measurements = [*report.measurements, measured]
            report = replace(report, measurements=measurements, hardware=hardware)
        write_atomic(numbers, json.dumps(encode(report), indent=1))

    console.print(report.table())
    for line in report.remarks(options.seconds):
        show(line)
    show(f"numbers: {numbers}")
    ratios = report.ratios()
    if any(ratios.values()):
        draw_benchmark(ratios, figure, report.title())
        show(f"figure: {figure}")
    return 0 if ratios else 1


def unique_words(text: str) -> tuple[str, ...]:
    """Parse an argument such as `torch,flax-example`, without repetitions."""
    return tuple(dict.fromkeys(words(text)))


def parse_arguments(arguments: list[str]) -> Options:
    parser = ArgumentParser(description=__doc__)
    add_names = partial(parser.add_argument, metavar="NAMES", type=unique_words)
    add_number = partial(parser.add_argument, metavar="N", type=positive(int))
    custom = parser.add_argument_group("workloads to measure in place of the nine").add_argument
    add_custom = partial(custom, default=argparse.SUPPRESS)
    add_custom(
        "--models",
        metavar="NAMES",
        type=unique_words,
        help=f"comma-separated networks ({','.join(MODELS)})",
    )
    add_custom("--image-size", metavar="N", type=positive(int), help="side in pixels (32)")
    add_custom("--batch-size", metavar="N", type=positive(int), help="images per batch (128)")
    add_custom("--precision", metavar="TYPE", help="float32 (the default) or bfloat16")
    add_custom("--task", help="train (the default) or evaluate")
    add_names("--against", default=AGAINST, help="comma-separated contenders (%(default)s)")
    add_number("--rounds", default=10, help="rounds per contender (%(default)s)")
    add_number(
        "--seconds",
        type=positive(float),
        default=math.inf,
        help="start no further workload or round after N seconds",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/benchmark"),
        metavar="DIR",
        help="directory for benchmark.json, .png and .svg (%(default)s)",
    )
    options = choose_workloads(vars(parser.parse(arguments)))
    check(options)
    return options


def choose_workloads(arguments: dict[str, Any]) -> Options:
    """Make the options: custom workloads if the arguments have a model or a setting of them."""
    settings = {
        name: arguments.pop(name)
        for name in ("image_size", "batch_size", "precision", "task")
        if name in arguments
    }
    models = arguments.pop("models", MODELS if settings else ())
    workloads = tuple(Workload(model, **settings) for model in models)
    return Options(workloads=workloads or WORKLOADS, **arguments)


def check(options: Options) -> None:
    """Check what the options name, and make the directory for the results.

    Raises:
      InputError: a name is unknown, a contender cannot run, or the directory cannot be made.
    """
    for workload in options.workloads:
        check_choice("--precision", workload.precision, PRECISIONS)
        check_choice("--task", workload.task, tuple(TASKS))
    peers = tuple(name for name in CONTENDERS if name != "ours")
    for name in options.against:
        check_choice("--against", name, peers)
        if CONTENDERS[name].module == "torch_peer" and not importlib.util.find_spec("torch"):
            raise InputError(
                f"--against {name}: PyTorch is not installed: pip install -e '.[benchmark]', "
                "or choose --against flax-example"
            )
    for workload in options.workloads:
        create_model(workload.model, num_classes=10)
        if any(CONTENDERS[peer].module != "ours" for peer in options.against):
            describe_architecture(workload.model)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {options.out}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(run_command(main))
