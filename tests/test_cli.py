"""The list of commands and flags: what is typed today must work tomorrow, so a change of it is a change of this file.

python tests/test_cli.py        # writes tests/golden/commands.txt again
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer.main

from hcnet_cli.cli import app
from hcnet_cli.console import counted

GOLDEN = Path(__file__).parent / "golden" / "commands.txt"


def surface() -> str:
    """One line a parameter: command, flags, default."""
    lines: list[str] = []

    def walk(command: Any, path: str) -> None:
        for parameter in command.params:
            flags = "/".join([*parameter.opts, *parameter.secondary_opts])
            if "--help" not in parameter.opts:
                default = "" if parameter.default in (None, False, []) else f" = {parameter.default}"
                lines.append(f"{path} {flags}{' ...' if getattr(parameter, 'multiple', False) else ''}{default}")
        for name, sub in getattr(command, "commands", {}).items():
            walk(sub, f"{path} {name}")

    walk(typer.main.get_command(app), "hcnet")
    return "\n".join(lines) + "\n"


def test_commands_and_flags_are_the_frozen_ones() -> None:
    assert surface() == GOLDEN.read_text()


@pytest.mark.parametrize(
    ("number", "noun", "said"),
    [(1, "line", "1 line"), (0, "line", "0 lines"), (2, "process", "2 processes"), (1.0, "epoch", "1 epoch")],
)
def test_one_of_a_thing_is_said_in_the_singular(number: float, noun: str, said: str) -> None:
    assert counted(number, noun) == said


if __name__ == "__main__":
    GOLDEN.write_text(surface())
