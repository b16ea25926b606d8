"""Convolutions on CPUs with oneDNN, the library that PyTorch uses there too.

XLA computes them with Eigen or YNNPACK. For the gradient with respect to the kernel, whose window
is as large as the image, it first copies both images into another layout. jaxlib for Linux on
x86-64 also ships oneDNN, reachable through a custom call. Times of 3x3 convolutions at batch 128 on
two cores of an AMD EPYC with AVX-512, in milliseconds (XLA, this module, PyTorch 2.13):

    map     channels   value              gradient of x      gradient of the kernel
    32x32   16         8.1   3.2   3.0    5.7   3.3   2.9    14.4   5.6   2.7
    16x16   32         6.1   2.9   2.6    6.0   2.9   2.6     9.9   4.1   2.7
    8x8     64         5.8   2.7   2.3    5.7   2.8   2.4     8.5   3.0   2.5

Input gradients with a stride of 2, as matrix products (XLA, this module):

    32x32   16 to 32     11.9   4.2
    8x8     128 to 128    6.5   4.3
    2x2     512 to 512  160.9   3.0

The custom call is not a documented interface. It is used only with versions of jaxlib that have
passed the tests, in cases known to be safe, and after passing a check on this machine (with SSE4.1
alone it hangs). All other cases and platforms use `lax.conv_general_dilated` itself, and so does
everything with `FLAXNETS_CONV=xla` in the environment.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from flaxnets.models.onednn import has_bfloat16, has_onednn, passes_check

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# Kernel gradients of inputs of more bytes take PART images at a time, to fit the caches.
LARGE, PART = 2**22, 16
# What `check_onednn` tries: images, their size, input and output channels, kernel size, stride.
CHECKED_SHAPES = (
    (128, 32, 1, 16, 3, 1),
    (128, 32, 16, 16, 3, 1),
    (32, 8, 16, 32, 3, 2),
    (32, 8, 16, 32, 1, 1),
)


def conv_general_dilated(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **kw: Any):
    """Replace `lax.conv_general_dilated` in `flax.linen.Conv` (NHWC images, HWIO kernels)."""
    ordinary = (
        not has_onednn()
        or isinstance(padding, str)
        or any(d not in (None, 1, (1, 1)) for d in (kw["lhs_dilation"], kw["rhs_dilation"]))
        or kw["feature_group_count"] != 1
        or kw["precision"] is not None
        or not (x.ndim == 4 and x.dtype == kernel.dtype)
        or not (x.dtype == jnp.float32 or (x.dtype == jnp.bfloat16 and has_bfloat16()))
    )
    if ordinary:
        return lax.conv_general_dilated(x, kernel, strides, padding, **kw)
    # Negative padding is cut off first: oneDNN refuses it, and XLA's results are wrong.
    cropped = [(0, 0, 0), *((min(a, 0), min(b, 0), 0) for a, b in padding), (0, 0, 0)]
    x = lax.pad(x, x.dtype.type(0), cropped) if np.any(cropped) else x
    (top, bottom), (left, right) = ((max(a, 0), max(b, 0)) for a, b in padding)
    settings: Any = {"strides": tuple(strides), "padding": ((top, bottom), (left, right))}
    shape = lax.conv_general_shape_tuple(
        x.shape, kernel.shape, *settings.values(), dimension_numbers=DIMENSIONS
    )
    if 0 in x.shape or 0 in shape:  # oneDNN would end the process
        return lax.conv_general_dilated(x, kernel, *settings.values(), **kw)
    return conv_p.bind(x, kernel, **settings)


def check_onednn() -> None:
    """Compare oneDNN with XLA several times, since a oneDNN that hangs does not hang every time.

    Raises:
      AssertionError: the results differ.
    """
    rng = np.random.default_rng(0)
    tolerances = {jnp.float32: 1e-4}
    if has_bfloat16():
        tolerances[jnp.bfloat16] = 2e-2
    for (count, size, channels, filters, window, stride), dtype in product(
        CHECKED_SHAPES, tolerances
    ):
        pad = (window // 2, window // 2)
        settings: Any = {"strides": (stride, stride), "padding": (pad, pad)}
        x = rng.standard_normal((count, size, size, channels), np.float32)
        kernel = rng.standard_normal((window, window, channels, filters), np.float32)
        operands = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)

        def run(functions: Any, x: Any, kernel: Any, settings: Any = settings):
            conv, input_gradient, kernel_gradient = functions
            y = conv(x, kernel, **settings)
            return (
                y,
                input_gradient(y, kernel, size=x.shape[1:3], **settings),
                kernel_gradient(x, y, size=kernel.shape[:2], **settings),
            )

        ours = jax.jit(partial(run, (onednn_conv, onednn_input_gradient, onednn_kernel_gradient)))
        ordinary = ordinary_conv, ordinary_input_gradient, ordinary_kernel_gradient
        theirs = jax.jit(partial(run, ordinary))(*operands)
        for _ in range(10):
            for a, b in zip(ours(*operands), theirs, strict=True):
                largest = np.abs(np.asarray(b, np.float32)).max()
                np.testing.assert_allclose(
                    np.asarray(a, np.float32),
                    np.asarray(b, np.float32),
                    rtol=10 * tolerances[dtype],
                    atol=tolerances[dtype] * largest,
                )


def ordinary_conv(x: jax.Array, kernel: jax.Array, *, strides: Any, padding: Any) -> jax.Array:
    """Convolve with XLA."""
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=DIMENSIONS)


def onednn_conv(x: jax.Array, kernel: jax.Array, *, strides: Any, padding: Any) -> jax.Array:
    """Convolve with oneDNN, or as a matrix product if the images are single pixels."""
    if x.shape[1:3] == kernel.shape[:2] == (1, 1) and not np.any(padding):
        return lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))
    return _call_onednn(x, kernel, "HWIO", strides, padding, (1, 1))


def ordinary_kernel_gradient(
    x: jax.Array, g: jax.Array, *, size: tuple[int, int], strides: Any, padding: Any
) -> jax.Array:
    """Compute the kernel gradient of `ordinary_conv` with XLA, from `g`, that of its output.

    The result is `(height, width, in, out)`, with height and width from `size`.
    """
    kernel = jax.ShapeDtypeStruct((*size, x.shape[-1], g.shape[-1]), x.dtype)
    conv = partial(ordinary_conv, x, strides=strides, padding=padding)
    return jax.linear_transpose(conv, kernel)(g)[0]


def onednn_kernel_gradient(
    x: jax.Array, g: jax.Array, *, size: tuple[int, int], strides: Any, padding: Any
) -> jax.Array:
    """Compute the same gradient with oneDNN, as a convolution over the images with kernel `g`.

    Images become channels. The channels of `x` become neighbouring pixels of a row, which the
    kernel steps over by dilation. The output is then as wide as the true kernel times these
    channels, which keeps the vector units busy; `size` alone would be too small.
    """
    if size == (1, 1) and not np.any(padding):
        x = x[:, :: strides[0], :: strides[1]]
        rows, columns = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        return _multiply_transposed(rows, columns)[None, None]
    # Pad below and to the right until the output has the kernel's size. This padding is negative if
    # no window reaches the last rows or columns.
    (top, bottom), (left, right) = (
        (before, k + s * (o - 1) - n - before)
        for k, s, o, n, (before, _) in zip(
            size, strides, g.shape[1:3], x.shape[1:3], padding, strict=True
        )
    )
    if min(bottom, right) < 0:
        x = lax.pad(x, x.dtype.type(0), ((0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0)))
        top = bottom = left = right = 0
    count, height, width, channels = x.shape

    def of_part(x: jax.Array, g: jax.Array) -> jax.Array:
        rows = x.reshape(len(x), -1).T.reshape(1, height, width * channels, len(x))
        return _call_onednn(
            rows,
            g,
            "IHWO",
            (1, 1),
            ((top, bottom), (left * channels, right * channels)),
            (strides[0], strides[1] * channels),
        )

    if x.nbytes <= LARGE or count % PART:
        total = of_part(x, g)
    else:
        parts = [a.reshape(count // PART, PART, *a.shape[1:]) for a in (x, g)]
        shape = (1, size[0], size[1] * channels, g.shape[-1])
        total = lax.scan(
            lambda total, part: (total + of_part(*part), None), jnp.zeros(shape, jnp.float32), parts
        )[0]
    return total.astype(x.dtype).reshape(*size, channels, -1)


def _call_onednn(
    x: jax.Array,
    kernel: jax.Array,
    kernel_layout: str,
    strides: Sequence[int],
    padding: Sequence[Sequence[int]],
    dilation: Sequence[int],
) -> jax.Array:
    """Call oneDNN's NHWC convolution; `kernel_layout` is the order of the axes of `kernel`."""
    axis = {letter: kernel_layout.index(letter) for letter in "HWIO"}
    shape = [
        (n + sum(pad) - (kernel.shape[axis[letter]] - 1) * d - 1) // s + 1
        for letter, n, pad, d, s in zip("HW", x.shape[1:3], padding, dilation, strides, strict=True)
    ]
    nhwc = {"data": {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}}
    config = {
        "dims": 4,
        "input": nhwc,
        "kernel": {
            "filter": {
                "input_feature_dim": axis["I"],
                "output_feature_dim": axis["O"],
                "spatial_dims": [axis["H"], axis["W"]],
            }
        },
        "output": nhwc,
        "window": {
            "pad_left": [before for before, _ in padding],
            "pad_right": [after for _, after in padding],
            "strides": list(strides),
            "window_dilations": list(dilation),
        },
        "feature_groups": 1,
    }
    out = jax.ShapeDtypeStruct((len(x), *shape, kernel.shape[axis["O"]]), x.dtype)
    call = jax.ffi.ffi_call(
        "__onednn$convolution",
        out,
        custom_call_api_version=2,
        legacy_backend_config=json.dumps({"onednn_conv_config": config}),
    )
    return call(x, kernel)


