"""The training loop: one engine, any task. It knows no task, no model and no data set, only the protocols below."""

from __future__ import annotations

import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hcnet_cli import checkpoint, dist
from hcnet_cli.console import Progress, RunFailed
from hcnet_cli.rng import derive
from hcnet_cli.runs import RunFolder, write_text, writing

ADAM_SLOTS = ("step", "exp_avg", "exp_avg_sq")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of an activation

Batch: TypeAlias = Any  # any nesting of dicts, lists and tuples of tensors; `sample` [B] holds data set indices


class Evaluator(Protocol):
    """Gathers predictions over a whole validation set and turns them into numbers."""

    def update(self, predictions: Any, batch: Batch) -> None: ...

    def compute(self) -> dict[str, float]:
        """Metrics in per cent; every process calls it and gets the same, whatever the number of processes."""
        ...

    def save(self, folder: Path) -> None:
        """Writes what is worth keeping of the predictions (main process)."""
        ...


class Task(nn.Module):
    """What is learned. `forward(batch)` gives named, weighted losses [], whose sum is minimised."""

    model: nn.Module  # what a checkpoint holds
    primary: str  # the metric that decides which weights are best; higher is better
    protocol: str = ""  # how the metric is made, where there are several ways

    def predict(self, batch: Batch) -> Any:
        """What the evaluator takes of a batch."""
        raise NotImplementedError

    def evaluator(self) -> Evaluator:
        raise NotImplementedError


class TrainBatches(Protocol):
    """Training data: `accumulate` micro-batches for each optimizer step."""

    unreadable: list[str]

    def iterate(self, start_step: int) -> Iterator[Batch]: ...


class EvalBatches(Sized, Iterable[Batch], Protocol):
    """One process's part of the validation data: every sample in exactly one batch of one process."""


@dataclass(frozen=True)
class Evaluation:
    """One way to score the model: the task whose `predict` and `evaluator` do it, and the batches."""

    name: str
    task: Task
    batches: EvalBatches


@dataclass
class Job:
    """Everything a run needs, built (build.job); durations in optimizer steps."""

    task: Task
    train: TrainBatches
    evaluations: Sequence[Evaluation]  # the first is made during training and decides which weights are best
    describe: Callable[[int], str]  # training sample -> the file it comes from
    optimizer: torch.optim.Optimizer
    lr_at: Callable[[int], float]
    total_steps: int
    batch_size: int
    accumulate: int
    eval_every: int
    log_every: int
    save_minutes: float
    clip_grad: float | None
    precision: str  # fp32, bf16 or fp16
    device: torch.device
    seed: int
    ema: ModelEmaV3 | None = None
    describe_weights: Mapping[str, str] = field(default_factory=dict)  # safetensors metadata of best.safetensors


@dataclass
class State:
    """Where a run stands; with the tensors of a checkpoint this is all that is needed to go on bit for bit."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # of the best weights
    seconds: float = 0.0  # training time, without evaluation
    waited: float = 0.0  # of which waiting for data
    unreadable: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)
    window: dict[str, Any] = field(default_factory=dict)  # loss sums not yet logged


class Stopper:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a request to stop after the current step; a second Ctrl-C ends it"""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: int = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Moves every tensor of a nested batch; everything else passes through."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def autocast(job: Job) -> AbstractContextManager[object]:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(job.precision)
    return torch.autocast(job.device.type, dtype) if dtype else nullcontext()


def evaluate(job: Job, evaluation: Evaluation, progress: Progress | None = None) -> tuple[dict[str, float], Evaluator]:
    """Metrics of the task's current weights (the EMA's where there is one) on the validation data."""
    task: Any = evaluation.task
    evaluator = task.evaluator()
    trained = task.model
    if job.ema is not None:
        task.model = job.ema.module
    task.eval()
    try:
        with torch.inference_mode():
            for number, batch in enumerate(evaluation.batches, 1):
                moved = to_device(batch, job.device)
                with autocast(job):
                    predictions = task.predict(moved)
                evaluator.update(predictions, moved)
                if progress:
                    progress.evaluating(number, len(evaluation.batches))
            return evaluator.compute(), evaluator
    finally:
        task.model = trained
        task.train()


def restore(job: Job, folder: Path) -> State:
    """Brings the job to the newest whole checkpoint in `folder`; a fresh State where there is none."""
    found = checkpoint.read(folder)
    if found is None:
        return State()
    tensors, state = found
    job.task.model.load_state_dict(tensors["model"])
    names = [name for name, _ in job.task.model.named_parameters()]
    by_parameter = dict(zip(job.task.model.parameters(), names, strict=True))
    for group in job.optimizer.param_groups:
        for parameter in group["params"]:
            name = by_parameter[parameter]  # type: ignore[index]
            if f"{name}:step" in tensors["optimizer"]:
                step, first, second = (tensors["optimizer"][f"{name}:{slot}"] for slot in ADAM_SLOTS)
                job.optimizer.state[parameter] = {
                    "step": step.to(parameter.device),
                    # in the parameter's own memory layout, as the optimizer makes them
                    "exp_avg": torch.zeros_like(parameter).copy_(first),
                    "exp_avg_sq": torch.zeros_like(parameter).copy_(second),
                }
    if job.ema is not None:
        job.ema.module.load_state_dict(tensors["ema"])
    return State(**state)


