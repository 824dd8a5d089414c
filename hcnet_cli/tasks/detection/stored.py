"""Annotation files, parsed once: their arrays are kept in the cache folder and mapped into memory by every process.

Parsing COCO's training annotations takes half a minute and 2 GB; the arrays take a second, and the processes and
workers of a machine share their pages. A file of arrays is a safetensors file, named by the content of the annotation
file and by what was asked of it. A damaged one, or a cache that cannot be written, costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from safetensors.numpy import save_file

from hcnet_cli import dist
from hcnet_cli.cache import cache_dir
from hcnet_cli.console import UserError
from hcnet_cli.data.folders import Packed
from hcnet_cli.files import open_regular, replacing
from hcnet_cli.tasks.detection.annotations import Annotations, Truth, read_annotations

VERSION = 3  # raise it when `read_annotations` makes something else of the same file
DTYPES = {"I64": np.int64, "I32": np.int32, "F64": np.float64, "F32": np.float32, "BOOL": np.bool_, "U8": np.uint8}
CHUNK = 2**20  # bytes hashed at a time


def shared_annotations(file: Path, *, masks: bool, scoring: bool) -> Annotations:
    """`read_annotations`, parsed by one process of a machine at most; problems are raised, on every process."""
    made: list[Annotations] = []
    dist.from_main(lambda: made.append(_stored(file, masks, scoring)))
    return made[0] if made else _stored(file, masks, scoring)  # another machine may have another cache


def _stored(file: Path, masks: bool, scoring: bool) -> Annotations:
    digest = hashlib.blake2b(digest_size=16)
    with open_regular(file) as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
    asked = f"{'m' if masks else 'b'}{'s' if scoring else 't'}"
    cache = cache_dir() / "annotations" / f"{digest.hexdigest()}-{asked}{VERSION}.safetensors"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):  # no lock: parsed by several, to the same arrays
            cache.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(cache.with_suffix(".lock")))
        if found := _load(cache, file):
            return found
        annotations = read_annotations(file, masks=masks, scoring=scoring)
        if annotations.digest != digest.hexdigest():  # it changed meanwhile
            return annotations
        with contextlib.suppress(OSError, UserError):
            _save(cache, annotations)
            return _load(cache, file) or annotations
        return annotations


def _save(cache: Path, annotations: Annotations) -> None:
    arrays: dict[str, NDArray[Any]] = {}
    facts: dict[str, Any] = {}
    for part, prefix in ((annotations, ""), (annotations.truth, "truth.")):
        for field in dataclasses.fields(part) if part is not None else ():
            value = getattr(part, field.name)
            if isinstance(value, Packed):
                arrays[f"{prefix}{field.name}.data"] = np.frombuffer(value.data, dtype=np.uint8)
                arrays[f"{prefix}{field.name}.ends"] = value.ends
            elif isinstance(value, np.ndarray):
                arrays[prefix + field.name] = value
            elif field.name not in ("file", "truth"):
                facts[prefix + field.name] = value
    with replacing(cache) as temporary:
        text = json.dumps(facts)
        save_file(arrays, temporary, {"facts": text, "sum": _sum(arrays, text)})


def _sum(arrays: dict[str, NDArray[Any]], text: str) -> str:
    made = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(arrays):
        made.update(name.encode())
        made.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return made.hexdigest()


def _load(cache: Path, file: Path) -> Annotations | None:
    """The annotations of a file of arrays, whose pages stay in the file; None where it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        raw = np.memmap(cache, dtype=np.uint8, mode="r")
        start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8:start].tobytes())
        about = header.pop("__metadata__")
        arrays = {
            name: np.asarray(raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]])
            .view(DTYPES[entry["dtype"]])
            .reshape(entry["shape"])
            for name, entry in header.items()
        }
        if _sum(arrays, about["facts"]) == about["sum"]:
            fields = {**arrays, **json.loads(about["facts"])}
            truth = {name[6:]: fields.pop(name) for name in list(fields) if name.startswith("truth.")}
            if truth:
                fields["truth"] = Truth(**_packed(truth))
            return Annotations(file=file, **_packed(fields))
    return None


def _packed(fields: dict[str, Any]) -> dict[str, Any]:
    """With each pair NAME.data and NAME.ends as the list of byte strings that it stands for."""
    for name in [name.removesuffix(".data") for name in fields if name.endswith(".data")]:
        fields[name] = Packed.of(fields.pop(f"{name}.data"), fields.pop(f"{name}.ends"))
    return fields
