"""JSON from files that anyone may have written, as plain data without surprises. Torch-free."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from hcnet_cli.console import UserError
from hcnet_cli.files import read_text

DEPTH = 32  # of nesting; a record has 4
LARGEST_INT = 2**63  # larger numbers do not survive other programs, and overflow as floats
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no file can hold
RECORD_BYTES = 16 * 2**20  # of a record; the largest have some 10 kB


def read_json(path: Path, limit: int = RECORD_BYTES) -> Any:
    """The content of a JSON file of at most `limit` bytes, as `parse_json` has it. UserError, with the path."""
    text = read_text(path, limit)
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}.") from None


def parse_json(text: str) -> Any:
    """Plain data from JSON. ValueError, a clause, for what is not JSON, and for what readers would stumble over: deep
    nesting, numbers that are not finite or too large, text that is no Unicode (lone surrogates).
    """
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON (line {error.lineno}: {error.msg})") from None
    except ValueError:  # an integer of more digits than Python reads
        raise ValueError("it has a number of thousands of digits") from None
    _check(data, DEPTH)
    return data


def unicode(text: str) -> str:
    r"""Text that `parse_json` takes: an escape, such as \udce9, for each lone surrogate."""
    return SURROGATE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _check(data: Any, depth: int) -> None:
    if isinstance(data, dict | list):
        if not depth:
            raise ValueError("it is nested too deeply")
        for one in data:
            _check(one, depth - 1)
        for one in data.values() if isinstance(data, dict) else ():
            _check(one, depth - 1)
    elif isinstance(data, str):
        if SURROGATE.search(data):
            raise ValueError("it holds text that is not Unicode")
    elif isinstance(data, float):
        if not math.isfinite(data):
            raise ValueError("it holds a number that is not finite")
    elif isinstance(data, int) and abs(data) > LARGEST_INT:
        raise ValueError("it holds a number that is too large")
