"""How far a run is, by its log where that is ahead of the record. Torch-free."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hcnet_cli.plain_json import parse_json
from hcnet_cli.record import RunInfo

TAIL = 4096  # bytes at the end of a log that are read


def last_step(folder: Path, info: RunInfo) -> int:
    """The last logged step of a run at work, whose record is written at checkpoints alone; else that of the record."""
    return logged_step(folder, info) if info.status == "running" else info.steps_done


def logged_step(folder: Path, info: RunInfo) -> int:
    """The last logged step, or that of the record where it is ahead."""
    logged = [entry.get("step") for entry in last_entries(folder / "metrics.jsonl")]
    return max([info.steps_done, *(step for step in logged if isinstance(step, int) and step <= info.steps_total)])


def last_entries(log: Path) -> Iterator[dict[str, Any]]:
    """The entries at the end of a log, those alone that are whole."""
    for line in tail(log).splitlines():
        with contextlib.suppress(ValueError):  # a line cut short
            entry = parse_json(line)
            if isinstance(entry, dict):
                yield entry


def tail(file: Path) -> str:
    """The text at the end of a file; nothing of one that cannot be read."""
    try:
        with file.open("rb") as content:
            content.seek(max(0, os.fstat(content.fileno()).st_size - TAIL))
            return content.read().decode("utf-8", "replace")
    except OSError:
        return ""
