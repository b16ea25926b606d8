"""Why plain networks degrade: what can be measured in trained residual networks and their twins.

Pure functions of a network (version 1 of `flaxnets.models.resnet`), its variables and normalised
images; they give NumPy arrays or numbers. Layers and blocks are named as in `params`, joined by
`/`, and come in the order in which an image passes them.
"""

import csv
import io
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxnets.errors import InputError
from flaxnets.files import write_atomic
from flaxnets.models.resnet import Block, ResNet, zero_padded_identity
from flaxnets.models.stacking import unscanned, unstack_blocks
from flaxnets.parallel import is_primary
from flaxnets.training.steps import TrainState, count_errors, cross_entropy

Variables = Mapping[str, Any]

EPSILON = 1e-5  # of `flaxnets.models.layers.batch_norm`


def layer_names(params: Mapping[str, Any]) -> list[str]:
    """The weighted layers on the longest path: shortcuts are left out."""
    names = [
        "/".join(entry.key for entry in path[:-1])
        for path, _ in jax.tree.leaves_with_path(params)
        if len(path) > 1 and path[-1].key == "kernel" and path[-2].key[:8] != "shortcut"
    ]

    def place(name: str) -> tuple[bool, list[int]]:
        return name == "head", [int(number) for number in re.findall(r"\d+", name)]

    return sorted(names, key=place)


def block_names(params: Mapping[str, Any]) -> list[str]:
    """The blocks, `stage1_block1` first."""
    return list(dict.fromkeys(name.split("/")[0] for name in layer_names(params)[1:-1]))


def gradient_norms(
    model: nn.Module, variables: Variables, images: jax.Array, labels: jax.Array
) -> dict[str, float]:
    """Euclidean norm of the gradient of the mean cross-entropy with respect to each layer's kernel.

    In training mode: BatchNorm, where there is any, uses the statistics of these images.

    Args:
      images: float32 `(batch, height, width, channels)`, normalised.
      labels: int `(batch,)`.
    """
    gradients = jax.jit(partial(_gradients, model))(dict(variables), images, labels)
    return {name: float(gradients[name]) for name in layer_names(variables["params"])}


