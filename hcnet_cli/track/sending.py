"""Sends the lines of a metrics.jsonl to a tracker, each step once, whatever is stopped on the way."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hcnet_cli.console import UserError
from hcnet_cli.files import write_text, writing
from hcnet_cli.plain_json import parse_json, read_json
from hcnet_cli.runs import RunFolder
from hcnet_cli.table import is_number
from hcnet_cli.track.event_file import EventFile
from hcnet_cli.track.mlflow_run import MlflowRun
from hcnet_cli.track.tracked import Tracker, about
from hcnet_cli.track.trackio_run import TrackioRun
from hcnet_cli.track.wandb_run import WandbRun

KINDS: dict[str, Callable[[Path], Tracker]] = {  # each loads its package in `begin`
    "tensorboard": EventFile,
    "wandb": WandbRun,
    "trackio": TrackioRun,
    "mlflow": MlflowRun,
}

POLL = 2.0  # seconds between two looks at the log of a run that trains


def send(folder: RunFolder, name: str, training: Callable[[], bool] = lambda: False) -> int:
    """Sends what the tracker `name` lacks, and goes on while `training()`. Returns the number of lines sent.

    The last step that was sent is kept. The next call sends that step again, for its evaluation may have come later,
    and has the tracker forget what it got of it and of later ones: no point is missing or twice. A tracker that cannot
    forget gets the whole log each time (`Tracker.whole`).

    UserError while another process sends to the same tracker.
    """
    place = folder.path / "track"
    with writing(place):
        place.mkdir(exist_ok=True)
    lock = FileLock(place / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"Another process sends {folder.path} to {name}.") from None
    with lock:
        return _send(folder, place / f"{name}.json", KINDS[name](place / name), training)


def where(folder: RunFolder, name: str) -> str:
    """The command that shows or uploads what was sent."""
    return KINDS[name](folder.path / "track" / name).where()


def _send(folder: RunFolder, kept: Path, tracker: Tracker, training: Callable[[], bool]) -> int:
    last, length = (-1, -1) if tracker.whole else sent_before(kept)
    log, sent = Tail(folder.log_file), 0
    if length == log.length() and not training():
        return 0
    tracker.begin(last, about(folder))
    step = last
    try:
        while True:
            goes_on = training()  # asked first: all that was logged before it ended is read
            lines = [line for line in log.read() if line["step"] >= last]
            for line in lines:
                kind = "train" if "lr" in line else "val"
                values = {f"{kind}/{key}": float(v) for key, v in line.items() if key != "step" and is_number(v)}
                tracker.send(line["step"], values)
            if lines or not goes_on:
                tracker.flush()
                step = max([step, *(line["step"] for line in lines)])
                write_text(kept, json.dumps({"step": step, "bytes": log.offset}) + "\n")
                sent += len(lines)
            if not goes_on:
                return sent
            time.sleep(POLL)
    finally:
        tracker.close()


def sent_before(kept: Path) -> tuple[int, int]:
    """The last step that was sent, and the bytes of the log then; -1 where that is not known: all is sent again."""
    with contextlib.suppress(UserError, ValueError, TypeError, KeyError):
        content = read_json(kept)
        if kept.with_suffix("").is_dir():  # else what was sent has been removed
            return int(content["step"]), int(content.get("bytes", -1))
    return -1, -1


class Tail:
    """The lines of a log that grows. A last line that is not whole yet is left for later."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0

    def length(self) -> int:
        """Bytes of the log now."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def read(self) -> list[dict[str, Any]]:
        """The entries since the last call; a line that is none is left out."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                content = file.read()
        except OSError:  # nothing is logged yet
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self.offset += len(whole)
        entries = []
        for line in whole.decode("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError):
                entry = parse_json(line)
                if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                    entries.append(entry)
        return entries
