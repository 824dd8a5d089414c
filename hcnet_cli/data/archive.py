"""Images in tars: which there are, of which class, and where each lies. Nothing is unpacked.

A tar is listed once; the list is kept in the cache folder under the tar's name, size, times and inode. The class of an
image KEY.jpg is in KEY.cls (a number) or KEY.json (`label` or `cls`), where there is one; else it is the tar inside
the tar that holds it (ImageNet's train.tar), or its first folder. `hcnet shards` writes classes as folders.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import tarfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import unquote_to_bytes

import numpy as np
from numpy.typing import NDArray

from hcnet_cli import dist
from hcnet_cli.cache import cache_dir
from hcnet_cli.console import UserError, status_line
from hcnet_cli.data.folders import Packed
from hcnet_cli.data.member import Member, Tar
from hcnet_cli.files import is_image, read_text, replacing

INFO = "_info.json"  # timm's name and form: splits, their tars, and how many samples each has
SPLIT = {"train": "train", "val": "val", "validation": "val"}
NAMED = re.compile(r"(?:^|[-_.])(train|val|validation)(?=[-_.]|\d|$)")  # a tar's split, by its name
NUMBERED = re.compile(r"(.*?)(\d+)\.tar")
ENDINGS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
JPEG = (".jpeg", ".jpe", ".jfif")
BLOCK = 512  # bytes, of a tar
LARGEST_LABEL = 2**20  # bytes of a .cls or .json file
STATUS_SECONDS = 2.0


class Shard(NamedTuple):
    """What `_info.json` of `hcnet shards` says of a tar."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Archives:
    """The tars of a data folder, by split.

    `name`, `digest`, `classes` (in their order) and `shards` are what `hcnet shards` wrote, else empty.
    """

    root: Path
    tars: Mapping[str, Sequence[Path]]
    name: str = ""
    digest: str = ""
    classes: Sequence[str] = ()
    shards: Mapping[Path, Shard] | None = None

    def require_unchanged(self, digest: str) -> None:
        """UserError, naming the tar, unless the contents have the digest that they were written with."""
        if not self.shards or digest == self.digest or digest.partition("-")[0] != self.digest.partition("-")[0]:
            return
        for tar, shard in self.shards.items():
            if sha256(tar) != shard.sha256:
                raise _changed(tar, "its content is another")
        raise UserError(f"{self.root / INFO} is not of these tars.", hint="Write the shards again with hcnet shards.")


def sha256(path: Path) -> str:
    """As sha256sum prints it."""
    made = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            made.update(block)
    return made.hexdigest()


def _changed(tar: Path, how: str) -> UserError:
    return UserError(
        f"The shard {tar} changed since {tar.parent / INFO} was written: {how}.",
        hint="Copy it again from where it is whole, or write the shards again with hcnet shards.",
    )


# --- which tars -------------------------------------------------------------------------------------------------------


def find(root: Path) -> Archives:
    """The tars of a data folder; none of a split that is a folder of folders.

    UserError for tars that are missing, or are not those that `_info.json` lists.
    """
    if (root / INFO).is_file():
        return _from_info(root)
    found: dict[str, list[Path]] = {}
    for path in sorted([*root.iterdir(), *(file for name in SPLIT for file in root.glob(f"{name}/*"))]):
        named = NAMED.search(path.name if path.parent == root else path.parent.name)
        if named and path.name.lower().endswith(ENDINGS) and path.is_file() and not path.name.startswith("."):
            found.setdefault(SPLIT[named[1]], []).append(path)
    tars = {split: paths for split, paths in found.items() if not _has_folders(root / split)}
    for paths in tars.values():
        _require_no_gap(paths)
    return Archives(root, tars)


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_dir() and not path.name.startswith(".") for path in folder.iterdir())


