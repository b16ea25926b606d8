"""Checks that jaxlib's oneDNN can be used on this machine."""

import hashlib
import os
import platform
import signal
import subprocess
import sys
import threading
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jaxlib.version

from flaxnets.errors import FallbackWarning, InputError
from flaxnets.files import cache_directory, write_cache

# A jaxlib in which the custom call has changed would crash the process.
TESTED_JAXLIB = ((0, 10, 2), (0, 13, 0))
CHECK_VERSION = "2"  # of what `check_onednn` tries: another needs a new verdict
# Seconds. The check takes about five, and a busy machine must not fail it.
CHECK_LIMIT = 60
# The alarm ends the check even if the parent process has been killed.
CHECK = (
    f"import signal; signal.alarm({CHECK_LIMIT});"
    "from flaxnets.models.convolution import check_onednn; check_onednn()"
)
_CHECKING = threading.Lock()


def has_onednn() -> bool:
    """Return whether oneDNN is available and may be used; `passes_check` tests whether it works.

    It may not be used with several devices, since XLA's partitioner cannot split a custom call, nor
    with the persistent compilation cache, which cannot store a program with a custom call.

    Raises:
      InputError: the environment variable FLAXNETS_CONV is neither empty nor `xla`.
    """
    choice = os.environ.get("FLAXNETS_CONV", "")
    if choice not in ("", "xla"):
        raise InputError(
            f"FLAXNETS_CONV must be xla (for XLA's convolutions) or unset, not {choice!r}"
        )
    first, beyond = TESTED_JAXLIB
    config: Any = jax.config
    return (
        choice != "xla"
        and (sys.platform, platform.machine()) == ("linux", "x86_64")
        and first <= jaxlib.version.__version_info__ < beyond
        and jax.default_backend() == "cpu"
        and jax.device_count() == 1
        and not (config.jax_enable_compilation_cache and config.jax_compilation_cache_dir)
    )


@cache
def has_bfloat16() -> bool:
    """Return whether oneDNN multiplies bfloat16 here; without instructions for it, it may not."""
    limited = any(os.environ.get(f"{name}_MAX_CPU_ISA") for name in ("ONEDNN", "DNNL"))
    return "avx512_bf16" in _read_flags() and not limited


def passes_check() -> bool:
    """Return whether oneDNN's convolutions finish with the right numbers on this machine.

    A child process tries them once for each processor, jaxlib and setting of oneDNN. The verdict is
    kept below `XDG_CACHE_HOME` (`~/.cache`). A failure is reported by a `FallbackWarning`.
    """
    with _CHECKING:  # several networks may be compiled at the same time
        return _passes_check()


@cache
def _passes_check() -> bool:
    if _is_below_avx2():
        # No check would do: with SSE4.1 it has passed one and hung in training a minute later.
        warnings.warn(
            "oneDNN's convolutions do not work on this machine (below AVX2 they may hang), XLA's "
            "slower ones are used (FLAXNETS_CONV=xla chooses them without this warning)",
            FallbackWarning,
            stacklevel=3,
        )
        return False
    path = _verdict_path()
    try:
        verdict = path.read_bytes().decode(errors="replace")
    except OSError:
        verdict = ""
    if verdict not in ("works", "fails"):
        passed = _run_check()
        verdict = "works" if passed else "fails"
        if passed is not None:
            write_cache(path, verdict)  # if that fails, the next process checks again
    if verdict == "fails":
        warnings.warn(
            "oneDNN's convolutions do not work on this machine; XLA's slower ones are used "
            f"(set FLAXNETS_CONV=xla to silence this warning, or delete {path} to check again)",
            FallbackWarning,
            stacklevel=3,
        )
    return verdict == "works"


def _is_below_avx2() -> bool:
    """Whether oneDNN would use instructions from before AVX2, by the processor or by request."""
    settings = [os.environ.get(f"{name}_MAX_CPU_ISA", "") for name in ("ONEDNN", "DNNL")]
    flags = _read_flags()
    return bool({setting.upper() for setting in settings} & {"SSE41", "AVX"}) or (
        bool(flags) and "avx2" not in flags
    )


def _read_flags() -> list[str]:
    """List what the processor can do; nothing if the system does not say."""
    return next((line.split() for line in _read_cpuinfo() if line.startswith("flags")), [])


def _read_cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _verdict_path() -> Path:
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    facts = [CHECK_VERSION, jaxlib.version.__version__, str(len(cores))]
    facts += [
        f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(("ONEDNN_", "DNNL_"))
    ]
    facts += sorted({line for line in _read_cpuinfo() if line.startswith(("model name", "flags"))})
    digest = hashlib.sha256("\n".join(facts).encode(errors="surrogateescape")).hexdigest()
    return cache_directory() / f"onednn-{digest[:16]}"


def _run_check() -> bool | None:
    """Whether the check passed; None where it could not be made."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    environment.pop("JAX_DISABLE_JIT", None)
    try:
        check = subprocess.run(
            [sys.executable, "-c", CHECK],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=CHECK_LIMIT,
            start_new_session=True,  # Ctrl-C must not fail the check
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    except OSError:  # no memory for another process, perhaps
        return None
    return None if check.returncode == -signal.SIGKILL else check.returncode == 0
