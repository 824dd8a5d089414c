"""The device and the number format of a run."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

from hcnet_cli import dist
from hcnet_cli.console import UserError, warn
from hcnet_cli.cores import cores, processes_here
from hcnet_cli.inputs import DEVICES, NO_CUDA, NO_CUDA_HINT

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86 and ARM processors, in /proc/cpuinfo


def use_cores(device: torch.device) -> None:
    """Computes with no more threads than this process has cores, unless the user says how many (OMP_NUM_THREADS)."""
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), cores()))


def pick_device(name: str) -> torch.device:
    """What "auto" means: CUDA (this process's own), else Apple's MPS, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f'There is no device "{name}".', hint=DEVICES) from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(NO_CUDA, hint=NO_CUDA_HINT)
        if device.index is not None and processes_here() > 1:
            raise UserError(
                f"--device {name} would put the {processes_here()} processes of this machine on one GPU.",
                hint="Use --device cuda: each process takes its own.",
            )
        device = torch.device("cuda", device.index if device.index is not None else dist.local_rank())
        if device.index >= torch.cuda.device_count():
            raise UserError(f"There is no device {device}: PyTorch sees {torch.cuda.device_count()}.")
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("This machine has no MPS device.", hint="Use --device cpu.")
    elif device.type not in ("cpu", "mps"):
        raise UserError(f'The device "{name}" is not supported.', hint=DEVICES)
    return device


def pick_precision(precision: str, device: torch.device) -> str:
    """What "auto" means: bf16 on a GPU that computes it, fp16 on an older one, fp32 elsewhere."""
    if precision == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and device.type == "cpu":
        raise UserError("fp16 training needs a GPU.", hint="Use --precision bf16 or fp32.")
    if precision == "bf16":
        warn_of_emulation(device)
    return precision


@functools.cache
def warn_of_emulation(device: torch.device) -> None:
    """Says once if bf16 was asked for where it is slow."""
    if emulates_bf16(device):
        warn(f"This {'GPU' if device.type == 'cuda' else 'CPU'} has no bf16 arithmetic: bf16 is emulated, and far "
             "slower than fp32.")  # fmt: skip


def emulates_bf16(device: torch.device) -> bool:
    """Whether PyTorch computes bf16 by other types on this device. False where the system does not tell."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    try:
        return BF16_FLAGS.isdisjoint(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
