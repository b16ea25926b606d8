"""The report of a study: one HTML file with its figure, tables, diagnostics and configuration.

A study may be untrusted: the contents of its files are shown as text, and no other file is read.
"""

import base64
import hashlib
import json
import math
import re
import stat
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from flaxnets.errors import DamageWarning
from flaxnets.reporting.comparison import compare_depths, describe_differences
from flaxnets.reporting.conclusion import conclude
from flaxnets.reporting.figures import COLOURS
from flaxnets.reporting.reproduce import DEFINITION, plain, reproduce
from flaxnets.reporting.tables import blocks, network_name
from flaxnets.studies.results import Network, Run, curves, group_runs
from flaxnets.text import duration

LARGEST_FILE = 50_000_000  # bytes
METRICS = (
    ("train error, %", "train_error", 2),
    ("test error, %", "test_error", 2),
    ("train loss", "train_loss", 3),
    ("test loss", "test_loss", 3),
)


@dataclass(frozen=True)
class Diagnostic:
    """A finding about the networks of a study, with an optional PNG picture and table.

    `table` has headings, and rows of text and numbers, as in `diagnostics.json`.
    """

    title: str
    paragraph: str
    picture: bytes | None
    table: tuple[list[str], list[list[str | float]]] | None = None


def make_report(
    runs: Sequence[Run],
    environments: Sequence[Any] = (),
    diagnostics: Sequence[Diagnostic] = (),
    picture: bytes | None = None,
) -> str:
    """Make the report, a self-contained HTML page.

    Args:
      environments: environments of the study, as stored in `study.json`.
      picture: the study's figure as a PNG, for readers without JavaScript.
    """
    runs = [_readable(run) for run in runs]
    networks, configs = group_runs(runs), [run.config for run in runs]
    here = Path(__file__)
    page, style, script = (
        here.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".html", ".css", ".js")
    )
    style = f"{_colours()}\n{style}"
    depths = sorted({run.depth for run in runs})
    lines = [_line(run, depths.index(run.depth)) for run in runs if run.result.rows]
    return Template(page).substitute(
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        title=_text(_title(networks)),
        subtitle=_text(_subtitle(configs)),
        lead=_text(conclude(networks, _total_steps(configs[0]) if configs else None)),
        figure=_figure(lines, picture),
        tables=_tables(networks),
        diagnostics=_diagnostics(diagnostics),
        command=_command(*reproduce(configs, environments)),
        configuration=_facts({key: configs[0].get(key) for key in DEFINITION} if configs else {}),
        environments="".join(map(_facts, environments or [{}])),
        data=json.dumps(lines, allow_nan=False).replace("<", "\\u003c"),
    )


# Files next to the runs. Damaged ones are left out, with a warning.


def read_environments(study: Path) -> list[Any]:
    """Read the environments of a study from its `study.json`."""
    stored = _read_json(study / "study.json")
    environments = stored.get("environments") if isinstance(stored, dict) else None
    return environments if isinstance(environments, list) else []


def read_diagnostics(study: Path) -> list[Diagnostic]:
    """Read `diagnostics/diagnostics.json` and the pictures next to it."""
    path = study / "diagnostics" / "diagnostics.json"
    if path.parent.is_symlink():
        _warn(f"{path.parent} is a link")
        return []
    stored = _read_json(path)
    if stored is not None and not isinstance(stored, list):
        _warn(f"{path} is damaged (it is not a list)")
    diagnostics = []
    for entry in stored if isinstance(stored, list) else []:
        keys = ("title", "paragraph", "figure")
        title, paragraph, figure = map(entry.get, keys) if isinstance(entry, dict) else [None] * 3
        if not isinstance(title, str) or not isinstance(paragraph, str):
            _warn(f"{path} is damaged (an entry lacks a title or paragraph)")
            continue
        picture = None
        if isinstance(figure, str) and re.fullmatch(r"\w[\w.-]{0,200}", figure):
            picture = read_picture(path.with_name(figure), needed=True)
        elif figure is not None:
            _warn(f"{path} is damaged (a figure in it is not the name of a file next to it)")
        table = None
        if _is_table(entry.get("table")):
            table = entry["table"]["headings"], entry["table"]["rows"]
        elif entry.get("table") is not None:
            _warn(f"{path} is damaged (a table in it is not headings and rows of equal length)")
        diagnostics.append(Diagnostic(title, paragraph, picture, table))
    return diagnostics