def _from_info(root: Path) -> Archives:
    wrong = UserError(f"{root / INFO} is not a list of shards as timm and hcnet shards write it.")
    try:
        info = json.loads(read_text(root / INFO, 64 * 2**20))
        tars: dict[str, list[Path]] = {}
        shards: dict[Path, Shard] = {}
        for name, part in info["splits"].items():
            if name not in SPLIT:
                continue
            for number, file in enumerate(part["filenames"]):
                if Path(file).is_absolute() or ".." in Path(file).parts:
                    raise UserError(f"{root / INFO} names a file outside of its folder: {file}.")
                tars.setdefault(SPLIT[name], []).append(root / file)
                if "hcnet" in info:
                    shards[root / file] = Shard(int(part["bytes"][number]), str(part["sha256"][number]))
        known: dict[str, Any] = {}
        if "hcnet" in info:
            known = {key: str(info[key]) for key in ("name", "digest")}
            known["classes"] = [str(name) for name in info.get("classes", [])]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise wrong from None
    for split, paths in tars.items():
        if missing := [path for path in paths if not path.is_file()]:
            raise UserError(f"The shard {missing[0]} is missing: {root / INFO} lists {len(paths)} for {split}.")
    for tar, shard in shards.items():
        if (size := tar.stat().st_size) != shard.size:
            raise _changed(tar, f"it has {size:,} bytes, not {shard.size:,}")
    return Archives(root, tars, **known, shards=shards)


def _require_no_gap(tars: Sequence[Path]) -> None:
    """UserError where the numbers in the names of tars leave one out."""
    numbers: dict[str, list[tuple[int, Path]]] = {}
    for path in tars:
        if numbered := NUMBERED.fullmatch(path.name):
            numbers.setdefault(numbered[1], []).append((int(numbered[2]), path))
    for found in numbers.values():
        for (before, path), (after, _) in itertools.pairwise(sorted(found)):
            if after > before + 1:
                raise UserError(f"A shard is missing after {path}: the next one has the number {after}.")


