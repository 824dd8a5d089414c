"""What mkdocs.yml builds: the repository's Markdown files under their own paths, so that their links hold, and the
commands with their options, generated from the program.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "results/*/*.md")
TARGETS = (  # of links, no pages
    *("LICENSE", "results/published.csv", "hcnet_cli/statistics.py", "hcnet_cli/sizes.py"),
    "hcnet_cli/tasks/detection/mask_rcnn.py",
)
FILES = ("docs/images/*", "docs/site.css")


def on_files(files: Files, config: Any) -> Files:
    """All pages, and the theme's own files."""
    theme = [file for file in files if file.src_dir != config["docs_dir"]]
    paths = sorted({path for pattern in (*PAGES, *TARGETS) for path in ROOT.glob(pattern)})
    made = [
        File.generated(config, path.relative_to(ROOT).as_posix(), content=path.read_text(encoding="utf-8"))
        for path in paths
    ]
    made += [
        File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
        for pattern in FILES
        for path in sorted(ROOT.glob(pattern))
    ]
    return Files([*theme, *made, File.generated(config, "commands.md", content=commands())])


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site has them: a folder is its README; runs are not in the repository. Names of files over code."""
    markdown = re.sub(r"\[([^\]]+)\]\((?:\.\./)+runs/[^)]+\)", r"\1", markdown)
    markdown = re.sub(r"\]\((results/tables)\)", r"](\1/README.md)", markdown)
    return re.sub(r"^(```\w+) (\S+)$", r'\1 title="\2"', markdown, flags=re.MULTILINE)


def commands() -> str:
    """Every command with its options, in Markdown."""
    import typer.main
    from typer.cli import get_docs_for_click

    from hcnet_cli.cli import app

    command = typer.main.get_command(app)
    return get_docs_for_click(obj=command, ctx=typer.Context(command), name="hcnet", title="Commands")
