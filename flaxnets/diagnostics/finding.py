"""Inputs and outputs of diagnostics: networks of a study, numbers to store, findings to show."""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar, get_args, get_origin, get_type_hints

import jax

from flaxnets.data import Dataset
from flaxnets.errors import InputError
from flaxnets.files import write_atomic
from flaxnets.models.resnet import ResNet
from flaxnets.studies.restore import Restored
from flaxnets.studies.results import Run
from flaxnets.training import Progress

LARGEST_FILE = 50_000_000  # bytes


class NotPossibleError(Exception):
    """Raised when a study lacks what a diagnostic needs."""


# The networks of a study.


@dataclass(frozen=True)
class Setting:
    """Facts that all numbers of a study share; figures take their titles and colours from them.

    Attributes:
      dataset: name of the data set.
      updates: number of updates of a run.
      seed: seed of the networks that were measured.
      depths: all depths of the study, whatever their kind and seed; each has its colour.
    """

    dataset: str
    updates: int
    seed: int
    depths: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dataset}, {self.updates:,} updates, seed {self.seed}"

    def check_names(self, names: Iterable[str]) -> None:
        """Check that `names` may be networks of the study.

        Raises:
          ValueError: one of `names` is not `kind-depth`, or its depth is unknown.
        """
        for name in names:
            if split_name(name)[1] not in self.depths:
                raise ValueError(f"{name} is not of the study's depths")


@dataclass(frozen=True)
class Network:
    """A trained network of the study."""

    run: Run
    restored: Restored
    model: ResNet

    @property
    def name(self) -> str:
        return f"{self.run.kind}-{self.run.depth}"

    @property
    def variables(self) -> dict[str, Any]:
        return self.restored.variables


class Images(NamedTuple):
    """Normalised images on the devices, and their labels."""

    images: jax.Array
    labels: jax.Array


@dataclass(frozen=True)
class Study:
    """Finished plain and residual networks of one seed, which the diagnostics measure.

    Attributes:
      path: directory of the study.
      depths: all depths of the study, whatever their kind and seed.
      train, test: fixed samples of the two splits.
    """

    path: Path
    networks: list[Network]
    depths: tuple[int, ...]
    dataset: Dataset
    train: Images
    test: Images

    @property
    def setting(self) -> Setting:
        run = self.networks[0].run
        return Setting(self.dataset.name, run.result.step, run.seed, self.depths)

    @property
    def out(self) -> Path:
        """Directory of the findings."""
        return self.path / "diagnostics"

    def of_kind(self, kind: str) -> list[Network]:
        return [network for network in self.networks if network.run.kind == kind]

    def twins(self) -> list[Network]:
        """Return the plain and residual network of the greatest depth that both kinds have."""
        depths = [{network.run.depth for network in self.of_kind(k)} for k in ("plain", "residual")]
        deepest = max(set.intersection(*depths), default=None)
        return [network for network in self.networks if network.run.depth == deepest]


class TrainingPlan(NamedTuple):
    """Facts about a run before it starts; `work` is the cost of a step, in any unit."""

    name: str
    work: float
    total_steps: int
    steps_per_epoch: int
    batch_size: int


class Options(NamedTuple):
    """Options of the measurements.

    Attributes:
      batch: number of training images for the gradients.
      epochs: number of epochs to train a construction; None for as many as the study, within
        `flaxnets.diagnostics.construction.CONTINUED_EPOCHS`.
      stop: returns whether training should stop and save.
      watch: context manager around training; the callable it gives is called with each progress.
    """

    batch: int
    epochs: int | None
    stop: Callable[[], bool]
    watch: Callable[[TrainingPlan], AbstractContextManager[Callable[[Progress], None]]]


# Findings.


class Table(NamedTuple):
    """Headings, and rows of text; numbers are formatted."""

    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Finding(NamedTuple):
    """Text and table that a diagnostic shows with its figure."""

    title: str
    paragraph: str
    table: Table


