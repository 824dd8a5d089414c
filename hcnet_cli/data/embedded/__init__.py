"""Small real data sets that every machine has: handwritten digits, and scenes made of them, in the big sets' formats.

| name | layout | content |
|---|---|---|
| `digits` | ImageNet folders | the 1797 digits of scikit-learn (UCI, CC BY 4.0), drawn on textures, 32 x 32 |
| `digit-scenes` | COCO 2017 | the digits on textured 128 x 128 canvases: boxes, masks, crowds, images without objects |
| `digit-stuff` | ADE20K SceneParsing | the same scenes: ten digits and the four textures behind them, 0 = other |

Each is made on first use and read by the loaders that read ImageNet, COCO and ADE20K. Training images and scenes show
only digits of the training split, those for validation only the others.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from hcnet_cli import dist
from hcnet_cli.cache import cache_dir, embedded_folder
from hcnet_cli.console import UserError, did_you_mean, notice
from hcnet_cli.data import identity
from hcnet_cli.data.embedded.digits import make_digits
from hcnet_cli.data.embedded.scenes import make_digit_scenes, make_digit_stuff
from hcnet_cli.files import read_text, remove_stale, write_text

EMBEDDED: dict[str, Callable[[Path], None]] = {
    "digits": make_digits,
    "digit-scenes": make_digit_scenes,
    "digit-stuff": make_digit_stuff,
}

DIGESTS = {  # of the contents of all files, for EMBEDDED_VERSION, with Pillow 13
    "digits": "v2-4534e38f2406a676",
    "digit-scenes": "v2-be3a3bb50f100f52",
    "digit-stuff": "v2-913aef62a2dcb702",
}


def data_folder(path: str) -> Path:
    """The folder that `--data` means: the path itself, with `~` for the home folder, or an embedded set by its name,
    made on first use.
    """
    return ensure(path) if path in EMBEDDED else Path(os.path.expanduser(path))


def ensure(name: str) -> Path:
    """The folder of an embedded data set, made if it is not there yet; the same bytes every time.

    A folder whose contents are not those of the set is made again. The folder is renamed into place when complete, so
    a killed process leaves none and a second one may make the set at the same time. Under torchrun one process makes
    it. Raises UserError for an unknown name and for a cache that cannot be written.
    """
    return dist.from_main(lambda: _ensure(name))


def _ensure(name: str) -> Path:
    if name not in EMBEDDED:
        known = ", ".join(EMBEDDED)
        raise UserError(
            f'There is no embedded data set "{name}".{did_you_mean(name, EMBEDDED)}', hint=f"Known: {known}."
        )
    folder = embedded_folder(name)
    temporary = folder.with_name(f".{name}-{uuid.uuid4().hex}")
    broken = temporary.with_suffix(".broken")
    try:
        if replaces := folder.is_dir():
            if _is_whole(name, folder):
                return folder
            notice(f"The embedded data set {name} in {folder} was changed or is incomplete: it is made again.")
        remove_stale(folder.parent, f".{name}-*")
        temporary.mkdir(parents=True)
        notice(f"Making the embedded data set {name} in {folder} (once, up to half a minute).")
        EMBEDDED[name](temporary)
        if replaces:
            folder.rename(broken)
        temporary.rename(folder)
        with contextlib.suppress(OSError, UserError):  # a cache that cannot be written costs time alone
            _digest_file(folder).parent.mkdir(exist_ok=True)
            write_text(_digest_file(folder), _digest(folder))
    except OSError as error:
        if not os.path.isdir(folder):  # else another process finished first
            raise UserError(
                f"The embedded data set {name} cannot be written to {folder}: {error.strerror or error}.",
                hint="Set HCNET_CACHE to a folder that you may write to and that has free space.",
            ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(broken, ignore_errors=True)
    return folder


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return identity.content_digest(folder, [os.fsencode(path.relative_to(folder)) for path in files])


def _digest_file(folder: Path) -> Path:
    return cache_dir() / "identity" / f"{folder.parent.name}-{folder.name}.digest"


def _is_whole(name: str, folder: Path) -> bool:
    """Whether a folder holds the set as this version makes it, here or on the machine where DIGESTS were taken.

    Another version of Pillow may compress the same pixels to other bytes, so the digest of what was made here is kept.
    """
    found = _digest(folder)
    with contextlib.suppress(UserError):
        return found in (DIGESTS[name], read_text(_digest_file(folder), limit=1000))
    return found == DIGESTS[name]
