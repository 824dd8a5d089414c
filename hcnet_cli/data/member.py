"""A file inside a tar, read where it lies: the tar's path, an offset and a number of bytes."""

from __future__ import annotations

import errno
import functools
import io
import os
from pathlib import Path
from typing import NamedTuple

OPEN_TARS = 256  # that a process keeps open; most systems allow a process 1024 files


class Tar(NamedTuple):
    """A tar as it was when it was indexed. Another size, time or inode means another content."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Tar:
        stat = os.stat(path)
        return cls(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


class Member(NamedTuple):
    """A file inside a tar. `str()` names both, for messages: OUT/train-000003.tar:cat/1.jpg."""

    tar: Tar
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar.path}:{self.name}"

    def read(self) -> bytes:
        """The content; OSError if the tar is shorter than when it was indexed, or another file."""
        content = os.pread(_opened(self.tar).fileno(), self.size, self.offset)  # no position: threads may share it
        if len(content) != self.size:
            raise OSError(errno.EIO, f"{self.tar.path} ends before it")
        return content


Source = str | Path | Member


@functools.lru_cache(maxsize=OPEN_TARS)
def _opened(tar: Tar) -> io.FileIO:
    file = io.FileIO(tar.path)
    stat = os.fstat(file.fileno())
    if (stat.st_size, stat.st_mtime_ns, stat.st_ino) != (tar.size, tar.mtime_ns, tar.inode):
        file.close()
        raise OSError(errno.ESTALE, f"{tar.path} changed after it was indexed")
    return file
