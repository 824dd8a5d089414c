"""Reads published numbers (published.csv) into rows. Tables, protocols and metrics are those that the tasks declare."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hcnet_cli.console import UserError, did_you_mean
from hcnet_cli.files import read_text
from hcnet_cli.table import Value
from hcnet_cli.tasks import TASKS

TEXT = ("table", "protocol", "model", "source")
SIZES = {"img_size": 100_000, "params_m": 1e6, "macs_g": 1e9}  # column -> largest value
METRICS = {metric.published or metric.key: metric.key for spec in TASKS.values() for metric in spec.metrics}
NUMBERS = {**dict(zip(SIZES, SIZES, strict=True)), **METRICS}  # column of the file -> key of a row
COLUMNS = (*TEXT, *NUMBERS)
SPECS = {spec.table: spec for spec in TASKS.values()}
Values = dict[str, Value]


def shipped_published() -> Path:
    """The published numbers that the project ships: inside the wheel, or in a source checkout."""
    here = Path(__file__).parent
    return next(p for p in (here / "published.csv", here.parent / "results" / "published.csv") if p.is_file())


def read_published(files: Sequence[Path]) -> list[Values]:
    """The rows of published.csv files; a file that does not exist is skipped.

    A row that two files repeat counts once. UserError for rows of one model and protocol with different numbers.
    """
    rows: dict[tuple[Value, ...], tuple[Values, str]] = {}
    unique: dict[Path, Path] = {}
    for file in files:
        if file.is_file():
            unique.setdefault(file.resolve(), file)
    for file in unique.values():
        keys_here: set[tuple[Value, ...]] = set()
        for line, row in _read_csv(file):
            key = (row["table"], row["protocol"], row["model"], row.get("img_size"))
            place = f"{file} line {line}"
            if key in keys_here:
                raise UserError(f'{place}: "{row["model"]}" appears twice for {row["protocol"]} ({rows[key][1]}).')
            keys_here.add(key)
            first, first_place = rows.setdefault(key, (row, place))
            if any(first.get(name) != row.get(name) for name in NUMBERS.values()):
                raise UserError(
                    f'{place}: "{row["model"]}" ({row["protocol"]}) has other numbers than {first_place}.',
                    hint='Remove one, or give a row from another source a name of its own, such as "Swin-T (re-run)".',
                )
    return [row for row, _ in rows.values()]


def _read_csv(file: Path) -> list[tuple[int, Values]]:
    """(line number, row) of each row. UserError for a file that is not as documented."""
    reader = csv.reader(io.StringIO(read_text(file), newline=""), strict=True)
    lines: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            cells = [" ".join(cell.split()) for cell in cells]
            if hidden := next((cell for cell in cells if not cell.isprintable()), None):
                shown = ascii(hidden)[:60]
                raise UserError(f"{file} line {reader.line_num} has a character that cannot be shown ({shown}).")
            if any(cells) or not lines:
                lines.append((reader.line_num, cells))
    except csv.Error as error:
        raise UserError(f"{file} line {reader.line_num} cannot be read as CSV: {error}.") from None
    header = lines.pop(0)[1] if lines else []
    columns = f"Columns: {', '.join(COLUMNS)}."
    for name in header:
        if name not in COLUMNS:
            raise UserError(f'{file}: unknown column "{name}".{did_you_mean(name, COLUMNS)}', hint=columns)
        if header.count(name) > 1:
            raise UserError(f"{file}: the column {name} appears twice.", hint=columns)
    for name in TEXT:
        if name not in header:
            raise UserError(f"{file}: the column {name} is missing.", hint=columns)
    rows = []
    for line, cells in lines:
        if len(cells) != len(header):
            raise UserError(f"{file} line {line} has {len(cells)} cells, the header {len(header)}.")
        rows.append((line, _row(dict(zip(header, cells, strict=True)), f"{file} line {line}")))
    return rows


def _row(cells: Mapping[str, str], place: str) -> Values:
    texts = {name: cells[name] for name in TEXT}
    for name, text in texts.items():
        if not text:
            raise UserError(f'{place}: "{name}" is empty.')
    spec = SPECS.get(texts["table"])
    if spec is None:
        raise UserError(f'{place}: unknown table "{texts["table"]}" (known: {", ".join(SPECS)}).')
    protocols = list(dict.fromkeys(spec.protocols.values()))
    if texts["protocol"] not in protocols:
        raise UserError(
            f'{place}: unknown protocol "{texts["protocol"]}".{did_you_mean(texts["protocol"], protocols)}',
            hint=f"Known for {spec.table}: {'; '.join(protocols)}.",
        )
    numbers = {
        key: _number(cells[name].strip(), name, place) for name, key in NUMBERS.items() if cells.get(name, "").strip()
    }
    if not any(metric.key in numbers for metric in spec.metrics):
        names = ", ".join(metric.published or metric.key for metric in spec.metrics)
        raise UserError(f"{place}: no result in it ({names} are all empty).")
    return {"data": spec.benchmark, **texts, **numbers, "status": "published"}


def _number(text: str, name: str, place: str) -> float:
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|nan)", text, re.ASCII | re.IGNORECASE):
        raise UserError(f'{place}: "{name}" is "{ascii(text)[1:-1][:40]}", not a number.')
    value, highest = float(text), SIZES.get(name, 100)
    if not 0 <= value <= highest:
        limit = "between 0 and 100 (per cent)" if name in METRICS else f"a positive number up to {highest:,.0f}"
        raise UserError(f'{place}: "{name}" is {text[:40]}, not {limit}.')
    if name in METRICS and 0 < value <= 1:
        percent = f"{100 * value:.10g}"
        raise UserError(
            f'{place}: "{name}" is {text[:40]}, which looks like a fraction; results are in per cent.',
            hint=f"Write {percent} for {percent} %.",
        )
    if name == "img_size" and not value.is_integer():
        raise UserError(f'{place}: "{name}" is {text[:40]}, not a number of pixels.')
    return int(value) if name == "img_size" else value