def _is_table(value: Any) -> bool:
    """Return whether `value` has headings, and rows of text or finite numbers of equal length."""
    if not isinstance(value, dict):
        return False
    headings, rows = value.get("headings"), value.get("rows")
    return (
        isinstance(headings, list)
        and isinstance(rows, list)
        and bool(headings and rows)
        and all(isinstance(heading, str) for heading in headings)
        and all(isinstance(row, list) and len(row) == len(headings) for row in rows)
        and all(
            isinstance(cell, str) or (type(cell) in (int, float) and abs(cell) < 1e15)
            for row in rows
            for cell in row
        )
    )


def parse_number(text: str) -> float | None:
    """Parse a cell that is a number, such as `-1,360` or `5.71e-07`; None for other text."""
    form = r"[+-]?\d{1,3}((,\d{3})*|\d*)(\.\d+)?(e[+-]?\d{1,3})?"
    number = float(text.replace(",", "")) if re.fullmatch(form, text, re.ASCII) else math.inf
    return number if math.isfinite(number) else None


def read_picture(path: Path, needed: bool = False) -> bytes | None:
    """Read a PNG; None if there is none, with a warning if it is `needed`."""
    content = _read_file(path, needed)
    if content is not None and not content.startswith(b"\x89PNG\r\n\x1a\n"):
        _warn(f"{path} is not a PNG")
        return None
    return content


def _read_json(path: Path) -> Any:
    content = _read_file(path)
    try:
        return None if content is None else json.loads(content)
    except (ValueError, RecursionError):
        _warn(f"{path} is damaged")


def _read_file(path: Path, needed: bool = False) -> bytes | None:
    try:
        # A link could lead elsewhere, and reading a pipe could block forever.
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_size <= LARGEST_FILE:
            return path.read_bytes()
        _warn(f"{path} is not a file, or has more than {LARGEST_FILE:,} bytes")
    except OSError as error:
        if needed or not isinstance(error, FileNotFoundError):
            _warn(f"{path} cannot be read ({error.strerror})")
    return None


def _warn(problem: str) -> None:
    warnings.warn(f"{problem}; the report leaves it out", DamageWarning, stacklevel=3)


def _readable(run: Run) -> Run:
    """Replace numbers of a run that cannot be compared or printed by NaN."""

    def number(value: Any) -> float:
        return float(value) if abs(value) < 1e15 else math.nan

    rows = [{name: number(value) for name, value in row.items()} for row in run.result.rows]
    step, seconds = min(run.result.step, 10**15), number(run.result.seconds)
    return replace(run, result=replace(run.result, rows=rows, step=step, seconds=seconds))


# Title and subtitle.


def _title(networks: Sequence[Network]) -> str:
    if not networks:
        return "A study without runs"
    kinds = _listed(dict.fromkeys(network.kind for network in networks))
    depths = sorted({network.depth for network in networks})
    title = f"{kinds} networks at depth{'s'[: len(depths) - 1]} {_listed(depths)}"
    return title if ":" in networks[0].kind else title[0].upper() + title[1:]


def _subtitle(configs: Sequence[dict[str, Any]]) -> str:
    if not configs:
        return ""
    data, steps = configs[0].get("dataset"), _total_steps(configs[0])
    parts = [plain(data.get("name"))] if isinstance(data, dict) else []
    parts += [f"{plain(configs[0].get('family'))} family"]
    parts += [f"{steps:,} updates"] if steps else []
    seeds = sorted({config["seed"] for config in configs})
    return " · ".join([*parts, f"seed{'s'[: len(seeds) - 1]} {_listed(seeds)}"])


