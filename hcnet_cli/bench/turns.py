"""Rounds in which jobs alternate, and what is measured around them; nothing here knows what a job is."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TypeVar

OTHER_LOAD = 0.2  # cores that other processes may take before a note says so
Key = TypeVar("Key")
Figure = TypeVar("Figure")


def take_turns(
    jobs: Mapping[Key, Callable[[], Figure]],
    rounds: int,
    tell: Callable[[str], None],
    used: list[tuple[float, float]],
) -> Iterator[dict[Key, Figure]]:
    """Yields what each job returned, round by round; every round begins with the next job.

    Appends to `used`, for each round, CPU seconds of other processes and seconds, where the system tells.
    """
    names = list(jobs)
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
        before, start = cpu_of_others(), time.perf_counter()
        first = number % len(names)
        found = {name: jobs[name]() for name in names[first:] + names[:first]}
        after, wall = cpu_of_others(), time.perf_counter() - start
        if before is not None and after is not None:
            used.append((after - before, wall))
        yield found


class Stopped(BaseException):
    """A signal ended the measurement."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turns Ctrl-C, a scheduler's SIGTERM and a terminal that is gone into `Stopped`. What nohup ignores stays so."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def cores_of_others(used: Sequence[tuple[float, float]]) -> float | None:
    return sum(cpu for cpu, _ in used) / sum(wall for _, wall in used) if used else None


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


def other_load_notes(others: float | None) -> list[str]:
    """A note where other processes took a noticeable part of the machine."""
    if others is None or others < OTHER_LOAD:
        return []
    return [f"This machine was busy: other processes took {others:.1f} of {os.cpu_count()} cores while the clock ran."]
