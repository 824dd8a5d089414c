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
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
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
PLAIN |= {"±": "+-", "√": "sqrt ", "…": "...", "→": "->", "½": "1/2", "¼": "1/4", "µ": "u"}


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
    """As `did_you_mean`, for dotted keys: by the last part, those of the same section first. Initials ("wd", "lr")
    stand for the words they begin, in either direction.
    """
    section, _, last = key.rpartition(".")
    keys = sorted(known, key=lambda one: one.rpartition(".")[0] != section)
    names = {one: one.rpartition(".")[2] for one in keys}

    def initials(name: str) -> str:
        return "".join(word[:1] for word in name.split("_"))

    found = [one for one, name in names.items() if len(last) > 1 and last in (initials(name), name)]
    found += [one for one, name in names.items() if "_" in last and initials(last) == name]
    found += [
        one
        for name in difflib.get_close_matches(last, names.values(), cutoff=0.7)
        for one in keys
        if names[one] == name
    ]
    return f' Did you mean "{found[0]}"?' if found else ""


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 under an hour; days before it."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    return f"{days} d {clock}" if days else clock


def units(count: float, unit: float) -> str:
    """A count in millions, say: 28.62, but 0.0026 and not 0.00."""
    return f"{count / unit:.2f}" if count >= unit or not count else f"{count / unit:.3g}"


def counted(number: float, noun: str) -> str:
    """A number and its noun in the right form: 1 line, 2 lines, 3 processes."""
    plural = f"{noun}es" if noun.endswith(("s", "ch")) else f"{noun}s"
    return f"{number:.12g} {noun if number == 1 else plural}"


def about(seconds: float) -> str:
    """A duration as an estimate is said: 40 s, 12 min, 3.5 h, 13 d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size or (unit == "min" and seconds >= 90):
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}".replace(".0 ", " ")
    return f"{max(1, round(seconds))} s"


def clock_time(seconds: float) -> str:
    """The time of day in so many seconds: 14:05, on another day Mon 14:05, after a week 12 Dec."""
    then = time.time() + seconds
    if seconds > 6 * 86400:
        return time.strftime("%d %b", time.localtime(then)).lstrip("0")
    today = time.localtime().tm_yday == time.localtime(then).tm_yday
    return time.strftime("%H:%M" if today else "%a %H:%M", time.localtime(then))


def megabytes(mebibytes: float) -> str:
    """Memory where there is little room: 312 MB, 7.9 GB."""
    return f"{mebibytes:.0f} MB" if mebibytes < 1000 else f"{mebibytes / 1024:.1f} GB"


def brief(value: float) -> str:
    """A number in at most 7 characters, for columns."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.{min(3, max(0, 3 - math.floor(math.log10(abs(value))))) if value else 0}f}"
    return two_digits(value)