class Diagnostic(Protocol):
    """The numbers of one diagnostic, which its JSON file stores.

    `measure` returns None when `options.stop` interrupted it, and raises `NotPossibleError` when
    the study lacks what it needs.
    """

    @property
    def study(self) -> Setting: ...

    @classmethod
    def measure(cls, study: Study, options: Options) -> Self | None: ...

    def draw(self, path: Path) -> None: ...

    def describe(self) -> Finding: ...


# Files.

T = TypeVar("T")


def write_numbers(path: Path, numbers: Any) -> None:
    """Write the numbers of a diagnostic as JSON; NaN and infinities become null."""
    write_atomic(path, json.dumps(_encode(asdict(numbers)), indent=1, allow_nan=False) + "\n")


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encode(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_numbers(path: Path, kind: type[T]) -> T:
    """Read numbers of the dataclass `kind` written by `write_numbers`; null becomes NaN.

    Raises:
      InputError: the file cannot be read, or holds something else.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError("it is too large")
        return _decode(kind, json.loads(path.read_text(encoding="utf-8")), "it")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} is damaged, or of an earlier version ({error})") from error


def _decode(kind: Any, value: Any, name: str) -> Any:
    """Convert `value` to the type `kind`: a dataclass, dict, list, tuple or plain value.

    Raises:
      ValueError: `value` does not have that type.
    """
    if is_dataclass(kind):
        hints: dict[str, Any] = get_type_hints(kind)
        names = [field.name for field in fields(kind)]
        if not isinstance(value, dict) or value.keys() != set(names):
            raise ValueError(f"{name} does not have the fields {', '.join(names)}")
        make: Any = kind
        return make(**{field: _decode(hints[field], value[field], field) for field in names})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], entry, key) for key, entry in value.items()}
    if origin in (list, tuple) and isinstance(value, list):
        return origin(_decode(arguments[0], entry, name) for entry in value)
    if kind is float and value is None:
        return math.nan
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{name} is not of the type {getattr(kind, '__name__', kind)}")
    return float(value) if kind is float else value


def write_finding(out: Path, name: str, found: Finding, order: Sequence[str]) -> None:
    """Add a finding to `diagnostics.json`, which the report shows, in this `order` of names."""
    path = out / "diagnostics.json"
    try:
        entries = {entry["name"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))}
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        entries = {}  # not there, or damaged
    entries[name] = {
        "name": name,
        "title": found.title,
        "paragraph": found.paragraph,
        "figure": f"{name}.png",
        "table": found.table._asdict(),
    }
    in_order = [entries[known] for known in order if known in entries]
    write_atomic(path, json.dumps(in_order, indent=2) + "\n")


# Words and numbers.


def split_name(name: str) -> tuple[str, int]:
    """Return kind and depth of a name such as `plain-56`.

    Raises:
      ValueError: `name` is not the name of such a network.
    """
    found = re.fullmatch(r"(plain|residual)-(\d{1,4})", name)
    if found is None:
        raise ValueError(f"{name!r} is not a network's name")
    return found[1], int(found[2])


def deepest_of_each_kind(names: Iterable[str]) -> list[str]:
    """Return the deepest plain network and the deepest residual one, if any."""
    by_kind: dict[str, str] = {}
    for name in sorted(names, key=split_name):
        by_kind[split_name(name)[0]] = name
    return list(by_kind.values())


def listed(words: Sequence[str]) -> str:
    """Join words as `a, b and c`."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


def significant(value: float) -> str:
    """Format with three significant digits: `0.0238`, `641`, `1,360`, `5.71e-07`; `nan`, `inf`."""
    text = f"{value:#.3g}".rstrip(".")
    return f"{float(text):,.0f}" if "e+" in text and abs(value) < 1e7 else text


def finite(values: Iterable[float]) -> list[float]:
    """Return the finite values, or one NaN if there are none."""
    return [value for value in values if math.isfinite(value)] or [math.nan]


def span(values: Iterable[float]) -> str:
    """Format the lowest and the highest finite value as `0.250 to 0.450`."""
    values = list(values)
    shown = finite(values)
    if math.isnan(shown[0]):
        return "not finite"
    lost = f" ({len(values) - len(shown)} not finite)" if len(shown) < len(values) else ""
    return f"{significant(min(shown))} to {significant(max(shown))}{lost}"
