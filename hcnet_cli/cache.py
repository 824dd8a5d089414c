"""The cache folder: what is kept there need not be made again. And the digest of data whose folder did not change.

Torch-free, so that a start can tell finished runs before PyTorch is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from hcnet_cli.console import UserError
from hcnet_cli.files import read_text, write_text
from hcnet_cli.plain_json import parse_json

EMBEDDED_VERSION = 4  # raise it when a byte of any embedded set changes: the sets are then made again, in a new folder
DIGEST_VERSION = 2  # raise it when the digest of data covers something else
UNSETTLED_SECONDS = 2.0  # a file changed this recently may change again within one tick of a coarse clock: not kept
MOST_FILES = 200_000  # of a folder whose state is kept: looking at so many takes about a second


def cache_dir() -> Path:
    """`$HCNET_CACHE`, else `$XDG_CACHE_HOME/hcnet`, else `~/.cache/hcnet`; for a user without a home folder, one of
    his own among the temporary files.
    """
    if own := os.environ.get("HCNET_CACHE"):
        return Path(os.path.expanduser(own))
    home = os.path.expanduser("~")  # "~" where there is neither $HOME nor an entry for the user
    if base := os.environ.get("XDG_CACHE_HOME") or (home != "~" and os.path.join(home, ".cache")):
        return Path(base) / "hcnet"
    folder = Path(tempfile.gettempdir()) / f"hcnet-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid != os.getuid():
            raise UserError(f"{folder} belongs to another user.", hint="Set HCNET_CACHE to a folder of your own.")
    return folder


def embedded_folder(name: str) -> Path:
    """Where an embedded set lies once it is made."""
    return cache_dir() / f"embedded-v{EMBEDDED_VERSION}" / name


class KnownData(NamedTuple):
    """What the results call the data of a folder, and their digest."""

    name: str
    digest: str


def folder_state(root: Path, since: float | None = None) -> str:
    """A digest over the names, sizes, times and inodes of all files in a folder, links followed.

    "" for a folder that cannot be listed, that holds more than MOST_FILES, or of which a file changed after `since` (a
    time; now, if it is not given) or so shortly before that another change could look the same.
    """
    settled = (time.time() if since is None else since) - UNSETTLED_SECONDS
    total = hashlib.blake2b(digest_size=16)
    pending, seen, count = [os.fsencode(os.path.realpath(root))], set[tuple[int, int]](), 0
    try:
        while pending:
            folder = pending.pop()
            here = os.stat(folder)
            if (here.st_dev, here.st_ino) in seen:
                continue
            seen.add((here.st_dev, here.st_ino))
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
            for entry in entries:
                try:
                    stat = entry.stat()
                except FileNotFoundError:  # a link that leads nowhere
                    total.update(entry.path + b"\0gone\n")
                    continue
                if entry.is_dir():
                    pending.append(entry.path)
                    continue
                count += 1
                if count > MOST_FILES or max(stat.st_mtime, stat.st_ctime) > settled:
                    return ""
                numbers = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
                total.update(entry.path + b"\0" + repr(numbers).encode())
    except OSError:
        return ""
    return total.hexdigest()


def known_data(root: Path, section: dict[str, Any]) -> KnownData | None:
    """What was last kept of a folder, if its state is still the same. `section`: how it is read, plain JSON values."""
    with contextlib.suppress(OSError, UserError, ValueError, KeyError, TypeError):
        kept = parse_json(read_text(_file(root, section), limit=10_000))
        if kept["state"] and kept["state"] == folder_state(root):
            return KnownData(str(kept["name"]), str(kept["digest"]))
    return None


def keep_data(root: Path, section: dict[str, Any], known: KnownData, since: float) -> None:
    """Keeps name and digest of a folder that was read after the time `since`. A cache that fails costs only time."""
    state = folder_state(root, since)
    file = _file(root, section)
    if state:
        with contextlib.suppress(OSError, UserError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps({"state": state, **known._asdict()}) + "\n")


def _file(root: Path, section: dict[str, Any]) -> Path:
    key = json.dumps([os.path.realpath(root), section, DIGEST_VERSION], sort_keys=True)
    return cache_dir() / "known" / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.json"
