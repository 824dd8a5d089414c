"""What the user sees. Standard output carries results, standard error everything else; the main process speaks."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # what the system calls it

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class UserError(ValueError):
    """A mistake the user can correct: shown as one sentence (and a hint), exit code 2, never a traceback."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str]]:
        return type(self), (str(self), self.hint)  # crosses from worker processes whole


class RunFailed(UserError):
    """A run that went wrong by itself (exit code 1)."""

    exit_code = 1


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


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 under an hour; days before it."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    return f"{days} d {clock}" if days else clock


class Progress:
    """Training progress: a live bar on a terminal, plain lines (at most one each QUIET seconds) elsewhere."""

    QUIET = 5.0

    def __init__(self, total: int, start: int, metric: str) -> None:
        self.total, self.start, self.metric = total, start, metric
        self.live = err.is_terminal and is_main_process()
        self.began = self.printed = time.monotonic()
        self.best: float | None = None
        columns = (
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
        )
        self.bar = RichProgress(*columns, console=err, disable=not self.live, expand=True)
        self.row = self.bar.add_task("", total=total, completed=start)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, step: int, entry: Mapping[str, float]) -> None:
        """Shows a log entry: loss, images_per_second, data_wait (share of the time)."""
        now = time.monotonic()
        left = (now - self.began) / max(1, step - self.start) * (self.total - step)
        text = f"loss {entry['loss']:.3f} · {entry['images_per_second']:.0f} img/s"
        if entry["data_wait"] >= 0.05:
            text += f" · data {entry['data_wait']:.0%}"
        if self.best is not None:
            text += f" · {self.metric} {self.best:.2f}"
        text += f" · {duration(left)} left"
        self.bar.update(self.row, completed=step, description=text)
        if not self.live and (now - self.printed > self.QUIET or step == self.total):
            self.printed = now
            notice(f"step {step}/{self.total} · {text}")

    def evaluating(self, done: int, of: int) -> None:
        self.bar.update(self.row, description=f"evaluating {done}/{of}")

    def evaluated(self, step: int, metrics: Mapping[str, float], best: float | None) -> None:
        self.best = best
        if not self.live:
            shown = " · ".join(f"{name} {value:.2f}" for name, value in list(metrics.items())[:6])
            notice(f"step {step}/{self.total} · evaluated: {shown}")


@contextlib.contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """Shows progress: one line that is replaced on a terminal (without a thread), else plain lines."""
    if not err.is_terminal:
        yield notice
        return
    with Live(console=err, auto_refresh=False, transient=True) as live:
        yield lambda text: live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
