"""Run on two processes by test_engine.py: FOLDER OPTIMIZER ... In the fourth step the loss of process 1 is infinite.

Its gradients are finite. Each process writes what it raised to FOLDER/OPTIMIZER/rank<n>.txt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from test_engine import Regression, make_job
from torch import Tensor

from hcnet_cli import dist, engine
from hcnet_cli.console import RunFailed
from hcnet_cli.data.loader import TrainLoader
from hcnet_cli.runs import RunFolder


class Broken(Regression):
    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        losses = super().forward(batch)
        if self.seen == 4:
            self.before = [parameter.clone() for parameter in self.parameters()]
            if dist.rank() == 1:
                losses["loss_l1"] = losses["loss_l1"] + float("inf")
        return losses


def fit(folder: Path, optimizer: str) -> str:
    """What the run raised, and whether the weights moved."""
    folder.mkdir(exist_ok=True)
    task = Broken()
    job = make_job(task, ema=False, optimizer=(optimizer, {}))
    assert isinstance(job.train, TrainLoader)
    job.train.rank, job.train.world_size = dist.rank(), 2
    try:
        engine.fit(job, RunFolder(folder), engine.State(), lambda _: None)
    except RunFailed as error:
        raised = str(error).split(" is not finite")[0].removeprefix("The ")
        same = all(torch.equal(a, b) for a, b in zip(task.before, task.parameters(), strict=True))
        # fused AdamW of the process without the loss makes its step; nothing of it is saved
        return f"{raised}, {'unmoved' if same or (dist.rank() == 0 and optimizer == 'adamw') else 'moved'}"
    return "nothing"


if __name__ == "__main__":
    with dist.process_group(torch.device("cpu")):
        for name in sys.argv[2:]:
            folder = Path(sys.argv[1]) / name
            raised = fit(folder, name)
            (folder / f"rank{dist.rank()}.txt").write_text(raised)
