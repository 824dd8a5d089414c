"""Tables as text: rich for the terminal, Markdown, LaTeX, CSV, JSON. Equal tables give equal bytes."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.table import Table as RichTable
from rich.text import Text

from hcnet_cli.console import Terminal, visible
from hcnet_cli.report.escape import (
    in_csv,
    in_latex,
    in_markdown,
    latex_line,
    markdown_code,
    markdown_link,
    slug,
    to_json,
)
from hcnet_cli.table import MISSING, Column, Row, Table, Value, is_number

LISTED_RUNS = 12  # under a table on the terminal
SOURCES_IN_TABLE = 12  # under a LaTeX table; more follow it
NOT_IN_LATEX = ("source", "recipe", "init", "seeds", "schedule")  # the caption and the notes hold them


def run_lines(table: Table) -> list[tuple[str, Row]]:
    """(label, row) of the rows that come from runs, for the list under the table."""
    rows = [row for row in table.rows if row.runs]
    return [(f"{table.label(row)}, seed{'s' * (len(row.runs) > 1)} {row.values.get('seeds')}", row) for row in rows]


def provenance(values: Mapping[str, Value]) -> list[tuple[str, str]]:
    """Where a measured row comes from, as (what, text), without what is unknown."""
    done, total = values.get("steps_done"), values.get("steps_total")
    steps = f"{done:,} of {total:,}" if is_number(done) and is_number(total) and total else ""
    facts = [
        ("command", values.get("command")),
        ("recipe", values.get("recipe")),
        ("departs in", values.get("changes")),
        ("started from", values.get("init")),
        ("steps", steps),
        ("batch", values.get("batch_size")),
        ("data", f"{values.get('data')} {str(values.get('data_digest') or '')[:12]}".strip()),
        ("evaluation", values.get("metric_notes")),
        ("commit", values.get("commit")),
        ("machine", values.get("machine")),
        ("device", " ".join(str(values[k]) for k in ("device", "precision") if values.get(k))),
        ("finished" if values.get("status") in (None, "finished") else "stopped", values.get("finished")),
        ("error", values.get("error")),
    ]
    return [(what, str(text)) for what, text in facts if text not in (None, "")]


# --- rich -------------------------------------------------------------------------------------------------------------


def rich_text(tables: Sequence[Table], notes: Sequence[str], width: int, color: bool) -> str:
    """For a terminal of `width` columns; secondary columns that do not fit are left out and named."""
    file = io.StringIO()
    console = Terminal(file=file, width=width, force_terminal=color, color_system="auto" if color else None)
    for table in tables:
        columns = fitting(table, width)
        grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for column in columns:
            side: Literal["left", "right"] = "left" if column.style == "text" else "right"
            title = Text(visible(column.title).replace(" ", "\n"))
            grid.add_column(title, justify=side, no_wrap=not table.is_label(column), overflow="fold")
        for _, rows in itertools.groupby(table.rows, key=lambda row: row.kind):
            for row in rows:
                cells = (_rich_cell(table, row, column) for column in columns)
                grid.add_row(*cells, style="dim" if row.kind == "unfinished" else "")
            grid.add_section()
        console.print(table.title, style="italic")  # not as the grid's title, which is broken to the grid's width
        console.print(grid)
        lines = list(table.notes)
        if left_out := [c.title for c in table.columns if c not in columns]:
            lines.append(f"Not shown for want of width: {', '.join(left_out)} ({table.whole} has all).")
        sources = run_lines(table)
        lines += [f"{label}: {relative(row.runs[0], None)}{_more(row)}" for label, row in sources[:LISTED_RUNS]]
        if len(sources) > LISTED_RUNS:
            lines.append(f"and the runs of {len(sources) - LISTED_RUNS} more rows")
        for line in lines:
            console.print(line, style="dim")
        console.print()
    for note in notes:
        console.print(note)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).strip("\n") + "\n"


def _more(row: Row) -> str:
    return f" and {len(row.runs) - 1} more" if len(row.runs) > 1 else ""


def _rich_cell(table: Table, row: Row, column: Column) -> Text:
    style = ("underline" if row.kind == "published" else "bold") if column.key in row.best else ""
    return Text(_cell(table, row, column), style=style)


def _cell(table: Table, row: Row, column: Column) -> str:
    if column.key == "source":
        return visible(row.runs[0].name + _more(row) if row.runs else str(row.values.get("source") or MISSING))
    return visible(table.show(row, column))


def fitting(table: Table, width: int) -> list[Column]:
    """The columns that fit: secondary ones are dropped from the last on. Labels may wrap between words."""
    columns = list(table.columns)
    need = {}
    for column in columns:
        texts = [_cell(table, row, column) for row in table.rows]
        if table.is_label(column):
            texts = [word for text in texts for word in text.split()]
        need[column.key] = max(map(cell_len, [*column.title.split(), *texts])) + 2  # padding and rule
    for column in reversed(table.columns):
        if sum(need[c.key] for c in columns) + 1 > width and column.secondary:
            columns.remove(column)
    return columns


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(tables: Sequence[Table], notes: Sequence[str], base: Path | None) -> str:
    """GitHub's Markdown. Links to runs are relative to the folder `base` (None: the current one)."""
    parts = []
    for table in tables:
        lines = [[in_markdown(c.title) for c in table.columns]]
        lines.append(["---" if c.style == "text" else "---:" for c in table.columns])
        kinds = list(dict.fromkeys(row.kind for row in table.rows))
        for kind in kinds:
            if len(kinds) > 1 or kind == "unfinished":
                lines.append([f"*{kind}*", *("" for _ in table.columns[1:])])
            lines += [[_md_cell(table, row, c, base) for c in table.columns] for row in table.rows if row.kind == kind]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        widths[-1] = 0  # the last column holds long sources
        text = [f"## {in_markdown(table.title)}", ""]
        sides = ["<" if c.style == "text" else ">" for c in table.columns]
        for line in lines:
            cells = (f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True))
            text.append(f"| {' | '.join(cells)} |")
        text += ["", *(f"- {in_markdown(note)}" for note in table.notes)]
        if listed := run_lines(table):
            text += ["", "<details><summary>Where the measured numbers come from</summary>", ""]
            for label, row in listed:
                facts = (f"{what} {markdown_code(fact)}" for what, fact in provenance(row.values))
                text.append(f"- {in_markdown(label)}: {'; '.join(facts)}")
            text += ["", "</details>"]
        parts.append("\n".join(text))
    if notes:
        parts.append("\n".join(f"- {in_markdown(note)}" for note in notes) if len(notes) > 1 else in_markdown(notes[0]))
    return "\n\n".join(parts) + "\n"


