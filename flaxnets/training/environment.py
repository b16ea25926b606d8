"""What a run's numbers were made with, and what of it changes their last bits."""

import os
from importlib.metadata import version
from typing import Any

import jax

from flaxnets.models.onednn import has_onednn, passes_check

PACKAGES = ("flaxnets", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# With another value of these, the same program gives other bits.
CHANGES_BITS = (
    *("platform", "device_kind", "device_count", "process_count", "xla_flags"),
    *("cpu_cores", "nproc", "x64", "convolutions"),
)


# Of these, those that matter on CPUs alone.
ON_CPUS = ("cpu_cores", "nproc", "convolutions")


def record_environment() -> dict[str, Any]:
    """Packages, devices and settings of this process; recorded with each run, never compared with
    what another study has."""
    onednn = has_onednn() and passes_check()
    return {
        "packages": {name: version(name) for name in PACKAGES},
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "cpu_cores": count_cores(),
        # XLA's own number of threads, for some of its work.
        "nproc": " ".join(os.environ.get(name, "") for name in ("PJRT_NPROC", "NPROC")).strip(),
        "x64": bool(jax.config.read("jax_enable_x64")),
        "convolutions": "oneDNN" if onednn else "XLA",
    }


def count_cores() -> int:
    """The CPU cores that this process may use; threads share out sums over as many."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_change(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Why a run that goes on in the environment `now` will not end with the bits that it would have
    had in that of `before`, in a line, or None."""
    changes = [
        f"{name} was {before[name]!r} and is {now[name]!r}"
        for name in CHANGES_BITS
        if name in before
        and before[name] != now[name]
        and (now["platform"] == "cpu" or name not in ON_CPUS)
    ]
    packages = before.get("packages")
    for name in ("jax", "jaxlib", "flaxnets"):
        old = packages.get(name) if isinstance(packages, dict) else None
        if old is not None and old != now["packages"][name]:
            changes.append(f"{name} was {old} and is {now['packages'][name]}")
    if not changes:
        return None
    return f"{'; '.join(changes)}: it will not end bit for bit as if never interrupted"
