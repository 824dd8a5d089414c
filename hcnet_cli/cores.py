"""The processor cores that this process may use."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def cores() -> int:
    """Processor cores for this process: those that its affinity, its container and Slurm leave it, shared evenly among
    the processes that torchrun started on this machine. At least 1.
    """
    found = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    if (limit := container_cores()) is not None:
        found.append(limit)
    with contextlib.suppress(KeyError, ValueError):
        found.append(int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, min(found) // processes_here())


def processes_here() -> int:
    """The processes that torchrun started on this machine; 1 without it."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(count) if count.isdecimal() else 1)


def container_cores() -> int | None:
    """The cores that the control group of a container allows (cpu.max of version 2); None for no limit."""
    with contextlib.suppress(OSError, ValueError):  # "max 100000": none
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) // int(period)
    return None


def busy() -> str:
    """Words for a time that other programs have made longer than it will be alone; "" where they have not."""
    load, all_cores = os.getloadavg()[0], os.cpu_count() or 1
    return f" while the machine is busy (load {load:.0f}, {all_cores} cores)" if load > all_cores + 1 else ""
