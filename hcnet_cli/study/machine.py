"""Divides the machine between the runs of a study."""

from __future__ import annotations

import os
import subprocess

from hcnet_cli.cores import cores

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(slot: int, jobs: int, device: str) -> dict[str, str]:
    """The environment of the run in one of `jobs` slots, with its share of the cores or the GPUs."""
    env = {name: value for name, value in os.environ.items() if name not in (*TORCHRUN_VARIABLES, "FORCE_COLOR")}
    if jobs > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
        if cards := gpus(device):
            env["CUDA_VISIBLE_DEVICES"] = cards[slot % len(cards)]
    return env


def gpus(device: str) -> list[str]:
    """The GPUs, as CUDA_VISIBLE_DEVICES names them; none where `device` is the CPU or names one of them."""
    if device not in ("auto", "cuda"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]
