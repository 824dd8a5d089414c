"""What is wrong with a data set: training stops at the first problem, `hcnet check` lists all. Both use one reader,
which hands every problem to a function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NoReturn

from hcnet_cli.console import UserError

Report = Callable[[UserError], object]  # takes a problem; if it returns, the reader goes on without what is wrong


def refuse(problem: UserError) -> NoReturn:
    """What training does with a problem."""
    raise problem


@contextlib.contextmanager
def reported(report: Report) -> Iterator[None]:
    """Reports the problem that ends the block."""
    try:
        yield
    except UserError as problem:
        report(problem)