def _listed(words: Iterable[Any]) -> str:
    *first, last = map(str, words)
    return f"{', '.join(first)} and {last}" if first else last


def _total_steps(config: dict[str, Any]) -> int | None:
    steps = config.get("total_steps")
    return steps if type(steps) is int and 0 < steps < 2**63 else None


# Parts of the page.


def _text(value: object) -> str:
    """Escape text for HTML, and replace characters that reorder or hide others."""

    def visible(c: str) -> str:
        return c if c.isprintable() or c == "\u00a0" else " " if c.isspace() else "\ufffd"

    return escape("".join(map(visible, str(value))))


def _facts(values: Any) -> str:
    """List names and values; those of a nested object are side by side."""
    if not isinstance(values, dict) or not values:
        return "<p>Not recorded.</p>"
    lines = []
    for key, value in values.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        parts = (f"<span><i>{_name(k)}</i> {_text(plain(v))}</span>" for k, v in entries)
        lines.append(f"<dt>{_name(key)}</dt><dd>{''.join(parts)}</dd>")
    return f"<dl>{''.join(lines)}</dl>"


def _name(key: str) -> str:
    return _text(key.replace("_", " "))


def _image(picture: bytes, alternative: str) -> str:
    # Shown at print size: figures of this library have 160 dots per inch, a page has 96.
    width = int.from_bytes(picture[16:20]) * 96 // 160 or 600
    data = base64.b64encode(picture).decode()
    alt = _text(alternative)
    return (
        f'<div class="scroll picture" tabindex="0" role="region" aria-label="{alt}">'
        f'<img alt="{alt}" width="{width}" src="data:image/png;base64,{data}"></div>'
    )


def _figure(lines: Sequence[Any], picture: bytes | None) -> str:
    if not lines:
        return "<p>No run has finished an epoch yet, so there is nothing to draw.</p>"
    instead = "<p>The errors are drawn here by JavaScript; the tables list the final ones.</p>"
    if picture is not None:
        instead = _image(picture, "Training and test error against epoch, a panel for each kind")
    return f'<div id="figure">{instead}</div>'


def _line(run: Run, colour: int) -> dict[str, Any]:
    """Convert a run for the figure: epochs as in `degradation.png`, null for invalid errors."""
    rows = run.result.rows
    first = rows[0]["step"] if rows[0]["step"] > 0 else 1.0
    line = {"kind": run.kind, "depth": run.depth, "seed": run.seed}
    line["colour"] = colour % len(COLOURS)
    line["epoch"] = [round(row["step"] / first, 4) if row["step"] > 0 else 0 for row in rows]
    for split in ("train", "test"):
        errors = [row[f"{split}_error"] for row in rows]
        line[split] = [round(error, 4) if 0 <= error <= 100 else None for error in errors]
    return line


# A cell is text, or a number as text and as the value to sort by.
Cell = str | tuple[str, float]


def _number(value: float, form: str = "{:,}") -> Cell:
    return ("-" if math.isnan(value) else form.format(value), value)


def _time(seconds: float) -> Cell:
    return ("-" if math.isnan(seconds) else duration(seconds), seconds)


def _tables(networks: Sequence[Network]) -> str:
    """Make a table of the networks, if there are several seeds, and one of the runs."""
    if not networks:
        return "<p>There are no runs yet.</p>"
    first, errors = ["kind", "network", "blocks", "depth", "parameters"], [m[0] for m in METRICS]
    means, ends = [], []
    for network in networks:
        config = network.runs[0].config
        cells = [network.kind, network_name(config), blocks(config)]
        cells += [_number(network.depth, "{}"), _number(config["parameters"])]
        seconds = sum(run.result.seconds for run in network.runs)
        statistics = [_mean(network, metric, digits) for _, metric, digits in METRICS]
        means.append([*cells, *statistics, _time(seconds), network.status])
        for run in network.runs:
            result = run.result
            finals = [_number(result.final(m), f"{{:.{digits}f}}") for _, m, digits in METRICS]
            progress = [_number(result.step), _time(result.seconds), _status(run)]
            ends.append([*cells, _number(run.seed, "{}"), *finals, *progress])
    tables = [_table("Runs", [*first, "seed", *errors, "steps", "time", "status"], ends)]
    if len(ends) > len(means):
        caption = "Networks: mean ± standard deviation over finished runs"
        tables.insert(0, _table(caption, [*first, *errors, "time", "runs"], means))
    differences = [
        [name, _number(sum(changes) / len(changes), "{:+.2f}"), describe_differences(changes)]
        for name, changes in compare_depths(curves(networks).values(), "train_error")
    ]
    if differences:
        headings = ["more depth", "training error changes, points", "seed by seed"]
        tables.append(_table("More depth, paired by seed", headings, differences))
    return "\n".join(tables)


