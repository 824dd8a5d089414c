"""`hcnet report`: the tables of all runs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hcnet_cli.cli import complete
from hcnet_cli.console import UserError, notice, out, warn

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_PORT = 8787  # of the page that --watch serves


def report(
    fmt: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="rich, markdown, csv, json, latex or html; else what the output's ending names.",
            autocompletion=complete.report_formats,
        ),
    ] = None,
    table: Annotated[
        str, typer.Option(help="imagenet, coco, ade20k, ablation or all.", autocompletion=complete.report_tables)
    ] = "all",
    results: Annotated[list[Path] | None, typer.Option(help="Results folder; may be repeated.")] = None,
    published: Annotated[list[Path] | None, typer.Option(help="CSV of further published numbers; may repeat.")] = None,
    output: Annotated[Path | None, typer.Option(help="A file to write instead of standard output.")] = None,
    check: Annotated[
        Path | None, typer.Option(help="Folder of tables to compare with the runs; 1 if they differ.")
    ] = None,
    public: Annotated[
        bool,
        typer.Option("--public", help="Leave out folders, the names of computer and user, and secrets in commands."),
    ] = False,
    figures: Annotated[
        Path | None, typer.Option(help="Folder for every figure of the page, as PDF and SVG for a paper's column.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            help="Two classifiers image by image; --output FILE.png draws images on which they differ.",
            autocompletion=complete.run_folders,
        ),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Serve the page on this machine while runs go on; with --output, write it anew."),
    ] = False,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Of --watch (default 8787); 0: a free one.")
    ] = None,
) -> None:
    """Print the paper's tables from the runs, published numbers beside measured ones."""
    from hcnet_cli.files import write_output
    from hcnet_cli.report import format_for, report_check
    from hcnet_cli.report import report as make
    from hcnet_cli.study.table import tables

    for folder in results or []:
        if not folder.is_dir():
            raise UserError(f"There is no results folder {folder}.")
    where, more = results or [Path("results")], published or []
    if compare is not None:
        for flag, given in (("--format", fmt), ("--check", check), ("--watch", watch)):
            if given:
                raise UserError(f"--compare prints lines of text; {flag} has no place beside it.")
        _compare(*compare, output)
        return
    if figures is not None:
        for flag, given in (("--format", fmt), ("--output", output), ("--check", check), ("--watch", watch)):
            if given:
                raise UserError(f"--figures writes figures alone; {flag} has no place beside it.")
    studies, unreadable = tables(where)
    for line in unreadable:
        warn(line)
    if figures is not None:
        from hcnet_cli.report import write_figures

        for line in write_figures(where, figures, table=table, published=more, extra=studies, public=public):
            out.print(line)
        notice(f"Each as PDF and as SVG in {figures}.")
        return
    if check is not None:
        if output is not None or fmt is not None:
            raise UserError(
                f"--check compares every table in {check}; --{'output' if output else 'format'} has no place."
            )
        for line in (differing := report_check(where, check, published=more, extra=studies)):
            out.print(line)
        if not differing:
            notice(f"All tables in {check} agree with the runs.")
        raise typer.Exit(1 if differing else 0)
    if port is not None and (not watch or output is not None):
        raise UserError("--port is that of the page that --watch serves.", hint="hcnet report --watch --port 8787")
    if watch and output is None:
        if fmt not in (None, "html"):
            raise UserError(f"--watch serves a page, not {fmt}.", hint="hcnet report --watch")
        from hcnet_cli.report.serve import LivePage, serve

        def page(version: str) -> str:
            again, _ = tables(where)
            return make(where, table=table, fmt="html", published=more, extra=again, public=public, version=version)

        page("check")  # a mistake is said here, not in the browser
        serve(LivePage(where, page), DEFAULT_PORT if port is None else port)
        return
    fmt = fmt or format_for(output)
    if watch and fmt != "html":
        raise UserError("--watch refreshes a page.", hint="Add --output report.html, or leave --output out.")
    while True:
        text = make(
            where,
            table=table,
            fmt=fmt,
            published=more,
            extra=studies,
            output=output,
            refresh=10 if watch else None,
            public=public,
        )
        if output is None:
            sys.stdout.write(text)
            return
        write_output(output, text)
        if not watch:
            return
        try:
            time.sleep(10)
        except KeyboardInterrupt:
            return
        studies, _ = tables(where)


def _read_image(file: Path, bits: int | None) -> Image:
    from hcnet_cli.data.images import read_image

    return read_image(file, bits=bits)


def _compare(first: Path, second: Path, output: Path | None) -> None:
    from hcnet_cli.files import check_output, replacing, writing
    from hcnet_cli.report.compare import compare_runs

    if output is not None and output.suffix.lower() != ".png":
        raise UserError(f"{output} cannot be the picture of a comparison.", hint="Its name must end in .png.")
    lines, picture = compare_runs(first, second, None if output is None else _read_image)
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    if picture is not None and output is None:
        notice("--output FILE.png draws the images on which they differ most.")
    elif picture is not None and output is not None:
        check_output(output)
        with writing(output), replacing(output) as temporary:
            picture.save(temporary, format="png")
        notice(f"Wrote {output}.")
