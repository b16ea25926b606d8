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
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from flaxnets.decoding import decode, encode
from flaxnets.errors import DamageWarning, InputError
from flaxnets.reporting.comparison import compare_depths, describe_differences
from flaxnets.reporting.conclusion import conclude
from flaxnets.reporting.error_panels import METRICS, SCALES, RunErrors, draw_panel, list_errors
from flaxnets.reporting.figures import colour_depths
from flaxnets.reporting.findings import FileName, StoredFinding, Table
from flaxnets.reporting.reproduce import plain, reproduce
from flaxnets.reporting.tables import blocks, network_name
from flaxnets.studies.results import NetworkResults, Run, curves, group_runs
from flaxnets.text import duration
from flaxnets.training import RunConfig, StudyConfig
from flaxnets.training.environment import Environment

LARGEST_FILE = 50_000_000  # bytes
COLUMNS = (
    ("train error, %", "train_error", 2),
    ("test error, %", "test_error", 2),
    ("train loss", "train_loss", 3),
    ("test loss", "test_loss", 3),
)


@dataclass(frozen=True)
class Diagnostic:
    """A finding about the networks of a study, with an optional PNG picture and table."""

    title: str
    paragraph: str
    picture: bytes | None
    table: Table | None = None


def make_report(
    runs: Sequence[Run],
    environments: Sequence[Environment] = (),
    diagnostics: Sequence[Diagnostic] = (),
) -> str:
    """Make the report, a self-contained HTML page.

    Args:
      environments: environments of the study, as stored in `study.json`.
    """
    runs = [_readable(run) for run in runs]
    networks, configs = group_runs(runs), [run.config for run in runs]
    here = Path(__file__)
    page, style, script = (
        here.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".html", ".css", ".js")
    )
    errors = tuple(list_errors(run) for run in runs if run.result.rows)
    figure, rules = _figure(errors)
    style += rules
    return Template(page).substitute(
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        title=_text(_title(networks)),
        subtitle=_text(_subtitle(configs)),
        lead=_text(conclude(networks, configs[0].total_steps if configs else None)),
        figure=figure,
        tables=_tables(networks),
        diagnostics=_diagnostics(diagnostics),
        command=_command(*reproduce(configs, environments)),
        configuration=_facts(configs[0].study if configs else None),
        environments="".join(map(_facts, environments or [None])),
        data=json.dumps([asdict(run) for run in errors], allow_nan=False).replace("<", "\\u003c"),
    )


# Files next to the runs. Damaged ones are left out, with a warning.


def read_diagnostics(study: Path) -> list[Diagnostic]:
    """Read `diagnostics/diagnostics.json` and the pictures next to it."""
    path = study / "diagnostics" / "diagnostics.json"
    if path.parent.is_symlink():
        _warn(f"{path.parent} is a link")
        return []
    stored = _read_json(path)
    if stored is None:
        return []
    if not isinstance(stored, list):
        _warn(f"{path} is damaged (it is not a list)")
        return []
    diagnostics = []
    for entry in stored:
        found = _decode_part(StoredFinding, entry, f"{path} is damaged (an entry in it")
        if found is not None:
            name = _decode_part(FileName, found.figure, f"{path} is damaged (a figure in it")
            picture = None if name is None else _read_picture(path.with_name(name))
            table = _decode_part(Table, found.table, f"{path} is damaged (a table in it")
            diagnostics.append(Diagnostic(found.title, found.paragraph, picture, table))
    return diagnostics


def _decode_part(kind: Any, value: object, what: str) -> Any:
    """Decode a part of a file; None if there is none or, with a warning, if it is damaged."""
    if value is None and kind is not StoredFinding:
        return None
    try:
        return decode(kind, value, what)
    except InputError as error:
        _warn(f"{error})")
        return None


def parse_number(text: str) -> float | None:
    """Parse a cell that is a number, such as `-1,360` or `5.71e-07`; None for other text."""
    form = r"[+-]?\d{1,3}((,\d{3})*|\d*)(\.\d+)?(e[+-]?\d{1,3})?"
    number = float(text.replace(",", "")) if re.fullmatch(form, text, re.ASCII) else math.inf
    return number if math.isfinite(number) else None


def _read_picture(path: Path) -> bytes | None:
    content = _read_file(path, needed=True)
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

    rows = [
        {name: None if value is None else number(value) for name, value in row.items()}
        for row in run.result.rows
    ]
    step, seconds = min(run.result.step, 10**15), number(run.result.seconds)
    return replace(run, result=replace(run.result, rows=rows, step=step, seconds=seconds))


# Title and subtitle.


def _title(networks: Sequence[NetworkResults]) -> str:
    if not networks:
        return "A study without runs"
    kinds = _listed(dict.fromkeys(network.kind for network in networks))
    depths = sorted({network.depth for network in networks})
    title = f"{kinds} networks at depth{'s'[: len(depths) - 1]} {_listed(depths)}"
    return title if ":" in networks[0].kind else title[0].upper() + title[1:]


def _subtitle(configs: Sequence[RunConfig]) -> str:
    if not configs:
        return ""
    first = configs[0]
    seeds = sorted({config.seed for config in configs})
    return " · ".join(
        [
            first.dataset.name,
            f"{first.family} family",
            f"{first.total_steps:,} updates",
            f"seed{'s'[: len(seeds) - 1]} {_listed(seeds)}",
        ]
    )


def _listed(words: Iterable[Any]) -> str:
    *first, last = map(str, words)
    return f"{', '.join(first)} and {last}" if first else last


