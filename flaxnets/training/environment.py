"""The environment of a run, and the parts of it that change the last bits of its results."""

import os
from importlib.metadata import version
from typing import Any

import jax

from flaxnets.models.onednn import has_onednn, passes_check

PACKAGES = ("flaxnets", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# The same program gives different bits if one of these differs.
CHANGES_BITS = (
    *("platform", "device_kind", "device_count", "process_count", "xla_flags"),
    *("cpu_cores", "nproc", "x64", "convolutions"),
)


# Of these, those that matter on CPUs alone.
ON_CPUS = ("cpu_cores", "nproc", "convolutions")


def record_environment() -> dict[str, Any]:
    """Record packages, devices and settings of this process.

    The record is stored with each run. A study may hold runs of different environments.
    """
    onednn = has_onednn() and passes_check()
    return {
        "packages": {name: version(name) for name in PACKAGES},
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "cpu_cores": count_cores(),
        # Variables that set the number of threads for some of XLA's work.
        "nproc": " ".join(os.environ.get(name, "") for name in ("PJRT_NPROC", "NPROC")).strip(),
        "x64": bool(jax.config.read("jax_enable_x64")),
        "convolutions": "oneDNN" if onednn else "XLA",
    }


def count_cores() -> int:
    """Count the CPU cores this process may use: XLA splits sums over as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_change(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Describe in one line the changes since `before` that change the bits of a resumed run, or
    return None."""
    changes = [
        f"{name} was {before[name]!r} and is now {now[name]!r}"
        for name in CHANGES_BITS
        if name in before
        and before[name] != now[name]
        and (now["platform"] == "cpu" or name not in ON_CPUS)
    ]
    packages = before.get("packages")
    for name in ("jax", "jaxlib", "flaxnets"):
        old = packages.get(name) if isinstance(packages, dict) else None
        if old is not None and old != now["packages"][name]:
            changes.append(f"{name} was {old} and is now {now['packages'][name]}")
    if not changes:
        return None
    return f"{'; '.join(changes)}, so it will not match an uninterrupted run bit for bit"
