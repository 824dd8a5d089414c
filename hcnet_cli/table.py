"""A table as data, and the text of its cells. Whatever shows numbers builds these; `report/` renders them."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeGuard

from hcnet_cli.tasks.spec import Column, Style

__all__ = ["MISSING", "Column", "Kind", "Row", "Style", "Table", "Value", "is_number", "joined", "mark_best", "number"]

MISSING = "–"
Kind = Literal["published", "measured", "unfinished"]
Value = str | int | float | None


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        kind: Published and measured rows are ranked separately; unfinished ones are not ranked.
        values: By column key. CSV and JSON print all of them, also those without a column. `<key>_ci` is half of the
            95 % interval of `<key>`.
        runs: Folders of the runs that the row was computed from.
        best: Keys of the columns in which no row of the same kind is higher.
        mark: Printed after the label and points to a note, such as "[1]".
    """

    kind: Kind
    values: Mapping[str, Value]
    runs: tuple[Path, ...] = ()
    best: frozenset[str] = frozenset()
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table. Its first column holds the labels of the rows.

    Args:
        name: What `hcnet report --table` calls it.
        forest: (label, difference, low, high) of each arm, for a forest plot.
        whole: The flag that prints all columns, named where some are left out for lack of room.
        short: A short title for links.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    forest: Sequence[tuple[str, float, float, float]] = ()
    whole: str = "--format markdown"
    short: str = ""

    @property
    def measured(self) -> bool:
        return any(row.kind != "published" for row in self.rows)

    def is_label(self, column: Column) -> bool:
        return column.key == self.columns[0].key

    def label(self, row: Row) -> str:
        return self.show(row, self.columns[0])

    def show(self, row: Row, column: Column) -> str:
        """The text of a cell; a mean over seeds is followed by its interval; "–" where there is no value."""
        value = row.values.get(column.key)
        if self.is_label(column):
            return f"{value}{_progress(row)}{' ' if row.mark else ''}{row.mark}"
        if value is None or value == "":
            return "" if row.kind == "published" and column.measured_only else MISSING
        if column.style == "text" or not is_number(value):
            return str(value)
        text = number(value, column.style, as_printed=row.kind == "published")
        half = row.values.get(f"{column.key}_ci")
        return f"{text} ± {number(half, column.style)}" if is_number(half) else text


def _progress(row: Row) -> str:
    if row.kind != "unfinished":
        return ""
    done, total = row.values.get("steps_done"), row.values.get("steps_total")
    if isinstance(done, int) and isinstance(total, int) and total:
        return f" ({row.values.get('status')} at {100 * done // total} %)"
    return f" ({row.values.get('state') or 'unfinished'})"


def number(value: float, style: Style, as_printed: bool = False) -> str:
    """A number as text. `as_printed`: with no more digits than a source gave."""
    if abs(value) >= 1e15:
        return f"{float(value):.3g}"
    if style == "integer":
        return f"{value:,.0f}"
    if style == "percent":
        text = f"{value:.2f}"
        return text[:-1] if as_printed and text.endswith("0") else text
    if style == "difference":
        return f"{value:+.2f}".replace("-", "−")
    if style == "p":
        return f"{value:.3f}" if value >= 0.001 else "< 0.001"
    if style == "short":
        return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.1f}"
    if as_printed:
        return f"{value:.1f}" if abs(value) < 10 and round(value, 1) == value else f"{value:,.10g}"
    if abs(value) < 1:
        return f"{value:.3g}"
    return f"{value:,.{min(2, max(0, 3 - math.floor(math.log10(abs(value)))))}f}"


def is_number(value: object) -> TypeGuard[float]:
    """Whether the value is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def joined(texts: Sequence[str], separator: str = ", ") -> str:
    """The texts that are not empty, each once."""
    return separator.join(dict.fromkeys(text for text in texts if text))


def mark_best(rows: Sequence[Row], columns: Sequence[Column]) -> list[Row]:
    """The rows with `best` filled in: measured and published rows are ranked separately, from two rows on."""
    marks: list[set[str]] = [set() for _ in rows]
    for column in columns:
        for kind in ("measured", "published") if column.best else ():
            values = {
                i: value
                for i, row in enumerate(rows)
                if row.kind == kind and is_number(value := row.values.get(column.key))
            }
            if len(values) > 1:
                highest = max(values.values())
                for i, value in values.items():
                    if value == highest:
                        marks[i].add(column.key)
    return [dataclasses.replace(row, best=frozenset(keys)) for row, keys in zip(rows, marks, strict=True)]
