"""Weights & Biases, offline unless WANDB_MODE says otherwise. `wandb sync` uploads later."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from hcnet_cli.files import writing
from hcnet_cli.track.tracked import PROJECT, About


class WandbRun:
    """Offline, a new file with the whole log takes the place of the old one. Online, Weights & Biases leaves out the
    steps that it has.
    """

    whole = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, step: int, about: About) -> None:
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        with writing(self.folder):
            if os.environ["WANDB_MODE"] == "offline":
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(exist_ok=True)
        quiet = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            host="-",
            x_disable_meta=True,  # with host: the names of computer and user, the command
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=about.id,
            name=about.name,
            config=about.settings(),
            dir=str(self.folder),
            resume="allow" if os.environ["WANDB_MODE"] != "offline" else None,
            settings=quiet,
        )

    def send(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)  # values of one step become one point

    def flush(self) -> None: ...

    def close(self) -> None:
        import wandb

        self.run.finish()
        wandb.teardown()  # returns once its own process has written everything

    def where(self) -> str:
        return f"wandb sync {shlex.quote(str(self.folder))}/wandb/offline-run-*"