# Parts of the page.


def _text(value: object) -> str:
    """Escape text for HTML, and replace characters that reorder or hide others."""

    def visible(c: str) -> str:
        return c if c.isprintable() or c == "\u00a0" else " " if c.isspace() else "\ufffd"

    return escape("".join(map(visible, str(value))))


def _facts(facts: StudyConfig | Environment | None) -> str:
    """List names and values; those of a nested object are side by side."""
    if facts is None:
        return "<p>Not recorded.</p>"
    lines = []
    for key, value in encode(facts).items():
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


def _figure(runs: Sequence[RunErrors]) -> tuple[str, str]:
    """Make a panel for each kind and scale, and boxes; return them and the rules of their styles.

    Unless a box is checked, its rule hides the panels and curves that have its id as a class.
    """
    if not runs:
        return "<p>No run has finished an epoch yet, so there is nothing to draw.</p>", ""
    colours = colour_depths(run.depth for run in runs)
    kinds = list(dict.fromkeys(run.kind for run in runs))
    names = {
        f"depth-{i}": f"{_sample('train', colour)}depth {depth}"
        for i, (depth, colour) in enumerate(colours.items())
    }
    names |= {metric: f"{_sample(metric)}{name} error" for metric, name in METRICS.items()}
    names |= {f"kind-{i}": _text(kind) for i, kind in enumerate(kinds)}
    names["log"] = "logarithmic above 1 %"
    boxes = [
        f'<label><input type="checkbox" id="{key}"{" checked" * (key != "log")}>{name}</label>'
        for key, name in names.items()
    ]
    rule = "#figure:has(#{0}:not(:checked)) .panels .{0} {{ display: none; }}\n"
    panels = [
        f'<div class="panel {scale} kind-{i}"><h3>{_text(kind)}</h3>{draw_panel(runs, kind, scale)}'
        "</div>"
        for scale in SCALES
        for i, kind in enumerate(kinds)
    ]
    figure = (
        f'<div id="figure"><div class="legend">{"".join(boxes)}</div>'
        f'<div class="panels">{"".join(panels)}</div>'
        '<div id="tip" hidden></div><p id="spoken" class="unseen" aria-live="polite"></p></div>'
    )
    return figure, "".join(map(rule.format, names))


def _sample(metric: str, colour: str = "#000000") -> str:
    stroke = colour.replace("#000000", "currentColor")
    path = f'<path class="{metric}" stroke="{stroke}" d="M1,5H21"/>'
    return f'<svg viewBox="0 0 22 10" aria-hidden="true">{path}</svg>'


# A cell is text, or a number as text and as the value to sort by.
Cell = str | tuple[str, float]


def _number(value: float, form: str = "{:,}") -> Cell:
    return ("-" if math.isnan(value) else form.format(value), value)


def _time(seconds: float) -> Cell:
    return ("-" if math.isnan(seconds) else duration(seconds), seconds)


def _tables(networks: Sequence[NetworkResults]) -> str:
    """Make a table of the networks, if there are several seeds, and one of the runs."""
    if not networks:
        return "<p>There are no runs yet.</p>"
    first, errors = ["kind", "network", "blocks", "depth", "parameters"], [m[0] for m in COLUMNS]
    means, ends = [], []
    for network in networks:
        config = network.runs[0].config
        cells = [network.kind, network_name(config), blocks(config)]
        cells += [_number(network.depth, "{}"), _number(config.parameters)]
        seconds = sum(run.result.seconds for run in network.runs)
        statistics = [_mean(network, metric, digits) for _, metric, digits in COLUMNS]
        means.append([*cells, *statistics, _time(seconds), network.status])
        for run in network.runs:
            result = run.result
            finals = [_number(result.final(m), f"{{:.{digits}f}}") for _, m, digits in COLUMNS]
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


def _mean(network: NetworkResults, metric: str, digits: int) -> Cell:
    mean, spread = network.mean(metric), network.spread(metric)
    form = f"{{:.{digits}f}}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")
    return _number(mean, form)


def _status(run: Run) -> str:
    status, total = run.result.status, run.config.total_steps
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
        + ("" if each.table is None else _number_table(each.title, each.table))
        for each in diagnostics
    ]
    command = "<code>python experiments/diagnostics.py STUDY_DIR</code>"
    return "\n".join(sections) or f"<p>There are no diagnostics yet: {command} makes them.</p>"


def _number_table(title: str, table: Table) -> str:
    """Make the table of a diagnostic. A column with any number is sorted by its numbers."""
    columns: list[list[Cell]] = []
    for column in zip(*table.rows, strict=True):
        texts = [cell if isinstance(cell, str) else f"{cell:,.6g}" for cell in column]
        numbers = [parse_number(text) for text in texts]
        values = [math.nan if number is None else number for number in numbers]
        cells: list[Cell] = list(zip(texts, values, strict=True))
        columns.append([*texts] if all(map(math.isnan, values)) else cells)
    return _table(
        f"{title}: table", table.headings, list(zip(*columns, strict=True)), heads_section=False
    )


def _command(commands: Sequence[str], remarks: Sequence[str]) -> str:
    introduction = ["<p>To reproduce this study:</p>"] if commands else []
    parts = [f"<pre>{_text(command)}</pre>" for command in commands]
    return "\n".join([*introduction, *parts, *(f"<p>{_text(remark)}</p>" for remark in remarks)])


def _hash(text: str) -> str:
    """Return the hash with which a content security policy allows a style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
