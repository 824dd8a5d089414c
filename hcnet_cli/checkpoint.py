"""Checkpoints that survive a crash at any moment: tensors as safetensors, the rest as JSON, a checksum over each file.

`last/` is the newest, `previous/` the one before. A new one is written beside them and renamed into place, so that at
every instant one of the two is whole; `read` takes the newest whole one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hcnet_cli.console import UserError, warn
from hcnet_cli.runs import existing_parent, sync, write_text, writing

Tensors = Mapping[str, Tensor]
NEWEST, PREVIOUS = "last", "previous"


def save_tensors(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
    """Replaces a safetensors file atomically; `metadata` becomes JSON under one key: equal content, equal bytes.

    UserError when the disk is full or the place is not writable.
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # channels-last weights are stored in the ordinary order; a file is the same whatever layout trained it
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with writing(path):
        try:
            _require_space(path, sum(t.numel() * t.element_size() for t in plain.values()))
            save_file(plain, temp, metadata={"hcnet": json.dumps(metadata, sort_keys=True)} if metadata else None)
            sync(temp)
            os.replace(temp, path)
        except SafetensorError as error:
            if "os error 28" in str(error):  # it reports the system's error as text
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
            raise
        finally:
            temp.unlink(missing_ok=True)
        sync(path.parent)


def write(folder: Path, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
    """Makes `folder`/last from named groups of tensors and a JSON-able state; the former last becomes previous."""
    fresh = folder / f".{NEWEST}.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    with writing(fresh):
        fresh.mkdir(parents=True)
        for name, group in tensors.items():
            save_tensors(fresh / f"{name}.safetensors", group)
        checksums = {f"{name}.safetensors": _sha256(fresh / f"{name}.safetensors") for name in tensors}
        body = {"state": dict(state), "files": checksums}
        write_text(fresh / "state.json", json.dumps({**body, "checksum": _checksum(body)}, indent=1))
        newest, previous = folder / NEWEST, folder / PREVIOUS
        if newest.exists():
            shutil.rmtree(previous, ignore_errors=True)
            newest.rename(previous)
        fresh.rename(newest)
        sync(folder)


def read(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """(tensors, state) of the newest whole checkpoint, or None where there is none yet.

    A damaged one is passed over with a warning. UserError when there are checkpoints and all are damaged.
    """
    present = [folder / name for name in (NEWEST, PREVIOUS) if (folder / name).exists()]
    for place in present:
        try:
            return _read_whole(place)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            warn(f"The checkpoint {place} is damaged ({error}) and was passed over.")
    if present:
        raise UserError(
            f"No checkpoint in {folder} is whole.", hint="Start over with --fresh, or restore the folder from a copy."
        )
    return None


def _read_whole(place: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    content = json.loads((place / "state.json").read_text(encoding="utf-8"))
    checksum = content.pop("checksum")
    if checksum != _checksum(content):
        raise ValueError("state.json was altered")
    for name, digest in content["files"].items():
        if _sha256(place / name) != digest:
            raise ValueError(f"{name} was altered or cut short")
    return {Path(name).stem: load_file(place / name) for name in content["files"]}, content["state"]


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file)


def file_digest(file: Any) -> str:
    """SHA-256 of an open binary file, in pieces."""
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(2**20), b""):
        digest.update(block)
    return digest.hexdigest()


def _require_space(path: Path, size: int) -> None:
    """A full disk found before half a file is written."""
    if shutil.disk_usage(existing_parent(path.parent)).free < size + 2**20:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
