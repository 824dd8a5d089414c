"""Protects what is on disk: a crash, a full disk or a flipped bit costs no more than the steps since the last save."""

from __future__ import annotations

import errno
import os
import platform
import shutil
from pathlib import Path

import pytest
import torch

from hcnet_cli import checkpoint, files, runs
from hcnet_cli.console import UserError


def write(folder: Path, step: int) -> None:
    tensors = {"model": {"w": torch.full((3, 2), float(step))}, "optimizer": {"w:step": torch.tensor(step)}}
    checkpoint.write(folder, tensors, {"step": step, "best": 0.1 + 0.2})


def step_of(folder: Path) -> int:
    found = checkpoint.read(folder)
    assert found is not None
    tensors, state = found
    assert tensors["model"]["w"].eq(state["step"]).all()
    assert state["best"] == 0.1 + 0.2  # JSON keeps every bit of a float
    return state["step"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.read(tmp_path) is None


def test_the_newest_is_read_and_the_one_before_is_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert step_of(tmp_path) == 3
    shutil.rmtree(tmp_path / "last")
    assert step_of(tmp_path) == 2


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    file: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    victim = tmp_path / "last" / file
    content = bytearray(victim.read_bytes())
    if damage == "remove":
        victim.unlink()
    elif damage == "truncate":
        victim.write_bytes(content[: len(content) // 2])
    else:
        content[-10] ^= 1
        victim.write_bytes(content)
    assert step_of(tmp_path) == 1
    assert "damaged" in capsys.readouterr().err


def test_all_damaged_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "last" / "state.json").write_text("{")
    with pytest.raises(UserError, match=str(tmp_path)):
        checkpoint.read(tmp_path)


@pytest.mark.parametrize("crash_at", range(1, 12))
def test_a_crash_at_any_rename_or_sync_leaves_a_whole_checkpoint(
    crash_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill -9 in the middle of writing, at every point where the disk changes."""
    write(tmp_path, 1)
    calls = 0

    class Killed(BaseException):
        pass

    def counted(real: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == crash_at:
                raise Killed
            return real(*args, **kwargs)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(checkpoint, "save_file", counted(checkpoint.save_file))
        try:
            write(tmp_path, 2)
        except Killed:
            pass
        else:
            assert calls < crash_at
    assert step_of(tmp_path) in (1, 2)
    write(tmp_path, 3)  # and what the crash left behind is no obstacle
    assert step_of(tmp_path) == 3


def test_a_full_disk_is_one_sentence_and_the_earlier_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(UserError, match="disk is full"):
            write(tmp_path, 2)
    assert step_of(tmp_path) == 1

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="disk is full"):
            write(tmp_path, 2)
    assert step_of(tmp_path) == 1


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "run.json"
    files.write_text(target, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="disk is full"):
            files.write_text(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["run.json"]


def test_links_pipes_and_devices_are_written_to_and_stay_what_they_are(tmp_path: Path) -> None:
    """A report for a link, a named pipe or /dev/stdout; as root, a rename would replace the device itself."""
    target, link, pipe = tmp_path / "target.md", tmp_path / "link.md", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    files.write_text(link, "new")
    assert (link.is_symlink(), target.read_text()) == (True, "new")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_text(pipe, "text")
    assert (pipe.is_fifo(), os.read(reader, 10)) == (True, b"text")
    os.close(reader)


def test_a_run_that_was_killed_is_not_called_running(tmp_path: Path) -> None:
    """Its record cannot say so; its lock does. What another computer does cannot be told from here."""
    folder = runs.RunFolder(tmp_path / "run")
    data = runs.DataInfo(name="d", digest="0", path="d", num_train=1, num_val=1, num_classes=1)
    info = runs.RunInfo(task="pretrain", protocol="", size="t", seed=0, fingerprint="0", data=data, steps_total=1,
                        batch_size=1, host=platform.node())  # fmt: skip

    def status() -> str:
        found = folder.read()
        assert found is not None
        return found.status

    with folder.lock():
        folder.write(info)
        assert status() == "running"
    assert status() == "interrupted"
    folder.write(info.model_copy(update={"host": "elsewhere"}))
    assert status() == "running"


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), runs.RunFolder(tmp_path / "file" / "run").lock():
        pass


def test_channels_last_tensors_survive(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    checkpoint.write(tmp_path, {"model": {"w": weight}}, {})
    found = checkpoint.read(tmp_path)
    assert found is not None
    assert found[0]["model"]["w"].equal(weight)
