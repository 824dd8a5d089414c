"""The state of a run in a checkpoint: with it, training continues bit for bit as if it had not been interrupted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hcnet_cli import checkpoint, optim
from hcnet_cli.console import UserError
from hcnet_cli.engine.job import Job


@dataclass
class State:
    """How far a run has got. The checkpoint holds this as JSON, beside the tensors."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    improved_step: int | None = None  # of the first weights with the best score: `patience` counts from there
    metrics: dict[str, float] = field(default_factory=dict)  # of the best weights
    weights: str = ""  # digest of the best weights
    seconds: float = 0.0  # training time, without evaluation
    waited: float = 0.0  # the part of it spent waiting for data
    unreadable_files: list[str] = field(default_factory=list)  # of all processes: training images and why
    evaluation_due: bool = False  # the weights of `step` are still to be evaluated
    scaler: dict[str, Any] = field(default_factory=dict)
    window: dict[str, Any] = field(default_factory=dict)  # loss sums since the last log line


def save(job: Job, folder: Path, state: State) -> None:
    """Writes the checkpoint of `state.step` (main process)."""
    optimizer, optimizer_rest = optim.state_to_save(job.optimizer, job.task.model)
    tensors = {"model": job.task.model.state_dict(), "optimizer": optimizer}
    if job.ema is not None:
        tensors["ema"] = job.ema.module.state_dict()
    checkpoint.write(folder, tensors, {**asdict(state), "optimizer": optimizer_rest, "run": dict(job.identity)})


def restore(job: Job, folder: Path) -> State:
    """Loads the newest whole checkpoint in `folder` into the job; a new State if there is none.

    UserError for a checkpoint of another run. Those from before checkpoints had an identity are taken as they are.
    """
    found = checkpoint.read(folder)
    if found is None:
        return State()
    tensors, content = found
    identity = content.pop("run", {})
    differing = [f"{key} {identity[key]} there, {ours} here" for key, ours in job.identity.items()
                 if identity.get(key, ours) != ours]  # fmt: skip
    if differing:
        raise UserError(
            f"The checkpoints in {folder} are of another run, at step {content.get('step')}: {', '.join(differing)}.",
            hint="Choose another --name, or give --fresh to replace them.",
        )
    job.task.model.load_state_dict(tensors["model"])
    # checkpoints from before other optimizers than AdamW existed have tensors only
    optim.load_state(job.optimizer, job.task.model, tensors["optimizer"], content.pop("optimizer", {}))
    if job.ema is not None:
        job.ema.module.load_state_dict(tensors["ema"])
    try:
        return TypeAdapter(State).validate_python(content)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"The checkpoint in {folder} is damaged: its state has no {key} that can be understood.",
            hint="Start over with --fresh, or restore the folder from a backup.",
        ) from None
