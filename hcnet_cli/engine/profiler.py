"""Where the time of a training step goes: `--profile N`. Nothing here can change a number of the run."""

from __future__ import annotations

import gzip
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from hcnet_cli import dist
from hcnet_cli.console import counted, warn
from hcnet_cli.engine.job import Job
from hcnet_cli.files import optional, replacing, write_text
from hcnet_cli.privacy import host_id
from hcnet_cli.report import render
from hcnet_cli.table import Column, Row, Table

WARM_UP = 5  # steps before the timed ones: workers start, kernels are chosen, memory is allocated
TRACED = 2  # steps after them, which PyTorch's profiler records: recording makes them slower
LOADING = ("decode", "augment")
PARTS = ("wait for data", *LOADING, "transfer", "forward", "backward", "all-reduce", "optimizer")


class Profiler:
    """Times the parts of `steps` steps, records a few more, then prints the table and keeps both in `folder`.

    While it measures, the host waits for the device at both ends of every part. With `steps` 0 it does nothing.
    """

    def __init__(self, job: Job, folder: Path, steps: int) -> None:
        self.job, self.folder, self.steps = job, folder, steps
        self.step = -1  # the current one, counted from where the session began
        self.seconds: dict[str, float] = defaultdict(float)  # of every part, over the timed steps
        self.loading = dict.fromkeys(LOADING, 0.0)
        self.whole = 0.0
        self.last_gradient: Any = None
        self.hooks: list[Any] = []
        self.trace: profile | None = None

    @property
    def timing(self) -> bool:
        return WARM_UP <= self.step < WARM_UP + self.steps

    def begin(self) -> None:
        """Before a step."""
        if not self.steps:
            return
        self.step += 1
        if self.step == WARM_UP and dist.is_distributed():
            parameters = [p for p in self.job.task.parameters() if p.requires_grad]
            self.hooks = [p.register_post_accumulate_grad_hook(self._note_gradient) for p in parameters]
        if self.step == WARM_UP + self.steps and dist.is_main():
            device = [ProfilerActivity.CUDA] if self.job.device.type == "cuda" else []
            self.trace = profile(activities=[ProfilerActivity.CPU, *device])
            self.trace.start()
        if self.timing:
            self.before = dict(self.job.train.loading)
            self.begun = self._now()

    def end(self) -> None:
        """After a step."""
        if self.timing:
            self.whole += self._now() - self.begun
            for name in LOADING:
                self.loading[name] += self.job.train.loading[name] - self.before[name]
        if self.steps and self.step == WARM_UP + self.steps + TRACED - 1:
            self.close()

    def part(self, name: str) -> AbstractContextManager[None]:
        """Times what is inside as a part of the step."""
        if self.trace is not None:
            return record_function(name)
        return self._timed(name) if self.timing else nullcontext()

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begun = self._now()
        self.last_gradient = None
        yield
        ended = self._moment()
        seconds = self._now() - begun
        if name == "backward" and self.last_gradient is not None:  # then only the other processes are waited for
            waited = min(seconds, self._between(self.last_gradient, ended))
            self.seconds["all-reduce"] += waited
            seconds -= waited
        self.seconds[name] += seconds

    def _note_gradient(self, _: Tensor) -> None:
        self.last_gradient = self._moment()

    def _now(self) -> float:
        """Seconds, once the device has done what it was given."""
        getattr(torch, self.job.device.type).synchronize()
        return time.perf_counter()

    def _moment(self) -> Any:
        """A moment in the work of the device, which is not waited for."""
        if self.job.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def _between(first: Any, second: Any) -> float:
        return float(second - first if isinstance(first, float) else first.elapsed_time(second) / 1000)

    def close(self) -> None:
        """Prints and keeps what was measured; called again, it does nothing."""
        for hook in self.hooks:
            hook.remove()
        trace, self.trace = self.trace, None
        asked, self.steps = self.steps, 0
        timed = min(asked, self.step - WARM_UP + 1)
        if trace is not None:
            trace.stop()
        if asked and timed < 1:
            warn(f"Nothing was profiled: training ended within the {WARM_UP} steps of warming up.")
        if timed < 1 or not dist.is_main():
            return
        with optional(self.folder):
            self.folder.mkdir(exist_ok=True)
            made = self.table(timed)
            sys.stdout.write(render([made], "rich"))
            write_text(self.folder / "profile.md", render([made], "markdown"))
            if trace is None:
                warn(f"Training ended after {timed} of the {asked} steps to time, so there is no trace.json.gz.")
            else:
                write_trace(trace, self.folder / "trace.json.gz")

    def table(self, timed: int) -> Table:
        """Means of `timed` steps. What is in no part is `other`, so the rows sum to the step."""
        seconds = dict(self.seconds)
        workers = self.job.train.workers
        if not workers:  # the data were loaded in this process, while it waited
            seconds |= self.loading
            seconds["wait for data"] -= sum(self.loading.values())
        shown = {name: seconds[name] for name in PARTS if name in seconds}
        shown["other"] = self.whole - sum(shown.values())
        rows = [_row(name, value / timed, value / self.whole) for name, value in shown.items()]
        rows.append(_row("step", self.whole / timed, 1.0))
        notes = [f"{counted(self.job.batch_size, 'image')} a step on {self.job.device.type}, {self.job.precision}."]
        if workers:
            busy = ", ".join(f"{name} {1000 * value / timed:.1f} ms" for name, value in self.loading.items())
            notes.append(f"Meanwhile in {counted(workers, 'data worker')}, summed over all: {busy} for each step.")
        if dist.is_distributed():
            notes.append(f"Process 0 of {dist.processes()}. All-reduce: what does not overlap with the backward pass.")
        columns = [Column("part", "part"), Column("ms", "ms", "number"), Column("share", "%", "percent")]
        return Table(
            "profile", f"Where the time of a step goes: means of {counted(timed, 'step')}", columns, rows, notes
        )


def _row(name: str, seconds: float, share: float) -> Row:
    return Row("measured", {"part": name, "ms": 1000 * seconds, "share": 100 * share})


def write_trace(trace: profile, path: Path) -> None:
    """A Chrome trace in which the computer's name is the digest that records have, and no temporary file is named."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(written))
        text = written.read_text(encoding="utf-8")
    text = re.sub(r'"host_name": ".*"', f'"host_name": "{host_id()}"', text, count=1)
    text = re.sub(r'"traceName": ".*"', f'"traceName": "{path.name}"', text)
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode()))