def _gradients(
    model: nn.Module, variables: dict[str, Any], images: jax.Array, labels: jax.Array
) -> dict[str, jax.Array]:
    def loss(params: Any) -> jax.Array:
        logits: Any
        logits, _ = model.apply(
            {**variables, "params": params},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        return cross_entropy(logits, labels).mean()

    gradients = jax.grad(loss)(variables["params"])
    names = layer_names(variables["params"])
    return {name: jnp.linalg.norm(_find(gradients, name)["kernel"].ravel()) for name in names}


def _find(tree: Mapping[str, Any], name: str) -> Any:
    for part in name.split("/"):
        tree = tree[part]
    return tree


def without_batch_norm(model: ResNet) -> ResNet:
    """The same network with nothing in place of each BatchNorm."""
    return model.clone(norm=_Nothing)


class _Nothing(nn.Module):
    scale_init: Any = None
    use_running_average: bool = False
    dtype: Any = None
    param_dtype: Any = None

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def _watch(
    model: nn.Module, variables: Variables, images: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Input and output of every module, in evaluation mode, under its name."""
    seen = {}

    def look(call: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output = call(*args, **kwargs)
        if context.method_name == "__call__" and context.module.path:
            seen["/".join(context.module.path)] = (args[0], output)
        return output

    with nn.intercept_methods(look):
        model.apply(dict(variables), images, train=False)
    return seen


def layer_responses(model: nn.Module, variables: Variables, images: jax.Array) -> dict[str, float]:
    """Standard deviation of the output of each 3x3 layer after BatchNorm, before the addition and
    the rectifier, over all images, places and channels (He et al. 2015, Figure 7)."""
    names = [
        name
        for name in layer_names(variables["params"])[:-1]
        if _find(variables["params"], name)["kernel"].shape[:2] == (3, 3)
    ]

    @jax.jit
    def spreads(variables: Variables, images: jax.Array) -> dict[str, jax.Array]:
        seen = _watch(model, variables, images)
        return {name: seen[re.sub(r"conv(\d+)$", r"bn\1", name)][1].std() for name in names}

    spread = spreads(variables, images)
    return {name: float(spread[name]) for name in names}


def residual_ratios(model: nn.Module, variables: Variables, images: jax.Array) -> dict[str, float]:
    """||F(x)|| / ||x|| of each block, F the residual function and x what the shortcut brings: the
    mean of it over the images."""
    blocks = block_names(variables["params"])

    @jax.jit
    def ratios(variables: Variables, images: jax.Array) -> dict[str, jax.Array]:
        seen = _watch(model, variables, images)
        found = {}
        for block in blocks:
            last = max(name for name in seen if re.fullmatch(rf"{block}/bn\d+", name))
            residual = seen[last][1]
            norms = [
                jnp.linalg.norm(array.reshape(len(array), -1), axis=1)
                for array in (residual, _shortcut(seen, block, residual))
            ]
            found[block] = (norms[0] / norms[1]).mean()
        return found

    ratio = ratios(variables, images)
    return {block: float(ratio[block]) for block in blocks}


def _shortcut(seen: Mapping[str, Any], block: str, like: jax.Array) -> jax.Array:
    """What the shortcut of a block brings; for a plain one, the parameter-free shortcut A."""
    projection = seen.get(f"{block}/shortcut_bn")
    if projection is not None:
        return projection[1]
    x = seen[block][0]
    return zero_padded_identity(x, like.shape[-1], -(-x.shape[1] // like.shape[1]))


def lesion_errors(
    model: nn.Module, variables: Variables, images: jax.Array, labels: jax.Array
) -> dict[str | None, float]:
    """Error in percent with one block removed, for each block; under None, with none removed.

    Of a removed block its shortcut remains; of a plain one, the parameter-free shortcut A that its
    residual twin has (Veit et al. 2016, arXiv:1605.06431, section 4).
    """
    blocks = block_names(variables["params"])

    @jax.jit
    def count(variables: dict, images: jax.Array, labels: jax.Array, removed: jax.Array):
        seen = {}

        def remove(
            call: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext
        ) -> Any:
            output, path = call(*args, **kwargs), "/".join(context.module.path)
            if context.method_name == "__call__":
                seen[path] = (args[0], output)
            if isinstance(context.module, Block):
                # Blocks end in a rectifier.
                rest = jnp.maximum(_shortcut(seen, path, output), 0)
                output = jnp.where(removed == blocks.index(path), rest, output)
            return output

        with nn.intercept_methods(remove):
            logits: Any = model.apply(variables, images, train=False)
        return count_errors(logits, labels).sum()

    return {
        block: 100 * int(count(dict(variables), images, labels, jnp.int32(i))) / len(labels)
        for i, block in enumerate([*blocks, None])
    }


def insert_identities(
    shallow: ResNet, variables: Variables, deep: ResNet, images: jax.Array
) -> dict[str, Any]:
    """Variables of the plain network `deep` that make it the function which the plain `shallow` is.

    The argument of He et al. (2015), section 1, that a deeper network need not be worse: the blocks
    that it has more, at the end of each stage, are identities. Their kernels copy each channel, and
    their BatchNorms undo what they do: running statistics are those of the signal on `images`, the
    scale its standard deviation, the bias its mean. Rectified signals pass the rectifiers.

    Raises:
      ValueError: `deep` is not `shallow` with more two-convolution blocks.
    """
    sizes = (shallow.stage_sizes, deep.stage_sizes)
    alike = shallow.clone(stage_sizes=deep.stage_sizes) == deep
    more = all(few <= many for few, many in zip(*sizes, strict=False))
    if not alike or not more or deep.residual or deep.block != "basic" or deep.preactivation:
        raise ValueError("identities go between the blocks of plain networks of one family")

    @jax.jit
    def stage_statistics(variables: Variables, images: jax.Array) -> list[tuple[Any, Any]]:
        # In bfloat16 the statistics would be too coarse to undo.
        seen = _watch(shallow.clone(dtype=jnp.float32), variables, images)
        ends = [
            seen[f"stage{stage}_block{size}"][1]
            for stage, size in enumerate(shallow.stage_sizes, 1)
        ]
        return [(end.mean((0, 1, 2)), end.var((0, 1, 2))) for end in ends]

    params, stats = dict(variables["params"]), dict(variables["batch_stats"])
    for stage, (mean, var) in enumerate(stage_statistics(variables, images), 1):
        width = len(mean)
        copy = jnp.zeros((3, 3, width, width)).at[1, 1].set(jnp.eye(width))
        scale = jnp.sqrt(var + EPSILON)
        for block in range(sizes[0][stage - 1] + 1, sizes[1][stage - 1] + 1):
            name = f"stage{stage}_block{block}"
            params[name] = {
                **{f"conv{i}": {"kernel": copy} for i in (1, 2)},
                **{f"bn{i}": {"scale": scale, "bias": mean} for i in (1, 2)},
            }
            stats[name] = {f"bn{i}": {"mean": mean, "var": var} for i in (1, 2)}
    # An array of its own for each: who donates them may do so once.
    return jax.tree.map(np.array, {"params": params, "batch_stats": stats})


def random_direction(params: Any, seed: int) -> Any:
    """A normal direction in the space of the kernels, each filter of the norm that it has in
    `params` (Li et al. 2018, arXiv:1712.09913, section 4); zero for biases and BatchNorm.

    It depends on `seed` and the parameters' names and shapes, so that twins get the same one but
    for the norms.
    """

    def draw(path: Any, leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        if path[-1].key != "kernel":
            return np.zeros_like(leaf)
        name = zlib.crc32(jax.tree_util.keystr(path).encode())
        # NumPy's numbers: JAX would compile for every shape.
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
    """Mean cross-entropy around the parameters along two random directions.

    In training mode, as the optimizer sees it: running statistics are those of another network as
    soon as a kernel moves. BatchNorm's own parameters are left as they are.

    Args:
      offsets: `(n,)`, along both; 1 is as far as the parameters are from zero, filter by filter.
      seed: of the directions, see `random_direction`.

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

    return np.array(
        [
            [
                float(loss(variables, directions, jnp.float32([x, y]), images, labels))
                for x in offsets
            ]
            for y in offsets
        ]
    )


def read_gradients(directory: Path, names: Sequence[str]) -> list[dict[str, float]]:
    """The rows of a run's `gradients.csv`, an epoch each; none without one.

    Raises:
      InputError: it is damaged, or its layers are not `names`.
    """
    path = directory / "gradients.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            if reader.fieldnames != ["epoch", "step", *names]:
                raise ValueError("its columns are not epoch, step and this network's layers")
            return [
                {k: (int if k in ("epoch", "step") else float)(v) for k, v in row.items()}
                for row in reader
            ]
        except (TypeError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error}); move it away") from error


class GradientLog:
    """`gradients.csv` in a run directory: `epoch`, `step` and the norm of each layer's gradient.

    The gradient is that of the mean loss on fixed training images, as `gradient_norms`. A run that
    goes on from an earlier step loses the rows behind it and writes them again.
    """

    def __init__(self, model: nn.Module, images: jax.Array, labels: jax.Array) -> None:
        self._norms = jax.jit(partial(_gradients, unscanned(model)))
        self._images, self._labels = images, labels
        shapes = jax.eval_shape(
            lambda: unscanned(model).init(jax.random.key(0), images[:1], train=False)
        )
        self._names = layer_names(shapes["params"])

    def check(self, directory: Path) -> None:
        """Refuse a damaged `gradients.csv` before the run goes on.

        Raises:
          InputError: as `read_gradients`.
        """
        read_gradients(directory, self._names)

    def write(self, directory: Path, state: TrainState, row: Mapping[str, Any]) -> None:
        """Add the state at the end of an epoch, whose row of `metrics.csv` is `row`."""
        variables = unstack_blocks(state.variables)
        norms = jax.device_get(self._norms(variables, self._images, self._labels))
        if not is_primary():
            return
        names = self._names
        earlier = [old for old in read_gradients(directory, names) if old["step"] < row["step"]]
        place = {"epoch": row["epoch"], "step": row["step"]}
        rows = [*earlier, {**place, **{name: float(norms[name]) for name in names}}]
        text = io.StringIO()
        writer = csv.DictWriter(text, ["epoch", "step", *names], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(directory / "gradients.csv", text.getvalue())