# --- what is in them --------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """An image in a tar: its class, its name below the folder of the class, and where it lies.

    `written`: 1 where a .cls or .json beside it says the class, else 0.
    """

    label: bytes
    name: bytes
    offset: int
    size: int
    written: int


@dataclass(frozen=True, eq=False)
class Members:
    """Where the images of a split lie, as arrays [N] that workers share."""

    tars: tuple[Tar, ...]
    tar: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]

    def member(self, i: int, name: str) -> Member:
        return Member(self.tars[self.tar[i]], name, int(self.offset[i]), int(self.size[i]))

    def take(self, rows: NDArray[np.intp]) -> Members:
        return Members(self.tars, self.tar[rows], self.offset[rows], self.size[rows])

    def by_tar(self) -> list[NDArray[np.int64]]:
        """Of each tar with images their numbers, in the order in which they lie."""
        order = np.lexsort((self.offset, self.tar))
        return np.split(order, np.flatnonzero(np.diff(self.tar[order])) + 1)


@dataclass(frozen=True, eq=False)
class Contents:
    """The images of a split, class by class: `counts` of each class, `names` in sorted order within it."""

    classes: tuple[str, ...]
    counts: NDArray[np.int64]
    names: Packed
    members: Members

    def only(self, classes: Collection[str]) -> Contents:
        """Without the images of other classes."""
        if set(self.classes) <= set(classes):
            return self
        wanted = np.array([name in classes for name in self.classes])
        kept = np.flatnonzero(np.repeat(wanted, self.counts))
        return Contents(
            tuple(name for name in self.classes if name in classes),
            self.counts[wanted],
            self.names.take(kept),
            self.members.take(kept),
        )


def read(archives: Archives, split: str) -> Contents:
    """Lists the tars of a split, each once. One process reads, the others get its result.

    UserError for a tar that is damaged or compressed, or that holds what an archive of images has no use for.
    """
    return dist.from_main(lambda: _read(archives.tars[split], bool(archives.shards), archives.classes))


def _read(paths: Sequence[Path], own: bool, classes: Sequence[str]) -> Contents:
    tars = tuple(Tar.of(path) for path in paths)
    found: list[tuple[bytes, bytes, int, int, int]] = []
    written: list[int] = []
    last = time.monotonic()
    with status_line() as tell:
        for number, tar in enumerate(tars):
            samples = _samples(tar, own)
            found += [(one.label, one.name, number, one.offset, one.size) for one in samples]
            written += [one.written for one in samples]
            if time.monotonic() - last > STATUS_SECONDS:
                last = time.monotonic()
                tell(f"Listing tars: {number + 1:,} of {len(tars):,}")
    if 0 < sum(written) < len(found):
        label, name, number, *_ = found[written.index(0)]
        raise UserError(
            f"{tars[number].path}: {os.fsdecode(label + b'/' + name)} has no .cls or .json beside it, and "
            f"{sum(written):,} of the {len(found):,} images of its split have one.",
            hint="A class is written beside every image of a split, or is the folder of every image.",
        )
    labels = _in_order({os.fsdecode(sample[0]) for sample in found}, classes)
    place = {os.fsencode(label): number for number, label in enumerate(labels)}
    found.sort(key=lambda sample: (place[sample[0]], sample[1]))
    for one, other in itertools.pairwise(found):
        if one[:2] == other[:2]:
            where = tars[one[2]].path, tars[other[2]].path
            raise UserError(
                f"The sample {os.fsdecode(one[0])}/{os.fsdecode(one[1])} is there twice: in {where[0]} and "
                f"{'again in it' if where[0] == where[1] else where[1]}."
            )
    numbers = np.array([sample[2:] for sample in found], dtype=np.int64).reshape(-1, 3)
    return Contents(
        classes=tuple(labels),
        counts=np.bincount([place[sample[0]] for sample in found], minlength=len(labels)),
        names=Packed([sample[1] for sample in found]),
        members=Members(tars, numbers[:, 0].astype(np.int32), numbers[:, 1].copy(), numbers[:, 2].copy()),
    )


def _in_order(labels: Collection[str], classes: Sequence[str]) -> list[str]:
    """In the order of `classes`, where these are all among them; else numbers by value, then names."""
    places = {name: number for number, name in enumerate(classes)}
    return sorted(labels, key=places.__getitem__ if places.keys() >= set(labels) else _by_value)


def _by_value(label: str) -> tuple[int, str]:
    return (int(label), "") if label.isascii() and label.isdigit() and len(label) < 10 else (10**10, label)


def _samples(tar: Tar, own: bool) -> list[Sample]:
    """The images of a tar, from the cache or by reading its headers."""
    place = hashlib.blake2b(repr((os.path.realpath(tar.path), tar[1:], own)).encode("utf-8", "surrogateescape"))
    cache = cache_dir() / "archives" / f"{place.hexdigest()[:32]}.npz"
    with contextlib.suppress(Exception):  # no cache, or a damaged one: it is made again
        stored = np.load(cache, allow_pickle=False)
        texts = stored["texts"].tobytes().split(b"\0")
        numbers = stored["numbers"]
        if len(texts) == 2 * len(numbers):
            return list(map(Sample, texts[0::2], texts[1::2], *numbers.T.tolist()))
    with open(tar.path, "rb") as file:
        samples = _sorted_out(_files(file, tar.path), file, tar.path, own)
    with contextlib.suppress(OSError, UserError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cache) as temporary, open(temporary, "wb") as out:
            texts = [text for sample in samples for text in sample[:2]]
            triples = np.array([sample[2:] for sample in samples], dtype=np.int64).reshape(-1, 3)
            np.savez(out, texts=np.frombuffer(b"\0".join(texts), dtype=np.uint8), numbers=triples)
    return samples


class _File(NamedTuple):
    name: bytes
    offset: int
    size: int
    inside: bytes  # the name of the tar inside the tar, without .tar


def _files(file: BinaryIO, path: str, start: int = 0, inside: bytes = b"") -> Iterator[_File]:
    """The regular files of a tar that begins at `start`, those of tars in it included."""
    where = f"{path}{':' + os.fsdecode(inside) + '.tar' if inside else ''}"
    head = os.pread(file.fileno(), 2, start)
    for magic, kind in COMPRESSED.items():
        if head == magic:
            raise UserError(
                f"{where} is compressed ({kind}): images are read where they lie in a plain tar.",
                hint="Unpack it to a .tar; images hardly get smaller by compression.",
            )
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (entry := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # would grow to gigabytes
                name = os.fsencode(entry.name)
                if entry.isdir():
                    continue
                if not entry.isreg() or entry.issparse():
                    raise UserError(f"{where} holds {_kind(entry)}, {entry.name}: only regular files are read.")
                if name.startswith(b"/") or b".." in name.split(b"/") or b"\0" in name:
                    raise UserError(f"{where} holds a file whose name leads out of it: {entry.name!r}.")
                name = b"/".join(part for part in name.split(b"/") if part not in (b"", b"."))
                after = tar.offset
                if name.lower().endswith(b".tar") and not inside:
                    yield from _files(file, path, entry.offset_data, os.path.basename(name)[:-4])
                    file.seek(after)
                else:
                    yield _File(name, entry.offset_data, entry.size, inside)
            end = tar.offset
    except UserError:  # a ValueError too
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise _damaged(where, str(error)) from None
    if os.pread(file.fileno(), BLOCK, end) != bytes(BLOCK):  # tarfile takes a cut between two files as the end
        raise _damaged(where, "it has no end mark")


def _damaged(where: str, reason: str) -> UserError:
    return UserError(
        f"{where} is truncated or damaged: {reason.rstrip('.')}.", hint="Was it copied or downloaded completely?"
    )


def _kind(entry: tarfile.TarInfo) -> str:
    if entry.issym() or entry.islnk():
        return "a link"
    return "a device or a pipe" if entry.isdev() else "a file of an unknown type"


def key(name: bytes) -> bytes:
    """WebDataset's key of a name: up to the first dot of its last part."""
    folder, slash, base = name.rpartition(b"/")
    return folder + slash + base.partition(b".")[0]


