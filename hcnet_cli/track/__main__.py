"""python -m hcnet_cli.track RUN NAME PID: sends what the process PID, which trains RUN and started this one, logs."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from hcnet_cli.console import UserError
from hcnet_cli.record import read_record
from hcnet_cli.runs import RunFolder
from hcnet_cli.track.sending import send

PATIENCE = 60.0  # seconds for the rest, once the process that trains was killed


def main() -> None:
    """Ends with the run, or with the process that trains it."""
    folder, name, parent = RunFolder(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])
    os.nice(5)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()

    def training() -> bool:
        try:
            return os.getppid() == parent and read_record(folder.record).status == "running"
        except UserError:
            return os.getppid() == parent

    send(folder, name, training)


def _end_with(parent: int) -> None:
    """A tracker that hangs must not outlive training, which is not there any more to stop it."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(PATIENCE)
    os._exit(1)


if __name__ == "__main__":
    main()
