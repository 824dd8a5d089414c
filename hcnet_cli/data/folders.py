"""What data folders of every format have in common."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hcnet_cli.console import UserError
from hcnet_cli.tasks import TASKS


class Packed:
    """A list of byte strings in one buffer, which worker processes share.

    Separate strings would be copied into each worker page by page, since touching one changes its reference count.
    """

    def __init__(self, items: Iterable[bytes]) -> None:
        buffer, ends = bytearray(), []
        for item in items:
            buffer += item
            ends.append(len(buffer))
        self.data: bytes | NDArray[np.uint8] = bytes(buffer)
        self.ends: NDArray[np.int64] = np.array(ends, dtype=np.int64)

    @classmethod
    def of(cls, data: NDArray[np.uint8], ends: NDArray[np.int64]) -> Packed:
        """From a buffer that exists, such as a file that is mapped into memory."""
        made = cls(())
        made.data, made.ends = data, ends
        return made

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        return bytes(self.data[self.ends[i - 1] if i else 0 : self.ends[i]])

    def take(self, rows: NDArray[np.intp]) -> Packed:
        return Packed([self[i] for i in rows.tolist()])


def dataset_name(root: Path, benchmark: str, is_benchmark: bool) -> str:
    """How results call a data set: the benchmark's name for the benchmark itself, else the folder's own.

    Another data set's rows must not appear next to published ones, so a folder that only has the benchmark's name is
    called "NAME-data".
    """
    if is_benchmark:
        return benchmark
    name = _plain(root.resolve().name)
    return f"{name}-data" if name == benchmark else name


def own_name(text: str, benchmark: str) -> str:
    """The name of a data set that is no benchmark, where its results or weights must not pass for those of one.

    No task's benchmark has it, and none that begins with `benchmark`: runs are called TASK-DATA-MODEL. "part-" and
    "data" behind the benchmark's name say that it is not meant (see grouping.py).
    """
    name = _plain(text)
    if name in {spec.benchmark for spec in TASKS.values()}:
        return f"{name}-data"
    return re.sub(rf"^{re.escape(benchmark)}-(?!part-|data(-|$))", f"{benchmark}-data-", name)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "data"


LeftOut = dict[str, list[str]]  # why files or objects of a data folder are not used -> their names


@contextlib.contextmanager
def reading_folder(root: Path) -> Iterator[None]:
    """Turns an OSError raised inside, while a data folder is listed, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{os.fsdecode(error.filename or root)} cannot be read: {error.strerror}.") from None


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted, without hidden ones. Links are followed."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def walk(folder: bytes, wanted: Callable[[bytes], bool], other: str, left_out: LeftOut) -> list[bytes]:
    """The files in a folder and below whose name is `wanted`, relative to it, sorted. Links are followed.

    What is not used goes to `left_out`: hidden files and folders, links back to a folder above, and files that are
    not wanted, under the reason `other`.
    """
    names: list[bytes] = []
    pending: list[tuple[bytes, frozenset[tuple[int, int]]]] = [(b"", _above(folder))]

    def leave_out(reason: str, name: bytes) -> None:
        left_out.setdefault(reason, []).append(os.fsdecode(os.path.join(folder, name)))

    while pending:
        below, above = pending.pop()
        here = os.stat(os.path.join(folder, below))
        with os.scandir(os.path.join(folder, below)) as entries:
            for entry in entries:
                name = below + entry.name
                if entry.name.startswith(b"."):
                    leave_out("hidden files and folders", name)
                elif entry.is_dir():
                    inside = above | {(here.st_dev, here.st_ino)}
                    if not entry.is_symlink():
                        pending.append((name + b"/", inside))
                    elif ((target := entry.stat()).st_dev, target.st_ino) in inside:
                        leave_out("links to a folder above", name)
                    else:
                        pending.append((name + b"/", inside | _above(entry.path)))
                elif wanted(entry.name) and (entry.is_file() or _is_broken_link(entry)):
                    names.append(name)
                else:
                    leave_out(other, name)
    return sorted(names)


def _above(folder: bytes) -> frozenset[tuple[int, int]]:
    """Device and inode of every folder above one, as its path says and where links lead."""
    found = {
        parent
        for path in (os.path.abspath(folder), os.path.realpath(folder))
        for parent in Path(os.fsdecode(path)).parents
    }
    return frozenset((stat.st_dev, stat.st_ino) for stat in map(os.stat, found))


def _is_broken_link(entry: os.DirEntry[bytes]) -> bool:
    """Whether a link leads nowhere: its target was meant to be used, and whoever reads it says so."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def counted(left_out: LeftOut) -> dict[str, int]:
    """How many files or objects are left out for each reason."""
    return {reason: len(names) for reason, names in left_out.items() if names}
