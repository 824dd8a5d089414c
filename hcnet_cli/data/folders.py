"""What data folders of every format have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np


class Packed:
    """A list of byte strings in one buffer, which worker processes share.

    Separate strings would be copied into each worker page by page, since touching one changes its reference count.
    """

    def __init__(self, items: Iterable[bytes]) -> None:
        buffer, ends = bytearray(), []
        for item in items:
            buffer += item
            ends.append(len(buffer))
        self.data, self.ends = bytes(buffer), np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        return self.data[self.ends[i - 1] if i else 0 : self.ends[i]]


def dataset_name(root: Path, benchmark: str, is_benchmark: bool) -> str:
    """How results call a data set: the benchmark's name for the benchmark itself, else the folder's own.

    Another data set's rows must not appear next to published ones, so a folder that only has the benchmark's name is
    called "NAME-data".
    """
    if is_benchmark:
        return benchmark
    name = re.sub(r"[^a-z0-9]+", "-", root.resolve().name.lower()).strip("-") or "data"
    return f"{name}-data" if name == benchmark else name
