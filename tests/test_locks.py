"""Protects the lock of a folder across machines: it says whose it is; a stale one is taken over, a living one not."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

import pytest

from hcnet_cli import locks
from hcnet_cli.console import RunFailed, UserError
from hcnet_cli.locks import Lock
from hcnet_cli.runs import RunFolder


def left_by_another_machine(folder: Path, silent: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ".lock.json"
    file.write_text(json.dumps({"host": "node7", "pid": 4242, "job": "17_3", "token": "theirs"}))
    os.utime(file, (time.time() - silent,) * 2)


def test_a_lock_of_a_living_machine_is_refused_and_says_whose_it_is(tmp_path: Path) -> None:
    left_by_another_machine(tmp_path / "run", silent=20)
    folder = RunFolder(tmp_path / "run")
    assert folder.is_locked()
    with (
        pytest.raises(UserError, match=r"process 4242 on node7, Slurm job 17_3, last heard of 0:20 ago"),
        folder.lock(),
    ):
        pass
    assert json.loads((tmp_path / "run" / ".lock.json").read_text())["token"] == "theirs"


def test_a_lock_of_a_machine_that_is_gone_is_taken_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    left_by_another_machine(tmp_path / "run", silent=locks.STALE + 5)
    folder = RunFolder(tmp_path / "run")
    assert not folder.is_locked()
    with folder.lock():
        owner = Lock(folder.path).owner()
        assert owner is not None
        assert (owner.host, owner.pid) == (platform.node(), os.getpid())
        assert folder.is_locked()
    assert "was left by process 4242 on node7" in capfd.readouterr().err
    assert not (folder.path / ".lock.json").exists()


def test_a_lock_that_the_server_still_holds_is_taken_over_and_its_owner_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that was cut off: its lock is still held, its heartbeat is old. Once back it must not write."""
    folder = RunFolder(tmp_path)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(platform, "node", lambda: "node7")
        cut_off = Lock(tmp_path)
        assert cut_off.acquire()
    cut_off.over.set()
    assert not Lock(tmp_path).acquire()
    os.utime(cut_off.owner_file, (time.time() - locks.STALE - 1,) * 2)
    ours = Lock(tmp_path)
    assert ours.acquire()
    folder.held = cut_off
    with pytest.raises(RunFailed, match="was taken over by process"):
        folder.append(step=1)
    assert not folder.log_file.exists()
    cut_off.release()
    ours.require()
    assert not Lock(tmp_path).acquire()  # the release of the first does not free the second's
    ours.release()
    assert Lock(tmp_path).acquire()


def test_a_process_that_was_killed_here_leaves_no_lock(tmp_path: Path) -> None:
    """The system's lock decides on one machine, however young the heartbeat."""
    (tmp_path / ".lock.json").write_text(json.dumps({"host": platform.node(), "pid": 1, "job": "", "token": "x"}))
    assert not Lock(tmp_path).is_held()
    assert Lock(tmp_path).acquire()


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT", 0.02)
    lock = Lock(tmp_path)
    assert lock.acquire()
    os.utime(lock.owner_file, (1000, 1000))
    deadline = time.monotonic() + 20
    while lock.owner_file.stat().st_mtime < 2000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', '{"host": "a", "pid": "x", "job": "", "token": ""}'])
def test_a_damaged_name_is_no_owner(text: str, tmp_path: Path) -> None:
    (tmp_path / ".lock.json").write_text(text)
    assert Lock(tmp_path).owner() is None
    assert Lock(tmp_path).acquire()
