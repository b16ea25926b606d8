"""Count the kernels that a train step launches on an NVIDIA H100, without having one.

    python experiments/count_kernels.py --plugin DIR
    python experiments/count_kernels.py --plugin DIR --models cifar_resnet56 --devices 8

DIR holds the CUDA plugin of JAX; if it does not, the pip command that fills it is printed. The
train step is compiled as for training and never runs, so times and cuDNN's choice of algorithms
stay unknown. PyTorch's kernels for the same step are counted if torch is installed.
"""

import signal

if __name__ == "__main__":
    # Importing takes seconds: until `run_command`, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # the directory of the package `experiments`

from experiments.contenders.inputs import describe_architecture
from experiments.contenders.workload import PRECISIONS, Workload
from experiments.kernels import Compilation, compile_step, describe_gpus, load_plugin
from flaxnets.cli.arguments import ArgumentParser, positive, words
from flaxnets.cli.main import run_command
from flaxnets.cli.progress import plain_console
from flaxnets.errors import InputError
from flaxnets.models import published_image_shape

COLUMNS = ("convolutions", "fusions", "transposes", "copies", "collectives", "other")


DEFAULT = (
    Workload("cifar_resnet20"),
    Workload("cifar_resnet20", precision="bfloat16"),
    Workload("resnet50", image_size=224, batch_size=256, precision="bfloat16"),
)


@dataclass(frozen=True)
class Options:
    """`workloads` have the batch size of one of the `devices`."""

    plugin: Path
    workloads: tuple[Workload, ...]
    devices: int


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    load_plugin(options.plugin)
    devices = describe_gpus(options.devices)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("network", no_wrap=True)
    for heading in ("image", "batch", "precision", "kernels", *COLUMNS):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("temporaries", "compilation", "PyTorch"):
        table.add_column(heading, justify="right", no_wrap=True)
    for workload in options.workloads:
        step = compile_step(workload, devices)
        table.add_row(*cells(workload, step), count_torch(workload))
    console = plain_console()
    console.width = max(console.width, 200)
    console.print(table)
    return 0


def cells(workload: Workload, step: Compilation) -> list[str]:
    return [
        workload.model,
        f"{workload.image_size}x{workload.image_size}",
        str(workload.batch_size),
        workload.precision,
        str(step.launches.total),
        *(str(getattr(step.launches, name)) for name in COLUMNS),
        f"{step.temporary_bytes / 1e9:.2f} GB",
        f"{step.seconds:.0f} s",
    ]


def count_torch(workload: Workload) -> str:
    """Return the number of PyTorch's kernels, or an empty string if it cannot be counted."""
    if importlib.util.find_spec("torch") is None:
        return ""
    from experiments.contenders.torch_kernels import count_torch_kernels

    try:
        architecture = describe_architecture(workload.model)
    except InputError:  # the peer does not support this network
        return ""
    bfloat16 = workload.precision == "bfloat16"
    return str(count_torch_kernels(architecture, workload.image_size, bfloat16))


def parse_arguments(arguments: list[str] | None) -> Options:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--plugin", type=Path, required=True, metavar="DIR", help="directory of the CUDA plugin"
    )
    parser.add_argument(
        "--models",
        type=words,
        metavar="NAMES",
        help="networks (default: cifar_resnet20 in both precisions, and resnet50 in bfloat16)",
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="precision of --models (default: both)"
    )
    parser.add_argument(
        "--batch-size", type=positive(int), metavar="N", help="images a device (default: 128)"
    )
    parser.add_argument(
        "--devices", type=positive(int), default=1, metavar="N", help="number of GPUs (default: 1)"
    )
    args = parser.parse(arguments)
    if args.models is None and (args.precision or args.batch_size):
        raise InputError("--precision and --batch-size need --models")
    workloads = DEFAULT
    if args.models is not None:
        workloads = tuple(
            Workload(name, published_image_shape(name)[0], args.batch_size or 128, precision)
            for name in args.models
            for precision in ([args.precision] if args.precision else PRECISIONS)
        )
    return Options(args.plugin, workloads, args.devices)


if __name__ == "__main__":
    sys.exit(run_command(main))