def _sorted_out(files: Iterator[_File], file: BinaryIO, path: str, own: bool) -> list[Sample]:
    """The images among the files, with their classes."""
    images: list[_File] = []
    labels: dict[bytes, bytes] = {}
    seen: set[bytes] = set()
    for one in list(files):
        whole = one.inside + b"/" + one.name
        if whole in seen:
            raise UserError(f"{path} holds {os.fsdecode(one.name)} twice.")
        seen.add(whole)
        if os.path.basename(one.name).startswith(b"."):
            continue
        extension = one.name[len(key(one.name)) + 1 :].lower()
        if is_image(one.name):
            images.append(one)
        elif not own and extension in (b"cls", b"json") and (extension == b"cls" or key(one.name) not in labels):
            if (label := _label(os.pread(file.fileno(), min(one.size, LARGEST_LABEL), one.offset), extension)) is None:
                raise UserError(f"{path}: {os.fsdecode(one.name)} names no class.")
            labels[key(one.name)] = label
    used: set[bytes] = set()
    samples = []
    for image in images:
        own_key = key(image.name)
        if own:
            label, _, name = original_name(image.name).partition(b"/")
        elif own_key in labels:
            label, name = labels[own_key], image.name
            if own_key in used:
                raise UserError(f"{path} holds two images of the key {os.fsdecode(own_key)}.")
            used.add(own_key)
        elif image.inside:
            label, name = image.inside, image.name
        else:
            label, _, name = image.name.partition(b"/")
        if not name:
            raise UserError(
                f"{path}: no class is known of {os.fsdecode(image.name)}.",
                hint="KEY.jpg goes with KEY.cls or KEY.json, or lies in the folder of its class.",
            )
        samples.append(Sample(label, name, image.offset, image.size, int(not own and own_key in labels)))
    return samples


def _label(content: bytes, extension: bytes) -> bytes | None:
    """The class that a .cls or .json file names; None for one that names none, as a number below 0 does."""
    try:
        value: Any = content.decode().strip()
        if extension == b"json":
            entry = json.loads(value)
            value = entry.get("label", entry.get("cls"))
        value = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    except (ValueError, AttributeError, RecursionError):
        return None
    if not isinstance(value, str) or not value or "\0" in value or re.fullmatch(r"-\d+", value):
        return None
    return value.encode()


# --- names in WebDataset's form ---------------------------------------------------------------------------------------


def quoted(name: bytes) -> bytes:
    """The name without the dots and bytes that a key cannot have, as a URL writes them."""
    return re.sub(rb"[^!-$&-\-/-~]", lambda byte: b"%%%02X" % ord(byte[0]), name)


def member_name(name: bytes, taken: bool = False) -> bytes:
    """The name of an image in a WebDataset: CLASS/1.jpg as it is; a.b.jpg and 1.JPEG as KEY.jpg whose key is quoted.

    `taken`: another image has the same key.
    """
    stem, extension = os.path.splitext(name)
    kind = os.fsdecode(extension).lower()
    kind = ".jpg" if kind in JPEG else kind
    if not taken and quoted(stem) == stem and kind == os.fsdecode(extension).lower():
        return name
    return quoted(name) + os.fsencode(kind)


def original_name(member: bytes) -> bytes:
    """The inverse of `member_name`."""
    whole = unquote_to_bytes(key(member))
    return whole if is_image(whole) else member
