"""Loss landscapes: the loss around trained networks, along two random directions."""

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from msgspec import Meta
from scipy.interpolate import RectBivariateSpline

from flaxnets.decoding import Finite, Positive
from flaxnets.diagnostics.finding import MeasureOptions, NotPossibleError
from flaxnets.diagnostics.layers import Variables
from flaxnets.diagnostics.panels import WIDTH
from flaxnets.diagnostics.scales import round_ticks
from flaxnets.diagnostics.study import DiagnosedStudy, NetworkName, Setting
from flaxnets.diagnostics.text import listed, significant
from flaxnets.reporting.figures import write_png_and_svg
from flaxnets.reporting.findings import Finding, Table
from flaxnets.training.steps import cross_entropy

# Offsets of a square of points around a network, along both directions.
OFFSETS = np.linspace(-1.0, 1.0, 15)
DRAWN = 141  # points along each side that the figure interpolates


def random_direction(params: Any, seed: int) -> Any:
    """Draw a normal direction in the space of the kernels, with the filter norms of `params`.

    The filter normalisation is that of Li et al. (2018), arXiv:1712.09913, section 4. Biases and
    BatchNorm parameters get zeros. The numbers drawn depend on `seed` and the parameters' names and
    shapes, so that twins get the same direction except for the norms.
    """

    def draw(path: Any, leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        if path[-1].key != "kernel":
            return np.zeros_like(leaf)
        name = zlib.crc32(jax.tree_util.keystr(path).encode())
        # Drawn with NumPy: JAX would compile for every shape.
        direction = np.random.default_rng([seed, name]).standard_normal(leaf.shape, np.float32)
        filters = tuple(range(leaf.ndim - 1))  # each has one output channel
        norms = [np.sqrt(np.square(array).sum(filters)) for array in (leaf, direction)]
        return direction * norms[0] / norms[1]

    return jax.tree.map_with_path(draw, params)


def loss_surface(
    model: nn.Module,
    variables: Variables,
    images: jax.Array,
    labels: jax.Array,
    offsets: np.ndarray,
    seed: int = 0,
) -> np.ndarray:
    """Compute the mean cross-entropy around the parameters, along two random directions.

    The network is in training mode, as the optimizer sees it: running statistics are wrong as soon
    as a kernel moves. BatchNorm's own parameters stay as they are.

    Args:
      offsets: `(n,)`, offsets along both directions; 1 is as far as the parameters are from zero,
        filter by filter.
      seed: seed of the directions, see `random_direction`.

    Returns:
      float `(n, n)`; a row is an offset along the second direction.
    """
    directions = [random_direction(variables["params"], 2 * seed + i) for i in (0, 1)]

    @jax.jit
    def loss(variables: Variables, directions: Any, at: jax.Array, images: Any, labels: Any):
        params = jax.tree.map(
            lambda leaf, first, second: leaf + at[0] * first + at[1] * second,
            variables["params"],
            *directions,
        )
        logits: Any
        logits, _ = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return cross_entropy(logits, labels).mean()

    def row(y: float) -> list[float]:
        at = (jnp.float32([x, y]) for x in offsets)
        return [float(loss(variables, directions, point, images, labels)) for point in at]

    return np.array([row(y) for y in offsets])


@dataclass(frozen=True)
class Landscape:
    """The loss of `images` training images, in training mode, around the deepest twins.

    Attributes:
      offsets: offsets along both directions.
      loss: network -> a row for each offset along the second direction, a value for each along the
        first.
    """

    study: Setting
    images: Positive
    offsets: Annotated[list[Finite], Meta(min_length=3)]
    loss: Annotated[dict[NetworkName, list[list[float]]], Meta(min_length=1)]

    @classmethod
    def measure(cls, study: DiagnosedStudy, options: MeasureOptions) -> Self:
        twins = study.twins()
        if not twins:
            raise NotPossibleError("it needs a plain and a residual network of one depth")
        loss = {
            network.name: loss_surface(
                network.model, network.variables, *study.train, OFFSETS
            ).tolist()
            for network in twins
        }
        return cls(study.setting, len(study.train.labels), OFFSETS.tolist(), loss)

    def draw(self, path: Path) -> None:
        """Draw each surface on one scale of colours, with contours; the cross is the network.

        Between the measured points of the 15x15 grid, cubic splines interpolate the logarithm of
        the loss.
        """
        surfaces = {name: np.array(rows) for name, rows in self.loss.items()}
        low, high = colour_range(list(surfaces.values()))
        # 64 colours keep the file small.
        mapping = ScalarMappable(LogNorm(low, high), colormaps["cividis"].resampled(64))
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        axes = figure.subplots(1, len(surfaces), sharex=True, sharey=True, squeeze=False)[0]
        first, last = self.offsets[0], self.offsets[-1]
        fine = np.linspace(first, last, DRAWN)
        for ax, (name, surface) in zip(axes, surfaces.items(), strict=True):
            smooth = interpolate(np.array(self.offsets), surface, low, high, fine)
            ax.imshow(
                smooth,
                norm=mapping.norm,
                cmap=mapping.cmap,
                origin="lower",
                extent=(first, last, first, last),
                interpolation="bilinear",
            )
            _draw_contours(ax, fine, smooth)
            cross = {"ls": "", "marker": "+", "ms": 10, "mew": 1.8, "color": "w"}
            ax.plot(0, 0, path_effects=[withStroke(linewidth=3.4, foreground="0.25")], **cross)
            ax.set_title(name, fontsize="medium")
            ax.set_xlabel("offset along a random direction")
        ticks = [-1, -0.5, 0, 0.5, 1] if (first, last) == (-1, 1) else [first, 0, last]
        axes[0].set(xticks=ticks, yticks=ticks, ylabel="offset along another one")
        bar = figure.colorbar(mapping, ax=axes, label="loss, logarithmic", extend="max")
        ticks = round_ticks(low, high, most=12)
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.minorticks_off()
        title = f"loss of {self.images:,} training images around trained networks (crosses)"
        write_png_and_svg(figure, path, f"{title}\n{self.study}")

    def describe(self) -> Finding:
        rows, sentences, lower = [], [], []
        middle, points = len(self.offsets) // 2, len(self.offsets) ** 2
        for name, values in self.loss.items():
            surface = np.array(values)
            centre = float(surface[middle, middle])
            rim = np.concatenate([surface[0], surface[-1], surface[1:-1, 0], surface[1:-1, -1]])
            rim = rim[np.isfinite(rim)]
            # An empty rim has no median.
            ends = [float(f(rim)) if rim.size else math.nan for f in (np.min, np.median, np.max)]
            below, lost = (surface < centre).sum(), (~np.isfinite(surface)).sum()
            sentences.append(
                f"At {name}, the loss is {significant(centre)}; the median loss on the rim of the "
                f"square is {significant(ends[1])}."
            )
            lower.append(f"{below} around {name}")
            rows.append((name, *map(significant, (centre, *ends)), f"{below}", f"{lost}"))
        sentences += [
            f"Of the other {points - 1} points, {listed(lower)} have a lower loss than the network "
            "at the centre.",
            "The square extends by one filter norm in each direction, and the loss is that of "
            f"{self.images:,} training images in training mode (seed {self.study.seed}).",
        ]
        headings = (
            *("network", "at the network", "rim, lowest", "rim, median", "rim, highest"),
            *("points lower", "points not finite"),
        )
        return Finding("Loss landscapes", " ".join(sentences), Table(headings, rows))


def _draw_contours(ax: Axes, fine: np.ndarray, smooth: np.ndarray) -> None:
    """Draw contours at round losses, each labelled once if there is room."""
    if smooth.max() < 1.001 * smooth.min():
        return  # the variation is rounding
    levels = round_ticks(float(smooth.min()), float(smooth.max()), most=12)
    contours = ax.contour(fine, fine, smooth, levels, colors="w", linewidths=0.8)
    size = fine[-1] - fine[0]
    places = [np.zeros(2)]  # the cross in the middle
    for path in contours.get_paths():
        # Keep labels away from the edge, which would cut them.
        points = np.asarray(path.vertices)
        inner = points[np.abs(points - fine.mean()).max(1) < 0.43 * size]
        away = [min(np.hypot(*(point - place)) for place in places) for point in inner]
        if away and max(away) > 0.1 * size:
            places.append(inner[int(np.argmax(away))])
    for label in ax.clabel(
        contours, manual=places[1:], fmt=lambda loss: f"{loss:g}", fontsize="small"
    ):
        label.set_path_effects([withStroke(linewidth=2, foreground="0.25")])


def colour_range(surfaces: list[np.ndarray]) -> tuple[float, float]:
    """Return the losses at the ends of the colour scale, which all panels share.

    They are the lowest loss and the 98th percentile, because a few points may explode.
    """
    finite = np.concatenate([surface[np.isfinite(surface)] for surface in surfaces])
    if not finite.size:
        return 1.0, 10.0
    low, high = max(float(finite.min()), 1e-6), float(np.quantile(finite, 0.98))
    return low, max(high, 1.01 * low)


def interpolate(
    offsets: np.ndarray, surface: np.ndarray, low: float, high: float, fine: np.ndarray
) -> np.ndarray:
    """Interpolate the surface `(n, n)` over `offsets` at the points of `fine`.

    Cubic splines of the logarithm go through the given points; losses are clipped to `low` and
    `high`, and NaN counts as `high`.
    """
    logs = np.log(np.clip(np.nan_to_num(surface, nan=high), low, high))
    degree = min(3, len(offsets) - 1)
    spline = RectBivariateSpline(offsets, offsets, logs, kx=degree, ky=degree)
    return np.clip(np.exp(spline(fine, fine)), low, high)
