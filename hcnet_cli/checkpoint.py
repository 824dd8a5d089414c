"""Checkpoints that survive a crash at any moment: tensors as safetensors, the rest as JSON, a checksum for each file.

`last/` is the newest checkpoint and `previous/` the one before. A new one is written to a third folder and renamed, so
that one of the two is whole at any moment. `read` returns the newest whole one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hcnet_cli.console import UserError, warn
from hcnet_cli.files import open_regular, read_text, replacing, require_space, sync, write_text, writing

Tensors = Mapping[str, Tensor]
NEWEST, PREVIOUS = "last", "previous"
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what reading a bad one raises


def save_tensors(path: Path, tensors: Tensors, metadata: Mapping[str, Any] | None = None) -> None:
    """Replaces a safetensors file atomically. `metadata` is stored as sorted JSON: equal content gives equal bytes.

    UserError if the disk is full or the folder cannot be written.
    """
    # channels-last tensors are stored in the ordinary order, so the file does not depend on the layout
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with writing(path), replacing(path) as temporary:
        require_space(path, sum(t.numel() * t.element_size() for t in plain.values()))
        try:
            save_file(plain, temporary, metadata={"hcnet": json.dumps(metadata, sort_keys=True)} if metadata else None)
        except SafetensorError as error:
            if "os error 28" in str(error):  # safetensors reports the system's error as text
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
            raise


def write(folder: Path, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
    """Writes named groups of tensors and a JSON-able state to `folder`/last; the old last becomes previous."""
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
    """(tensors, state) of the newest whole checkpoint, or None if there is none yet.

    A damaged checkpoint is skipped with a warning. UserError if there are checkpoints and all are damaged.
    """
    present = [folder / name for name in (NEWEST, PREVIOUS) if (folder / name).exists()]
    for place in present:
        try:
            return _read_whole(place)
        except (*DAMAGE, SafetensorError) as error:
            warn(f"The checkpoint {place} is damaged ({str(error).rstrip('.')}) and was skipped.")
    if present:
        raise UserError(
            f"No checkpoint in {folder} is whole.", hint="Start over with --fresh, or restore the folder from a backup."
        )
    return None


def owner(folder: Path) -> tuple[dict[str, str], int] | None:
    """(identity of the run, step) of the newest checkpoint whose state.json can be read; None where there is none.

    The identity is empty where the checkpoint does not say. Reads no tensors.
    """
    for name in (NEWEST, PREVIOUS):
        try:
            state = json.loads(read_text(folder / name / "state.json"))["state"]
            return dict(state.get("run", {})), int(state["step"])
        except DAMAGE:
            continue
    return None


def _read_whole(place: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    content = json.loads(read_text(place / "state.json"))
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise ValueError("state.json was altered")
    for name, digest in content["files"].items():
        if Path(name).name != name:
            raise ValueError(f"{name} is not the name of a file in it")
        if _sha256(place / name) != digest:
            raise ValueError(f"{name} was altered or cut short")
    return {Path(name).stem: load_file(place / name) for name in content["files"]}, content["state"]


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return file_digest(file)


def file_digest(file: BinaryIO) -> str:
    """SHA-256 of an open binary file, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(2**20), b""):
        digest.update(block)
    return digest.hexdigest()
