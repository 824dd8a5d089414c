"""Called by the array script: may a cell start once more, and is there something to go on from? Asks the run's record.

python -m hcnet_cli.study.attempt STEM start RESTARTS
python -m hcnet_cli.study.attempt STEM saved CODE
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from hcnet_cli.console import UserError, notice, print_error
from hcnet_cli.plain_json import read_json


def progress(stem: Path) -> tuple[str, int]:
    """(status, step) of the cell's run; ("", 0) before there is one. The checkpoint may be newer than the record."""
    folder = stem.with_name(f"{stem.name}.run")
    status, step = "", 0
    with contextlib.suppress(UserError):
        record: Any = read_json(folder / "run.json")
        status, step = str(record["status"]), int(record["steps_done"])
    with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
        state: Any = read_json(folder / "last" / "state.json")
        step = max(step, int(state["state"]["step"]))
    return status, step


def start(stem: Path, restarts: int) -> int:
    """Notes an attempt. 1 if the last `restarts` + 1 of them began at this very step."""
    file = stem.with_name(f"{stem.name}.attempts")
    step = progress(stem)[1]
    before = file.read_text().split() if file.exists() else []
    if len(before) > restarts and set(before[-restarts - 1 :]) == {str(step)}:
        print_error(
            f"This cell was started {restarts + 1} times without getting beyond step {step}.",
            hint="Give it more --time or another partition, and submit it again with the same command.",
        )
        return 1
    with file.open("a") as attempts:
        attempts.write(f"{step}\n")
    return 0


def saved(stem: Path, code: int) -> int:
    """0 if the run was interrupted and can go on. `code`: with which the training command ended."""
    status, step = progress(stem)
    if not status and code > 128:
        print_error("A signal came before the run had begun.", hint="Give it more --time than starting takes.")
    if status in ("interrupted", "running"):  # "running": it could not even write that it was interrupted
        notice(f"Saved at step {step}: the cell is put into the queue again.")
        return 0
    return 1


def main(name: str, what: str, number: str) -> int:
    return (start if what == "start" else saved)(Path(name), int(number))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
