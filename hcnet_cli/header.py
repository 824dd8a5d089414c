"""A safetensors file without PyTorch: its metadata, which say of which run the weights are, and its digest."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

from hcnet_cli.files import open_regular
from hcnet_cli.plain_json import parse_json

DTYPES = {  # safetensors' names of the kinds of number that weights have -> PyTorch's
    **{f"F{bits}": f"torch.float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"torch.int{bits}" for bits in (8, 16, 32, 64)},
    "BF16": "torch.bfloat16",
    "U8": "torch.uint8",
    "BOOL": "torch.bool",
}
LARGEST = 16 * 2**20  # bytes of a header, which needs some 100 for each tensor


def read_metadata(path: Path) -> dict[str, Any]:
    """What `checkpoint.save_tensors` stored with the tensors; {} for a file of another program.

    ValueError, a clause, for a file that is cut short or not safetensors; UserError for one that cannot be read.
    """
    with open_regular(path) as file:
        return _read_header(file)[1]


def tensors_digest(path: Path) -> str:
    """`weights.digest` of the tensors in a file, of their bytes as they lie there. Errors as `read_metadata`."""
    total = hashlib.sha256()
    with open_regular(path) as file:
        tensors, _ = _read_header(file)
        start = file.tell()
        size = os.fstat(file.fileno()).st_size - start
        try:
            for name in sorted(tensors):
                dtype, shape, (begin, end) = (tensors[name][key] for key in ("dtype", "shape", "data_offsets"))
                size -= end - begin
                if size < 0 or not 0 <= begin <= end:  # tensors that share bytes could ask for any amount of reading
                    raise ValueError
                file.seek(start + begin)
                total.update(f"{name}{tuple(shape)}{DTYPES[dtype]}".encode())
                total.update(file.read(end - begin))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            raise ValueError("its header is damaged") from None
    return total.hexdigest()[:16]


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the entries of the tensors, the metadata) of a file that is read up to where its tensors begin."""
    size = int.from_bytes(file.read(8), "little")
    text = file.read(size) if 2 <= size <= LARGEST else b""
    end = os.fstat(file.fileno()).st_size
    if not text.startswith(b"{"):
        raise ValueError("it is not a safetensors file")
    if len(text) < size:
        raise ValueError("it is cut short")
    header = parse_json(text.decode("utf-8", "replace"))
    try:
        about = parse_json(header.pop("__metadata__", {}).get("hcnet", "{}"))
        needed = max((one["data_offsets"][1] for one in header.values()), default=0)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("its header is damaged") from None
    if type(needed) is not int or end != 8 + size + needed:
        cut = type(needed) is int and end < 8 + size + needed
        raise ValueError("it is cut short" if cut else "it is longer than its header says")
    return header, about if isinstance(about, dict) else {}