def _mean(network: Network, metric: str, digits: int) -> Cell:
    mean, spread = network.mean(metric), network.spread(metric)
    form = f"{{:.{digits}f}}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")
    return _number(mean, form)


def _status(run: Run) -> str:
    status, total = run.result.status, _total_steps(run.config)
    if status == "diverged":
        return f"diverged at step {run.result.diverged_step}"
    if status == "unfinished" and total:
        return f"unfinished, {min(1.0, run.result.step / total):.0%}"
    return status


def _table(
    caption: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    heads_section: bool = True,
) -> str:
    """Make a table in a box that scrolls. Caption and headings may be untrusted text.

    Without `heads_section`, it has no caption and is no wider than the text of its section.
    """
    caption = _text(caption)

    def cell(content: Cell) -> str:
        if isinstance(content, str):
            return f"<td>{_text(content)}</td>"
        text, value = content
        key = "" if math.isnan(value) else value
        return f'<td class="number" data-sort="{key}">{_text(text)}</td>'

    head = "".join(
        f'<th scope="col"{"" if isinstance(content, str) else " class=number"}>{_text(name)}</th>'
        for name, content in zip(headings, rows[0], strict=True)
    )
    body = "\n".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">'
        + (f"<table><caption>{caption}</caption>\n" if heads_section else '<table class="compact">')
        + f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _diagnostics(diagnostics: Sequence[Diagnostic]) -> str:
    sections = [
        f"<h3>{_text(each.title)}</h3>"
        f"<p>{_text(each.paragraph)}</p>"
        + ("" if each.picture is None else _image(each.picture, each.title))
        + ("" if each.table is None else _number_table(each.title, *each.table))
        for each in diagnostics
    ]
    command = "<code>python experiments/diagnostics.py STUDY_DIR</code>"
    return "\n".join(sections) or f"<p>There are no diagnostics yet: {command} makes them.</p>"


def _number_table(title: str, headings: list[str], rows: list[list[str | float]]) -> str:
    """Make the table of a diagnostic. A column with any number is sorted by its numbers."""
    columns: list[list[Cell]] = []
    for column in zip(*rows, strict=True):
        texts = [cell if isinstance(cell, str) else f"{cell:,.6g}" for cell in column]
        numbers = [parse_number(text) for text in texts]
        values = [math.nan if number is None else number for number in numbers]
        cells: list[Cell] = list(zip(texts, values, strict=True))
        columns.append([*texts] if all(map(math.isnan, values)) else cells)
    return _table(
        f"{title}: table", headings, list(zip(*columns, strict=True)), heads_section=False
    )


def _command(commands: Sequence[str], remarks: Sequence[str]) -> str:
    introduction = ["<p>To reproduce this study:</p>"] if commands else []
    parts = [f"<pre>{_text(command)}</pre>" for command in commands]
    return "\n".join([*introduction, *parts, *(f"<p>{_text(remark)}</p>" for remark in remarks)])


def _colours() -> str:
    """Return the figure's colours as CSS variables, with the colour of text for black."""
    colours = ("var(--ink)" if colour == "#000000" else colour for colour in COLOURS)
    return f":root {{ {' '.join(f'--line-{i}: {c};' for i, c in enumerate(colours))} }}"


def _hash(text: str) -> str:
    """Return the hash with which a content security policy allows a style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
