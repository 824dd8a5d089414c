"""How far a run is, by its log where that is ahead of the record. Torch-free."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from hcnet_cli.plain_json import parse_json
from hcnet_cli.record import RunInfo

TAIL = 4096  # bytes at the end of metrics.jsonl that are read


def last_step(folder: Path, info: RunInfo) -> int:
    """The last logged step of a run at work, whose record is written at checkpoints alone; else that of the record."""
    if info.status != "running":
        return info.steps_done
    try:
        with (folder / "metrics.jsonl").open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - TAIL))
            lines = log.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return info.steps_done
    step = info.steps_done
    for line in lines:
        with contextlib.suppress(ValueError):  # a line cut short
            entry = parse_json(line)
            logged = entry.get("step") if isinstance(entry, dict) else None
            if isinstance(logged, int) and logged <= info.steps_total:
                step = max(step, logged)
    return step
