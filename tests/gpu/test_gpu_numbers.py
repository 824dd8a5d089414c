"""Protects what a GPU computes: precisions, loss scaling, the guard, DDP, layouts and layers, against a CPU or fp32."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import environment
from gpu_support import DEVICE, batches_of, deterministic, make_job, make_stepper, needs_device
from safetensors.torch import load_file
from torch import Tensor, nn

from hcnet_cli import engine, kernels
from hcnet_cli.bench.models import literal
from hcnet_cli.console import RunFailed
from hcnet_cli.models import HcNet
from hcnet_cli.rng import seeded
from hcnet_cli.runs import RunFolder

pytestmark = needs_device
__all__ = ["deterministic"]
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Relative to the largest value."""
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    assert bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def losses(data: Path, steps: int = 3, device: torch.device = DEVICE, **values: Any) -> list[float]:
    job = make_job(data, device, **values)
    stepper = make_stepper(job)
    return [float(stepper.step(step, [batch])["loss"]) for step, batch in enumerate(batches_of(job, steps))]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2), ("fp16", 5e-3)])
def test_three_steps_in_every_precision_have_the_losses_of_fp32_on_a_cpu(
    precision: str, tolerance: float, folder_of_images: Path
) -> None:
    """The same images, weights and draws; bf16 keeps 8 bits of a number, fp16 11."""
    ours = losses(folder_of_images, train__precision=precision)
    assert ours == pytest.approx(losses(folder_of_images, device=torch.device("cpu")), rel=tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_weights_gradients_and_the_optimizer_stay_in_fp32(precision: str, folder_of_images: Path) -> None:
    job = make_job(folder_of_images, train__precision=precision)
    stepper = make_stepper(job)
    for step, batch in enumerate(batches_of(job, 2)):
        stepper.step(step, [batch])
    assert stepper.scaler.is_enabled() == (precision == "fp16")
    states = [value for state in job.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert states
    assert {tensor.dtype for tensor in [*job.task.model.parameters(), *states]} == {torch.float32}
    assert {tensor.device.type for tensor in job.task.model.parameters()} == {DEVICE.type}


def test_a_step_that_overflows_in_fp16_is_left_out_and_the_scale_halved(folder_of_images: Path) -> None:
    job = make_job(folder_of_images, train__precision="fp16")
    stepper = make_stepper(job)
    first, second = batches_of(job, 2)
    stepper.scaler.load_state_dict({**stepper.scaler.state_dict(), "scale": 2.0**40})
    before = weights_of(job.task.model)
    stepper.step(0, [first])
    assert_same(weights_of(job.task.model), before)
    assert stepper.scaler.get_scale() == 2.0**39
    assert not stepper.guard.on_any_process()
    stepper.scaler.load_state_dict({**stepper.scaler.state_dict(), "scale": 2.0**10})
    stepper.step(1, [second])
    assert any(not torch.equal(a, b) for a, b in zip(weights_of(job.task.model).values(), before.values(), strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("log_every", [1, 6])
def test_a_loss_that_is_not_finite_moves_no_weight(
    precision: str, log_every: int, folder_of_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of step 3 is infinite. A GPU is looked at when a line is logged, here after step 3 or after step 6."""
    job = make_job(folder_of_images, train__precision=precision, train__log_every=log_every)
    forward, seen = job.task.forward, []

    def broken(batch: dict[str, Any]) -> dict[str, Tensor]:
        seen.append(weights_of(job.task.model))
        return {name: loss + (float("inf") if len(seen) == 3 else 0) for name, loss in forward(batch).items()}

    monkeypatch.setattr(job.task, "forward", broken)
    with pytest.raises(RunFailed, match="The loss of step 3 is not finite"):
        engine.fit(job, RunFolder(tmp_path), engine.State(), lambda _: None)
    if precision != "fp16":  # the scaler leaves out the step; the steps after it, before the line is logged, move them
        assert_same(weights_of(job.task.model), seen[2])
    assert (tmp_path / "failure" / "failure.json").exists()
    assert not (tmp_path / "last").exists()


def test_ddp_on_one_device_makes_the_steps_of_one_process(
    folder_of_images: Path, tmp_path: Path, deterministic: None
) -> None:
    """A group of one process, nccl on CUDA: the same bits. Two processes on one device, gloo: the same to rounding."""
    alone = make_job(folder_of_images, train__accumulate=2)
    batches = batches_of(alone, 6)
    stepper = make_stepper(alone)
    for step in range(3):
        stepper.step(step, batches[2 * step : 2 * step + 2])
    grouped = make_job(folder_of_images, train__accumulate=2)
    backend = "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        stepper = make_stepper(grouped)
        assert isinstance(stepper.net, nn.parallel.DistributedDataParallel)
        for step in range(3):
            stepper.step(step, batches[2 * step : 2 * step + 2])
    finally:
        torch.distributed.destroy_process_group()
    assert_same(weights_of(grouped.task.model), weights_of(alone.task.model))

    script = Path(__file__).with_name("two_processes_on_one_device.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    made = tmp_path / "weights.safetensors"
    done = subprocess.run(
        [*launcher, str(script), str(folder_of_images), str(made)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = weights_of(alone.task.model)
    for name, tensor in load_file(made).items():
        assert_near(tensor, expected[name], 1e-4)


def small_hcnet() -> HcNet:
    """The widths of HcNet-T, fewer blocks, and weights of order one, so that every term is seen."""
    with seeded(3):
        model = HcNet(depths=(1, 1, 2, 1), num_classes=10)
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1.0
            parameter.data = torch.randn(parameter.shape) * scale
    return model


def results(model: nn.Module, images: Tensor) -> Sequence[Tensor]:
    """Logits, and the gradients of the first and the last weights."""
    logits = model(images)
    wanted = [next(model.parameters()), list(model.parameters())[-2]]
    return [logits, *torch.autograd.grad(F.cross_entropy(logits, torch.arange(len(logits), device=DEVICE)), wanted)]


def test_the_model_and_its_kernels_compute_the_literal_form(deterministic: None) -> None:
    """In fp32. On a GPU `accelerate` leaves every layer as it is and says so."""
    with seeded(4):
        images = torch.randn(4, 3, 64, 64)
    plain = small_hcnet()
    reference = results(literal(plain).to(DEVICE), images.to(DEVICE))
    fast = copy.deepcopy(plain).to(DEVICE, memory_format=torch.channels_last)
    said = kernels.accelerate(fast)
    assert (DEVICE.type == "cpu") != any("no kernels" in line for line in said)
    for model in (plain.to(DEVICE), fast):
        for ours, theirs in zip(results(model, images.to(DEVICE)), reference, strict=True):
            assert_near(ours, theirs, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layout_of_images_changes_no_number_and_that_of_weights_only_rounding(
    dtype: torch.dtype, deterministic: None
) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    model = small_hcnet().to(DEVICE, memory_format=torch.channels_last)
    with torch.autocast(DEVICE.type, dtype, enabled=dtype is not torch.float32), torch.no_grad():
        logits, same = (model(images.contiguous(memory_format=layout)) for layout in LAYOUTS)
        contiguous = small_hcnet().to(DEVICE)(images)
    assert torch.equal(logits, same)
    assert_near(contiguous, logits, {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype])
