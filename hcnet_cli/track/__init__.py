"""Experiment trackers: `--track NAME` while a run trains, `hcnet track RUN --to NAME` afterwards. Torch-free.

metrics.jsonl is the record. A process of its own follows it and sends what is new, so that a tracker that hangs, fails
or is killed never touches training; what it has not taken can be sent later.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hcnet_cli.console import UserError, did_you_mean, warn
from hcnet_cli.files import optional

if TYPE_CHECKING:
    from hcnet_cli.runs import RunFolder

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")  # each is the name of its package, and of an extra
PATIENCE = 30.0  # seconds that trackers get at the end of training, before they are stopped


def check_trackers(text: str) -> list[str]:
    """The trackers of a comma list. UserError for one that is not known or not installed. Loads none."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in TRACKERS:
            raise UserError(
                f'There is no tracker "{name}".{did_you_mean(name, TRACKERS)}', hint=f"Known: {', '.join(TRACKERS)}."
            )
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name is no package
            raise UserError(f"{name} is not installed.", hint=f"pip install 'hcnet[{name}]'")
    return names


@contextlib.contextmanager
def tracking(folder: RunFolder, names: Sequence[str]) -> Iterator[None]:
    """Processes that send what is logged inside. Whatever becomes of them, what is inside is not disturbed."""
    processes = {}
    for name in names:
        place = folder.path / "track"
        with optional(place):
            place.mkdir(exist_ok=True)
            with (place / f"{name}.log").open("w") as log:
                processes[name] = subprocess.Popen(
                    [sys.executable, "-m", "hcnet_cli.track", str(folder.path), name, str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for training
                )
    try:
        yield
    finally:
        deadline = time.monotonic() + PATIENCE
        for name, process in processes.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            code = process.poll()
            if code is None:
                process.kill()
                process.wait()
            if code != 0:
                how = "did not finish" if code is None else "failed"
                warn(
                    f"{name} {how}: {folder.path / 'track' / name}.log. The run is not concerned; "
                    f"`hcnet track {shlex.quote(str(folder.path))} --to {name}` sends the rest."
                )
