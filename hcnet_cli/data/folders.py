"""What data folders of every format have in common."""

from __future__ import annotations

import re
from pathlib import Path


def dataset_name(root: Path, benchmark: str, is_benchmark: bool) -> str:
    """How results call a data set: the benchmark's name for the benchmark itself, else the folder's own.

    Rows of another data set never stand beside published ones, so a folder that happens to have the benchmark's name
    is called "NAME-data".
    """
    if is_benchmark:
        return benchmark
    name = re.sub(r"[^a-z0-9]+", "-", root.resolve().name.lower()).strip("-") or "data"
    return f"{name}-data" if name == benchmark else name
