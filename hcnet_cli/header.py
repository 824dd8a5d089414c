"""The metadata of a safetensors file, read from its first bytes: which run the weights are of. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hcnet_cli.files import open_regular
from hcnet_cli.plain_json import parse_json

LARGEST = 16 * 2**20  # bytes of a header, which needs some 100 for each tensor


def read_metadata(path: Path) -> dict[str, Any]:
    """What `checkpoint.save_tensors` stored with the tensors; {} for a file of another program.

    ValueError, a clause, for a file that is cut short or not safetensors; UserError for one that cannot be read.
    """
    with open_regular(path) as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if 2 <= size <= LARGEST else b""
        end = os.fstat(file.fileno()).st_size
    if not text.startswith(b"{"):
        raise ValueError("it is not a safetensors file")
    if len(text) < size:
        raise ValueError("it is cut short")
    header = parse_json(text.decode("utf-8", "replace"))
    try:
        needed = max((one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"), default=0)
        about = parse_json(header.get("__metadata__", {}).get("hcnet", "{}"))
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("its header is damaged") from None
    if type(needed) is not int or end != 8 + size + needed:
        cut = type(needed) is int and end < 8 + size + needed
        raise ValueError("it is cut short" if cut else "it is longer than its header says")
    return about if isinstance(about, dict) else {}
