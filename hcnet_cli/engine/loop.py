"""The training loop: steps, log lines, evaluations, checkpoints and stopping."""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import Tensor

from hcnet_cli import checkpoint, dist
from hcnet_cli.console import Progress, UserError
from hcnet_cli.data.loader import watching_workers
from hcnet_cli.engine.failure_report import StepKeys, report_non_finite, step_keys
from hcnet_cli.engine.job import EvalBatches, Evaluation, Evaluator, Job, autocast, to_device
from hcnet_cli.engine.profiler import Profiler
from hcnet_cli.engine.state import State, save
from hcnet_cli.engine.step import Stepper
from hcnet_cli.engine.strip import add_row
from hcnet_cli.files import optional
from hcnet_cli.profile import evaluating, peak_memory_mb
from hcnet_cli.runs import RunFolder
from hcnet_cli.weights import digest

MISSING = ".missing"  # in final/ while its files are still to be written


class Stopper:
    """Turns SIGNALS into a request to stop after the current step; a second Ctrl-C stops at once.

    A SIGHUP that is ignored stays so: under nohup a run outlives its terminal.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: int = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        for number in self.SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


class StopRequest(Exception):
    """Ends an evaluation that a signal has interrupted, on every process; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Agreement:
    """The number of the signal that any process has received, or 0, equal on every process.

    One call is one unit of work: a step, or a batch of an evaluation. Several processes communicate only at every so
    many calls that SECONDS pass, a number that all of them compute from the pace of the slowest.
    """

    SECONDS = 2.0

    def __init__(self, stopper: Stopper) -> None:
        self.stopper = stopper
        self.calls, self.due_after, self.since = 0, 1, time.monotonic()

    def __call__(self, at_once: bool = False) -> int:
        """`at_once`: communicate at this call, whenever the last one was."""
        if not dist.is_distributed():
            return self.stopper.received
        self.calls += 1
        if self.calls < self.due_after and not at_once:
            return 0
        pace = (time.monotonic() - self.since) / self.calls
        number, pace = dist.all_reduce_max(float(self.stopper.received), pace)
        self.due_after = max(1, int(self.SECONDS / max(pace, 1e-6)))
        self.calls, self.since = 0, time.monotonic()
        return int(number)


class Window:
    """Means since the last log line. Tensors stay on the device until `read`. `state` is kept in checkpoints, with
    sums that are not finite as text, for JSON cannot hold them.
    """

    def __init__(self, device: torch.device, steps: int = 0, sums: Mapping[str, float | str] | None = None) -> None:
        self.device = device
        self.steps = steps
        self.sums: dict[str, Tensor] = {n: torch.tensor(float(v), device=device) for n, v in (sums or {}).items()}
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
        sums = self._mean_over_processes()
        return {"steps": self.steps, "sums": {n: v if math.isfinite(v) else str(v) for n, v in sums.items()}}

    def read(self, batch_size: int, alone: bool = False) -> dict[str, float]:
        """Means over steps and processes, images/s of all processes, and the share of time spent waiting for data.

        `alone`: means of this process; none waits for another.
        """
        sums = {name: value.item() for name, value in self.sums.items()} if alone else self._mean_over_processes()
        return {
            **{name: value / self.steps for name, value in sums.items()},
            "images_per_second": round(self.timed_steps * batch_size / self.seconds, 2),
            "data_wait": round(self.waited / self.seconds, 4),
        }

    def _mean_over_processes(self) -> dict[str, float]:
        if not self.sums:
            return {}
        names = sorted(self.sums)
        means = dist.all_reduce_sum(torch.stack([self.sums[name] for name in names])) / dist.processes()
        return dict(zip(names, means.tolist(), strict=True))


@watching_workers()
def evaluate(
    job: Job, evaluation: Evaluation, progress: Progress | None = None, stopper: Stopper | None = None
) -> tuple[dict[str, float], Evaluator]:
    """Metrics of the job's weights (`Job.weights`) by one evaluation, and the evaluator that holds the predictions.

    UserError where the metric that matters is undefined on these data; StopRequest once `stopper` got a signal.
    """
    evaluator = evaluation.task.evaluator()
    with contextlib.nullcontext(progress) if progress else Progress(len(evaluation.batches)) as shown:
        predict(job, evaluation, evaluator, evaluation.batches, shown, stopper)
        metrics = evaluator.compute()
    primary = evaluation.task.primary
    if not math.isfinite(metrics.get(primary, math.nan)):
        raise UserError(
            f"{primary} is not defined on the validation data: there is nothing in them to measure it on.",
            hint="`hcnet check` says what the data hold.",
        )
    return metrics, evaluator


