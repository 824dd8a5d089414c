"""A model in a file of the user's own, "FILE.py:FUNCTION": which file that is, and its content as a digest. Torch-free.

The file runs (`models/own.py`) only where the command line names it: a recipe or a run folder from elsewhere cannot.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from hcnet_cli.console import UserError
from hcnet_cli.files import read_text

LIMIT = 2**20  # bytes of the file


def is_own(name: str) -> bool:
    """Whether `model.name` names a file of the user's own instead of a model of timm."""
    return ".py:" in name or name.endswith(".py")


def split(name: str) -> tuple[Path, str]:
    """The file and the function of "FILE.py:FUNCTION"."""
    file, _, function = name.rpartition(":")
    if not file or not function.isidentifier():
        raise UserError(
            f'--model "{name}" names no function in the file.', hint="Write FILE.py:FUNCTION, or FILE.py:CLASS."
        )
    return Path(os.path.expanduser(file)), function


def read_source(name: str, digest: str = "") -> str:
    """The content of the file. UserError where there is none, no text, or (with `digest`) another content."""
    path, _ = split(name)
    if not path.is_file():
        raise UserError(
            f"There is no file {path}, which --model names.",
            hint="A run keeps a copy: --model RUN/model.py:FUNCTION goes on with it.",
        )
    source = read_text(path, LIMIT)
    if digest and digest != source_digest(source):
        raise UserError(
            f"{path} is not the file that the recipe or the run was made with: it has changed.",
            hint="A run keeps a copy of its own: --model RUN/model.py:FUNCTION.",
        )
    return source


def source_digest(source: str) -> str:
    """16 hex digits over the content of the file."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]
