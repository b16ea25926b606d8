"""Look inside a network: its layers, what they cost, and a drawing.

    python experiments/show.py                                           all networks
    python experiments/show.py resnet34                                  the layers of one
    python experiments/show.py resnet34 --compare plain34 --figure f.svg  two, drawn side by side

Multiply-adds are counted per image, from shapes.
"""

import signal

if __name__ == "__main__":
    # Importing takes seconds: until `run_command`, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
from rich import box
from rich.table import Table

from flaxnets.cli.arguments import ArgumentParser, positive
from flaxnets.cli.main import run_command
from flaxnets.cli.progress import plain_console
from flaxnets.errors import InputError
from flaxnets.models import ResNet, create_model, list_models, published_image_shape
from flaxnets.models.cost import Cost, LayerCost, list_layers, list_modules
from flaxnets.reporting.architecture_figures import draw_networks, find_blocks
from flaxnets.text import millions

LARGEST = 10_000
SUFFIXES = (".svg", ".png", ".pdf")


@dataclass(frozen=True)
class Options:
    model: str | None
    input: tuple[int, int, int] | None
    classes: int | None
    compare: str | None
    figure: Path | None


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = plain_console()
    if options.model is None:
        console.print(networks_table())
        return 0

    names = [options.model] if options.compare is None else [options.model, options.compare]
    classes = {} if options.classes is None else {"num_classes": options.classes}
    models = [create_model(name, **classes) for name in names]
    shapes = [options.input or published_image_shape(name) for name in names]
    modules = [list_modules(*network) for network in zip(models, shapes, strict=True)]
    drawings = []
    for name, model, shape, parts in zip(names, models, shapes, modules, strict=True):
        layers = [layer for layer in parts if layer.cost.parameters]
        console.print(layers_table(name, shape, layers))
        title = f"{name}\n{describe(sum_costs(layers))}"
        drawings.append((title, find_blocks(parts, getattr(model, "residual", False))))
    if options.figure:
        try:
            draw_networks(drawings, options.figure)
        except OSError as error:
            raise InputError(f"--figure {options.figure}: {error.strerror}") from error
        console.print(f"figure: {options.figure}", soft_wrap=True)
    return 0


def networks_table() -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("network", no_wrap=True)
    for heading in ("image", "parameters", "multiply-adds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in list_models():
        if "<" in name:
            table.add_row(name)
            continue
        shape = published_image_shape(name)
        cost = sum_costs(all_layers(create_model(name), shape))
        table.add_row(name, times(shape), f"{cost.parameters:,}", f"{cost.multiply_adds:,}")
    return table


def all_layers(model: nn.Module, shape: tuple[int, ...]) -> list[LayerCost]:
    """List layers faster than `list_layers`: later blocks of a stage repeat its second."""
    if not isinstance(model, ResNet):
        return list_layers(model, shape)
    short = model.clone(stage_sizes=[min(blocks, 2) for blocks in model.stage_sizes])
    times = {f"stage{i}_block2": blocks - 1 for i, blocks in enumerate(model.stage_sizes, 1)}
    return [
        layer for layer in list_layers(short, shape) for _ in range(times.get(layer.path[0], 1))
    ]


def sum_costs(layers: list[LayerCost]) -> Cost:
    return Cost(*(sum(numbers) for numbers in zip(*(layer.cost for layer in layers), strict=True)))


def layers_table(name: str, shape: tuple[int, ...], layers: list[LayerCost]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=f"{name}, {times(shape)}", show_footer=True)
    total = sum_costs(layers)
    table.add_column("layer", "total", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("output", justify="right", no_wrap=True)
    table.add_column("parameters", f"{total.parameters:,}", justify="right", no_wrap=True)
    table.add_column("multiply-adds", f"{total.multiply_adds:,}", justify="right", no_wrap=True)
    for layer in layers:
        cost = layer.cost
        adds = f"{cost.multiply_adds:,}" if cost.multiply_adds else ""
        path = "/".join(layer.path)
        table.add_row(path, layer.kind, times(layer.output_shape), f"{cost.parameters:,}", adds)
    return table


def times(shape: tuple[int, ...]) -> str:
    """Format a shape as `224x224x3`."""
    return "x".join(map(str, shape))


def describe(cost: Cost) -> str:
    adds = cost.multiply_adds
    billions = f"{adds / 1e9:.2f} G" if adds >= 1e9 else millions(adds)
    return f"{millions(cost.parameters)} parameters\n{billions} multiply-adds"


def image_shape(text: str) -> tuple[int, int, int]:
    """Parse an argument such as `224x224x3`."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    height, width, channels = map(int, match.groups()) if match else (0, 0, 0)
    if not (0 < height <= LARGEST and 0 < width <= LARGEST and 0 < channels <= LARGEST):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not height x width x channels, such as 224x224x3, each at most {LARGEST}"
        )
    return height, width, channels


def parse_arguments(arguments: list[str] | None) -> Options:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "model", nargs="?", metavar="NAME", help="a network (default: list all networks)"
    )
    parser.add_argument(
        "--input",
        type=image_shape,
        metavar="HxWxC",
        help="shape of an image (default: the published one)",
    )
    parser.add_argument("--classes", type=positive(int), metavar="N", help="number of classes")
    parser.add_argument(
        "--compare", metavar="NAME", help="a second network, drawn next to the first"
    )
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help=".svg, .png or .pdf file to draw to"
    )
    options = Options(**vars(parser.parse(arguments)))
    others = (options.figure, options.compare, options.input, options.classes)
    if options.model is None and any(others):
        raise InputError("name a network: python experiments/show.py resnet34")
    if options.figure and options.figure.suffix not in SUFFIXES:
        raise InputError(f"--figure must end in {', '.join(SUFFIXES)}, not {options.figure.name!r}")
    if options.classes and options.classes > LARGEST**2:
        raise InputError(f"--classes must be at most {LARGEST**2}")
    if options.figure and options.figure.is_dir():
        raise InputError(f"--figure: {options.figure} is a directory")
    if options.figure and not options.figure.parent.is_dir():
        raise InputError(f"--figure: there is no directory {options.figure.parent}")
    return options


if __name__ == "__main__":
    sys.exit(run_command(main))
