"""The metadata of a safetensors file, read from its first bytes: which run the weights are of. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LARGEST = 100 * 2**20  # bytes of a header; the format's own limit


def read_metadata(path: Path) -> dict[str, Any]:
    """What `checkpoint.save_tensors` stored with the tensors; {} for a file of another program.

    OSError or ValueError for a file that is missing, cut short or not safetensors.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= LARGEST:
            raise ValueError("it is not a safetensors file")
        text = file.read(size)
        file.seek(0, 2)
        end = file.tell()
    header = json.loads(text.decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("its header is not a mapping")
    try:
        needed = max((one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"), default=0)
        about = json.loads(header.get("__metadata__", {}).get("hcnet", "{}"))
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("its header is damaged") from None
    if end != 8 + size + needed:
        raise ValueError("it is cut short" if end < 8 + size + needed else "it is longer than its header says")
    return about if isinstance(about, dict) else {}
