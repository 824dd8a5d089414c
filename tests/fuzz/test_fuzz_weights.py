"""Any bytes, and any pickle, as a weights file: plain tensors or one sentence, in little time and memory."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_weights import Call
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from support import edited, examples, watched
from torch._utils import _rebuild_tensor_v2

from hcnet_cli.console import UserError
from hcnet_cli.weights import DTYPES, digest, read_weights

STATE = {"stem.weight": torch.arange(24.0).view(2, 3, 4), "head.bias": torch.zeros(3), "steps": torch.tensor(3)}
EDITS = st.lists(st.tuples(st.integers(0, 5000), st.sampled_from(["set", "insert", "cut"]), st.binary(max_size=9)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def read(file: Path) -> None:
    """Reads the file: what comes is plain, or a UserError of one line that a terminal can show."""
    found: dict[str, torch.Tensor] = {}
    said = ""
    try:
        with watched(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = read_weights(file)
            assert len(digest(found)) == 16
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert "\x1b" not in said
    for name, value in found.items():
        assert isinstance(name, str)
        assert name.isprintable()
        assert type(value) is torch.Tensor
        assert value.is_contiguous()
        assert value.device.type == "cpu"
        assert value.dtype in DTYPES


def saved(state: Any, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def archive(pickled: bytes) -> bytes:
    """A checkpoint with this pickle and one storage, whose checksums are right."""
    file = io.BytesIO()
    contents = {"data.pkl": pickled, "byteorder": b"little", "data/0": bytes(96), "version": b"3\n"}
    with zipfile.ZipFile(file, "w") as zipped:
        for name, content in contents.items():
            zipped.writestr(f"w/{name}", content)
    return file.getvalue()


FILES = {"zip.pth": saved(STATE, True), "old.pth": saved(STATE, False), "w.safetensors": save(STATE)}
PICKLED = zipfile.ZipFile(io.BytesIO(FILES["zip.pth"])).read("archive/data.pkl")


@examples()
@given(name=st.sampled_from(sorted(FILES)), edits=EDITS)
def test_a_damaged_file(folder: Path, name: str, edits: list[tuple[int, str, bytes]]) -> None:
    (folder / name).write_bytes(edited(FILES[name], edits))
    read(folder / name)


@examples()
@given(edits=EDITS)
def test_a_damaged_pickle_in_a_whole_archive(folder: Path, edits: list[tuple[int, str, bytes]]) -> None:
    (folder / "p.pth").write_bytes(archive(edited(PICKLED, edits)))
    read(folder / "p.pth")


SIZES = st.lists(st.one_of(st.integers(0, 7), st.sampled_from([10**6, 10**11, 2**62, -1])), max_size=4)
KINDS = st.sampled_from(
    [
        lambda t: t,
        lambda t: torch.nn.Parameter(t),
        lambda t: t.to_sparse(),
        lambda t: t.to("meta"),
        lambda t: t.to(torch.complex64).conj(),
        lambda t: t.bool(),
        lambda t: t.to(torch.float8_e5m2),
        lambda t: t.half().t() if t.ndim == 2 else t.half(),
        lambda t: {"deeper": t},
        lambda t: [t],
    ]
)
TENSORS = st.one_of(
    st.builds(lambda kind, shape: kind(torch.ones(shape)), KINDS, st.lists(st.integers(0, 3), max_size=3)),
    st.builds(
        lambda size, stride, offset: Call(
            _rebuild_tensor_v2, torch.ones(6)._typed_storage(), offset, tuple(size), tuple(stride), False, OrderedDict()
        ),
        SIZES,
        SIZES,
        st.integers(0, 8),
    ),
    st.builds(lambda size: Call(bytearray, size), st.sampled_from([3, 10**11])),
    st.one_of(st.integers(), st.text(max_size=5), st.none()),
)
NAMES = st.one_of(st.text(st.characters(codec=None), max_size=8), st.integers(), st.tuples(st.text(max_size=3)))


@examples()
@given(
    state=st.dictionaries(NAMES, TENSORS, max_size=4),
    under=st.sampled_from([None, "model", "state_dict", "x"]),
    zipped=st.booleans(),
)
def test_any_state_dict(folder: Path, state: dict[Any, Any], under: str | None, zipped: bool) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = saved({under: state} if under else state, zipped)
    except (UnicodeEncodeError, RuntimeError, pickle.PicklingError):  # nobody can write it
        return
    (folder / "s.pth").write_bytes(content)
    read(folder / "s.pth")


GLOBALS = [
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch FloatStorage", "torch Size"),
    *("torch._utils _rebuild_meta_tensor_no_storage", "collections OrderedDict", "builtins set", "builtins bytearray"),
    *("torch._utils _rebuild_sparse_tensor", "torch.nn.parameter Parameter", "torch float32", "torch device"),
    *("argparse Namespace", "os system", "builtins eval", "_codecs encode", "torch Tensor", "torch FloatTensor"),
]
OPCODES = [
    *(b"c" + name.replace(" ", "\n").encode() + b"\n" for name in GLOBALS),
    *(b"X" + struct.pack("<I", len(text)) + text for text in (b"w", b"storage", b"0", b"cpu", b"\x1b[2J", b"model")),
    *(b"J" + struct.pack("<i", number) for number in (0, 1, 24, -1, 2**31 - 1)),
    *(b"}", b"]", b")", b"(", b"t", b"\x85", b"\x86", b"\x87", b"R", b"b", b"\x81", b"s", b"u", b"a", b"e", b"Q", b"N"),
    *(b"q\x00", b"h\x00", b"q\x01", b"h\x01", b"\x88", b"\x89", b"G?\xf0\0\0\0\0\0\0"),
]
STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\x18tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\0K\2K\3\x86K\3K\1\x86\x89"
TENSOR += b"ccollections\nOrderedDict\n)RtR"


@examples()
@given(code=st.lists(st.sampled_from([*OPCODES, STORAGE, TENSOR, b"X\1\0\0\0w" + TENSOR + b"s"]), max_size=25))
def test_any_pickle(folder: Path, code: list[bytes]) -> None:
    (folder / "o.pth").write_bytes(archive(b"\x80\2}" + b"".join(code) + b"."))
    read(folder / "o.pth")
