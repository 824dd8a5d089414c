"""One optimizer step: micro-batches, gradient, finite check, update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hcnet_cli import dist, optim
from hcnet_cli.console import UserError
from hcnet_cli.engine.job import Batch, Job, Task, autocast
from hcnet_cli.engine.profiler import Profiler
from hcnet_cli.rng import derive


class NonFiniteGuard:
    """Keeps the optimizer from moving the weights once a loss or a gradient was not finite.

    torch's fused optimizers read a flag on the device and leave the weights alone from that step on; the host need not
    wait for a GPU and looks at log steps only. For every other optimizer the host looks before each update. With fp16
    the gradient scaler skips the update instead.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device, scaled: bool) -> None:
        self.optimizer = optimizer
        self.on_device = optim.reads_found_inf(optimizer)
        self.checked_every_step = device.type == "cpu" or not (scaled or self.on_device)
        self.first_step = torch.full((), -1.0, device=device)  # -1: every step was finite
        self.parts: dict[str, Tensor] = {}  # the loss parts of that step

    def record(self, step: int, finite: Tensor, parts: Mapping[str, Tensor]) -> None:
        first = ~finite & (self.first_step < 0)
        self.first_step = torch.where(first, float(step), self.first_step)
        self.parts = {
            name: torch.where(first, part.float(), self.parts.get(name, part).float()) for name, part in parts.items()
        }

    def update(self) -> None:
        """Calls optimizer.step(), which moves no weight if a step was not finite on this process or any other."""
        if self.on_device:
            self.optimizer.found_inf = (self.first_step >= 0).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not self.on_any_process():
            self.optimizer.step()

    def on_any_process(self) -> bool:
        """Whether any process has seen a step that was not finite. The host waits for the device."""
        return dist.any_process(bool(self.first_step >= 0))

    def found(self) -> tuple[int, dict[str, float]]:
        """The first non-finite step of all processes, with the loss parts of the process that saw it."""
        own = int(self.first_step.item()), {name: part.item() for name, part in self.parts.items()}
        everyone: list[tuple[int, dict[str, float]]] = dist.gather(own)
        return min((seen for seen in everyone if seen[0] >= 0), key=lambda seen: seen[0])


class Stepper:
    """Makes the optimizer steps of a job, on this process's share of each batch."""

    def __init__(self, job: Job, profiler: Profiler) -> None:
        self.job, self.part = job, profiler.part
        self.net: Task | DistributedDataParallel = job.task
        if dist.is_distributed():
            ids = [job.device.index] if job.device.type == "cuda" else None
            self.net = DistributedDataParallel(cast(nn.Module, job.task), device_ids=ids)
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=job.precision == "fp16")
        self.guard = NonFiniteGuard(job.optimizer, job.device, self.scaler.is_enabled())
        self.parameters = [p for group in job.optimizer.param_groups for p in group["params"]]
        self.checked_unused = False

    def step(self, step: int, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Returns the mean of each loss part over the micro-batches, their sum as `loss`, and `grad_norm`."""
        job, optimizer = self.job, self.job.optimizer
        seed_step(job.seed, step, dist.rank())
        for group in optimizer.param_groups:
            group["lr"] = job.lr_at(step) * group.get("lr_scale", 1.0)
        parts = self._losses_and_gradients(batches)
        self._check_unused()
        with self.part("optimizer"):
            return {**parts, **self._update(step, parts)}

    def _update(self, step: int, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Clips, checks and updates; returns the sum of `parts` and the norm of the gradient before clipping."""
        job, optimizer = self.job, self.job.optimizer
        self.scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if job.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, job.clip_grad, norm)
        total = torch.stack([part.float() for part in parts.values()]).sum()
        if self.scaler.is_enabled():
            # a gradient that overflows is normal in fp16: the scaler skips the step and lowers its scale
            self.guard.record(step, total.isfinite(), parts)
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            self.guard.record(step, total.isfinite() & norm.isfinite(), parts)
            self.guard.update()
        optimizer.zero_grad(set_to_none=True)
        if job.ema is not None:
            job.ema.update(job.task.model, step=step)
        return {"loss": total, "grad_norm": norm}

    def _losses_and_gradients(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, 1):
            # processes exchange gradients after the last micro-batch only
            synced = number == len(batches) or not isinstance(self.net, DistributedDataParallel)
            with nullcontext() if synced else cast(DistributedDataParallel, self.net).no_sync():
                with self.part("forward"), autocast(self.job.precision, self.job.device):
                    losses: dict[str, Tensor] = self.net(batch)
                with self.part("backward"):
                    self.scaler.scale(reduce(torch.add, losses.values()) / len(batches)).backward()
            for name, loss in losses.items():
                share = loss.detach() / len(batches)
                parts[name] = parts[name] + share if name in parts else share
        return parts

    def _check_unused(self) -> None:
        """After the first backward pass."""
        if not self.checked_unused:
            self.checked_unused = True
            check_unused(self.job.task)


def seed_step(seed: int, step: int, rank: int) -> None:
    """For draws that are not keyed by sample, such as the drop path of timm's models; each process has its own."""
    torch.manual_seed(derive(seed, "torch", step, *([rank] if rank else [])))


def check_unused(task: nn.Module) -> None:
    """UserError, after a backward pass, for parameters without a gradient: they are not trained, and would hang DDP."""
    unused = [n for n, p in task.named_parameters() if p.requires_grad and p.grad is None]
    if unused:
        some = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
        raise UserError(
            f"{len(unused)} parameters would not be trained, for no loss depends on them: {some}.",
            hint="A model that is trained uses all its parameters; set requires_grad of the others to False.",
        )
