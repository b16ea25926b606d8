from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.compilation_cache import compilation_cache

from flaxnets.errors import FallbackWarning, InputError
from flaxnets.models import convolution, onednn
from flaxnets.models.convolution import (
    conv_general_dilated,
    conv_p,
    onednn_conv,
    ordinary_conv,
)
from flaxnets.models.onednn import has_onednn, passes_check
from tests.processes import COMMAND, finish


@contextmanager
def without_compilation_cache():
    """The tests' own, with which oneDNN cannot be used."""
    directory = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", directory)
    compilation_cache.reset_cache()


with without_compilation_cache():
    needs_onednn = pytest.mark.skipif(not has_onednn(), reason="no oneDNN in this jaxlib")


@pytest.fixture(autouse=True, scope="module")
def _without_compilation_cache():
    with without_compilation_cache():
        yield


KEYWORDS = {
    "lhs_dilation": (1, 1),
    "rhs_dilation": (1, 1),
    "dimension_numbers": convolution.DIMENSIONS,
    "feature_group_count": 1,
    "precision": None,
}
# Images, channels in and out, kernel, strides, padding: those of the networks, and odd ones.
SHAPES = [
    ((5, 8, 8), 3, 16, (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((4, 9, 7), 8, 16, (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((3, 2, 2), 6, 5, (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((2, 6, 6), 8, 16, (1, 1), (2, 2), ((0, 0), (0, 0))),
    ((2, 23, 23), 3, 8, (7, 7), (2, 2), ((3, 3), (3, 3))),
    ((1, 5, 4), 1, 1, (2, 3), (3, 1), ((0, 2), (2, 0))),
    ((2, 1, 6), 3, 4, (1, 5), (3, 1), ((2, 0), (0, 1))),  # the last rows are in no window
    # Bottlenecks on small maps.
    ((4, 4, 4), 16, 8, (1, 1), (1, 1), ((0, 0), (0, 0))),
    ((4, 4, 4), 8, 16, (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((4, 2, 2), 16, 16, (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((4, 2, 2), 8, 16, (1, 1), (2, 2), ((0, 0), (0, 0))),
    ((4, 1, 1), 16, 8, (1, 1), (1, 1), ((0, 0), (0, 0))),
    ((4, 1, 1), 8, 8, (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((3, 5, 5), 4, 8, (1, 1), (1, 1), ((1, 1), (1, 1))),
    ((2, 8, 8), 4, 6, (2, 2), (3, 3), ((0, 0), (1, 0))),
]


def random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def operands(shape):
    images, channels, filters, size, strides, padding = shape
    x, kernel = random(*images, channels), random(*size, channels, filters)
    return x, kernel, {"strides": strides, "padding": padding}


def value_and_gradients(conv, x, kernel):
    value, pullback = jax.vjp(conv, x, kernel)
    weights = random(*value.shape)
    gradients = pullback(weights)

    # The gradients' own derivatives, as in a Hessian times a vector.
    def gradient(x, kernel):
        return jax.grad(lambda x, kernel: (conv(x, kernel) ** 2 * weights).sum(), (0, 1))(x, kernel)

    return value, *gradients, *jax.jvp(gradient, (x, kernel), (2 * x, kernel + 1))[1]


@needs_onednn
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_ordinary_convolution_in_value_and_derivatives(shape):
    assert passes_check()  # or both would be XLA's
    x, kernel, settings = operands(shape)
    ours = jax.jit(partial(value_and_gradients, partial(conv_p.bind, **settings)))(x, kernel)
    theirs = jax.jit(partial(value_and_gradients, partial(ordinary_conv, **settings)))(x, kernel)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@needs_onednn
@pytest.mark.skipif(not onednn.has_bfloat16(), reason="no bfloat16 in this processor")
@pytest.mark.parametrize("shape", SHAPES[:4] + SHAPES[-8:-2])
def test_bfloat16_is_as_exact_as_the_ordinary_convolution(shape):
    """Both are compared with float32, since each rounds in places of its own."""
    assert passes_check()
    x, kernel, settings = operands(shape)

    def run(conv, dtype):
        value, pullback = jax.vjp(conv, jnp.asarray(x, dtype), jnp.asarray(kernel, dtype))
        return value, *pullback(jnp.asarray(random(*value.shape), dtype))

    exact = run(partial(ordinary_conv, **settings), jnp.float32)
    ours = jax.jit(partial(run, partial(conv_p.bind, **settings), jnp.bfloat16))()
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=1.5e-2 * np.abs(b).max())


@needs_onednn
@pytest.mark.parametrize("size", [2, 9])
def test_an_empty_result_is_ordinary(size):
    """No window fits, or there are no filters. oneDNN would end the process."""
    x = jnp.asarray(random(2, size, size, 3))
    kernel = jnp.asarray(random(3, 3, 3, 4 if size == 2 else 0))
    conv = partial(conv_general_dilated, strides=(1, 1), padding=((0, 0), (0, 0)), **KEYWORDS)
    jaxpr = jax.make_jaxpr(conv)(x, kernel)
    assert "conv_general_dilated" in str(jaxpr)


@needs_onednn
def test_negative_padding_cuts_pixels_off():
    """The custom call has no padding below zero: it would end the process."""
    x, kernel = jnp.asarray(random(2, 9, 9, 3)), jnp.asarray(random(3, 3, 3, 4))
    padding, strides = ((-1, 2), (0, -2)), (2, 2)
    conv = partial(conv_general_dilated, strides=strides, padding=padding, **KEYWORDS)
    paddings = [eqn.params["padding"] for eqn in jax.make_jaxpr(conv)(x, kernel).eqns[-1:]]
    assert paddings == [((0, 2), (0, 0))]
    expected = ordinary_conv(x[:, 1:, :-2], kernel, strides=strides, padding=((0, 2), (0, 0)))
    np.testing.assert_allclose(jax.jit(conv)(x, kernel), expected, rtol=1e-4, atol=1e-5)


@needs_onednn
def test_strided_input_gradients_are_matrix_products():
    """XLA stretches the gradient first, which takes fifty times as long on 2x2 maps."""
    x, kernel, settings = operands(SHAPES[1])
    gradient = jax.jit(jax.grad(lambda x: (conv_p.bind(x, kernel, **settings) ** 2).sum()))
    text = gradient.lower(x).as_text()
    assert "stablehlo.convolution" not in text
    assert text.count("stablehlo.dot_general") == 9


@needs_onednn
def test_a_kernel_gradient_in_parts(monkeypatch):
    x, kernel, settings = operands(SHAPES[1])
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    monkeypatch.setattr(convolution, "LARGE", x.nbytes - 1)
    monkeypatch.setattr(convolution, "PART", 2)
    gradient = jax.grad(lambda conv, k: (conv(x, k, **settings) ** 2).sum(), 1)
    text = str(
        jax.make_jaxpr(
            lambda: convolution.onednn_kernel_gradient(
                x, onednn_conv(x, kernel, **settings), size=(3, 3), **settings
            )
        )()
    )
    assert "scan" in text
    np.testing.assert_allclose(
        gradient(conv_p.bind, kernel), gradient(ordinary_conv, kernel), rtol=1e-4, atol=1e-3
    )


@needs_onednn
def test_nan_spreads():
    x, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 16))
    conv = partial(conv_p.bind, strides=(1, 1), padding=((1, 1), (1, 1)))
    spoilt = x.at[0, 0, 0, 0].set(jnp.nan)
    assert jnp.isnan(conv(spoilt, kernel)[0, :2, :2]).all()
    assert not jnp.isnan(conv(spoilt, kernel)[1]).any()
    assert jnp.isnan(conv(x, kernel.at[1, 1, 0, 0].set(jnp.nan))[..., 0]).all()
    pullback = jax.vjp(conv, spoilt, kernel)[1]
    assert jnp.isnan(pullback(jnp.ones((2, 4, 4, 16)))[1][:2, :2, 0]).all()


@needs_onednn
def test_batches_over_new_axes():
    x, kernel, settings = operands(SHAPES[0])
    xs, kernels = jnp.stack([x, 2 * x]), jnp.stack([kernel, kernel + 1])
    for axes in ((0, None), (None, 0), (0, 0)):
        args = [
            v if axis is None else vs
            for axis, v, vs in zip(axes, (x, kernel), (xs, kernels), strict=True)
        ]
        np.testing.assert_allclose(
            jax.vmap(partial(conv_p.bind, **settings), axes)(*args),
            jax.vmap(partial(ordinary_conv, **settings), axes)(*args),
            rtol=1e-4,
            atol=1e-4,
        )


def uses_onednn(x, kernel, strides=(1, 1), padding=((1, 1), (1, 1)), **changed):
    jaxpr = jax.make_jaxpr(
        lambda x, k: conv_general_dilated(x, k, strides, padding, **(KEYWORDS | changed))
    )(x, kernel)
    return [str(equation.primitive) for equation in jaxpr.eqns] == ["conv"]


@needs_onednn
def test_used_where_it_is_known_to_work(monkeypatch):
    x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
    assert uses_onednn(x, kernel)
    assert uses_onednn(x, kernel, strides=(2, 2))
    assert not uses_onednn(x, kernel, padding="SAME")
    assert not uses_onednn(x, kernel, rhs_dilation=(2, 2))
    assert not uses_onednn(x, kernel[:, :, :2], feature_group_count=2)
    assert not uses_onednn(x, kernel, precision=lax.Precision.HIGHEST)
    bfloat16 = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    assert uses_onednn(*bfloat16) == onednn.has_bfloat16()
    monkeypatch.setattr(convolution, "has_bfloat16", lambda: False)
    assert not uses_onednn(*bfloat16)


@needs_onednn
def test_not_used_where_it_would_fail(monkeypatch, tmp_path):
    for where, name, value in (
        (onednn.sys, "platform", "darwin"),
        (onednn.platform, "machine", lambda: "aarch64"),
        (onednn.jaxlib.version, "__version_info__", onednn.TESTED_JAXLIB[1]),
        (onednn.jax, "default_backend", lambda: "gpu"),
        (onednn.jax, "device_count", lambda: 8),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            assert not has_onednn(), name
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        assert not has_onednn()
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
    assert has_onednn()


@needs_onednn
def test_switched_off_by_the_environment(monkeypatch):
    monkeypatch.setenv("FLAXNETS_CONV", "xla")
    assert not has_onednn()
    monkeypatch.setenv("FLAXNETS_CONV", "mkl")
    with pytest.raises(InputError, match=r"FLAXNETS_CONV must be xla \(.* not 'mkl'"):
        has_onednn()
    monkeypatch.setenv("FLAXNETS_CONV", "")
    assert has_onednn()


@needs_onednn
def test_without_jit():
    x, kernel, settings = operands(SHAPES[1])
    conv = partial(conv_p.bind, **settings)
    with jax.disable_jit():
        for ours, theirs in zip(
            value_and_gradients(conv, x, kernel),
            value_and_gradients(partial(ordinary_conv, **settings), x, kernel),
            strict=True,
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@needs_onednn
def test_an_exported_program_has_no_custom_call():
    x, kernel, settings = operands(SHAPES[0])
    conv = partial(conv_p.bind, **settings)
    exported = jax.export.export(jax.jit(conv))(x, kernel)
    assert "onednn" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(x, kernel), conv(x, kernel), rtol=1e-4, atol=1e-4)


@pytest.fixture
def fresh_verdict(monkeypatch, tmp_path):
    """No check has been made yet; the verdicts that are written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    onednn._passes_check.cache_clear()
    yield tmp_path / "flaxnets"
    monkeypatch.undo()
    onednn._passes_check.cache_clear()


@pytest.mark.parametrize(
    "check",
    ["import time; time.sleep(60)", "raise AssertionError", "import os; os.kill(os.getpid(), 4)"],
    ids=["hangs", "is wrong", "dies"],
)
def test_what_fails_the_check_is_not_used(fresh_verdict, monkeypatch, check):
    monkeypatch.setattr(onednn, "CHECK", check)
    monkeypatch.setattr(onednn, "CHECK_LIMIT", 1)
    x, kernel, settings = operands(SHAPES[0])
    with pytest.warns(FallbackWarning, match="oneDNN's convolutions do not work on this machine"):
        lowered = jax.jit(partial(conv_p.bind, **settings)).lower(x, kernel)
    assert "onednn" not in lowered.as_text()
    (verdict,) = fresh_verdict.iterdir()
    assert verdict.read_text() == "fails"
    # The next process does not check again, and says so again.
    onednn._passes_check.cache_clear()
    monkeypatch.setattr(onednn, "_run_check", lambda: pytest.fail("it was checked again"))
    with pytest.warns(FallbackWarning, match=f"delete {verdict}"):
        assert not passes_check()


@pytest.mark.parametrize("setting", ["ONEDNN_MAX_CPU_ISA=SSE41", "DNNL_MAX_CPU_ISA=avx", "flags"])
def test_an_old_processor_is_not_trusted_whatever_the_check_says(
    fresh_verdict, monkeypatch, setting
):
    """With SSE4.1 oneDNN has passed the check and hung in training."""
    monkeypatch.setattr(onednn, "_run_check", lambda: True)
    name, _, value = setting.partition("=")
    if value:
        monkeypatch.setenv(name, value)
    else:
        monkeypatch.setattr(onednn, "_read_cpuinfo", lambda: ["flags\t\t: fpu sse4_1 avx"])
    with pytest.warns(FallbackWarning, match=r"do not work on this machine \(below AVX2"):
        assert not passes_check()
    assert not fresh_verdict.exists()


@needs_onednn
def test_it_passes_the_check_here(fresh_verdict, monkeypatch):
    assert passes_check()
    (verdict,) = fresh_verdict.iterdir()
    assert verdict.read_text() == "works"
    # Another setting of oneDNN is another question.
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert onednn._verdict_path() != verdict


def test_the_check_sees_wrong_numbers(monkeypatch):
    monkeypatch.setattr(convolution, "CHECKED_SHAPES", ((2, 4, 3, 4, 3, 1),))
    monkeypatch.setattr(convolution, "has_bfloat16", lambda: False)
    for name in ("conv", "input_gradient", "kernel_gradient"):
        monkeypatch.setattr(convolution, f"onednn_{name}", getattr(convolution, f"ordinary_{name}"))
    convolution.check_onednn()
    for name in ("conv", "input_gradient", "kernel_gradient"):
        right = getattr(convolution, f"ordinary_{name}")
        with monkeypatch.context() as patch:
            patch.setattr(
                convolution,
                f"onednn_{name}",
                lambda *operands, right=right, **settings: 1.01 * right(*operands, **settings),
            )
            with pytest.raises(AssertionError, match="Not equal"):
                convolution.check_onednn()


@pytest.mark.slow
@needs_onednn
def test_an_old_processor_does_not_hang_training(data_dir, tmp_path):
    """With SSE4.1 alone oneDNN's convolutions hang now and then."""
    arguments = ["--depths", "8", "--kinds", "plain", "--epochs", "2", "--data-dir", data_dir]
    environment = {"ONEDNN_MAX_CPU_ISA": "SSE41", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    status, _, err = finish(*COMMAND, *arguments, "--out", tmp_path / "out", **environment)
    assert status == 0, err
    assert err.startswith("warning: oneDNN's convolutions do not work on this machine")
