"""`hcnet shards`: an image folder as tars in WebDataset's form, CLASS/1.jpg beside CLASS/1.cls, and timm's _info.json.

Samples are shuffled, once and always alike, for readers that go through a tar from its beginning; this program reads
them by offset, in the order in which it reads the folder. Times and owners are left out: the same folder gives the
same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hcnet_cli.console import UserError, notice, status_line
from hcnet_cli.data import archive
from hcnet_cli.data.folders import reading_folder
from hcnet_cli.data.member import Member, Source
from hcnet_cli.files import existing_parent, new_folder, sync, writing
from hcnet_cli.tasks.classification.image_folder import SPLITS, WITHOUT_VAL, Files, ImageFolder, scan

STATUS_SECONDS = 2.0
BLOCK = archive.BLOCK
END = 20 * BLOCK  # of a tar: two empty blocks, filled up


def write(folder: Path, out: Path, size: int) -> None:
    """Writes the images of a folder into tars of about `size` bytes in a new folder: whole, or not at all.

    A folder may lack val/, as data.folds has no use for it; then there are no tars of it.

    UserError for data that training would refuse, an `out` that exists, and a disk without room, before writing.
    """
    check_out(out)
    there = SPLITS if _has_validation(folder) else SPLITS[:1]
    index = scan(folder, splits=there)
    splits = {split: ImageFolder(index, split, lambda image: {}) for split in there}
    with reading_folder(folder):
        sizes = {split: [_size(images.sample_path(i)) for i in range(len(images))] for split, images in splits.items()}
    need = sum(_blocks(one) + 5 * BLOCK for found in sizes.values() for one in found)
    free = shutil.disk_usage(existing_parent(out)).free
    if need > free:
        raise UserError(f"The shards need {need / 2**20:,.0f} MiB and {out} has {free / 2**20:,.0f} MiB free.")
    info: dict[str, Any] = {"hcnet": 1, "name": index.name, "digest": index.digest, "classes": list(index.classes)}
    info["splits"] = {}
    with new_folder(out) as temporary, writing(out):
        for split, images in splits.items():
            info["splits"][split] = _write_split(images, sizes[split], temporary, size)
        with open(temporary / archive.INFO, "w", encoding="utf-8") as file:
            json.dump(info, file, indent=1)
        sync(temporary / archive.INFO)
    count = sum(len(part["filenames"]) for part in info["splits"].values())
    tars = f"{count} tar{'s' if count > 1 else ''}"
    if "val" in splits:
        notice(f"Wrote {index.num_train:,} training and {index.num_val:,} validation images as {tars}.")
    else:
        notice(f"Wrote {index.num_train:,} training images as {tars}. {WITHOUT_VAL}")


def _has_validation(folder: Path) -> bool:
    with reading_folder(folder):
        return (folder / "val").is_dir() or "val" in archive.find(folder).tars


def check_out(out: Path) -> None:
    """UserError for a folder that exists."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists.", hint="Name a folder that does not exist yet.")


def _size(path: Source) -> int:
    return path.size if isinstance(path, Member) else os.stat(path).st_size


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _write_split(images: ImageFolder, sizes: list[int], folder: Path, limit: int) -> dict[str, Any]:
    """Writes the tars of a split; what timm's _info.json says of it, and the size and digest of each tar."""
    names = member_names(images.files, images.classes)
    order = np.random.RandomState(0).permutation(len(images)).tolist()
    tars: list[list[int]] = [[]]
    filled = 0
    for i in order:
        if tars[-1] and filled + sizes[i] > limit:
            tars.append([])
            filled = 0
        tars[-1].append(i)
        filled += _blocks(sizes[i]) + 3 * BLOCK
    files = [f"{images.split}-{number:06d}.tar" for number in range(len(tars))]
    digests = []
    done, last = 0, time.monotonic()
    with status_line() as tell:
        for file, members in zip(files, tars, strict=True):
            with _hashed(folder / file) as out, tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
                for i in members:
                    label = str(int(images.files.labels[i])).encode()
                    _add(tar, names[i], _content(images.sample_path(i)))
                    _add(tar, archive.key(names[i]) + b".cls", label)
                    done += 1
                    if time.monotonic() - last > STATUS_SECONDS:
                        last = time.monotonic()
                        tell(f"Writing {images.split}: {done:,} of {len(images):,} images")
            digests.append(out.digest.hexdigest())
    return {
        "name": images.split,
        "filenames": files,
        "shard_lengths": list(map(len, tars)),
        "num_samples": len(images),
        "bytes": [(folder / file).stat().st_size for file in files],
        "sha256": digests,
    }


def member_names(files: Files, classes: tuple[str, ...]) -> list[bytes]:
    """The names of a split's images in its tars."""
    names = [os.fsencode(f"{classes[label]}/{files.name(i)}") for i, label in enumerate(files.labels.tolist())]
    keys = Counter(archive.key(name) for name in names)
    return [archive.member_name(name, taken=keys[archive.key(name)] > 1) for name in names]


def _content(path: Source) -> bytes:
    if isinstance(path, Member):
        return path.read()
    with open(path, "rb") as file:
        return file.read()


def _add(tar: tarfile.TarFile, name: bytes, content: bytes) -> None:
    entry = tarfile.TarInfo(os.fsdecode(name))
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


class _Hashed:
    """A file whose content is hashed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self.file.write(content)


@contextlib.contextmanager
def _hashed(path: Path) -> Iterator[Any]:
    with open(path, "wb") as file:
        yield _Hashed(file)
    sync(path)
