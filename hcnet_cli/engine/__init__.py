"""Training and evaluation of any task. The engine knows no task, model or data set, only the types in job.py."""

from hcnet_cli.engine.job import (
    BYTES,
    Batch,
    EvalBatches,
    Evaluation,
    Evaluator,
    Job,
    Task,
    TrainBatches,
    to_device,
)
from hcnet_cli.engine.loop import Stopper, evaluate, fit
from hcnet_cli.engine.state import State, restore, save

__all__ = [
    "BYTES",
    "Batch",
    "EvalBatches",
    "Evaluation",
    "Evaluator",
    "Job",
    "State",
    "Stopper",
    "Task",
    "TrainBatches",
    "evaluate",
    "fit",
    "restore",
    "save",
    "to_device",
]
