"""Trackio: its SQLite file in the run folder, or in TRACKIO_DIR. `trackio sync` uploads later."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from hcnet_cli.files import writing
from hcnet_cli.track.tracked import PROJECT, About


class TrackioRun:
    """The run is removed from Trackio's file and written there again, whole."""

    whole = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, step: int, about: About) -> None:
        alone = os.environ.setdefault("TRACKIO_DIR", str(self.folder)) == str(self.folder)
        for remote in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):  # steps sent there cannot be taken back
            os.environ.pop(remote, None)
        os.environ["HF_HUB_OFFLINE"] = "1"  # else it asks the hub for the name that a token there belongs to
        import trackio

        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        with contextlib.suppress(ValueError):  # there is no project yet
            for run in trackio.Api().runs(PROJECT):
                if alone or run.name == about.name:  # alone: the name it had before `hcnet runs mv`, too
                    run.delete()
        off = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        self.run = trackio.init(PROJECT, about.name, config=about.settings(), **off)

    def send(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def flush(self) -> None: ...

    def close(self) -> None:
        self.run.finish()

    def where(self) -> str:
        place = os.environ.get("TRACKIO_DIR") or str(self.folder)
        return f"TRACKIO_DIR={shlex.quote(place)} trackio show --project {PROJECT}"