def save(job: Job, folder: Path, state: State) -> None:
    """Writes the checkpoint of `state.step` (main process)."""
    names = {parameter: name for name, parameter in job.task.model.named_parameters()}
    optimizer = {
        f"{names[parameter]}:{slot}": value
        for parameter, slots in job.optimizer.state.items()
        for slot, value in slots.items()
    }
    tensors = {"model": job.task.model.state_dict(), "optimizer": optimizer}
    if job.ema is not None:
        tensors["ema"] = job.ema.module.state_dict()
    checkpoint.write(folder, tensors, asdict(state))


class Stepper:
    """One optimizer step: micro-batches, gradient, finite check, update.

    The check costs no host synchronisation on a GPU: a loss or gradient that is not finite sets a flag on the device
    that makes the fused optimizer leave the weights alone from that step on; the host looks at log steps.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.net: Any = job.task
        if dist.is_distributed():
            ids = [job.device.index] if job.device.type == "cuda" else None
            self.net = DistributedDataParallel(job.task, device_ids=ids)
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=job.precision == "fp16")
        self.parameters = [p for group in job.optimizer.param_groups for p in group["params"]]
        self.bad_step = torch.full((), -1.0, device=job.device)  # first step that was not finite
        self.bad_parts: dict[str, Tensor] = {}
        self.checked_unused = False

    def step(self, step: int, batches: list[Batch]) -> dict[str, Tensor]:
        """Returns the mean of each loss part over the micro-batches, their sum as `loss`, and `grad_norm`."""
        job, optimizer = self.job, self.job.optimizer
        torch.manual_seed(derive(job.seed, "torch", step))  # for what a task may draw beside its keyed randomness
        for group in optimizer.param_groups:
            group["lr"] = job.lr_at(step)
        parts: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            with nullcontext() if last or self.net is job.task else self.net.no_sync():
                with autocast(job):
                    losses = self.net(batch)
                self.scaler.scale(sum(losses.values()) / len(batches)).backward()
            for name, loss in losses.items():
                parts[name] = parts.get(name, 0) + loss.detach() / len(batches)
        self._check_unused()
        self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if job.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, job.clip_grad, norm)
        total = torch.stack([part.float() for part in parts.values()]).sum()
        # fp16's scaler handles gradients that overflow (it skips the step); a loss that is not finite is never right
        finite = total.isfinite() if self.scaler.is_enabled() else total.isfinite() & norm.isfinite()
        first = ~finite & (self.bad_step < 0)
        self.bad_step = torch.where(first, float(step), self.bad_step)
        self.bad_parts = {n: torch.where(first, v.float(), self.bad_parts.get(n, v).float()) for n, v in parts.items()}
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.found_inf = (self.bad_step >= 0).float()  # type: ignore[attr-defined]  # read by fused AdamW
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if job.ema is not None:
            job.ema.update(job.task.model, step=step)
        return {**parts, "loss": total, "grad_norm": norm}

    def _check_unused(self) -> None:
        """After the first backward: a parameter without a gradient would train nothing, and hang several processes."""
        if not self.checked_unused:
            self.checked_unused = True
            unused = [n for n, p in self.job.task.named_parameters() if p.requires_grad and p.grad is None]
            assert not unused, f"parameters that no loss depends on: {', '.join(unused)}"


def fit(job: Job, folder: RunFolder, state: State, on_evaluation: Callable[[State], None]) -> int:
    """Trains from `state.step` to `job.total_steps`, logging, evaluating and saving into `folder`.

    Returns 0, or the number of the signal that stopped it (everything is saved then). `on_evaluation` is called on the
    main process after each evaluation and at the end. RunFailed for a loss that is not finite.
    """
    stepper = Stepper(job)
    if state.scaler:
        stepper.scaler.load_state_dict(state.scaler)
    host_checks_every = 1 if job.device.type == "cpu" else job.log_every
    recent: deque[tuple[int, list[int]]] = deque(maxlen=host_checks_every)
    window = Window(job.device, **state.window)
    last_save = time.monotonic()
    micro_batches = job.train.iterate(state.step)
    main = dist.is_main()

    def keep() -> None:
        state.unreadable = len(job.train.unreadable)
        state.scaler = stepper.scaler.state_dict()
        state.window = window.state()
        if main:
            save(job, folder.path, state)
        dist.barrier()

    with Stopper() as stopper, Progress(job.total_steps, state.step, job.task.primary) as progress:
        while state.step < job.total_steps:
            begun = time.monotonic()
            batches = [next(micro_batches) for _ in range(job.accumulate)]
            waited = time.monotonic() - begun
            recent.append((state.step, [index for batch in batches for index in batch["sample"].tolist()]))
            window.add(stepper.step(state.step, [to_device(batch, job.device) for batch in batches]))
            state.step += 1
            done = state.step == job.total_steps
            evaluating = done or state.step % job.eval_every == 0
            logging = evaluating or state.step % job.log_every == 0
            if logging or host_checks_every == 1:
                _stop_if_not_finite(stepper, recent, job, folder)
            seconds = time.monotonic() - begun
            window.took(seconds, waited)
            state.seconds += seconds
            state.waited += waited
            # several processes agree to stop at log steps only, so that at other steps none waits for another
            stopping = dist.any_process(bool(stopper.received)) if logging or not dist.is_distributed() else False
            if logging:
                entry = window.read(job.batch_size)
                window = Window(job.device)
                if main:
                    folder.append(step=state.step, lr=job.lr_at(state.step - 1), **entry)
                progress.step(state.step, entry)
            if evaluating:
                _evaluate_and_keep_best(job, folder, state, progress)
            if evaluating or stopping or _due(last_save, job.save_minutes, logging):
                keep()
                last_save = time.monotonic()
            if evaluating and main:
                on_evaluation(state)
            if stopping and not done:
                return stopper.received or signal.SIGTERM
    return 0


def _evaluate_and_keep_best(job: Job, folder: RunFolder, state: State, progress: Progress) -> None:
    metrics, evaluator = evaluate(job, job.evaluations[0], progress)
    value = metrics[job.task.primary]
    if state.best is None or value >= state.best:  # of equals the later, which has trained longer
        state.best, state.best_step, state.metrics = value, state.step, metrics
        if dist.is_main():
            weights = job.ema.module if job.ema is not None else job.task.model
            about = {**job.describe_weights, "step": str(state.step)}
            checkpoint.save_tensors(folder.best, weights.state_dict(), about)
            with writing(folder.path / "final"):
                (folder.path / "final").mkdir(exist_ok=True)
                evaluator.save(folder.path / "final")
    if dist.is_main():
        folder.append(step=state.step, **metrics)
    progress.evaluated(state.step, metrics, state.best)


def _due(last_save: float, minutes: float, logging: bool) -> bool:
    """Whether a checkpoint by the clock is due; asked at log steps only, where processes meet anyway."""
    return logging and dist.any_process(time.monotonic() - last_save > 60 * minutes)


def _stop_if_not_finite(stepper: Stepper, recent: Iterable[tuple[int, list[int]]], job: Job, folder: RunFolder) -> None:
    step = int(stepper.bad_step.item())
    if step < 0:
        return
    parts = {name: value.item() for name, value in stepper.bad_parts.items()}
    samples = sorted(i for items in dist.gather([i for s, items in recent if s == step for i in items]) for i in items)
    shown = ", ".join(f"{name} {value:g}" for name, value in parts.items())
    if dist.is_main():
        files = [job.describe(index) for index in samples]
        content = {"step": step, "losses": {n: str(v) for n, v in parts.items()}, "samples": samples, "files": files}
        write_text(folder.path / "nonfinite.json", json.dumps(content, indent=1))
    where = "loss" if not all(map(math.isfinite, parts.values())) else "gradient"
    raise RunFailed(
        f"The {where} of step {step} is not finite ({shown}); the weights were left as they were before it.",
        hint=f"The samples of that step are in {folder.path / 'nonfinite.json'}. "
        "A lower --lr or --precision fp32 often helps; the same command resumes from the last checkpoint.",
    )


class Window:
    """Means since the last log line. Tensors stay on the device until `read`; `state` lets a resumed run go on."""

    def __init__(self, device: torch.device, steps: int = 0, sums: Mapping[str, float] | None = None) -> None:
        self.device = device
        self.steps = steps
        self.sums: dict[str, Tensor] = {n: torch.tensor(v, device=device) for n, v in (sums or {}).items()}
        self.timed, self.seconds, self.waited = 0, 0.0, 0.0

    def add(self, values: Mapping[str, Tensor]) -> None:
        self.steps += 1
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def took(self, seconds: float, waited: float) -> None:
        self.timed += 1
        self.seconds += seconds
        self.waited += waited

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "sums": self._over_processes()}

    def read(self, batch_size: int) -> dict[str, float]:
        """Means over steps and processes; images/s over all processes; the share of time spent waiting for data."""
        return {
            **{name: value / self.steps for name, value in self._over_processes().items()},
            "images_per_second": round(self.timed * batch_size / self.seconds, 2),
            "data_wait": round(self.waited / self.seconds, 4),
        }

    def _over_processes(self) -> dict[str, float]:
        if not self.sums:
            return {}
        names = sorted(self.sums)
        means = dist.all_reduce_sum(torch.stack([self.sums[name] for name in names])) / dist.processes()
        return dict(zip(names, means.tolist(), strict=True))