def _md_cell(table: Table, row: Row, column: Column, base: Path | None) -> str:
    if column.key == "source" and row.runs:
        names = f"run {row.values.get('seeds', '')}".split(", ")
        if len(names) != len(row.runs):
            names = [run.name for run in row.runs]
        pairs = zip(names, row.runs, strict=True)
        return " ".join(markdown_link(name, relative(run, base)) for name, run in pairs)
    text = in_markdown(table.show(row, column))
    if column.key in row.best:
        return f"<u>{text}</u>" if row.kind == "published" else f"**{text}**"
    return text


def relative(path: Path, base: Path | None) -> str:
    return Path(os.path.relpath(path, base or Path.cwd())).as_posix()


# --- LaTeX ------------------------------------------------------------------------------------------------------------


def latex(tables: Sequence[Table], notes: Sequence[str]) -> str:
    r"""Tables to \input into a paper that has \usepackage{booktabs}; sources are listed by letters under each table."""
    parts = ["% Made by hcnet report. Needs \\usepackage{booktabs}."]
    parts += [f"% {visible(note)}" for note in notes]
    for table, label in zip(tables, latex_labels(tables), strict=True):
        columns = [c for c in table.columns if c.key not in NOT_IN_LATEX]
        sources: dict[str, str] = {}  # source -> letter
        lines = [
            r"\begin{table}[tp]",
            r"\centering\small\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{in_latex(table.title)}}}\label{{{label}}}",
            rf"\begin{{tabular}}{{{''.join('l' if c.style == 'text' else 'r' for c in columns)}}}",
            r"\toprule",
            " & ".join(in_latex(c.title) for c in columns) + r" \\",
        ]
        for kind, rows in itertools.groupby(table.rows, key=lambda row: row.kind):
            lines.append(r"\midrule")
            for row in rows:
                cells = [_tex_cell(table, row, c) for c in columns]
                names = ", ".join(run.name for run in row.runs)
                if source := str(row.values.get("source") or "") if kind == "published" else names:
                    cells[0] += rf"\textsuperscript{{{sources.setdefault(source, _letters(len(sources)))}}}"
                lines.append(latex_line(" & ".join(cells)) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", r"\par\medskip\begingroup\scriptsize\raggedright"]
        lines += [rf"{latex_line(in_latex(note))}\par" for note in table.notes]
        listed = [rf"\textsuperscript{{{letter}}} {in_latex(source)}.\quad" for source, letter in sources.items()]
        end = [r"\par\endgroup", r"\end{table}"]
        if len(listed) <= SOURCES_IN_TABLE:
            lines += listed + end
        else:  # a float cannot be longer than a page; what follows it can be broken
            lines += [
                *end,
                r"\begingroup\scriptsize\raggedright\noindent",
                rf"Sources of Table~\ref{{{label}}}:",
                *listed,
            ]
            lines += [r"\par\endgroup"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def latex_labels(tables: Sequence[Table]) -> list[str]:
    r"""A \label for each table by what it is of, such as tab:digits-val; by the whole title where two are of one data
    set. It does not depend on the place among the tables.
    """
    short = [slug(table.short or table.title.partition(":")[0]) for table in tables]
    names = [name if name and short.count(name) == 1 else slug(t.title) for name, t in zip(short, tables, strict=True)]
    made: list[str] = []
    for name, table in zip(names, tables, strict=True):
        own = name = f"tab:{name or table.name}"
        number = 1
        while own in made:  # two titles of the same letters
            number += 1
            own = f"{name}-{number}"
        made.append(own)
    return made


def _letters(number: int) -> str:
    """a, b, ... z, aa, ab, ...: no footnote looks like a row's mark, such as [1]."""
    before, last = divmod(number, 26)
    return (_letters(before - 1) if before else "") + chr(ord("a") + last)


def _tex_cell(table: Table, row: Row, column: Column) -> str:
    text, plus, half = map(in_latex, table.show(row, column).partition(" ± "))
    if column.key in row.best:
        text = rf"\underline{{{text}}}" if row.kind == "published" else rf"\textbf{{{text}}}"
    return rf"{text}\,{{\scriptsize$\pm${half}}}" if plus else text


# --- CSV and JSON -----------------------------------------------------------------------------------------------------


def csv_text(tables: Sequence[Table]) -> str:
    """Every row with all its values, also those without a column; `title` names the table. See `escape.in_csv`."""
    keys = list(dict.fromkeys(key for table in tables for row in table.rows for key in row.values))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(in_csv, ["title", *keys]))
    for table in tables:
        for row in table.rows:
            writer.writerow(map(in_csv, [table.title, *(_plain(row.values.get(key)) for key in keys)]))
    return out.getvalue()


def json_text(tables: Sequence[Table], notes: Iterable[str]) -> str:
    content = [
        {
            "name": table.name,
            "title": table.title,
            "columns": [{"key": c.key, "title": c.title} for c in table.columns],
            "rows": [{**{k: _plain(v) for k, v in row.values.items()}, "best": sorted(row.best)} for row in table.rows],
            "notes": list(table.notes),
            "forest": [list(arm) for arm in table.forest],
        }
        for table in tables
    ]
    return to_json({"tables": content, "notes": list(notes)}) + "\n"


def _plain(value: Value) -> Value:
    if isinstance(value, int | float) and not is_number(value):
        return None
    if not isinstance(value, float):
        return value
    return round(value, 6) if abs(value) >= 1 else float(f"{value:.6g}")  # a small p is not 0
