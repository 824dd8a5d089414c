"""Run on two processes by test_rehearsal.py, with a command's arguments. Process 1 makes fewer steps in a trial."""

from __future__ import annotations

import faulthandler

from hcnet_cli import dist, trial
from hcnet_cli.cli import main

if __name__ == "__main__":
    faulthandler.dump_traceback_later(120, exit=True)  # a process that waits for the other one in vain
    trial.QUICK_SECONDS = 0.0 if dist.rank() == 1 else 1000.0
    main()
