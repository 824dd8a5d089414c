"""Files of weights without PyTorch: whether they can be any, and of safetensors the metadata and the digest."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

from hcnet_cli.console import UserError
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


def check_content(path: Path) -> None:
    """UserError for a file that begins with text instead of weights, of any kind."""
    with open_regular(path) as file:
        head = file.read(512)
    if what := _other_content(head):
        raise UserError(f"{path} holds no weights: it is {what}.", hint="Download the file itself, and name that.")


def _other_content(head: bytes) -> str:
    """What a file is that begins with text instead of weights, in words; "" for anything else."""
    if not head:
        return "empty"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, which stands for the file"
    if start.lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page"
    if re.fullmatch(rb"[\t\n\r\x20-\x7e]{8,}", head):
        return f'text ("{head.splitlines()[0][:60].decode()}")'
    return ""


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
