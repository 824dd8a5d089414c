"""Fresh processes of the program, started in a fraction of a second.

A server that has imported the libraries, and has run nothing, forks each of them: a real process with a pid, an
environment and an exit code of its own, in which nothing was drawn before. What is imported before the program starts
is the only difference from `python -m hcnet_cli`; test_pretrain, test_readme and test_torchrun start that itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from conftest import Done, environment
from fresh_child import program
from real_slurm import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "torchvision", "timm", "pycocotools.mask", "rich.progress"])


@dataclass
class Program:
    """A process of the program that may still run."""

    process: BaseProcess
    out: Path
    err: Path

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def running(self) -> bool:
        return self.process.is_alive()

    def done(self, timeout: float = 250) -> Done:
        """Waits for its end; a process ended by a signal has that number, negative, as its code."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.send_signal(signal.SIGKILL)
            raise AssertionError(f"still running after {timeout} s:\n{self.err.read_text()}")
        said = [file.read_text() for file in (self.out, self.err)]
        self.out.unlink()
        self.err.unlink()
        return Done(self.process.exitcode, *said)


def start(*arguments: str | Path, folder: Path | None = None, **changes: str) -> Program:
    """`hcnet ARGUMENTS`, or a script and its arguments, in `folder`, with changes of the environment."""
    out, err = (Path(tempfile.mkstemp(prefix="hcnet-test-")[1]) for _ in range(2))
    words = [str(word) for word in arguments]
    where = (str(folder or Path.cwd()), str(out), str(err))
    process = CONTEXT.Process(target=program, args=(words, {**environment(), **changes}, *where))
    process.start()
    return Program(process, out, err)


def run(*arguments: str | Path, folder: Path | None = None, **changes: str) -> Done:
    return start(*arguments, folder=folder, **changes).done()


def run_two(*arguments: str | Path) -> None:
    """The run of two processes, in the environment that torchrun gives them."""
    port = str(free_port())
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [start(*arguments, RANK=rank, LOCAL_RANK=rank, **common) for rank in "01"]
    for done in [one.done() for one in started]:
        assert done.code == 0, done.err
