"""Findings of diagnostics, and `diagnostics.json`, which holds them for the report."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from flaxnets.decoding import decode, encode
from flaxnets.errors import InputError
from flaxnets.files import write_atomic

Cell = str | Annotated[float, msgspec.Meta(gt=-1e15, lt=1e15)]
FileName = Annotated[str, msgspec.Meta(pattern=r"^\w[\w.-]{0,200}\Z")]


@dataclass(frozen=True)
class Table:
    """Headings and rows of equal length; numbers are formatted text, or numbers in early files."""

    headings: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    rows: Annotated[Sequence[tuple[Cell, ...]], msgspec.Meta(min_length=1)]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.headings) for row in self.rows):
            raise InputError("its rows are not as long as its headings")


@dataclass(frozen=True)
class Finding:
    """Text and table that a diagnostic shows with its figure."""

    title: str
    paragraph: str
    table: Table


@dataclass(frozen=True, kw_only=True)
class StoredFinding:
    """An entry of `diagnostics.json`.

    Attributes:
      figure: name of a file next to it, see `FileName`.
      table: headings and rows, see `Table`; early entries have none.
    """

    name: str = ""
    title: str
    paragraph: str
    figure: Any = None
    table: Any = None


def write_finding(out: Path, name: str, found: Finding, order: Sequence[str]) -> None:
    """Add a finding to `diagnostics.json`, whose entries are in this `order` of names."""
    path = out / "diagnostics.json"
    try:
        entries = {entry.name: entry for entry in read_findings(path)}
    except InputError:
        entries = {}  # missing, or nothing in it can be used
    entries[name] = StoredFinding(
        name=name,
        title=found.title,
        paragraph=found.paragraph,
        figure=f"{name}.png",
        table=found.table,
    )
    in_order = [entries[known] for known in order if known in entries]
    write_atomic(path, json.dumps(encode(in_order), indent=2) + "\n")


def read_findings(path: Path) -> list[StoredFinding]:
    """Read the undamaged entries of `diagnostics.json`.

    Raises:
      InputError: the file cannot be read, or is not a list.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, list):
        raise InputError(f"{path} is damaged (it is not a list)")
    found = []
    for entry in content:
        with suppress(InputError):
            found.append(decode(StoredFinding, entry, "it"))
    return found
