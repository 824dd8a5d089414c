"""What the user sees. Standard output carries results, standard error everything else; the main process speaks.

Names of files, classes, runs and fields come from other people. They reach a terminal through `Terminal` alone, which
never takes them for markup and shows what a terminal would obey as an escape (`visible`).
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import errno
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.segment import Segment
from rich.text import Text

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # what the system calls it

# --- text that leaves -------------------------------------------------------------------------------------------------


def visible(text: str, keep: str = "") -> str:
    r"""The text with an escape, such as \x1b or \u202e, for each character that is obeyed or hidden instead of drawn.

    These are control characters (a line break too, unless it is in `keep`), bidirectional and other format characters,
    lone surrogates, separators other than the plain space, and code points without a character.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class Terminal(Console):
    """A console for text of any origin: a str is one line, taken literally. What has line breaks of ours is a Text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text, keep="\n"), style, control)


class ErrorConsole(Terminal):
    """Standard error. Where nobody reads it any more (a closed pipe, a terminal that is gone), it becomes silent:
    what is printed there is never a reason to end a run.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError:
            self.quiet = True

    def on_broken_pipe(self) -> None:
        self.quiet = True


out = Terminal(soft_wrap=True)
err = ErrorConsole(stderr=True, soft_wrap=True)

PLAIN = dict(zip("–−·─━╸╺│×“”’", '-------|x""\'', strict=True))  # our own characters, for an encoding that lacks them
PLAIN |= {"±": "+-", "√": "sqrt ", "…": "...", "→": "->", "½": "1/2", "¼": "1/4"}


def plain(error: UnicodeError) -> tuple[str, int]:
    """Error handler of an encoding: what it lacks is written in ASCII, as `PLAIN` says or as an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(c, c.encode("unicode_escape").decode()) for c in text), error.end


def open_output() -> None:
    """Makes both standard streams writable: a closed one goes nowhere, and any text suits their encoding."""
    codecs.register_error("hcnet.plain", plain)
    sys.stdout, sys.stderr = (stream or Path(os.devnull).open("w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="hcnet.plain")


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


# --- processes --------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """The place of this process among those that torchrun, or another launcher, started. None: not given."""

    rank: int
    world_size: int
    local_rank: int | None


def launch() -> Launch:
    """What RANK, WORLD_SIZE and LOCAL_RANK say: the only place that reads them. An empty variable is not set.

    Without WORLD_SIZE there is one process, whatever the others say. UserError for values that contradict each other.
    """
    world_size = _number("WORLD_SIZE", least=1)
    if world_size is None:
        return Launch(0, 1, None)
    rank, local_rank = _number("RANK", least=0), _number("LOCAL_RANK", least=0)
    if rank is None and world_size > 1:
        raise UserError(f"WORLD_SIZE is {world_size}, but RANK is not set.", hint=LAUNCH_HINT)
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        if value is not None and value >= world_size:
            raise UserError(f"{name} is {value}, but WORLD_SIZE is {world_size}.", hint=LAUNCH_HINT)
    return Launch(rank or 0, world_size, local_rank)


LAUNCH_HINT = "Start several processes with torchrun, which sets these variables; for one process, unset them."


def _number(name: str, least: int) -> int | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise UserError(f'{name} is "{text}", not a whole number of at least {least}.', hint=LAUNCH_HINT)
    return int(text)


def is_main_process() -> bool:
    """Whether this process speaks. Each one does where the variables contradict each other: it has to say so."""
    try:
        return launch().rank == 0
    except UserError:
        return True


# --- lines ------------------------------------------------------------------------------------------------------------


def notice(message: str) -> None:
    """One line for people, on standard error, from the main process only."""
    if is_main_process():
        _print_line(message)


def warn(message: str) -> None:
    if is_main_process():
        _print_line(f"warning: {message}", style="yellow")


def print_error(message: str, hint: str = "") -> None:
    """A mistake, and what to do next."""
    if is_main_process():
        _print_line(Text.assemble(("error:", "bold red"), " ", visible(message)))
        if hint:
            _print_line(hint)


def _print_line(line: str | Text, style: str = "") -> None:
    """Broken between words where a terminal ends; left to the terminal where a word, such as a path, is longer."""
    whole = not err.is_terminal or any(len(word) >= err.width for word in str(line).split())
    err.print(line, style=style or None, soft_wrap=whole)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""


def nearest_key(key: str, known: Iterable[str]) -> str:
    """As `did_you_mean`, for dotted keys: a name that is initials ("wd") stands for the words they begin."""
    keys = list(known)
    section, _, last = key.rpartition(".")
    initials = [one for one in keys if last == "".join(word[:1] for word in one.rpartition(".")[2].split("_"))]
    initials.sort(key=lambda one: one.rpartition(".")[0] != section)
    return f' Did you mean "{initials[0]}"?' if initials and len(last) > 1 else did_you_mean(key, keys)


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 under an hour; days before it."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    return f"{days} d {clock}" if days else clock


def about(seconds: float) -> str:
    """A duration as an estimate is said: 40 s, 12 min, 3.5 h, 13 d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size or (unit == "min" and seconds >= 90):
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}".replace(".0 ", " ")
    return f"{max(1, round(seconds))} s"


