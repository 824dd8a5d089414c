"""Rounds in which jobs alternate, and what is measured around them; nothing here knows what a job is."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

OTHER_LOAD = 0.2  # cores that other processes may take before a note says so
Key = TypeVar("Key")
Figure = TypeVar("Figure")


def take_turns(jobs: Mapping[Key, Callable[[], Figure]], rounds: int) -> Iterator[dict[Key, Figure]]:
    """Yields what each job returned, round by round; every round begins with the next job."""
    names = list(jobs)
    for number in range(rounds):
        first = number % len(names)
        yield {name: jobs[name]() for name in names[first:] + names[:first]}


def ratio(rates: Sequence[float], unit: Sequence[float]) -> float:
    """How many times the unit's rate: the median over the rounds, so that what slows a whole round cancels."""
    return statistics.median(rate / one for rate, one in zip(rates, unit, strict=True))


def cpu_of_others() -> float | None:
    """CPU seconds that other processes have used since this machine started; None where the system does not tell."""
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        user, nice, system, _, _, irq, softirq, steal = (int(word) for word in words[1:9])
        used = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
    return used - time.process_time()


def seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Time of `repeats` calls, waiting for the device at both ends."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def other_load_note(others: float | None) -> str | None:
    """What is to be said where other processes took a noticeable part of the machine."""
    if others is None or others < OTHER_LOAD:
        return None
    return f"This machine was busy: other processes took {others:.1f} of {os.cpu_count()} cores while the clock ran."