def _multiply_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply the transpose of `a` `(n, rows)` by `b` `(n, columns)` with oneDNN."""
    call = jax.ffi.ffi_call(
        "__onednn$matmul",
        jax.ShapeDtypeStruct((a.shape[1], b.shape[1]), a.dtype),
        custom_call_api_version=2,
        legacy_backend_config=json.dumps({"onednn_matmul_config": {"transpose_a": True}}),
    )
    return call(a, b)


def ordinary_input_gradient(
    g: jax.Array, kernel: jax.Array, *, size: tuple[int, int], strides: Any, padding: Any
) -> jax.Array:
    """Compute the input gradient of `ordinary_conv` with XLA, from `g`, that of its output.

    The result is `(batch, height, width, in)`, with height and width from `size`.
    """
    x = jax.ShapeDtypeStruct((len(g), *size, kernel.shape[2]), g.dtype)
    conv = partial(ordinary_conv, kernel=kernel, strides=strides, padding=padding)
    return jax.linear_transpose(conv, x)(g)[0]


def onednn_input_gradient(
    g: jax.Array, kernel: jax.Array, *, size: tuple[int, int], strides: Any, padding: Any
) -> jax.Array:
    """Compute the same gradient with oneDNN, or, if windows are strided, by matrix products.

    XLA would stretch `g` by the strides first and, for maps of few pixels and many channels, take
    up to fifty times as long.
    """
    opposite = tuple(
        (k - 1 - before, k - 1 - after)
        for k, (before, after) in zip(kernel.shape, padding, strict=False)
    )
    single = size == kernel.shape[:2] == (1, 1)
    if strides == (1, 1) and min(map(min, opposite)) >= 0 and not single:
        return _call_onednn(g, kernel[::-1, ::-1], "HWOI", strides, opposite, (1, 1))
    total = jnp.zeros((), jnp.float32)
    for tap in np.ndindex(kernel.shape[:2]):
        term = lax.dot_general(
            g, kernel[tap], (((3,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        # Each product belongs to the pixel that this tap of its window lies on.
        places = [
            (first := t - before, n - 1 - (s * (o - 1) + first), s - 1)
            for t, (before, _), n, s, o in zip(
                tap, padding, size, strides, g.shape[1:3], strict=True
            )
        ]
        total += lax.pad(term, jnp.float32(0), ((0, 0, 0), *places, (0, 0, 0)))
    return total.astype(g.dtype)


def _primitive(
    name: str,
    ordinary: Callable,
    onednn: Callable,
    shape: Callable,
    gradients: tuple[Callable, Callable],
) -> Primitive:
    """Create a primitive that JAX can differentiate in every mode and to any order.

    It is linear in each of its two operands, and `gradients` are those with respect to them.
    """
    primitive = Primitive(name)

    def batch(operands: Any, axes: Any, **kw: Any):
        return jax.vmap(partial(ordinary, **kw), axes)(*operands), 0

    compiled = jax.jit(primitive.bind, static_argnames=("strides", "padding", "size"))

    def compute(*operands: Any, **kw: Any):
        with jax.disable_jit(False):  # without `jit` it would recurse forever
            return compiled(*operands, **kw)

    def lower_on_cpu(context: mlir.LoweringRuleContext, *operands: Any, **kw: Any):
        # An exported program may run on other machines, so it must not contain the custom call.
        exported = context.module_context.lowering_parameters.for_export
        function = ordinary if exported or not passes_check() else onednn
        return mlir.lower_fun(function, multiple_results=False)(context, *operands, **kw)

    primitive.def_abstract_eval(lambda x, y, **kw: ShapedArray(shape(x, y, **kw), x.dtype))
    primitive.def_impl(compute)
    ad.defbilinear(primitive, *gradients)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(ordinary, multiple_results=False))
    mlir.register_lowering(primitive, lower_on_cpu, platform="cpu")
    return primitive


def _gradient_of_input(g: jax.Array, x: Any, kernel: jax.Array, **kw: Any):
    return input_gradient_p.bind(g, kernel, size=x.aval.shape[1:3], **kw)


def _gradient_of_kernel(g: jax.Array, x: jax.Array, kernel: Any, **kw: Any):
    return kernel_gradient_p.bind(x, g, size=kernel.aval.shape[:2], **kw)


# Each is linear in both operands, and the gradients of one of the three are the other two.
conv_p = _primitive(
    "conv",
    ordinary_conv,
    onednn_conv,
    lambda x, kernel, strides, padding: lax.conv_general_shape_tuple(
        x.shape, kernel.shape, strides, padding, DIMENSIONS
    ),
    (_gradient_of_input, _gradient_of_kernel),
)
input_gradient_p = _primitive(
    "conv_input_gradient",
    ordinary_input_gradient,
    onednn_input_gradient,
    lambda g, kernel, size, **kw: (g.shape[0], *size, kernel.shape[2]),
    (
        lambda d, g, kernel, size, **kw: conv_p.bind(d, kernel, **kw),
        lambda d, g, kernel, size, **kw: kernel_gradient_p.bind(
            d, g, size=kernel.aval.shape[:2], **kw
        ),
    ),
)
kernel_gradient_p = _primitive(
    "conv_kernel_gradient",
    ordinary_kernel_gradient,
    onednn_kernel_gradient,
    lambda x, g, size, **kw: (*size, x.shape[-1], g.shape[-1]),
    (
        lambda d, x, g, size, **kw: input_gradient_p.bind(g, d, size=x.aval.shape[1:3], **kw),
        lambda d, x, g, size, **kw: conv_p.bind(x, d, **kw),
    ),
)
