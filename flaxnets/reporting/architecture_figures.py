"""Networks drawn layer by layer, as in Figure 3 of He et al. (2015)."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve

from flaxnets.models.cost import LayerCost

# Colours of the boxes, one per resolution.
COLOURS = ("#E8E8E8", "#D9D2E9", "#CFE2F3", "#D9EAD3", "#FFF2CC", "#FCE5CD", "#F4CCCC")
UNIT = 0.27  # inches from one box to the next
WIDTH, HEIGHT = 4.4, 0.64  # size of a box in units
LONGEST_RUN = 6  # most equal blocks in a row that are drawn one by one


@dataclass(frozen=True)
class Block:
    """A column of boxes, with or without a shortcut around them.

    Attributes:
      name: name of the module.
      boxes: text and output size of each box; the size is empty without a feature map.
      shortcut: `"identity"`, `"projection"` or None.
      repeats: number of equal blocks in a row that this one stands for.
    """

    name: str
    boxes: tuple[tuple[str, str], ...]
    shortcut: str | None = None
    repeats: int = 1


def find_blocks(modules: Sequence[LayerCost], residual: bool) -> list[Block]:
    """Return the blocks of a network from its `list_modules`; pooling is inferred from shapes.

    With `residual`, every module that contains layers has a shortcut. As in the paper's figure, it
    is a projection if it changes the shape or has its own convolution, and an identity otherwise.
    """
    blocks: list[Block] = []
    inside: dict[tuple[str, ...], list[LayerCost]] = defaultdict(list)
    before = modules[0].input_shape
    for module in modules:
        layers = inside.pop(module.path, [])
        if len(module.path) > 1:
            inside[module.path[:-1]].append(module)
            continue
        boxes, shape = [], module.input_shape
        for layer in layers or [module]:
            if layer.kind != "batch norm" and not layer.path[-1].startswith("shortcut"):
                boxes += _pooling(shape, layer.input_shape)
                boxes.append((layer.kind, _size(layer.output_shape)))
                shape = layer.output_shape
        boxes += _pooling(shape, module.output_shape)
        if not boxes:
            continue
        if pooling := _pooling(before, module.input_shape):
            blocks.append(Block("", tuple(pooling)))
        before = module.output_shape
        shortcut = None
        if residual and layers:
            own = any(layer.path[-1].startswith("shortcut") for layer in layers)
            same = module.input_shape == module.output_shape
            shortcut = "identity" if same and not own else "projection"
        blocks.append(Block("/".join(module.path), tuple(boxes), shortcut))
    return blocks


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]}" if len(shape) == 3 else ""


def _pooling(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[str, str]]:
    """Return the box of the pooling between shapes `before` and `after`, if there is any."""
    if len(before) < 3 or before[:2] == after[:2]:
        return []
    if len(after) == 3:
        smaller = after[0] < before[0]  # a second branch starts from the image again
        return [(f"pool, /{round(before[0] / after[0])}", _size(after))] if smaller else []
    if after[0] % math.prod(before) == 0:  # flattened, perhaps from several branches
        return []
    return [("global average pool" if after[0] == before[-1] else "pool", "")]


def _fold(blocks: Sequence[Block]) -> list[Block]:
    """Fold long runs of equal blocks into one."""
    folded = []
    for _, group in groupby(blocks, lambda block: (block.boxes, block.shortcut)):
        run = list(group)
        folded += [replace(run[0], repeats=len(run))] if len(run) > LONGEST_RUN else run
    return folded


def draw_networks(networks: Sequence[tuple[str, Sequence[Block]]], path: Path) -> None:
    """Draw networks (title, blocks) side by side, input on top, to `path`, whose suffix gives the
    format. Shortcuts are solid for identities and dashed for projections."""
    columns = [(title, _fold(blocks)) for title, blocks in networks]
    sides = [5.2 if _has_branches(blocks) else 4.0 for _, blocks in columns]
    bottom = max(sum(len(block.boxes) for block in blocks) for _, blocks in columns)
    figure = Figure(figsize=(UNIT * 2 * sum(sides), UNIT * (bottom + 3.2)))
    left = 0.0
    for (title, blocks), side in zip(columns, sides, strict=True):
        ax = figure.add_axes((left / sum(sides), 0.0, side / sum(sides), 1.0))
        left += side
        ax.set_xlim(-side, side)
        ax.set_ylim(-bottom, 3.2)
        ax.axis("off")
        _draw_column(ax, title, blocks)
    figure.savefig(path, dpi=150)


def _has_branches(blocks: Sequence[Block]) -> bool:
    return any(block.name == "right" for block in blocks)


def _draw_column(ax: Axes, title: str, blocks: Sequence[Block]) -> None:
    name, *facts = title.splitlines()
    ax.text(0, 2.5, name, ha="center", va="center", fontsize=9, fontweight="bold")
    ax.text(0, 1.5, "\n".join(facts), ha="center", va="center", fontsize=6.5)
    ax.text(0, 0.55, "image", ha="center", va="center", fontsize=6.5)
    branches = _has_branches(blocks)
    image = (0.0, 0.3)
    ends, y, sizes = [image], -0.5, [""]  # starts of the arrows into the next box; its y
    for block in blocks:
        x = {"left": -2.4, "right": 2.4}.get(block.name, 0.0) if branches else 0.0
        starts, other_ends = ends, []
        if block.name == "right" and branches:
            y, starts, other_ends = -0.5, [image], ends
        top = y
        for text, size in block.boxes:
            for start in starts:
                style = {"arrowstyle": "-|>", "lw": 0.7, "mutation_scale": 5, "color": "k"}
                style |= {"shrinkA": 0, "shrinkB": 0}
                ax.annotate("", (x, y + HEIGHT / 2), start, arrowprops=style)
            if size not in sizes:
                sizes.append(size)
                if not branches:
                    place = (-WIDTH / 2 - 0.15, y)
                    ax.text(*place, size, ha="right", va="center", fontsize=6, color="0.4")
            _draw_box(ax, x, y, text, COLOURS[sizes.index(size) % len(COLOURS)])
            starts = [(x, y - HEIGHT / 2)]
            y -= 1
        if block.shortcut is not None:
            _draw_shortcut(ax, top + 0.5, y + 0.5, block.shortcut)
        if block.repeats > 1:
            place = (-WIDTH / 2 - 0.15, y + 1)
            ax.text(*place, f"{block.repeats} x", ha="right", va="center", fontsize=7)
        ends = other_ends + starts


def _draw_box(ax: Axes, x: float, y: float, text: str, colour: str) -> None:
    corner = (x - WIDTH / 2, y - HEIGHT / 2)
    style = "round,pad=0,rounding_size=0.12"
    ax.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, style, fc=colour, ec="0.3", lw=0.6))
    ax.text(x, y, text, ha="center", va="center_baseline", fontsize=6.5)


def _draw_shortcut(ax: Axes, top: float, bottom: float, kind: str) -> None:
    right = WIDTH / 2 + 1.2
    points = [(0, top), (right, top), (right, top), (right, (top + bottom) / 2)]
    points += [(right, bottom), (right, bottom), (0, bottom)]
    style = "-" if kind == "identity" else (0, (3, 2))
    curve = Curve(points, [Curve.MOVETO, *[Curve.CURVE4] * 6])
    ax.add_patch(PathPatch(curve, fill=False, lw=0.9, ls=style, zorder=0.5))
