"""Runs the function or class that builds a model from a file of the user's own, named on the command line."""

from __future__ import annotations

import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hcnet_cli import own_model
from hcnet_cli.console import UserError, did_you_mean


def load_function(name: str, digest: str = "") -> Callable[..., Any]:
    """The function that "FILE.py:FUNCTION" names. UserError for a file whose digest is another, that cannot be
    executed, or that has no such function.
    """
    path, function = own_model.split(name)
    source = own_model.read_source(name, digest)
    module = types.ModuleType(f"hcnet_own_{own_model.source_digest(source)}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look up the module of a class
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} cannot be executed: {describe_error(error, path)}.") from error
    made = getattr(module, function, None)
    if not callable(made):
        raise UserError(f"{path} has no function {function}.{did_you_mean(function, vars(module))}")
    result: Callable[..., Any] = made
    return result


def describe_error(error: BaseException, path: Path | None = None) -> str:
    """The class and first line of an exception, and the line of the user's file it came from; no full stop."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    message = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {message[0].rstrip('.')}" if message else type(error).__name__
    return f"{reason} (line {lines[-1]})" if lines else reason
