"""The identity of a data set: a digest of the contents of all its files, their names, its classes and its splits.

Each file is read once. Its digest is kept in the cache folder under the file's name, size, times and inode, so the
next start reads no file that did not change. A cache that is damaged or cannot be written only costs time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat as modes
import struct
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hcnet_cli import dist
from hcnet_cli.cache import DIGEST_VERSION, UNSETTLED_SECONDS, cache_dir
from hcnet_cli.console import UserError, notice, status_line
from hcnet_cli.data.images import bits_of, deep_peak, may_be_deep
from hcnet_cli.data.member import Member
from hcnet_cli.files import open_regular, replacing
from hcnet_cli.schema import MAX_PIXELS

Trust = Literal["content", "names"]
PREFIXES: dict[Trust, str] = {"content": f"v{DIGEST_VERSION}-", "names": f"v{DIGEST_VERSION}n-"}
NAMES_NOTE = "The data were told apart by names and sizes alone (--data-trust names): changes in place are not seen."
CACHE_MAGIC = b"hcnet identity 2\n"
DIGEST = 16  # bytes
RECORD = struct.Struct(f"<{DIGEST}s{DIGEST}sq")  # key, content, peak
STAT = struct.Struct("<qqqQ")  # size, times of modification and of change, inode
PEAK_RULE = b"\0white is zero"  # of the cached peak of a TIFF file: what it did not follow in earlier versions
HEAD = 64  # bytes of a file that tell its format
THREADS = min(32, 4 * (os.cpu_count() or 1))  # reading waits for the disk more than for the processor
CHUNK = 256  # files handed to a thread at a time
STATUS_AFTER, STATUS_EVERY = 2.0, 5.0  # seconds


class Record(NamedTuple):
    """What is known of a file. `peak`: see `images.deep_peak`."""

    content: bytes
    peak: int


@dataclass(frozen=True)
class Identity:
    """`digest` names the data. `bits`: how many bits its 16-bit images use; None where there are none.

    `num_distinct`: how many different contents the files have; with trust "names", their number. `changed`: files
    whose content is not what the cache said although size, times and inode are; only looked for with `verify`.
    """

    digest: str
    bits: int | None
    num_distinct: int
    changed: tuple[str, ...] = ()


def identify(
    root: Path,
    names: Sequence[bytes],
    facts: Mapping[str, Any],
    *,
    images: Collection[bytes] | None = None,
    member: Callable[[int], Member | None] = lambda number: None,
    trust: Trust = "content",
    bits: int | None = None,
    max_pixels: int = MAX_PIXELS,
    verify: bool = False,
) -> Identity:
    """The identity of the files `names` (relative to `root`, in their order) and of `facts`, such as the class list.

    One process reads, the others get its result. `images`: the names that are images, where not all are. `member(i)`:
    where names[i] lies, if that is in a tar. `trust`: "names" looks at names and sizes alone. `bits` replaces what
    would be measured in images of at most `max_pixels`. `verify` reads every file again.
    """
    return dist.from_main(lambda: _identify(root, names, facts, images, trust, bits, max_pixels, verify, member))


def content_digest(root: Path, names: Sequence[bytes]) -> str:
    """The digest of these files alone, without facts."""
    return _identify(root, names, {}, (), "content", None, MAX_PIXELS, False).digest


def _identify(
    root: Path,
    names: Sequence[bytes],
    facts: Mapping[str, Any],
    images: Collection[bytes] | None,
    trust: Trust,
    bits: int | None,
    max_pixels: int,
    verify: bool,
    member: Callable[[int], Member | None] = lambda number: None,
) -> Identity:
    reader = _Reader(root, trust, images, verify, max_pixels)
    total = hashlib.blake2b(json.dumps([trust, facts], sort_keys=True).encode(), digest_size=8)
    distinct: set[bytes] = set()
    peak = 0
    for name, record in zip(names, reader.records(names, member), strict=True):
        total.update(struct.pack("<I", len(name)) + name + record.content)
        distinct.add(record.content)
        peak = max(peak, record.peak)
    reader.save()
    return Identity(
        digest=PREFIXES[trust] + total.hexdigest(),
        bits=(bits or bits_of(peak)) if peak else None,
        num_distinct=len(distinct) if trust == "content" else len(names),
        changed=tuple(reader.changed),
    )


@dataclass
class _Reader:
    """Reads files, or takes what the cache knows of them."""

    root: Path
    trust: Trust
    images: Collection[bytes] | None
    verify: bool
    max_pixels: int = MAX_PIXELS
    known: dict[bytes, Record] = field(default_factory=dict)  # from the cache
    fresh: dict[bytes, Record] = field(default_factory=dict)  # for the cache
    changed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.base = os.path.join(os.fsencode(self.root), b"")
        place = f"{self.trust} {os.fsdecode(os.path.realpath(self.base))} {self.images == ()}"
        if self.max_pixels != MAX_PIXELS:  # of larger images no peak is known
            place += f" {self.max_pixels}"
        key = hashlib.blake2b(place.encode("utf-8", "surrogateescape"), digest_size=DIGEST).hexdigest()
        self.cache = cache_dir() / "identity" / f"{key}.bin"
        self.known = _load(self.cache)

    def records(self, names: Sequence[bytes], member: Callable[[int], Member | None]) -> Iterator[Record]:
        """A record for each name, in order."""
        if self.images is not None and not isinstance(self.images, frozenset):
            self.images = frozenset(self.images)
        chunks = [range(start, min(start + CHUNK, len(names))) for start in range(0, len(names), CHUNK)]
        begun = told = time.monotonic()
        done = 0
        with ThreadPoolExecutor(THREADS) as pool, status_line() as tell:
            for chunk in pool.map(lambda part: [self._record(names[i], member(i)) for i in part], chunks):
                yield from chunk
                done += len(chunk)
                now = time.monotonic()
                if now - begun > STATUS_AFTER and now - told > STATUS_EVERY and done < len(names):
                    told = now
                    left = (now - begun) / done * (len(names) - done)
                    tell(f"Reading the data's contents: {done:,} of {len(names):,} files, about {left:.0f} s left")

    def _record(self, name: bytes, member: Member | None) -> Record:
        try:
            if member is None:
                path: str | Member = os.fsdecode(self.base + name)
                stat = os.stat(self.base + name)
                if not modes.S_ISREG(stat.st_mode):  # a pipe would be waited for
                    raise OSError
                size, touched = stat.st_size, max(stat.st_mtime_ns, stat.st_ctime_ns)
                numbers = STAT.pack(size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
            else:
                path, tar = member, member.tar
                size, touched = member.size, max(tar.mtime_ns, tar.ctime_ns)
                numbers = STAT.pack(size, tar.mtime_ns, tar.ctime_ns, tar.inode) + struct.pack("<q", member.offset)
            rule = PEAK_RULE if name.lower().endswith((b".tif", b".tiff")) else b""
            key = hashlib.blake2b(numbers + name + rule, digest_size=DIGEST).digest()
            known = self.known.get(key)
            if known is not None and not self.verify:
                self.fresh[key] = known
                return known
            record = self._read(name, path, size)
        except OSError:  # whatever needs the image says so; here it must only differ from a whole file
            return Record(b"unreadable".ljust(DIGEST), 0)
        if known is not None and known.content != record.content:
            self.changed.append(os.fsdecode(name))
        if known is not None or time.time() - touched / 1e9 > UNSETTLED_SECONDS:
            self.fresh[key] = record
        return record

    def _read(self, name: bytes, path: str | Member, size: int) -> Record:
        image = self.images is None or name in self.images
        if self.trust == "names":
            content = struct.pack("<q", size).ljust(DIGEST)
            head = b""
            if image and may_be_deep(name):
                head = _content(path, HEAD)
        else:
            whole = _content(path)
            content, head = hashlib.blake2b(whole, digest_size=DIGEST).digest(), whole[:HEAD]
        return Record(content, deep_peak(path, head, self.max_pixels) if image else 0)

    def save(self) -> None:
        """Keeps what was read, if anything is new. What goes wrong with the cache is not the user's concern."""
        if self.fresh.keys() == self.known.keys() and not self.changed:
            return
        body = b"".join(RECORD.pack(key, record.content, record.peak) for key, record in self.fresh.items())
        with contextlib.suppress(OSError, UserError):
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.cache) as temporary:
                temporary.write_bytes(CACHE_MAGIC + hashlib.blake2b(body, digest_size=DIGEST).digest() + body)


def _content(path: str | Member, most: int = -1) -> bytes:
    """The first bytes of a file or of a member of a tar; -1: all."""
    if isinstance(path, Member):
        return path.read()[: None if most < 0 else most]
    with open(path, "rb") as file:
        return file.read(most)


def _load(cache: Path) -> dict[bytes, Record]:
    try:
        content = cache.read_bytes()
    except OSError:
        return {}
    start = len(CACHE_MAGIC) + DIGEST
    body = content[start:]
    if not content.startswith(CACHE_MAGIC):  # of another version
        return {}
    own = content[len(CACHE_MAGIC) : start]
    if len(body) % RECORD.size or own != hashlib.blake2b(body, digest_size=DIGEST).digest():
        notice(f"The cache {cache} is damaged: the data's files are read again.")
        return {}
    return {key: Record(content, peak) for key, content, peak in RECORD.iter_unpack(body)}


def file_peak(path: Path, max_pixels: int = MAX_PIXELS) -> int:
    """See `deep_peak`; 0 for a file that cannot be read: whoever reads the image says so."""
    try:
        with open_regular(path) as file:
            head = file.read(HEAD)
    except UserError:
        return 0
    return deep_peak(path, head, max_pixels)
