"""What the user sees: one console, one kind of error. Standard output carries results, standard error everything else."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable

from rich.console import Console

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class UserError(ValueError):
    """A mistake the user can mend: shown as one sentence (and a hint), exit code 2, never a traceback."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def notice(message: str) -> None:
    """One line for people, on standard error, from the main process only."""
    if is_main_process():
        err.print(message, markup=False)


def warn(message: str) -> None:
    if is_main_process():
        err.print(f"warning: {message}", style="yellow", markup=False)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""
