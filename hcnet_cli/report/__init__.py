"""`hcnet report`: runs and published numbers as tables, figures and one page."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence
from itertools import zip_longest
from pathlib import Path

from hcnet_cli import console
from hcnet_cli.console import UserError, did_you_mean
from hcnet_cli.files import read_text
from hcnet_cli.report import text
from hcnet_cli.results import Results, collect, public_table, tables
from hcnet_cli.sizes import SIZES
from hcnet_cli.study.status import statuses
from hcnet_cli.table import Table
from hcnet_cli.tasks import FIRST_TASK, TASKS

TABLES = (*(spec.table for spec in TASKS.values()), "ablation")
FORMATS = {"rich": "txt", "markdown": "md", "csv": "csv", "json": "json", "latex": "tex", "html": "html"}
ENDINGS = {ending: fmt for fmt, ending in FORMATS.items()}
FIRST_RUN = f"No runs yet. The first takes two minutes: hcnet {FIRST_TASK} --size {next(iter(SIZES))}"


def report(
    results: Sequence[Path],
    *,
    table: str = "all",
    fmt: str = "rich",
    published: Sequence[Path] = (),
    extra: Sequence[Table] = (),
    output: Path | None = None,
    width: int | None = None,
    refresh: float | None = None,
    public: bool = False,
    version: str = "",
) -> str:
    """The report as text in one of FORMATS. UserError for an unknown table or format, or a bad published file.

    Args:
        results: Folders with `runs/` in them.
        table: One of TABLES, or "all".
        fmt: One of FORMATS.
        published: Further files of published numbers, which must exist.
        extra: Tables of another origin, such as those of studies.
        output: The file that the text is for; links to runs are relative to its folder.
        width: Of the terminal ("rich" only).
        public: Without secrets, folders, and the names of computer and user.
        version: Of a page that is served and follows the runs, with every cell of the studies ("html" only).
        refresh: Seconds after which a browser loads the page again ("html" only).
    """
    _check_known("format", fmt, FORMATS)
    found, made = _collected(results, table, published, extra, public)
    base = output.absolute().parent if output else None
    if public:
        links_from = {"html": None, "markdown": base or Path.cwd()}.get(fmt, Path.cwd())
        made = [public_table(one, links_from) for one in made]
    notes = [] if found.runs else [FIRST_RUN]
    if not made:
        notes.append("There is nothing for this table yet.")
    notes += [*found.notes, *(f"Not read: {reason}" for _, reason in found.broken)]
    if fmt == "html":
        from hcnet_cli.report import page  # loads jinja2 and Pillow

        studies = []
        for folder in results if version and not public else ():  # a cell may say anything
            cells, unknown = statuses(folder)
            studies += cells
            notes += unknown
        return page.html(made, notes, found, refresh, version, studies)
    if fmt == "rich" and table == "all" and found.runs:
        if hidden := dict.fromkeys(t.name for t in made if not t.measured):
            notes.insert(0, f"Published numbers alone: hcnet report --table {' or '.join(hidden)}.")
        made = [t for t in made if t.measured]
    return render(made, fmt, notes, base=base, width=width)


def write_figures(results: Sequence[Path], folder: Path, *, table: str = "all", published: Sequence[Path] = (),
                  extra: Sequence[Table] = (), public: bool = False) -> list[str]:  # fmt: skip
    """Every figure of the page in `folder`, as PDF and SVG; a line for each. UserError where there is none.

    The other arguments are those of `report`.
    """
    from hcnet_cli.report import paper  # loads matplotlib

    found, made = _collected(results, table, published, extra, public)
    return paper.write_figures([public_table(one, None) for one in made] if public else made, found, folder)


def _collected(
    results: Sequence[Path], table: str, published: Sequence[Path], extra: Sequence[Table], public: bool
) -> tuple[Results, list[Table]]:
    """The runs, and the tables of that name, those with measured rows first."""
    _check_known("table", table, (*TABLES, "all"))
    for file in published:
        if not file.is_file():
            raise UserError(f"There is no file {file} with published numbers.")
    found = collect(results, published, public)
    made = [*tables(found, table), *(t for t in extra if table in ("all", t.name))]
    return found, sorted(made, key=lambda t: not t.measured)


def render(
    made: Sequence[Table], fmt: str, notes: Sequence[str] = (), *, base: Path | None = None, width: int | None = None
) -> str:
    """Tables, and `notes` after them, as text. Links to runs are relative to the folder `base`."""
    if fmt == "rich":
        return text.rich_text(made, notes, width or console.out.width, console.out.is_terminal)
    if fmt == "markdown":
        return text.markdown(made, notes, base)
    if fmt == "latex":
        return text.latex(made, notes)
    if fmt == "json":
        return text.json_text(made, notes)
    for note in notes:
        console.notice(note)
    return text.csv_text(made)


def report_check(results: Sequence[Path], folder: Path, *, published: Sequence[Path] = (),
                 extra: Sequence[Table] = ()) -> list[str]:  # fmt: skip
    """A line for each file in `folder` (<table>.<ending>, such as all.md) that differs from what the runs give now.

    UserError where there is nothing to compare.
    """
    pattern = re.compile(rf"({'|'.join((*TABLES, 'all'))})\.({'|'.join(ENDINGS)})")
    files = [(p, m) for p in sorted(folder.glob("*.*")) if (m := pattern.fullmatch(p.name))]
    if not files:
        raise UserError(
            f"There are no report files in {folder}.",
            hint=f"hcnet report --format markdown --output {shlex.quote(str(folder / 'all.md'))}",
        )
    if not collect(results, published).runs:
        raise UserError(f"There are no runs under {', '.join(map(str, results))} to check {folder} against.")
    lines = []
    for path, match in files:
        fmt = ENDINGS[match[2]]
        now = report(results, table=match[1], fmt=fmt, published=published, extra=extra, output=path, width=80)
        then = read_text(path).replace("\r\n", "\n")
        if now != then:
            pairs = zip_longest(now.split("\n"), then.split("\n"))
            line = next(n for n, (a, b) in enumerate(pairs, 1) if a != b)
            lines.append(f"{path} differs from what the runs give, from line {line} on.")
    return lines


def format_for(output: Path | None) -> str:
    """The format that a file's ending names; rich for the terminal. UserError for an unknown ending."""
    if output is None:
        return "rich"
    ending = output.suffix.lower()
    _check_known("ending of a report", ending, [f".{known}" for known in ENDINGS])
    return ENDINGS[ending[1:]]


def _check_known(what: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise UserError(f'Unknown {what} "{value}".{did_you_mean(value, known)}', hint=f"Known: {', '.join(known)}.")
