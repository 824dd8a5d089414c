"""How long this process has decoded images, for `--profile`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_seconds = 0.0


def timed(decode: Callable[P, R]) -> Callable[P, R]:
    """A function whose calls count as decoding."""

    @functools.wraps(decode)
    def timing(*args: P.args, **kwargs: P.kwargs) -> R:
        global _seconds
        begun = time.perf_counter()
        try:
            return decode(*args, **kwargs)
        finally:
            _seconds += time.perf_counter() - begun

    return timing


def seconds() -> float:
    """Of all calls in this process so far."""
    return _seconds
