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

sys.path.insert(0, str(Path(__file__).parents[1]))  # the directory of the package `experiments`

from experiments.contenders.comparison import TOLERANCES, DisagreementError, compare
from experiments.contenders.inputs import describe_architecture
from experiments.contenders.pool import Contender
from experiments.contenders.report import Hardware, Report, Settings, find_versions
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
    "torch-compile": Contender("torch_peer", {"compile": "default"}),
    "torch-cudagraph": Contender("torch_peer", {"compile": "reduce-overhead"}),
    "flax-example": Contender("flax_example"),
    "seeds-together": Contender("ours", {"seeds": 4}),
}
MODELS = "cifar_resnet20,cifar_resnet56,cifar_plain56,resnet50"
AGAINST = "torch,torch-compile,flax-example"


@dataclass(frozen=True)
class Options:
    models: tuple[str, ...]
    image_size: int
    batch_size: int
    precision: str
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
        settings=Settings(
            options.image_size, options.batch_size, options.precision, options.rounds
        ),
    )
    for model in options.models:
        if time.monotonic() > deadline:
            report = replace(report, left_out=[*report.left_out, model])
        else:
            try:
                measured, gpu = compare(model, contenders, report.settings, deadline, show)
            except DisagreementError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
            hardware = replace(report.hardware, gpu=gpu or report.hardware.gpu)
            report = replace(report, models=[*report.models, measured], hardware=hardware)
        write_atomic(numbers, json.dumps(encode(report), indent=1))

    console.print(report.table())
    for line in report.remarks(options.seconds):
        show(line)
    show(f"numbers: {numbers}")
    rates = report.rates()
    if not rates:
        return 1
    draw_benchmark(rates, figure, report.title())
    show(f"figure: {figure}")
    return 0


def unique_words(text: str) -> tuple[str, ...]:
    """Parse an argument such as `torch,flax-example`, without repetitions."""
    return tuple(dict.fromkeys(words(text)))


def parse_arguments(arguments: list[str]) -> Options:
    parser = ArgumentParser(description=__doc__)
    add_names = partial(parser.add_argument, metavar="NAMES", type=unique_words)
    add_number = partial(parser.add_argument, metavar="N", type=positive(int))
    add_names("--models", default=MODELS, help="comma-separated networks (%(default)s)")
    add_number("--image-size", default=32, help="side in pixels (%(default)s)")
    add_number("--batch-size", default=128, help="images per step (%(default)s)")
    parser.add_argument(
        "--precision", default="float32", metavar="TYPE", help="float32 (the default) or bfloat16"
    )
    add_names("--against", default=AGAINST, help="comma-separated contenders (%(default)s)")
    add_number("--rounds", default=10, help="rounds per contender (%(default)s)")
    add_number(
        "--seconds",
        type=positive(float),
        default=math.inf,
        help="start no further model or round after N seconds",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/benchmark"),
        metavar="DIR",
        help="directory for benchmark.json and benchmark.png (%(default)s)",
    )
    options = Options(**vars(parser.parse(arguments)))
    check(options)
    return options


def check(options: Options) -> None:
    """Check what the options name, and make the directory for the results.

    Raises:
      InputError: a name is unknown, a contender cannot run, or the directory cannot be made.
    """
    check_choice("--precision", options.precision, tuple(TOLERANCES))
    peers = tuple(name for name in CONTENDERS if name != "ours")
    for name in options.against:
        check_choice("--against", name, peers)
        if CONTENDERS[name].module == "torch_peer" and not importlib.util.find_spec("torch"):
            raise InputError(
                f"--against {name}: PyTorch is not installed: pip install -e '.[benchmark]', "
                "or choose --against flax-example"
            )
    for name in options.models:
        create_model(name, num_classes=10)
        if any(CONTENDERS[peer].module != "ours" for peer in options.against):
            describe_architecture(name)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {options.out}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(run_command(main))
