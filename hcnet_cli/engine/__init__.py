"""Training and evaluation of any task. The engine knows no task, model or data set, only the types in job.py."""

from hcnet_cli.engine.job import (
    BYTES,
    Batch,
    EvalBatches,
    Evaluation,
    Evaluator,
    Graph,
    Job,
    Predictor,
    Task,
    TrainBatches,
    autocast,
    to_device,
)
from hcnet_cli.engine.loop import Agreement, Stopper, evaluate, fit, predict, save_final
from hcnet_cli.engine.state import State, restore, save
from hcnet_cli.engine.step import check_unused

__all__ = [
    "BYTES",
    "Agreement",
    "Batch",
    "EvalBatches",
    "Evaluation",
    "Evaluator",
    "Graph",
    "Job",
    "Predictor",
    "State",
    "Stopper",
    "Task",
    "TrainBatches",
    "autocast",
    "check_unused",
    "evaluate",
    "fit",
    "predict",
    "restore",
    "save",
    "save_final",
    "to_device",
]
