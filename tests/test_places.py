"""Protects what lies on the disk: whatever stands where a file is expected, and whatever a killed process left."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Hcnet
from synthetic_runs import make_run

from hcnet_cli import cache, checkpoint, files, runs
from hcnet_cli.console import UserError
from hcnet_cli.data import embedded
from hcnet_cli.plain_json import parse_json, read_json
from hcnet_cli.results import collect
from hcnet_cli.runs import RunFolder

PUT: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "300 MB": lambda path: path.open("w").truncate(300 * 10**6),
    "deep nesting": lambda path: path.write_text("[" * 100_000),
    "5,000 digits": lambda path: path.write_text('{"schema_version": 1, "seed": ' + "9" * 5000 + "}"),
    "other bytes": lambda path: path.write_bytes(b"\xff\xfe{}"),
}


@pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "best.safetensors"])
@pytest.mark.parametrize("what", PUT)
def test_a_run_with_something_else_for_a_file_is_a_line_in_the_list(what: str, name: str, tmp_path: Path) -> None:
    """Each was a traceback, a hang or a full memory; the run beside it is read."""
    make_run(tmp_path, name="good")
    bad = make_run(tmp_path, name="bad", seed=1)
    info = runs.read_record(bad / "run.json").model_copy(update={"config": "0" * 16})
    text = (bad / "recipe.yaml").read_text()
    (bad / "run.json").write_text(runs.record_text(info.model_copy(update={"recipe_digest": runs.text_digest(text)})))
    (bad / name).unlink(missing_ok=True)
    PUT[what](bad / name)
    found = collect([tmp_path])
    assert [run.name for run in found.runs] == ["good"]
    ((folder, reason),) = found.broken
    assert folder.name == "bad"
    assert reason.isprintable()
    assert reason.endswith(".")


def test_a_log_that_cannot_be_read_costs_the_curves_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from hcnet_cli import report

    folder = make_run(tmp_path, score=97.25)
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    assert "97.25" in report.report([tmp_path], fmt="html")
    assert "is not a regular file. The run has no curves." in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    "text", ["NaN", "[1e999]", "9" * 5000, "1" + "0" * 30, '"\\ud800"', '{"\\udfff": 1}', "[" * 99, "{"]
)
def test_json_that_readers_would_stumble_over_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json cannot be read: it "):
        read_json(tmp_path / "x.json")


def test_json_is_read_as_python_reads_it() -> None:
    text = '{"a": [1, -2.5e3, true, null, "\\ud83d\\ude00 é"], "b": {"c": 9223372036854775807}}'
    assert parse_json(text) == {"a": [1, -2500.0, True, None, "😀 é"], "b": {"c": 2**63 - 1}}


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_every_file_follows_the_umask(mask: int, tmp_path: Path) -> None:
    """Safetensors makes its files private; a group could not read the weights of a run."""
    before = os.umask(mask)
    try:
        checkpoint.save_tensors(tmp_path / "best.safetensors", {"w": torch.ones(2)})
        files.write_text(tmp_path / "run.json", "{}")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {oct(0o666 & ~mask)}


def killed_while_writing(path: Path) -> Path:
    """What a process leaves that is killed while it replaces a file; the temporary file."""
    code = (
        "import os, pathlib, sys; from hcnet_cli.files import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    (left,) = path.parent.glob(f".{path.name}.*")
    return left


def test_the_next_command_in_a_run_folder_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    left = killed_while_writing(tmp_path / "best.safetensors")
    with RunFolder(tmp_path).lock():
        assert not left.exists()


def test_elsewhere_only_what_is_old_is_removed(tmp_path: Path) -> None:
    """A file of another process that writes now must stay."""
    left = killed_while_writing(tmp_path / "all.md")
    files.write_text(tmp_path / "all.md", "whole")
    assert left.exists()
    os.utime(left, (time.time() - 2 * files.STALE_SECONDS,) * 2)
    (tmp_path / ".all.md.old").touch()
    files.write_text(tmp_path / "all.md", "whole")
    assert not left.exists()
    assert (tmp_path / ".all.md.old").exists()


def test_half_an_embedded_set_of_a_killed_process_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCNET_CACHE", str(tmp_path))
    monkeypatch.setitem(embedded.EMBEDDED, "digits", lambda folder: (folder / "x").write_text("x"))
    half = tmp_path / f"embedded-v{cache.EMBEDDED_VERSION}" / ".digits-0123"
    half.mkdir(parents=True)
    os.utime(half, (0, 0))
    embedded.ensure("digits")
    assert not half.exists()


def test_a_disk_without_inodes_is_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_files=100, f_favail=0, f_bavail=10**6))
    with pytest.raises(UserError, match="inodes are used up") as error, files.writing(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "full" not in str(error.value)


# --- home and cache ---------------------------------------------------------------------------------------------------


def test_a_tilde_in_a_variable_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HCNET_CACHE", "~/cache")
    assert cache.cache_dir() == tmp_path / "cache"
    assert embedded.data_folder("~/data") == tmp_path / "data"


def test_a_user_without_a_home_has_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "HCNET_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user without an entry
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = cache.cache_dir()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    (tmp_path / "hcnet-54321").symlink_to(folder)
    if folder.lstat().st_uid != 54321:
        with pytest.raises(UserError, match="belongs to another user"):
            cache.cache_dir()


LONG = 300 * "a"


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", LONG),
        ("pretrain", "--data", LONG),
        ("shards", LONG, "out"),
        ("predict", LONG, LONG, "--output", "out"),
    ],
    ids=lambda words: words[0],
)
def test_a_name_that_no_file_can_have_is_one_sentence(
    arguments: tuple[str, ...], hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    done = hcnet(*arguments)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert LONG in done.err


@pytest.mark.parametrize(
    ("number", "words"), [(errno.EACCES, "Permission denied"), (errno.ENOSPC, "No space left on device")]
)
def test_what_the_system_refuses_of_a_file_is_one_sentence(
    number: int, words: str, tmp_path: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> None:
        raise OSError(number, words, str(path))

    monkeypatch.setattr("hcnet_cli.inputs.parquet_files", refused)
    done = hcnet("pretrain", "--data", tmp_path, "--out", tmp_path / "results")
    assert (done.code, done.err.splitlines()[0]) == (2, f"error: {tmp_path}: {words}.")
    monkeypatch.setenv("HCNET_TRACEBACK", "1")
    with pytest.raises(OSError, match=words):
        hcnet("pretrain", "--data", tmp_path, "--out", tmp_path / "results")
