"""The training loop: steps, log lines, evaluations, checkpoints and stopping."""

from __future__ import annotations

import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from hcnet_cli import checkpoint, dist
from hcnet_cli.console import Progress, RunFailed
from hcnet_cli.engine.job import Evaluation, Evaluator, Job, autocast, to_device
from hcnet_cli.engine.state import State, save
from hcnet_cli.engine.step import NonFiniteGuard, Stepper
from hcnet_cli.files import write_text, writing
from hcnet_cli.runs import RunFolder
from hcnet_cli.weights import digest


class Stopper:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a request to stop after the current step; a second Ctrl-C stops at once"""

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

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


class Window:
    """Means since the last log line. Tensors stay on the device until `read`. `state` is kept in checkpoints."""

    def __init__(self, device: torch.device, steps: int = 0, sums: Mapping[str, float] | None = None) -> None:
        self.device = device
        self.steps = steps
        self.sums: dict[str, Tensor] = {n: torch.tensor(v, device=device) for n, v in (sums or {}).items()}
        self.timed_steps = 0  # steps since the window was made or restored
        self.seconds = 0.0
        self.waited = 0.0

    def add(self, values: Mapping[str, Tensor]) -> None:
        self.steps += 1
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def add_time(self, seconds: float, waited: float) -> None:
        self.timed_steps += 1
        self.seconds += seconds
        self.waited += waited

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "sums": self._mean_over_processes()}

    def read(self, batch_size: int) -> dict[str, float]:
        """Means over steps and processes, images/s of all processes, and the share of time spent waiting for data."""
        return {
            **{name: value / self.steps for name, value in self._mean_over_processes().items()},
            "images_per_second": round(self.timed_steps * batch_size / self.seconds, 2),
            "data_wait": round(self.waited / self.seconds, 4),
        }

    def _mean_over_processes(self) -> dict[str, float]:
        if not self.sums:
            return {}
        names = sorted(self.sums)
        means = dist.all_reduce_sum(torch.stack([self.sums[name] for name in names])) / dist.processes()
        return dict(zip(names, means.tolist(), strict=True))


def evaluate(job: Job, evaluation: Evaluation, progress: Progress | None = None) -> tuple[dict[str, float], Evaluator]:
    """Metrics of the job's weights (`Job.weights`) by one evaluation, and the evaluator that holds the predictions."""
    task, evaluator = evaluation.task, evaluation.task.evaluator()
    trained = task.model
    task.model = job.weights
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


def fit(job: Job, folder: RunFolder, state: State, on_evaluation: Callable[[State], None]) -> int:
    """Trains from `state.step` to `job.total_steps`; logs, evaluates and saves into `folder`.

    Returns 0, or the number of the signal that stopped it after saving. `on_evaluation` is called on the main process
    after each evaluation, the last one included. RunFailed if a loss or gradient is not finite.
    """
    stepper = Stepper(job)
    if state.scaler:
        stepper.scaler.load_state_dict(state.scaler)
    guard = stepper.guard
    recent: deque[tuple[int, list[int]]] = deque(maxlen=1 if guard.checked_every_step else job.log_every)
    window = Window(job.device, **state.window)
    last_save = time.monotonic()
    micro_batches = job.train.iterate(state.step)
    main = dist.is_main()

    def save_checkpoint() -> None:
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
            if (logging or guard.checked_every_step) and guard.on_any_process():
                _report_non_finite(guard, recent, job, folder)
            seconds = time.monotonic() - begun
            window.add_time(seconds, waited)
            state.seconds += seconds
            state.waited += waited
            # several processes agree to stop at log steps only; at other steps none waits for another
            stopping = dist.any_process(bool(stopper.received)) if logging or not dist.is_distributed() else False
            if logging:
                entry = window.read(job.batch_size)
                window = Window(job.device)
                if main:
                    folder.append(step=state.step, lr=job.lr_at(state.step - 1), **entry)
                progress.step(state.step, entry)
            if evaluating:
                _evaluate_and_keep_best(job, folder, state, progress)
            if evaluating or stopping or _save_is_due(last_save, job.save_minutes, logging):
                save_checkpoint()
                last_save = time.monotonic()
            if evaluating and main:
                on_evaluation(state)
            if stopping and not done:
                return stopper.received or signal.SIGTERM
    return 0


def _evaluate_and_keep_best(job: Job, folder: RunFolder, state: State, progress: Progress) -> None:
    metrics, evaluator = evaluate(job, job.evaluations[0], progress)
    value = metrics[job.task.primary]
    if state.best is None or value >= state.best:  # of equal scores the later one, which has trained longer
        state.best, state.best_step, state.metrics = value, state.step, metrics
        if dist.is_main():
            best = job.weights.state_dict()
            state.weights = digest(best)
            about = {**job.describe_weights, **job.identity, "step": state.step, "metrics": metrics}
            checkpoint.save_tensors(folder.best, best, {**about, "weights": state.weights})
            final = folder.path / "final"
            with writing(final):
                final.mkdir(exist_ok=True)
                evaluator.save(final)
    if dist.is_main():
        folder.append(step=state.step, **metrics)
    progress.evaluated(state.step, metrics, state.best)


def _save_is_due(last_save: float, minutes: float, logging: bool) -> bool:
    """Whether `minutes` have passed on any process. Only at log steps, where processes communicate anyway."""
    return logging and dist.any_process(time.monotonic() - last_save > 60 * minutes)


def _report_non_finite(
    guard: NonFiniteGuard, recent: Iterable[tuple[int, list[int]]], job: Job, folder: RunFolder
) -> None:
    """Writes nonfinite.json (losses, samples and files of the step) and raises RunFailed, on every process."""
    step, parts = guard.found()
    samples = sorted(i for items in dist.gather([i for s, items in recent if s == step for i in items]) for i in items)
    report = folder.path / "nonfinite.json"
    if dist.is_main():
        files = [job.sample_path(index) for index in samples]
        content = {"step": step, "losses": {n: str(v) for n, v in parts.items()}, "samples": samples, "files": files}
        write_text(report, json.dumps(content, indent=1))
    what = "gradient" if all(map(math.isfinite, parts.values())) else "loss"
    shown = ", ".join(f"{name} {value:g}" for name, value in parts.items())
    raise RunFailed(
        f"The {what} of step {step} is not finite ({shown}); the weights were left as they were before it.",
        hint=f"The samples of that step are in {report}. "
        "A lower --lr or --precision fp32 often helps; the same command resumes from the last checkpoint.",
    )