def predict(
    job: Job,
    evaluation: Evaluation,
    evaluator: Evaluator,
    batches: EvalBatches,
    progress: Progress | None = None,
    stopper: Stopper | None = None,
) -> None:
    """Hands the predictions for `batches` to the evaluator. StopRequest once `stopper` of any process got a signal."""
    stopping = Agreement(stopper) if stopper else None
    common = -int(dist.all_reduce_max(-len(batches))[0]) if stopper else 0  # batches that every process has
    task = evaluation.task
    trained = task.model
    task.model = job.weights
    if dist.is_distributed():  # the statistics of batch norm are those of the main process, which are saved
        distribute_bn(task.model, dist.world_size(), reduce=False)
    try:
        with evaluating(task), torch.inference_mode():
            for number, batch in enumerate(batches, 1):
                moved = to_device(batch, job.device)
                with autocast(job.precision, job.device):
                    predictions = task.predict(moved)
                evaluator.update(predictions, moved)
                if progress:
                    progress.evaluating(number, len(batches))
                if stopping and number <= common and (received := stopping()):
                    raise StopRequest(received)
    finally:
        task.model = trained


@watching_workers()
def fit(job: Job, folder: RunFolder, state: State, on_evaluation: Callable[[State], None]) -> int:
    """Trains from `state.step` to `job.total_steps`, or until patience ends; logs, evaluates and saves into `folder`.

    Returns 0, or the number of the signal that stopped it after saving. `on_evaluation` is called on the main process
    after each evaluation, the last one included, when the checkpoint is written. RunFailed if a loss or gradient is not
    finite. A signal interrupts an evaluation too; the run that goes on begins with it. Predictions and pictures come
    after the checkpoint: nothing depends on them.
    """
    profiler = Profiler(job, folder.path / "profile", job.profile)
    stepper = Stepper(job, profiler)
    if state.scaler:
        stepper.scaler.load_state_dict(state.scaler)
    guard = stepper.guard
    recent: deque[StepKeys] = deque(maxlen=1 if guard.checked_every_step else job.log_every)
    window = Window(job.device, **state.window)
    last_save = time.monotonic()
    micro_batches = job.train.iterate(state.step)
    main = dist.is_main()

    def save_checkpoint() -> None:
        of_all = [state.unreadable_files, *dist.gather(job.train.unreadable)]
        state.unreadable_files = sorted({file for files in of_all for file in files})
        state.scaler = stepper.scaler.state_dict()
        state.window = window.state()
        if main:
            folder.require_lock()
            save(job, folder.path, state)
        dist.barrier()

    def evaluate_and_save() -> int:
        """Evaluates, saves, and keeps the predictions of the best weights. Returns 0, or the number of the signal that
        interrupted the evaluation; then the checkpoint says that it is still to be made.
        """
        nonlocal last_save
        try:
            evaluator = _evaluate_and_keep_best(job, folder, state, progress, stopper)
        except StopRequest as stopped:
            save_checkpoint()
            return stopped.number
        state.evaluation_due = False
        save_checkpoint()
        last_save = time.monotonic()
        if main:
            on_evaluation(state)
        if evaluator is not None and main:
            progress.begin("saving predictions and pictures")
            save_final(evaluator, folder.path / "final")
        return 0

    def shown() -> dict[str, float]:
        """What the progress line has beside the means of the log."""
        return {"lr": job.lr_at(state.step - 1), "memory_mb": peak_memory_mb(job.device)}

    progress = Progress(job.total_steps, state.step, job.task.primary, job.train.steps_per_epoch)
    with Stopper() as stopper, progress, contextlib.closing(profiler):
        if dist.from_main(lambda: state.step == state.best_step and (folder.path / "final" / MISSING).exists()):
            _, again = evaluate(job, job.evaluations[0], progress)
            if main:
                save_final(again, folder.path / "final")
        agreement = Agreement(stopper)
        if state.evaluation_due and (stopping := evaluate_and_save()):
            return stopping
        while state.step < job.total_steps and not out_of_patience(job, state):
            profiler.begin()
            begun = time.monotonic()
            with profiler.part("wait for data"):
                batches = [next(micro_batches) for _ in range(job.accumulate)]
            waited = time.monotonic() - begun
            recent.append(step_keys(state.step, batches))
            with profiler.part("transfer"):
                moved = [to_device(batch, job.device) for batch in batches]
            window.add(stepper.step(state.step, moved))
            state.step += 1
            evaluating = state.step == job.total_steps or state.step % job.eval_every == 0
            logging = evaluating or state.step % job.log_every == 0
            stopping = agreement(at_once=logging)
            with profiler.part("optimizer"):  # a checkpoint must not forget that a step was not finite
                failed = (logging or stopping or guard.checked_every_step) and guard.on_any_process()
            if failed:
                report_non_finite(guard, recent, job, folder, state)
            seconds = time.monotonic() - begun
            profiler.end()
            window.add_time(seconds, waited)
            state.seconds += seconds
            state.waited += waited
            if logging:
                entry = window.read(job.batch_size)
                window = Window(job.device)
                if main:
                    folder.append(step=state.step, lr=job.lr_at(state.step - 1), **entry)
                progress.step(state.step, entry | shown())
            elif progress.due and main:
                progress.step(state.step, window.read(job.batch_size, alone=True) | shown())
            if evaluating:
                state.evaluation_due = True
            if evaluating and not stopping:
                stopping = evaluate_and_save()
            elif stopping or _save_is_due(last_save, job.save_minutes, logging):
                save_checkpoint()
                last_save = time.monotonic()
            progress.begin(f"step {state.step + 1}/{job.total_steps}")
            if stopping:
                return stopping
    return 0