def main_metrics(metrics: Iterable[str], most: int = 6) -> list[str]:
    """The names to show where a line has room for few: the first of each kind (box_, mask_) before further ones."""
    names = [name for name in metrics if "_95_" not in name]  # without the ends of intervals
    kinds = [name.partition("_")[0] if "_" in name else "" for name in names]
    rank = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]
    return [names[i] for i in sorted(range(len(names)), key=lambda i: (rank[i] // 3, i))][:most]


class Progress:
    """Training progress: a live bar on a terminal; elsewhere a plain line every QUIET seconds, however long a step or
    an evaluation takes.
    """

    QUIET = 5.0

    def __init__(self, total: int, start: int = 0, metric: str = "") -> None:
        self.total, self.start, self.metric = total, start, metric
        self.live = err.is_terminal and is_main_process()
        self.began = self.printed = time.monotonic()
        self.at_work = f"step {start + 1}/{total}"  # what takes place now, for a step that is long
        self.work_began = self.began
        self.best: float | None = None
        columns = (
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
        )
        self.bar = RichProgress(*columns, console=err, disable=not self.live, expand=True)
        self.row = self.bar.add_task("", total=total, completed=start)
        self.over = threading.Event()
        self.watch = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        with contextlib.suppress(OSError):
            self.bar.start()
        if not self.live and is_main_process():
            self.watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        with contextlib.suppress(OSError):
            self.bar.stop()
        if self.watch.ident is not None:
            self.watch.join()

    def _watch(self) -> None:
        """Says what takes place where no line has been printed for long."""
        while not self.over.wait(self.QUIET / 10):
            now = time.monotonic()
            if now - self.printed > 2 * self.QUIET:
                self._line(f"{self.at_work} · at work for {duration(now - self.work_began)}")

    def _line(self, text: str) -> None:
        self.printed = time.monotonic()
        notice(text)

    def begin(self, work: str) -> None:
        """Names what takes place now."""
        self.at_work, self.work_began = work, time.monotonic()

    @property
    def due(self) -> bool:
        """Whether a line, or a new text of the bar, is due."""
        return time.monotonic() - self.printed > self.QUIET

    def step(self, step: int, entry: Mapping[str, float]) -> None:
        """Shows the means since the last log line: loss, images_per_second, data_wait (share of the time)."""
        left = (time.monotonic() - self.began) / max(1, step - self.start) * (self.total - step)
        text = f"loss {entry['loss']:.3f} · {entry['images_per_second']:.{0 if entry['images_per_second'] > 9 else 1}f}"
        text += " img/s"
        if entry["data_wait"] >= 0.05:
            text += f" · data {entry['data_wait']:.0%}"
        if self.best is not None:
            text += f" · {self.metric} {self.best:.2f}"
        text += f" · {duration(left)} left"
        self.bar.update(self.row, completed=step, description=text)
        if self.live:
            self.printed = time.monotonic()
        elif self.due or step == self.total:
            self._line(f"step {step}/{self.total} · {text}")

    def evaluating(self, done: int, of: int) -> None:
        self.bar.update(self.row, description=f"evaluating {done}/{of}")
        self.begin(f"evaluating · batch {done}/{of}" if done < of else "evaluating · scoring")
        if not self.live and self.due:
            self._line(f"evaluating · batch {done}/{of}")

    def evaluated(self, step: int, metrics: Mapping[str, float], best: float | None) -> None:
        self.best = best
        if not self.live:
            shown = " · ".join(f"{name} {metrics[name]:.2f}" for name in main_metrics(metrics))
            self._line(f"step {step}/{self.total} · evaluated: {shown}")


@contextlib.contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """Shows progress: one line that is replaced on a terminal (without a thread), else plain lines."""
    if not err.is_terminal:
        yield notice
        return
    with Live(console=err, auto_refresh=False, transient=True) as live:
        yield lambda text: live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
