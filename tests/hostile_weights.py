"""Weights files that ask for too much, or for something else than plain numbers; by name, for tests."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def _view(size: tuple[int, ...], stride: tuple[int, ...]) -> Call:
    return Call(_rebuild_tensor_v2, torch.ones(6)._typed_storage(), 0, size, stride, False, {})  # type: ignore[no-untyped-call]


def _many_views() -> dict[str, torch.Tensor]:
    return {f"w{i}": torch.ones(1).expand(2**18) for i in range(1000)}


def _zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", pickle.dumps({"w": 1}, 2))
        archive.writestr("w/version", "3")
        archive.writestr("w/data/0", bytes(300 * 2**20))


def _quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


def _header(text: bytes, data: bytes = b"", size: int | None = None) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


def _saved(make: Callable[[], Any], **options: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(make(), path, **options)


PTH: dict[str, Callable[[Path], object]] = {
    "a view of 400 GB": _saved(lambda: {"w": _view((10**11,), (0,))}),
    "a view of 400 GB, old format": _saved(lambda: {"w": _view((10**11,), (0,))}, _use_new_zipfile_serialization=False),
    "many views": _saved(_many_views),
    "a bytearray of 100 GB": _saved(lambda: {"w": torch.ones(2), "x": Call(bytearray, 10**11)}),
    "meta": _saved(lambda: {"w": torch.empty(10**9, device="meta")}),
    "sparse": _saved(lambda: {"w": torch.sparse_coo_tensor([[0]], [1.0], (10**9,))}),
    "sparse rows": _saved(lambda: {"w": torch.eye(3).to_sparse_csr()}),
    "nested": _saved(lambda: {"w": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}),
    "complex": _saved(lambda: {"w": torch.ones(2, dtype=torch.complex64).conj()}),
    "quantised": _saved(lambda: {"w": _quantised()}),
    "8 bits": _saved(lambda: {"w": torch.ones(4).to(torch.float8_e4m3fn)}),
    "a number for a name": _saved(lambda: {1: torch.ones(2)}),
    "a tuple for a name": _saved(lambda: {("w", 1): torch.ones(2)}),
    "surrogates in a name": _saved(lambda: {"w\ud800": torch.ones(2)}),
    "escape codes in a name": _saved(lambda: {"\x1b[2J\x1b]0;x\x07": torch.ones(2)}),
    "a name of a megabyte": _saved(lambda: {"w" * 2**20: torch.ones(2)}),
    "a zip bomb": _zip_bomb,
    "nothing": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}
SAFETENSORS: dict[str, Callable[[Path], object]] = {
    "a header of exabytes": _header(b"{}", size=2**62),
    "a header of 15 MiB": _header(b'{"__metadata__": {"x": "' + b" " * 15 * 2**20 + b'"}}'),
    "a deep header": _header(b'{"w": ' + b"[" * 100_000),
    "thousands of digits": _header(b'{"w": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}'),
    "an overflowing shape": _header(
        b'{"w": {"dtype": "F32", "shape": [4294967296, 4294967297], "data_offsets": [0, 4]}}', b"abcd"
    ),
    "escape codes in a name": _header(
        b'{"\\u001b[2J": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}', b"abcd"
    ),
    "a kind that is not known": _header(
        b'{"w": {"dtype": "\\u001b[2J", "shape": [], "data_offsets": [0, 4]}}', b"abcd"
    ),
    "4 bits": _header(b'{"w": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}', b"abcd"),
    "a list": _header(b"[]" + b" " * 100),
    **{name: PTH[name] for name in ("nothing", "zeros", "a folder", "a pipe", "a device", "a link to itself")},
}
