"""Protects the training loop: interrupted, divided or repeated, a run gives the same numbers bit for bit.

The task here is a toy, for the engine knows none; the same is shown for the real tasks through the command line.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from hcnet_cli import checkpoint, engine, optim
from hcnet_cli.console import RunFailed, UserError
from hcnet_cli.data.loader import EvalLoader, TrainLoader, epoch_batches
from hcnet_cli.engine import Evaluation, Job, State
from hcnet_cli.engine.step import NonFiniteGuard
from hcnet_cli.plain_json import read_json
from hcnet_cli.rng import derive, keyed_uniform, seeded
from hcnet_cli.runs import RunFolder, read_log

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "adamw, not fused": ("adamw", {"fused": False}),
    "sgd": ("sgd", {"momentum": 0.9}),
    "lamb": ("lamb", {}),
    "muon": ("muon", {"fallback_list": ["2.*"]}),
    "lion": ("lion", {}),
}
MICRO_BATCH = [0, 2, 4, 6, 7, 5, 3, 1]  # pairs are mixed with their mirror image, so the second halves are turned
TIMES = ("images_per_second", "data_wait")
UNREADABLE = (7, 11, 23)  # training points; another takes their place in a real data set


class Points:
    """y = Wx + noise; the noise of a training sample is drawn from its key."""

    def __init__(self, count: int) -> None:
        with seeded(0):
            self.x, self.w = torch.randn(count, 6), torch.randn(6, 2)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, request: tuple[int, int, int]) -> dict[str, Any]:
        index, key, _ = request
        with seeded(key):
            noise = 0.1 * torch.randn(2) if key else torch.zeros(2)
        item = {"sample": index, "key": key, "image": self.x[index], "target": self.x[index] @ self.w + noise}
        return item if not key or index not in UNREADABLE else {**item, "unreadable": f"point {index}"}


class Fitted:
    def __init__(self) -> None:
        self.error = 0.0

    def update(self, predictions: Tensor, batch: dict[str, Any]) -> None:
        self.error += float((predictions - batch["target"]).double().square().sum())

    def compute(self) -> dict[str, float]:
        return {"score": 100 - self.error}

    def save(self, folder: Path) -> None:
        (folder / "kept.txt").write_text(str(self.error))


class Regression(nn.Module):
    primary = "score"

    def __init__(self, at_step: Callable[[int], None] | None = None, dropout: float = 0.2) -> None:
        super().__init__()
        with seeded(1):
            self.model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))
        self.at_step, self.dropout, self.seen = at_step, dropout, 0

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if self.at_step:
            self.at_step(self.seen)
        self.seen += 1
        keep = (keyed_uniform(batch["key"], 6) >= self.dropout).T
        error = self.model(batch["image"] * keep) - batch["target"]
        return {"loss_l2": error.square().mean(), "loss_l1": 0.1 * error.abs().mean()}

    def predict(self, batch: dict[str, Any]) -> Tensor:
        return self.model(batch["image"])

    def evaluator(self) -> Fitted:
        return Fitted()


def make_job(
    task: Regression,
    total: int = 12,
    accumulate: int = 1,
    ema: bool = True,
    eval_every: int = 5,
    optimizer: tuple[str, dict[str, Any]] = ("adamw", {}),
) -> Job:
    train = Points(40)
    name, args = optimizer
    return Job(
        task=task,
        train=TrainLoader(train, batch_size=8, accumulate=accumulate, total_steps=total, seed=3, workers=0),
        evaluations=[Evaluation("", task, EvalLoader(Points(11), batch_size=4, workers=0))],
        sample_path=lambda index: f"point {index}",
        optimizer=optim.build_optimizer(task.model, name=name, args=args, lr=0.02, weight_decay=0.05, no_decay="1d"),
        lr_at=lambda step: optim.lr_at(step, lr=0.02, total_steps=total, warmup_steps=3),
        total_steps=total,
        batch_size=8,
        accumulate=accumulate,
        eval_every=eval_every,
        log_every=2,
        save_minutes=60,
        clip_grad=1.0,
        precision="fp32",
        device=torch.device("cpu"),
        seed=3,
        ema=ModelEmaV3(task.model, decay=0.9) if ema else None,
    )


def run(folder: Path, task: Regression, **options: Any) -> tuple[int, State, Job]:
    """Goes on from what is in `folder`, as the program does."""
    folder.mkdir(exist_ok=True)
    job = make_job(task, **options)
    state = engine.restore(job, folder)
    place = RunFolder(folder)
    place.rewind(state.step)
    return engine.fit(job, place, state, lambda _: None), state, job


def outcome(folder: Path, state: State, job: Job) -> dict[str, Any]:
    """All that must be equal: weights, EMA, optimizer, best weights, metrics, and the log but for its times."""
    assert job.ema is not None
    log = [{k: v for k, v in e.items() if k not in TIMES} for e in read_log(folder / "metrics.jsonl")]
    tensors = {
        **job.task.model.state_dict(),
        **{f"ema {k}": v for k, v in job.ema.module.state_dict().items()},
        **{f"{i} {k}": v for i, s in enumerate(job.optimizer.state.values()) for k, v in s.items()},
    }
    plain = {"log": log, "best": (state.best, state.best_step, state.metrics), "step": state.step}
    plain["unreadable"] = state.unreadable_files
    return {**plain, "weights": (folder / "best.safetensors").read_bytes(), "tensors": tensors}


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    ours, theirs = a.pop("tensors"), b.pop("tensors")
    assert a == b
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])) for name in ours)


@pytest.fixture(scope="module")
def never_interrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    stopped, state, job = run(folder, Regression())
    assert stopped == 0
    assert state.step == 12
    assert state.unreadable_files == ["point 11", "point 23", "point 7"]
    return outcome(folder, state, job)


@pytest.mark.parametrize("step", range(12))
def test_stopped_by_a_signal_at_any_step_and_continued_is_never_interrupted(
    step: int, tmp_path: Path, never_interrupted: dict[str, Any]
) -> None:
    number = engine.Stopper.SIGNALS[step % 4]

    def interrupt(seen: int) -> None:
        if seen == step:
            os.kill(os.getpid(), number)

    stopped, state, _ = run(tmp_path, Regression(interrupt))
    if step < 11:
        assert stopped == number
        assert state.step == step + 1  # the step under way is finished and saved
    stopped, state, job = run(tmp_path, Regression())
    assert stopped == 0
    assert_equal(outcome(tmp_path, state, job), dict(never_interrupted))


@pytest.mark.parametrize("step", range(12))
def test_killed_at_any_step_and_continued_is_never_interrupted(
    step: int, tmp_path: Path, never_interrupted: dict[str, Any]
) -> None:
    """Kill -9 leaves no time to save: the run goes back to its last checkpoint and forgets what it logged since."""

    class Killed(BaseException):
        pass

    def kill(seen: int) -> None:
        if seen == step:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path, Regression(kill))
    stopped, state, job = run(tmp_path, Regression())
    assert stopped == 0
    assert_equal(outcome(tmp_path, state, job), dict(never_interrupted))


def test_a_damaged_last_checkpoint_costs_steps_not_results(tmp_path: Path, never_interrupted: dict[str, Any]) -> None:
    run(tmp_path, Regression())
    (tmp_path / "last" / "model.safetensors").write_bytes(b"cut")
    _, state, job = run(tmp_path, Regression())
    assert_equal(outcome(tmp_path, state, job), dict(never_interrupted))


def test_files_that_any_process_could_not_read_are_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hcnet_cli.dist.gather", lambda item: [item, ["point 11", "point 39"]])
    _, state, _ = run(tmp_path, Regression())
    assert state.unreadable_files == ["point 11", "point 23", "point 39", "point 7"]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_equal_one_batch(accumulate: int, tmp_path: Path) -> None:
    """K micro-batches of b/k = one batch of b, dropout and augmentation included: only the order of sums differs."""
    _, _, whole = run(tmp_path / "1", Regression(), ema=False)
    _, _, parts = run(tmp_path / "k", Regression(), ema=False, accumulate=accumulate)
    for (name, a), b in zip(whole.task.model.state_dict().items(), parts.task.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6, msg=name)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def interrupt(seen: int) -> None:
        if seen == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Regression(interrupt))


def test_handlers_are_given_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in engine.Stopper.SIGNALS]
    run(tmp_path, Regression())
    assert [signal.getsignal(number) for number in engine.Stopper.SIGNALS] == before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Stopped twice and continued in new objects: state of parameters, of groups, flags and counters all survive."""

    def interrupt(at: int) -> Regression:
        return Regression(lambda seen: os.kill(os.getpid(), signal.SIGTERM) if seen == at else None)

    _, state, job = run(tmp_path / "whole", Regression(), optimizer=OPTIMIZERS[name])
    whole = outcome(tmp_path / "whole", state, job)
    run(tmp_path / "parts", interrupt(3), optimizer=OPTIMIZERS[name])
    run(tmp_path / "parts", interrupt(2), optimizer=OPTIMIZERS[name])
    _, state, job = run(tmp_path / "parts", Regression(), optimizer=OPTIMIZERS[name])
    assert state.step == 12
    assert_equal(outcome(tmp_path / "parts", state, job), whole)


