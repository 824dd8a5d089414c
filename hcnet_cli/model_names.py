"""The names of models, told from timm's source: importing timm takes seconds. Torch-free."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

from hcnet_cli.console import UserError, did_you_mean
from hcnet_cli.own_model import is_own
from hcnet_cli.sizes import SIZES

OURS = frozenset(size.timm_name for size in SIZES.values())
REGISTERED = re.compile(r"^@register_model\s*\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)


@functools.cache
def _source() -> str:
    """The text of timm's model files, "" where they are not found."""
    found = importlib.util.find_spec("timm")
    files = sorted((Path(found.origin).parent / "models").glob("*.py")) if found and found.origin else []
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def registered() -> list[str]:
    """Every model that has a name in timm, those of this project among them."""
    return sorted({*OURS, *REGISTERED.findall(_source())})


def is_unknown(name: str) -> bool:
    """Whether timm can have no model of this name: it stands nowhere in its source. A tag behind a dot is its own."""
    base = name.split(".", 1)[0]
    if is_own(name) or base in OURS or not _source():
        return False
    return not base.isidentifier() or base not in _source()


def unknown_model(name: str) -> UserError:
    """What is said of a name that timm does not have."""
    like = did_you_mean(name, registered())
    return UserError(f'There is no model "{name}" in timm.{like}', hint="A file of your own: --model FILE.py:FUNCTION.")
