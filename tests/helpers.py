"""What tests of many networks and runs share; compilation is most of their time."""

from functools import partial
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

# Compiles in half the time.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_variables(model: Any, *images: Any) -> dict[str, Any]:
    """Variables of `model`: kernels of variance 2 / fan-in; biases, scales, statistics at random.

    NumPy draws them: JAX would compile for every shape.
    """
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *images, train=False))

    def draw(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        if path[-1] == "kernel":
            std = np.sqrt(2 * shape[-1] / np.prod(shape))
            values = std * rng.standard_normal(shape, np.float32)
        elif path[-1] in ("scale", "var"):
            values = rng.uniform(0.5, 1.5, shape)
        else:
            values = rng.normal(0, 0.1, shape)
        return np.asarray(values, np.float32)

    leaves: Any = flatten_dict(shapes)
    return unflatten_dict({path: draw(path, leaf.shape) for path, leaf in leaves.items()})


def random_images(*shape: int) -> np.ndarray:
    """Normal float32 `(batch, height, width, channels)`."""
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def relative_error(ours: Any, theirs: Any) -> float:
    """Largest difference over the largest absolute value of `theirs`."""
    theirs = np.asarray(theirs)
    assert np.shape(ours) == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def stop_at(step):
    """`on_progress` and `stop` of a run that is to stop at `step`."""
    reached = [0]

    def on_progress(progress):
        reached[0] = progress.step

    return on_progress, lambda: reached[0] >= step
