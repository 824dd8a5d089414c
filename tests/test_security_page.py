"""docs/security.md promises what a test holds: each test that it names exists, and every fuzz test is named."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_tests_in_the_table_exist() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = set(re.findall(r"tests/[\w/]+\.py", page))
    assert named
    assert not [name for name in sorted(named) if not (ROOT / name).is_file()]
    assert {f"tests/fuzz/{path.name}" for path in (ROOT / "tests" / "fuzz").glob("test_*.py")} <= named


def test_the_places_in_the_page_exist() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    assert all((ROOT / name).is_file() for name in re.findall(r"hcnet_cli/[\w/]+\.py", page))
