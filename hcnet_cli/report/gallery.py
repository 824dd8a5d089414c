"""One self-contained HTML page of predictions: a picture for each image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from hcnet_cli.console import visible


def html(run: str, drawn: Sequence[tuple[str, str]], note: str = "") -> str:
    """The page. `drawn`: (name, data URI) of each picture; `note` stands below them. No script runs in it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    shown = [(visible(name), uri) for name, uri in drawn]
    return environment.get_template("gallery.html").render(run=visible(run), drawn=shown, note=note) + "\n"
