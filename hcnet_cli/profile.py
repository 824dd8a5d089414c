"""What a model costs: parameters, multiply-accumulates, images per second, peak memory."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record
from torch.utils.flop_counter import FlopCounterMode

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library speaks on standard error otherwise
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def count_params(model: nn.Module, trained: bool = False) -> int:
    """Numbers in the model's parameters (buffers are not counted, shared parameters once). `trained`: those alone that
    training changes.
    """
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trained)


def count_macs(model: nn.Module, *inputs: Any) -> int:
    """Multiply-accumulates of `model(*inputs)` in evaluation: convolutions, linear layers and matrix products.

    Norms, pooling, biases and element-wise work are not counted, as in the tables of papers. Nothing is computed:
    tensors among `inputs`, parameters and buffers are replaced by meta tensors, so any size takes milliseconds. Only a
    model that needs values, or makes tensors of its own on another device, is computed, with zeros as inputs.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            return _count_macs(model, inputs, torch.device("meta"))
        except Exception:  # whatever a model of the user's own raises
            device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
            return _count_macs(model, inputs, device)


def _count_macs(model: nn.Module, inputs: Sequence[Any], device: torch.device) -> int:
    moved = (torch.zeros_like(x, device=device) if isinstance(x, Tensor) else x for x in inputs)
    twin = _copied(model, device)
    with FlopCounterMode(display=False) as counter, evaluating(twin), torch.no_grad():
        twin(*moved)
    return int(counter.get_total_flops()) // 2  # the counter's convention is two operations per multiply-accumulate


def _copied(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on another device, without gradients. What it keeps between calls, such as a table of positions, is
    its own: the model itself does not meet it.
    """
    attributes = itertools.chain(*(vars(module).values() for module in model.modules()))
    tensors = itertools.chain(model.parameters(), model.buffers(), (x for x in attributes if isinstance(x, Tensor)))
    copies: dict[int, Any] = {}
    for tensor in tensors:
        value = tensor.detach().to(device, copy=True)
        copies[id(tensor)] = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value
    return copy.deepcopy(model, copies)


def throughput(
    model: nn.Module,
    image_size: int,
    *,
    batch_size: int = 64,
    seconds: float = 5.0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> float:
    """Images per second of inference on random images: the median over rounds of about half a second each.

    precision: "fp32", or "bf16" / "fp16" under autocast. The model is moved to `device` and stays there.
    """
    device = torch.device(device)
    model.to(device)
    images = torch.randn(batch_size, getattr(model, "in_chans", 3), image_size, image_size, device=device)
    dtype = DTYPES[precision]
    with (
        evaluating(model),
        torch.inference_mode(),
        torch.autocast(device.type, dtype, enabled=dtype is not torch.float32),
    ):
        run = functools.partial(model, images)
        run()  # allocations, kernel choice, compilation
        repeats = max(1, round(0.5 / timed(run, 1, device)))
        rates: list[float] = []
        stop = time.perf_counter() + seconds
        while not rates or time.perf_counter() < stop:
            rates.append(batch_size * repeats / timed(run, repeats, device))
    return statistics.median(rates)


def timed(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds that `repeats` calls take, waiting for the device at both ends."""
    synchronize: Callable[[], object] = getattr(torch, device.type).synchronize  # torch.cpu, torch.cuda, torch.mps
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return time.perf_counter() - start


def inference_speed(model: Any, img_size: int, device: torch.device, precision: str, batch: int) -> float:
    """Images/s of a run's model for the table, without gradient checkpointing."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(False)
    return round(throughput(model, img_size, batch_size=batch, seconds=1, device=device, precision=precision), 1)


def peak_memory_mb(device: str | torch.device | None = None) -> float:
    """MiB at the peak: allocated by PyTorch on a CUDA device, else the resident set of this process since its start."""
    if torch.device(device or "cpu").type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes on macOS, KiB on Linux


def peak_allocation(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes of tensors at the peak of `run()`, above those there were before; None where PyTorch cannot tell.

    So activations, gradients and temporaries, but not weights. On the CPU from the allocations that PyTorch's profiler
    records: scratch memory inside oneDNN is not among them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with record(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events: Any = recorded.profiler.kineto_results.events()
    peak = now = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode inside, each module's own mode restored outside."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
