"""Run on two processes by test_processes.py: FOLDER. Work of the main process takes longer than an exchange may.

Each process writes what it got to FOLDER/rank<n>.txt.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed.distributed_c10d import _set_pg_timeout

from hcnet_cli import dist


def work() -> str:
    time.sleep(6)
    return "done"


if __name__ == "__main__":
    with dist.process_group(torch.device("cpu")):
        dist.barrier()
        _set_pg_timeout(timedelta(seconds=2))  # in place of hours
        got = dist.from_main(work)
        (Path(sys.argv[1]) / f"rank{dist.rank()}.txt").write_text(got)
