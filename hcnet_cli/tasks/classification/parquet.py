"""Images in Parquet files, as copies of data sets on the Hugging Face hub have them, unpacked into tars.

A table has a column of {bytes, path}, or of bytes, and a column of labels. Parquet compresses rows together, so that an
image cannot be read where it lies: `hcnet shards` writes tars of them, which training reads.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcnet_cli.console import UserError, status_line
from hcnet_cli.data.archive import NAMED, SPLIT
from hcnet_cli.files import existing_parent, is_image, parquet_files, require_space, writing

if TYPE_CHECKING:
    import pyarrow.parquet as pq

ROWS = 64  # read at a time
STATUS_SECONDS = 2.0
ENDINGS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif"}
NUMBERED = re.compile(r"(.*-)(\d+)-of-(\d{1,6})(-[0-9a-f]+)?\.parquet")
TEXTS, BYTES = {"string", "large_string", "string_view"}, {"binary", "large_binary", "binary_view"}  # Arrow's types
PANDAS_INDEX = "__index_level_"
KNOWN = "A table holds a column of images ({bytes, path}, or bytes) and a column of labels (whole numbers or names)."


def _splits(root: Path) -> dict[str, list[Path]]:
    """The Parquet files of each split: data/train-00000-of-00002.parquet, or train/0000.parquet. val may be missing."""
    found = parquet_files(root)
    splits: dict[str, list[Path]] = {}
    for path in found:
        if named := NAMED.search(path.name) or NAMED.search(path.parent.name):
            splits.setdefault(SPLIT[named[1]], []).append(path)
    if "train" not in splits:
        raise UserError(
            f"{root} has no Parquet files of train.",
            hint=f"A file's name or its folder's says the split ({', '.join(SPLIT)}). It has {found[0].name}.",
        )
    numbers: dict[tuple[str, int], set[int]] = {}
    for path in found:
        if numbered := NUMBERED.fullmatch(str(path)):
            numbers.setdefault((numbered[1], int(numbered[3])), set()).add(int(numbered[2]))
    for (name, count), there in numbers.items():
        if gaps := sorted(set(range(count)) - there):
            raise UserError(f"The Parquet file {name}{gaps[0]:05d}-of-{count:05d} is missing.")
    return splits


@contextlib.contextmanager
def as_tars(root: Path, out: Path) -> Iterator[Path]:
    """A temporary folder, beside `out`, with the images of each split as train.tar and val.tar, class by folder.

    UserError for a file that is damaged or holds no images, a row without image or class, and a disk without room.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("Parquet files need pyarrow.", hint="pip install 'hcnet[parquet]'")
    splits = _splits(root)
    need = sum(path.stat().st_size for files in splits.values() for path in files)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=existing_parent(out)) as folder:
        made = Path(folder) / root.resolve().name
        with writing(out):
            require_space(out, 2 * need)
            made.mkdir()
            for split, files in splits.items():
                _unpack(files, made / f"{split}.tar")
        try:
            yield made
        except UserError as error:  # the temporary folder is gone when it is read
            raise UserError(*(text.replace(str(made), str(root)) for text in (str(error), error.hint))) from None


def _unpack(files: Sequence[Path], into: Path) -> None:
    """Writes the images of a split into a tar."""
    taken: set[str] = set()
    last = time.monotonic()
    with tarfile.open(into, "w", format=tarfile.PAX_FORMAT) as tar, status_line() as tell:
        for number, path in enumerate(files):
            for row, (content, name, label) in enumerate(_rows(path)):
                member = f"{label}/{name}"
                if not name or member in taken:
                    member = f"{label}/{path.stem}-{row:08d}.{_ending(content)}"
                taken.add(member)
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
                if time.monotonic() - last > STATUS_SECONDS:
                    last = time.monotonic()
                    tell(f"Reading {into.stem}: file {number + 1:,} of {len(files):,}, {len(taken):,} images")


def _ending(content: bytes) -> str:
    """Of a file with this content; readers look at the content, not at the name."""
    return next((ending for magic, ending in ENDINGS.items() if content.startswith(magic)), "webp")


def _rows(path: Path) -> Iterator[tuple[bytes, str, str]]:
    """The content, the file's name and the class of each image of a file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            image, label, names = _columns(file, path)
            row = 0
            for batch in file.iter_batches(ROWS, columns=[image, label]):
                for found, value in zip(*(batch.column(name).to_pylist() for name in (image, label)), strict=True):
                    yield _row(found, value, names, f"Row {row} of {path}")
                    row += 1
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"{path} cannot be read as Parquet: {reason}.") from None


def _columns(file: pq.ParquetFile, path: Path) -> tuple[str, str, Sequence[str]]:
    """The column of images, that of labels, and the names of the classes where the table has them."""
    schema = file.schema_arrow
    kinds = {field.name: field.type for field in schema}
    images = [name for name, kind in kinds.items() if str(kind) in BYTES or _is_image(kind)]
    named = _class_names(schema.metadata or {})
    marked = [name for name in kinds if name in named]
    called = [name for name in marked or kinds if name in ("label", "labels")]
    others = [name for name, kind in kinds.items() if _is_label(kind) and not name.startswith(PANDAS_INDEX)]
    labels = called or marked or others
    for what, found in (("images", images), ("labels", labels)):
        if len(found) != 1:
            many = f"{len(found)} columns that may be" if found else "no column of"
            raise UserError(f"{path} has {many} {what}: {', '.join(found or kinds)}.", hint=KNOWN)
    if not _is_label(kinds[labels[0]]):
        raise UserError(
            f'The column "{labels[0]}" of {path} has the type {kinds[labels[0]]}: a label is a whole number or a name.'
        )
    names = named.get(labels[0], ())
    if len(set(names)) < len(names):
        repeated = Counter(names).most_common(1)[0][0]
        numbers = [str(number) for number, name in enumerate(names) if name == repeated]
        raise UserError(
            f'The labels {" and ".join(numbers)} of {path} are both called "{repeated}": they would become one class.',
            hint="Give each class a name of its own, in the features of the data set.",
        )
    return images[0], labels[0], names


def _is_label(kind: Any) -> bool:
    """Whether a column of this Arrow type holds whole numbers or texts."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_integer(kind) or str(kind) in TEXTS


def _is_image(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """The names of the classes of each column, from what the library `datasets` writes into a table's schema."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _row(image: Any, label: Any, names: Sequence[str], where: str) -> tuple[bytes, str, str]:
    """The content, the file's name and the class of a row."""
    content, name = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    if not content:
        raise UserError(f"{where} holds no image: its bytes are missing.", hint=KNOWN)
    if isinstance(label, int) and names:
        label = names[label] if 0 <= label < len(names) else None
    label = str(label) if isinstance(label, str) or (isinstance(label, int) and label >= 0) else ""
    if not label:
        raise UserError(f"{where} names no class.", hint=KNOWN)
    if "/" in label or label.startswith(".") or "\0" in label:
        raise UserError(
            f"{where} is of the class {ascii(label)[:60]}: classes become folders, whose names hold no slash and "
            "start with no dot.",
            hint="Rename the class.",
        )
    name = os.path.basename(str(name or "")).lstrip(".")
    return content, name if is_image(os.fsencode(name)) else "", label
