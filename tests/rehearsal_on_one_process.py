"""Run on two processes by test_rehearsal.py: FOLDER. A rehearsed piece of work fails on process 1 alone.

Each process writes what it raised to FOLDER/rank<n>.txt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from hcnet_cli import dist, rehearsal
from hcnet_cli.console import UserError


def work() -> None:
    if dist.rank() == 1:
        raise ZeroDivisionError("of process 1")


if __name__ == "__main__":
    with dist.process_group(torch.device("cpu")):
        try:
            rehearsal.together("A training step", work)
            raised = "nothing"
        except UserError as error:
            raised = str(error)
        (Path(sys.argv[1]) / f"rank{dist.rank()}.txt").write_text(raised)
