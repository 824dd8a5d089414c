"""Shared by the fuzz tests: how many examples, and what each of them may cost."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from hypothesis import HealthCheck, settings

WAITING = 3  # times as long: 30 s of waiting
MOST_BYTES = 2**30  # that all examples of a process may add to its memory
_grown = 0


class Hang(BaseException):
    """An example took too long. No `except Exception` of the tested code may swallow it."""


def examples(default: int = 40) -> settings:
    """The same few examples in the suite; as many as $HCNET_FUZZ says, new ones each time, in `make fuzz`."""
    wanted = os.environ.get("HCNET_FUZZ")
    return settings(
        max_examples=int(wanted) if wanted else default,
        derandomize=not wanted,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def watched(seconds: float = 10) -> Iterator[None]:
    """Around one example: it ends within `seconds`, and memory does not grow by more than MOST_BYTES in sum.

    Seconds are those of the processor: other programs may leave little of it. What waits, and computes nothing, has
    WAITING times as long.
    """
    global _grown

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"an example takes more than {seconds} s")

    before = _peak()
    timers = (
        (signal.ITIMER_PROF, signal.SIGPROF, seconds),
        (signal.ITIMER_REAL, signal.SIGALRM, WAITING * seconds),
    )
    before_signals = [signal.signal(number, stop) for _, number, _ in timers]
    for timer, _, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before_signals, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
    _grown += _peak() - before
    assert _grown < MOST_BYTES, f"the examples added {_grown / 2**20:.0f} MiB"


def edited(content: bytes, edits: list[tuple[int, str, bytes]]) -> bytes:
    """The content with each edit (place, "insert", "cut" or another word for exchange, bytes) made in turn."""
    for place, how, new in edits:
        place %= max(1, len(content))
        end = place + (0 if how == "insert" else len(new))
        content = content[:place] + (b"" if how == "cut" else new) + content[end:]
    return content


def _peak() -> int:
    """The most memory that this process ever had, in bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