def two_digits(value: float) -> str:
    """1.3e-3, with two digits whatever the size, as learning rates are shown."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def main_metrics(metrics: Iterable[str], most: int = 6) -> list[str]:
    """The names to show where a line has room for few: the first of each kind (box_, mask_), then further ones."""
    names = [name for name in metrics if "_95_" not in name and name not in COUNTS]  # without the ends of intervals
    kinds = [name.partition("_")[0] if "_" in name else "" for name in names]
    rank = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]
    return [names[i] for i in sorted(range(len(names)), key=lambda i: (min(rank[i], 1 + rank[i] // 3), i))][:most]


COUNTS = ("num_present",)  # among the metrics, and no scores


class Bar(RichProgress):
    """A bar with a line of values below it."""

    values = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.values, no_wrap=True, overflow="ellipsis")


class Progress:
    """Training progress: a live bar and its values on a terminal; elsewhere a row of a table every QUIET seconds,
    however long a step or an evaluation takes. Both fit into 80 columns, and each evaluation is a line of its own.
    """

    QUIET = 5.0
    ROWS = 20  # of the table, after which its head is printed again
    COLUMNS: ClassVar = {
        "step": 7,
        "epoch": 6,
        "loss": 7,
        "lr": 8,
        "|grad|": 7,
        "memory": 7,
        "img/s": 7,
        "wait": 5,
        "left": 7,
        "ends": 9,
    }

    def __init__(self, total: int, start: int = 0, metric: str = "", steps_per_epoch: int = 0) -> None:
        self.total, self.start, self.metric = total, start, metric
        self.steps_per_epoch = steps_per_epoch
        self.rows = 0
        self.live = err.is_terminal and is_main_process()
        self.began = self.printed = time.monotonic()
        self.at_work = f"step {start + 1}/{total}"  # what takes place now, for a step that is long
        self.work_began = self.began
        self.evaluation_began = 0.0
        columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
        self.bar = Bar(*columns, console=err, disable=not self.live, expand=True)
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
        """Shows the means since the last log line: loss, lr, grad_norm, memory_mb, images_per_second, data_wait (share
        of the time). What an entry lacks stays empty.
        """
        seconds = (time.monotonic() - self.began) / max(1, step - self.start) * (self.total - step)
        of = {"step": str(step), "left": about(seconds) if step < self.total else "0 s", "ends": clock_time(seconds)}
        if self.steps_per_epoch:
            of["epoch"] = f"{step / self.steps_per_epoch:.{1 if step < 1000 * self.steps_per_epoch else 0}f}"
        if "memory_mb" in entry:
            of["memory"] = megabytes(entry["memory_mb"])
        if "data_wait" in entry:
            of["wait"] = f"{entry['data_wait']:.0%}"
        for name, key in (("loss", "loss"), ("|grad|", "grad_norm")):
            if key in entry:
                of[name] = brief(entry[key])
        if "lr" in entry:
            of["lr"] = two_digits(entry["lr"])
        if "images_per_second" in entry:
            rate = entry["images_per_second"]
            of["img/s"] = f"{rate:.{1 if rate < 99.95 else 0}f}"
        if self.live:
            self._show(step, of)
        elif self.due or step == self.total:
            if self.rows % self.ROWS == 0:
                self._line(" ".join(name.rjust(width) for name, width in self.COLUMNS.items()))
            self.rows += 1
            self._line(" ".join(of.get(name, "").rjust(width) for name, width in self.COLUMNS.items()))

    def _show(self, step: int, of: Mapping[str, str]) -> None:
        """The bar with epoch and time, and the values below it."""
        epochs = f"epoch {of['epoch']}/{self.total / self.steps_per_epoch:.0f} · " if "epoch" in of else ""
        values = [f"{name} {of[name]}" for name in ("loss", "lr", "|grad|") if name in of]
        values += [of["memory"]] if "memory" in of else []
        values += [f"{of['img/s']} img/s"] if "img/s" in of else []
        self.bar.values = " · ".join([*values, f"wait {of['wait']}"] if "wait" in of else values)
        self.bar.update(
            self.row, completed=step, total=self.total, description=f"{epochs}{of['left']} left, ends {of['ends']}"
        )
        self.printed = time.monotonic()

    def evaluating(self, done: int, of: int) -> None:
        now = time.monotonic()
        if done == 1:
            self.evaluation_began = now
        left = f" · {about((now - self.evaluation_began) / (done - 1) * (of - done))} left" if 1 < done < of else ""
        self.bar.values = ""
        self.bar.update(self.row, completed=done, total=of, description=f"evaluating{left}")
        self.begin(f"evaluating · batch {done}/{of}" if done < of else "evaluating · scoring")
        if not self.live and self.due:
            self._line(f"evaluating · batch {done}/{of}")

    def evaluated(self, step: int, metrics: Mapping[str, float], before: float | None) -> None:
        """A line with the scores and the change since the best before: as many as fit into 80 columns."""
        self.bar.update(self.row, completed=step, total=self.total, description="")
        line = f"step {step} · evaluated:"
        for number, name in enumerate(main_metrics(metrics)):
            part = f"{' ·' if number else ''} {name} {metrics[name]:.2f}"
            if name == self.metric and before is not None:
                change = metrics[name] - before
                said = f"{change:+.2f}, the best" if change > 0 else f"{change:+.2f} from the best"
                part += f" ({said})" if change else " (equal to the best, and kept in its place)"
            if number and len(line + part) > 80:
                break
            line += part
        self._line(line)


@contextlib.contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """Shows progress: one line that is replaced on a terminal (without a thread), else plain lines."""
    if not err.is_terminal:
        yield notice
        return
    with Live(console=err, auto_refresh=False, transient=True) as live:
        yield lambda text: live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)


def loading() -> AbstractContextManager[object]:
    """Says on a terminal that PyTorch is loaded, which takes seconds, for as long as that takes."""
    if "torch" in sys.modules or not err.is_terminal or not is_main_process():
        return contextlib.nullcontext()
    return Live(Text("Loading PyTorch ..."), console=err, auto_refresh=False, transient=True)