def _evaluate_and_keep_best(
    job: Job, folder: RunFolder, state: State, progress: Progress, stopper: Stopper
) -> Evaluator | None:
    """Returns the evaluator if these weights are the best so far: its predictions are worth keeping."""
    metrics, evaluator = evaluate(job, job.evaluations[0], progress, stopper)
    value, before = metrics[job.task.primary], state.best
    if state.best is None or value > state.best:
        state.improved_step = state.step
    is_best = state.best is None or value >= state.best  # of equal scores the later one, which has trained longer
    if is_best:
        state.best, state.best_step, state.metrics = value, state.step, metrics
        if dist.is_main():
            best = job.weights.state_dict()
            state.weights = digest(best)
            about = {**job.describe_weights, **job.identity, "step": state.step, "metrics": metrics}
            checkpoint.save_tensors(folder.best, best, {**about, "weights": state.weights})
            mark_final_missing(folder.path / "final")
    if dist.is_main():
        folder.append(step=state.step, **metrics)
        with optional(folder.path / "progress.png"):
            number = -(-state.step // job.eval_every)
            add_row(folder.path, evaluator, state.step, number, f"{job.task.primary} {value:.1f}")
    progress.evaluated(state.step, metrics, before)
    return evaluator if is_best else None


def out_of_patience(job: Job, state: State) -> bool:
    """Whether training stops early here: the last `Job.patience` evaluations brought no better score."""
    if job.patience is None or state.improved_step is None:
        return False
    return state.step // job.eval_every - state.improved_step // job.eval_every >= job.patience


def mark_final_missing(final: Path) -> None:
    """Says on the disk, until `save_final` is done, that the predictions in `final` are not those of the best weights.

    The checkpoint is written in between; whoever goes on from it after a crash sees the mark and makes them again.
    """
    with optional(final):
        final.mkdir(exist_ok=True)
        (final / MISSING).touch()


def save_final(evaluator: Evaluator, final: Path) -> None:
    """Replaces what is in `final` by what the evaluator keeps (main process). Never ends a run: failures are warnings.

    Everything is written elsewhere first, so that the folder holds the files of one evaluation alone.
    """
    made = final.with_name(f".{final.name}.tmp")
    with optional(final):
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        try:
            with optional(final):
                evaluator.save(made)
        finally:
            shutil.rmtree(final, ignore_errors=True)
            made.rename(final)


def _save_is_due(last_save: float, minutes: float, logging: bool) -> bool:
    """Whether `minutes` have passed on any process. Only at log steps, where processes communicate anyway."""
    return logging and dist.any_process(time.monotonic() - last_save > 60 * minutes)
