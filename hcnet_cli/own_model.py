"""A model in a file of the user's own, "FILE.py:FUNCTION": which file that is, and its content as a digest. Torch-free.

The file runs (`models/own.py`) only where the command line names it: a recipe or a run folder from elsewhere cannot.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
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
    if beside := imported_beside(path, source):
        raise UserError(
            f"{path} imports {beside}, which lies beside it: a run keeps {path.name} alone, and is known by it.",
            hint="Put what the model needs into the one file, or install it as a package: pip install -e FOLDER",
        )
    if digest and digest != source_digest(source):
        raise UserError(
            f"{path} is not the file that the recipe or the run was made with: it has changed.",
            hint="A run keeps a copy of its own: --model RUN/model.py:FUNCTION.",
        )
    return source


def imported_beside(path: Path, source: str) -> str:
    """The first module or package that the file imports from its own folder and that is not installed; "" for none,
    and for a file that is no Python, whose error comes where it is run.
    """
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError):
        return ""
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    for name in dict.fromkeys(name.partition(".")[0] for name in names):
        for found in (path.parent / f"{name}.py", path.parent / name / "__init__.py"):
            if name and found.is_file() and name not in importlib.metadata.packages_distributions():
                return str(found.relative_to(path.parent))
    return ""


def source_digest(source: str) -> str:
    """16 hex digits over the content of the file."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]
