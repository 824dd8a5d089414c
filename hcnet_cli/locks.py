"""A lock on a folder that says whose it is, on this machine and on a network file system. Torch-free.

On one machine the system's lock decides: it ends with its process. Between machines it may not be passed on, or outlive
its process, so the owner also leaves its name in `.lock.json` and touches that file every HEARTBEAT seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hcnet_cli.console import RunFailed, UserError, duration, notice
from hcnet_cli.files import read_text, write_text

HEARTBEAT = 10.0  # seconds
STALE = 90.0  # seconds without a heartbeat, after which an owner on another machine is gone


@dataclass(frozen=True)
class Owner:
    """Whose a lock is. `silent`: seconds since the last heartbeat."""

    host: str
    pid: int
    job: str
    token: str
    silent: float

    @property
    def is_here(self) -> bool:
        return self.host == platform.node()

    @property
    def is_gone(self) -> bool:
        """For an owner on another machine; here the system's lock knows better."""
        return not self.is_here and self.silent > STALE

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, last heard of {duration(max(0.0, self.silent))} ago"


class Lock:
    """The lock of a folder that exists. One object, one holder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = FileLock(folder / ".lock")
        self.owner_file = folder / ".lock.json"
        self.token = ""
        self.over = threading.Event()

    def acquire(self, timeout: float = 0.0) -> bool:
        """False if another process holds the lock; one that is gone from another machine is replaced."""
        before = self.owner()
        try:
            self.file.acquire(timeout=timeout)
        except Timeout:
            if before is None or not before.is_gone:
                return False
            (self.folder / ".lock").unlink(missing_ok=True)  # whoever held it would notice, see `require`
            self.file = FileLock(self.folder / ".lock")
            with contextlib.suppress(Timeout):
                self.file.acquire(timeout=0)
        except NotImplementedError:  # a file system without locks: the owner's name decides
            pass
        if before is not None and not before.is_here:
            if not before.is_gone:
                self.file.release()
                return False
            notice(f"The lock of {self.folder} was left by {before}: it is taken over.")
        self.token = uuid.uuid4().hex
        content = {"host": platform.node(), "pid": os.getpid(), "job": slurm_job(), "token": self.token}
        write_text(self.owner_file, json.dumps(content) + "\n")
        threading.Thread(target=self._beat, daemon=True).start()
        return True

    def release(self) -> None:
        self.over.set()
        owner = self.owner()
        if owner is not None and owner.token == self.token:
            self.owner_file.unlink(missing_ok=True)
        self.file.release()

    def require(self) -> None:
        """RunFailed where another process has taken the lock over, as after a machine was cut off for a while."""
        owner = self.owner()
        if owner is not None and owner.token != self.token:
            raise RunFailed(f"{self.folder} was taken over by {owner}: this process stops.")

    def is_held(self) -> bool:
        """Whether a process works in the folder; True too where that cannot be found out, as on a read-only disk."""
        owner = self.owner()
        try:
            self.file.acquire(timeout=0)
            self.file.release()
        except NotImplementedError:
            return owner is not None and not owner.is_gone
        except (Timeout, OSError):
            return owner is None or not owner.is_gone
        return owner is not None and not owner.is_here and not owner.is_gone

    def owner(self) -> Owner | None:
        """Who holds the lock, or held it last and was killed; None where nobody left a name."""
        try:
            content: Any = json.loads(read_text(self.owner_file, 4096))
            silent = time.time() - self.owner_file.stat().st_mtime
            return Owner(str(content["host"]), int(content["pid"]), str(content["job"]), str(content["token"]), silent)
        except (UserError, OSError, ValueError, KeyError, TypeError):
            return None

    def _beat(self) -> None:
        while not self.over.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                owner = self.owner()
                if owner is not None and owner.token == self.token:
                    os.utime(self.owner_file)


def slurm_job() -> str:
    """The job of this process, JOB or JOB_TASK; "" outside Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def of_slurm() -> dict[str, Any]:
    """What a record keeps of the Slurm job of this process: job, node, and how often it was requeued."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return {
        "job": slurm_job(),
        "node": os.environ.get("SLURMD_NODENAME", ""),
        "restarts": int(restarts) if restarts.isdigit() else 0,
    }
