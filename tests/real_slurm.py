"""A real Slurm of one node on this machine, for tests: munged, slurmctld and slurmd, started and stopped by `cluster`.

Debian's packages: slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge. Skips, with the reason, where it cannot
start: without them, without root, or where the kernel offers only what needs systemd.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock
SlurmctldPort={port}
SlurmdPort={daemon_port}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=20
SlurmdTimeout=15
OverTimeLimit=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_min_interval=100000,bf_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=main   Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1  PreemptMode=REQUEUE GraceTime=5
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


class Slurm:
    """The three daemons; `environment` makes Slurm's commands find them."""

    def __init__(self, root: Path) -> None:
        self.root, self.host = root, socket.gethostname().partition(".")[0]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {"SLURM_CONF": str(root / "slurm.conf")}

    def start(self) -> str:
        """Why it cannot start; "" when it has."""
        programs = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
        if missing := [name for name in programs if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]:
            return f"{missing[0]} is not installed"
        if os.geteuid():
            return "slurmd has to be started as root"
        for name in ("state", "spool"):
            (self.root / name).mkdir(parents=True)
        ports = [free_port(), free_port()]
        text = CONFIG.format(root=self.root, host=self.host, port=ports[0], daemon_port=ports[1])
        (self.root / "slurm.conf").write_text(text)
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munge.seed"}
        self._start("munged", "--foreground", "--force", *(f"--{k}={self.root / v}" for k, v in files.items()))
        with contextlib.suppress(AssertionError):
            wait_for((self.root / "munge.sock").exists, 10, "munged")
        self._start("slurmctld", "-D", "-c", "-f", str(self.root / "slurm.conf"))
        self.start_node()
        try:
            wait_for(self.is_idle, 60, "the node")
        except AssertionError:
            lines = [f"{log.name}: {log.read_text(errors='replace')[-300:]}" for log in self.root.glob("slurm*.log")]
            return "the node did not become idle: " + " | ".join(lines)
        return ""

    def start_node(self) -> None:
        self._start("slurmd", "-D", "-f", str(self.root / "slurm.conf"), "-N", self.host)

    def _start(self, name: str, *arguments: str) -> None:
        program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
        assert program
        log = (self.root / f"{name}.out").open("ab")
        env = {**os.environ, **self.environment}
        self.processes[name] = subprocess.Popen([program, *arguments], stdout=log, stderr=log, env=env)

    def kill_node(self) -> None:
        """Kill -9 of slurmd: the node no longer answers."""
        self.processes["slurmd"].kill()
        self.processes.pop("slurmd").wait()

    def command(self, *line: str) -> str:
        env = {**os.environ, **self.environment}
        done = subprocess.run(line, capture_output=True, text=True, env=env, timeout=60)
        return done.stdout

    def is_idle(self) -> bool:
        return self.command("sinfo", "--noheader", "--format=%T", "--partition=main").strip() == "idle"

    def jobs(self) -> dict[str, str]:
        """Array task -> state, of what waits or runs."""
        lines = self.command("squeue", "--noheader", "--array", "--format=%i %T").split("\n")
        return dict(line.split() for line in lines if line.strip())

    def stop(self) -> None:
        self.command("scancel", "--full", "--user=root")
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not self.jobs(), 60, "the jobs")
        for name in ("slurmd", "slurmctld", "munged"):
            if name in self.processes:
                self.processes[name].send_signal(signal.SIGTERM)
                try:
                    self.processes[name].wait(20)
                except subprocess.TimeoutExpired:
                    self.processes[name].kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def cluster(root: Path) -> Iterator[Slurm]:
    slurm = Slurm(root)
    try:
        if reason := slurm.start():
            pytest.skip(f"no Slurm here: {reason}")
        yield slurm
    finally:
        slurm.stop()
