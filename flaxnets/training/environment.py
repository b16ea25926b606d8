"""The environment of a run, and the parts of it that change the last bits of its results."""

import os
from dataclasses import dataclass, field
from importlib.metadata import version

import jax

from flaxnets.decoding import Count
from flaxnets.models.onednn import has_onednn, passes_check

PACKAGES = ("flaxnets", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# The same program gives different bits if one of these differs.
CHANGES_BITS = (
    *("platform", "device_kind", "device_count", "process_count", "xla_flags"),
    *("cpu_cores", "nproc", "x64", "convolutions"),
)
# Those of CHANGES_BITS that matter only on CPUs.
ON_CPUS = ("cpu_cores", "nproc", "convolutions")


@dataclass(frozen=True)
class Environment:
    """Packages, devices and settings of a process; None for what an early run did not record.

    Attributes:
      packages: version of each package.
      cpu_cores: number of CPU cores that the process may use.
      nproc: variables that set the number of threads for some of XLA's work.
      convolutions: library that computes convolutions on the CPU.
    """

    packages: dict[str, str] = field(default_factory=dict)
    platform: str | None = None
    device_kind: str | None = None
    device_count: Count | None = None
    process_count: Count | None = None
    xla_flags: str | None = None
    cpu_cores: Count | None = None
    nproc: str | None = None
    x64: bool | None = None
    convolutions: str | None = None


def record_environment() -> Environment:
    """Record the environment of this process.

    The record is stored with each run. A study may hold runs of different environments.
    """
    onednn = has_onednn() and passes_check()
    return Environment(
        packages={name: version(name) for name in PACKAGES},
        platform=jax.default_backend(),
        device_kind=jax.devices()[0].device_kind,
        device_count=jax.device_count(),
        process_count=jax.process_count(),
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        cpu_cores=count_cores(),
        nproc=" ".join(os.environ.get(name, "") for name in ("PJRT_NPROC", "NPROC")).strip(),
        x64=bool(jax.config.read("jax_enable_x64")),
        convolutions="oneDNN" if onednn else "XLA",
    )


def count_cores() -> int:
    """Count the CPU cores this process may use: XLA splits sums over as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_change(before: Environment, now: Environment) -> str | None:
    """Describe in one line the changes since `before` that change the bits of a resumed run, or
    return None."""
    names = [name for name in CHANGES_BITS if now.platform == "cpu" or name not in ON_CPUS]
    settings = [(name, getattr(before, name), getattr(now, name)) for name in names]
    versions = [(p, before.packages.get(p), now.packages[p]) for p in ("jax", "jaxlib", "flaxnets")]
    changes = [
        f"{name} was {old!r} and is now {new!r}"
        for name, old, new in settings
        if old is not None and old != new
    ]
    changes += [
        f"{name} was {old} and is now {new}"
        for name, old, new in versions
        if old is not None and old != new
    ]
    if not changes:
        return None
    return f"{'; '.join(changes)}, so it will not match an uninterrupted run bit for bit"
