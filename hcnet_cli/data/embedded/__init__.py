"""Small real data sets that every machine has: handwritten digits, and scenes made of them, in the big sets' formats.

| name | layout | content |
|---|---|---|
| `digits` | ImageNet folders | the 1797 digits of `sklearn.datasets.load_digits` (UCI, CC BY 4.0), 8 x 8 -> 32 x 32 |
| `digit-scenes` | COCO 2017 | the digits on textured 128 x 128 canvases: boxes, masks, crowds, images without objects |
| `digit-stuff` | ADE20K SceneParsing | the same scenes: ten digits and the four textures behind them, 0 = other |

Each is made on first use and read by the loaders that read ImageNet, COCO and ADE20K. Training scenes show only digits
of the training split, validation scenes only the others.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from hcnet_cli.console import UserError, did_you_mean, notice
from hcnet_cli.data.embedded.digits import make_digits
from hcnet_cli.data.embedded.scenes import make_digit_scenes, make_digit_stuff

VERSION = 3  # raise it when a byte of any set changes: the sets are then made again, in a new folder

EMBEDDED: dict[str, Callable[[Path], None]] = {
    "digits": make_digits,
    "digit-scenes": make_digit_scenes,
    "digit-stuff": make_digit_stuff,
}


def cache_dir() -> Path:
    """`$HCNET_CACHE`, else `$XDG_CACHE_HOME/hcnet`, else `~/.cache/hcnet`."""
    if own := os.environ.get("HCNET_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hcnet"


def data_folder(path: str) -> Path:
    """The folder that `--data` means: the path itself, or an embedded set by its name, made on first use."""
    return ensure(path) if path in EMBEDDED else Path(path)


def ensure(name: str) -> Path:
    """The folder of an embedded data set, made if it is not there yet; the same bytes every time.

    The folder is renamed into place when complete, so a killed process leaves none and a second one may make the set
    at the same time. Raises UserError for an unknown name and for a cache that cannot be written.
    """
    if name not in EMBEDDED:
        known = ", ".join(EMBEDDED)
        raise UserError(
            f'There is no embedded data set "{name}".{did_you_mean(name, EMBEDDED)}', hint=f"Known: {known}."
        )
    folder = cache_dir() / f"embedded-v{VERSION}" / name
    temporary = folder.with_name(f".{name}-{uuid.uuid4().hex}")
    try:
        if folder.is_dir():
            return folder
        temporary.mkdir(parents=True)
        notice(f"Making the embedded data set {name} in {folder} (once, some seconds).")
        EMBEDDED[name](temporary)
        temporary.rename(folder)
    except OSError as error:
        if not os.path.isdir(folder):  # else another process finished first
            raise UserError(
                f"The embedded data set {name} cannot be written to {folder}: {error.strerror or error}.",
                hint="Set HCNET_CACHE to a folder that you may write to and that has free space.",
            ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