def test_checkpoints_from_before_other_optimizers_go_on_bit_for_bit(
    tmp_path: Path, never_interrupted: dict[str, Any]
) -> None:
    """They hold "<parameter>:step", ":exp_avg" and ":exp_avg_sq" of AdamW, and no `optimizer` in state.json."""
    run(tmp_path, Regression(lambda seen: os.kill(os.getpid(), signal.SIGTERM) if seen == 6 else None))
    found = checkpoint.read(tmp_path)
    assert found is not None
    tensors, content = found
    names = [name for name, _ in Regression().model.named_parameters()]
    assert tensors["optimizer"].keys() == {f"{n}:{slot}" for n in names for slot in ("step", "exp_avg", "exp_avg_sq")}
    assert content.pop("optimizer") == {}
    checkpoint.write(tmp_path, tensors, content)
    _, state, job = run(tmp_path, Regression())
    assert_equal(outcome(tmp_path, state, job), dict(never_interrupted))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    _, _, job = run(tmp_path, Regression(), ema=False)
    tensors, rest = optim.state_to_save(job.optimizer, job.task.model)
    other = make_job(Regression(), ema=False)
    for name in ("9.weight:step", "group 7:step"):
        with pytest.raises(UserError, match="not trained here"):
            optim.load_state(other.optimizer, other.task.model, {**tensors, name: torch.tensor(1.0)}, rest)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_move(what: str, name: str, tmp_path: Path) -> None:
    """It names the step and the loss parts, and keeps the samples; the weights are those of the step before."""
    _, _, good = run(tmp_path / "good", Regression(), ema=False, total=7, optimizer=OPTIMIZERS[name])

    class Broken(Regression):
        def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
            losses = super().forward(batch)
            if self.seen == 8:
                if what == "loss":
                    losses["loss_l1"] = losses["loss_l1"] * torch.tensor(float("nan"))
                else:
                    losses["loss_l1"] = losses["loss_l1"] + (self.model[0].weight * 0).abs().sqrt().sum()
            return losses

    task = Broken()
    job = make_job(task, ema=False, optimizer=OPTIMIZERS[name])
    job.lr_at = good.lr_at
    with pytest.raises(RunFailed, match=rf"{what} of step 8 is not finite .*loss_l1") as error:
        engine.fit(job, RunFolder(tmp_path), State(), lambda _: None)
    assert error.value.exit_code == 1
    for a, b in zip(task.model.parameters(), good.task.model.parameters(), strict=True):
        assert torch.equal(a, b)
    report = json.loads((tmp_path / "failure" / "failure.json").read_text())
    assert report["step"] == 7
    (batch,) = report["batches"]
    assert [one["sample"] for one in batch["samples"]] == epoch_batches(40, 8, 3, 1)[2][MICRO_BATCH].tolist()
    assert [one["key"] for one in batch["samples"]] == [derive(3, "sample", 1, s["sample"]) for s in batch["samples"]]
    assert [one["file"] for one in batch["samples"]] == [f"point {one['sample']}" for one in batch["samples"]]
    kept = load_file(tmp_path / "failure" / "weights.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in good.task.model.state_dict().items())


def looked_at_log_steps(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the guard on a CPU what it is for a GPU."""
    real = NonFiniteGuard.__init__

    def init(guard: NonFiniteGuard, *arguments: Any) -> None:
        real(guard, *arguments)
        guard.checked_every_step = False

    monkeypatch.setattr(NonFiniteGuard, "__init__", init)
    job.log_every = 10


class InfiniteThenStopped(Regression):
    """The loss of step 3 is infinite; the signal comes in step 4, before a line is logged."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        losses = super().forward(batch)
        if self.seen == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return {name: loss + (float("inf") if self.seen == 3 else 0) for name, loss in losses.items()}


def test_a_signal_does_not_save_past_a_loss_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(InfiniteThenStopped(), ema=False)
    looked_at_log_steps(job, monkeypatch)
    with pytest.raises(RunFailed, match=r"The loss of step 3 is not finite .*; the weights were left as they were"):
        engine.fit(job, RunFolder(tmp_path), State(), lambda _: None)
    assert not (tmp_path / "last").exists()


def test_in_fp16_the_sentence_counts_the_steps_after_a_loss_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(InfiniteThenStopped(), ema=False)
    job.precision = "fp16"
    looked_at_log_steps(job, monkeypatch)
    with pytest.raises(RunFailed, match="it was left out, but 1 more was made before it was noticed"):
        engine.fit(job, RunFolder(tmp_path), State(), lambda _: None)
    assert json.loads((tmp_path / "failure" / "failure.json").read_text())["later_steps"] == 1


class Overflowing(Regression):
    """The gradient of step 3 is not finite: fp16 leaves out the step."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        losses = super().forward(batch)
        if batch["step_key"] == derive(3, "step", 3):
            losses["loss_l1"].register_hook(lambda gradient: gradient * float("inf"))
        return losses


def test_a_norm_that_is_not_finite_is_kept_in_the_log_and_in_the_window(tmp_path: Path) -> None:
    """The run stops right after such a step and goes on as if it had not."""

    def fp16(folder: Path, task: Regression) -> tuple[int, list[dict[str, Any]]]:
        folder.mkdir(exist_ok=True)
        job = make_job(task)
        job.precision, job.log_every = "fp16", 5
        state = engine.restore(job, folder)
        RunFolder(folder).rewind(state.step)
        stopped = engine.fit(job, RunFolder(folder), state, lambda _: None)
        return stopped, [{k: v for k, v in e.items() if k not in TIMES} for e in read_log(folder / "metrics.jsonl")]

    _, whole = fp16(tmp_path / "whole", Overflowing())
    assert [e["grad_norm"] is None for e in whole if "lr" in e] == [True, False, False]
    stop = Overflowing(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None)
    assert fp16(tmp_path / "parts", stop)[0] == signal.SIGTERM
    assert read_json(tmp_path / "parts" / "last" / "state.json")["state"]["window"]["sums"]["grad_norm"] == "nan"
    assert fp16(tmp_path / "parts", Overflowing()) == (0, whole)


def test_a_loss_that_one_of_two_processes_sees_stops_both(tmp_path: Path) -> None:
    """An infinite constant in the loss of one process leaves the gradients finite; the other process must not go on."""
    script = Path(__file__).parent / "non_finite_on_one_process.py"
    fresh.run_two(script, tmp_path, "adamw", "lamb")
    for optimizer in ("adamw", "lamb"):
        folder = tmp_path / optimizer
        assert [(folder / f"rank{rank}.txt").read_text() for rank in (0, 1)] == ["loss of step 4, unmoved"] * 2
        batches = json.loads((folder / "failure" / "failure.json").read_text())["batches"]
        assert [(batch["process"], len(batch["samples"])) for batch in batches] == [(0, 4), (1, 4)]


def test_a_parameter_no_loss_depends_on_is_named(tmp_path: Path) -> None:
    task = Regression()
    task.model.append(nn.Linear(2, 2))
    task.model[3].requires_grad_(True)
    task.model.forward = lambda x: task.model[2](task.model[1](task.model[0](x)))  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"model\.3\.weight"):
        run(tmp_path, task, ema=False)


def test_best_weights_are_those_of_the_best_evaluation(tmp_path: Path) -> None:
    """With a rising error after the first evaluation the first weights stay best, also after a resume."""

    class Worse(Regression):
        def evaluator(self) -> Fitted:
            fitted = Fitted()
            fitted.error = float(self.seen)
            fitted.update = lambda *_: None  # type: ignore[method-assign]
            return fitted

    _, state, _ = run(tmp_path, Worse(), ema=False)
    assert (state.best_step, state.metrics) == (5, {"score": 95.0})
    evaluations = [entry for entry in read_log(tmp_path / "metrics.jsonl") if "score" in entry]
    assert [entry["score"] for entry in evaluations] == [95.0, 90.0, 88.0]
    assert (tmp_path / "final" / "kept.txt").read_text() == "5.0"


def test_evaluation_uses_the_ema_and_leaves_the_model_training(tmp_path: Path) -> None:
    _, _, job = run(tmp_path, Regression())
    assert job.ema is not None
    other = make_job(Regression(), ema=False)
    other.task.model.load_state_dict(job.ema.module.state_dict())
    assert engine.evaluate(other, other.evaluations[0])[0] == engine.evaluate(job, job.evaluations[0])[0]
    assert job.task.training
    assert job.task.model is not job.ema.module


def test_nested_batches_reach_the_device() -> None:
    batch = {"a": torch.ones(2), "b": [(torch.ones(1), "text"), 3]}
    moved = engine.to_device(batch, torch.device("meta"))
    assert moved["a"].is_meta
    assert moved["b"][0][0].is_meta
    assert moved["b"][0][1] == "text"


def test_a_signal_interrupts_an_evaluation_which_is_then_made_first(
    tmp_path: Path, never_interrupted: dict[str, Any]
) -> None:
    """At the evaluations of steps 5, 10 and 12, after their first batch; nothing is evaluated or logged twice."""

    class Interrupted(Regression):
        def predict(self, batch: dict[str, Any]) -> Tensor:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().predict(batch)

    for step in (5, 10, 12):
        stopped, state, _ = run(tmp_path, Interrupted())
        assert (stopped, state.step, state.evaluation_due) == (signal.SIGTERM, step, True)
        assert state.best_step != step
        until = lambda seen: os.kill(os.getpid(), signal.SIGTERM) if seen == 0 else None  # noqa: E731
        stopped, state, job = run(tmp_path, Regression(until))
        assert not state.evaluation_due
    assert stopped == 0
    assert_equal(outcome(tmp_path, state, job), dict(never_interrupted))


def test_processes_agree_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 2 s of the slowest process's pace, however fast steps are; at once where they meet anyway."""
    from hcnet_cli.engine import loop

    now, reduced = [0.0], []

    def all_reduce_max(received: float, pace: float) -> tuple[float, float]:
        reduced.append(now[0])
        return received, max(pace, 0.25)  # another process takes 0.25 s a step

    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(loop.dist, "is_distributed", lambda: True)
    monkeypatch.setattr(loop.dist, "all_reduce_max", all_reduce_max)
    stopper = engine.Stopper()
    agreement = loop.Agreement(stopper)
    for _ in range(20):
        now[0] += 0.1
        assert agreement() == 0
    assert reduced == pytest.approx([0.1, 0.9, 1.7])  # after the first step, then every 2 / 0.25 = 8 steps
    stopper.received = signal.SIGUSR1
    now[0] += 0.1
    assert agreement() == 0
    assert agreement(at_once=True) == signal.SIGUSR1
