"""Protects the pages of `make docs`: every page is in the navigation, every link leads somewhere, nothing is loaded."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import environment

ROOT = Path(__file__).parent.parent
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*/*.md")]


def leaves(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    for one in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from leaves(one)


def test_every_page_is_in_the_navigation_once() -> None:
    named = list(leaves(SITE["nav"]))
    assert sorted(named) == sorted(["commands.md", *(page.relative_to(ROOT).as_posix() for page in PAGES)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not re.match(r"https?:|(\.\./)+runs/", target):  # runs are not in the repository
            assert (page.parent / target).exists(), target


def test_the_pages_are_built_without_a_warning_and_load_nothing(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("pip install 'hcnet[docs]'")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = {**environment(), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert "How it is measured" in (tmp_path / "index.html").read_text()
    frozen = (ROOT / "tests" / "golden" / "commands.txt").read_text()
    reference = (tmp_path / "commands.html").read_text()
    assert not {flag for flag in re.findall(r"--[a-z][\w-]+", frozen) if flag not in reference}
    loads = r"<(?:script|img|iframe)[^>]* src=[\"']?(https?:[^\s>\"']*)|<link[^>]* href=[\"']?(https?:[^\s>\"']*)"
    for page in tmp_path.rglob("*.html"):
        assert not re.findall(loads, page.read_text()), page
    for file in tmp_path.rglob("*.css"):
        assert not re.search(r"@import|url\([\"']?https?:", file.read_text()), file
