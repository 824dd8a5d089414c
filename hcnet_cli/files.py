"""Writing files so that a reader sees the old content or the new, never half; errors as one sentence. Torch-free."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hcnet_cli.console import DISK_FULL, UserError, notice, warn

STALE_SECONDS = 3600.0  # no write takes so long: an older temporary file is of a process that was killed


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file for reading. UserError for a folder, a pipe or a device, and for a file that cannot be read.

    A pipe is never waited for.
    """
    if "\0" in str(path):
        raise UserError(f"{str(path)!r} is not the name of a file.")
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise UserError(f"{path} is not a regular file.")
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. UserError as `open_regular`, and for a longer file.

    A file that grows meanwhile is read up to the limit alone.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{path} is larger than {limit / 2**20:.0f} MiB, more than such a file can need.")
    return content


def read_text(path: Path, limit: int = 16 * 2**20) -> str:
    """UTF-8 text of a regular file, without a byte-order mark. UserError as `read_bytes`, and for other encodings."""
    content = read_bytes(path, limit)
    try:
        null = content.find(b"\0")
        if null >= 0:  # no text has one, and UTF-16 without a mark has one beside every letter
            raise UnicodeDecodeError("utf-8", content, null, null + 1, "null character")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} is not UTF-8 text (line {line}).", hint="Save it as UTF-8.") from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError raised inside, while `path` is written, into a UserError that names the path and the cause."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL and out_of_inodes(path):
            raise UserError(
                f"The disk has no room for another file (its inodes are used up): {path} could not be written.",
                hint="What was saved before is intact. Remove files and run the same command again.",
            ) from None
        if error.errno in DISK_FULL:
            free = shutil.disk_usage(existing_parent(path)).free // 2**20
            raise UserError(
                f"The disk is full ({free} MiB free): {path} could not be written.",
                hint="What was saved before is intact. Free some space and run the same command again.",
            ) from None
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}.",
            hint="Choose another place, with --out or --output.",
        ) from None


@contextlib.contextmanager
def optional(path: Path) -> Iterator[None]:
    """Around the writing of a file that nothing depends on: what goes wrong is a warning that names the file."""
    try:
        yield
    except UserError as error:
        warn(f"{error} No score depends on it.")
    except Exception as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        warn(f"{path} could not be written: {reason}. No score depends on it.")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; what was written there replaces `path` at the end of the block.

    The file is synced before the rename and the folder after it. If the block raises, `path` stays as it was. Its mode
    follows the umask, whoever writes it. What a killed process left of an earlier write is removed.
    """
    remove_stale(path.parent, f".{glob.escape(path.name)}.*.tmp")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files private
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which becomes `path` at the end of the block; removed if it raises.

    UserError where it cannot be written, or something has the name by then.
    """
    remove_stale(path.parent, f".{glob.escape(path.name)}.*.tmp")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            temporary.mkdir(parents=True)
        yield temporary
        with writing(path):
            os.rename(temporary, path)
            sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_stale(folder: Path, pattern: str, seconds: float = STALE_SECONDS) -> None:
    """Removes the temporary files and folders of a pattern that nothing has been written to for `seconds`."""
    for old in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - old.lstat().st_mtime >= seconds:
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` with `text`: whole or not at all. UserError if that is impossible.

    A symbolic link is kept and its target is replaced. A pipe or a device receives the text directly. What UTF-8 cannot
    hold, such as a file name of other bytes, is written as JSON escapes it.
    """
    content = text.encode("utf-8", "backslashreplace")
    with writing(path):
        path = path.resolve()
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        with replacing(path) as temporary:
            temporary.write_bytes(content)


def check_output(path: Path) -> None:
    """UserError if the file of an --output cannot be written. Called before any work is done for it."""
    if path.is_dir():
        raise UserError(f"{path} is a folder.")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


@contextlib.contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """Makes a folder and those above it. Those that are empty at the end, also if the block raises, are removed."""
    made = [one for one in (path, *path.parents) if not one.exists()]
    try:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for one in made:
            with contextlib.suppress(OSError):  # it is not empty
                one.rmdir()


def write_output(path: Path, text: str) -> None:
    """`write_text` for the file of an --output: makes its folder and prints a notice."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    notice(f"Wrote {path}.")


EXTENSIONS = frozenset(  # of the files that are taken as images
    [
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff"),
        *(".gif", ".ppm", ".pgm", ".pnm"),
    ]
)


def is_image(name: bytes) -> bool:
    """Whether a file's name ends as those of images do."""
    return os.fsdecode(os.path.splitext(name)[1]).lower() in EXTENSIONS


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files in a folder and in the folders in it."""
    return sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")])


def existing_parent(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def write_speed(folder: Path, num_bytes: int = 8 * 2**20) -> float | None:
    """Bytes a second that reach the disk of a folder, by a temporary file; None where none can be written."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            begun = time.perf_counter()
            file.write(os.urandom(num_bytes))
            file.flush()
            os.fsync(file.fileno())
            return num_bytes / (time.perf_counter() - begun)
    except OSError:
        return None


def require_space(path: Path, num_bytes: int) -> None:
    """OSError(ENOSPC) if the disk of `path` has less than `num_bytes` and a reserve of 1 MiB free."""
    if shutil.disk_usage(existing_parent(path.parent)).free < num_bytes + 2**20:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def out_of_inodes(path: Path) -> bool:
    """Whether the disk of `path` has free bytes, but cannot hold one more file."""
    if not hasattr(os, "statvfs"):
        return False
    disk = os.statvfs(existing_parent(path))
    return disk.f_files > 0 and disk.f_favail == 0 and disk.f_bavail > 0  # some file systems count no inodes: 0 files
