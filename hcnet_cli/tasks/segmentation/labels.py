"""Label files: one class number per pixel, 8 bits, grey or palette. What their values mean, and which may occur."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hcnet_cli import dist
from hcnet_cli.console import UserError, notice
from hcnet_cli.data.decoding import timed
from hcnet_cli.data.images import UnusableImageError, opened, shown_size, turn
from hcnet_cli.data.problems import Report, refuse
from hcnet_cli.files import write_text
from hcnet_cli.schema import MAX_PIXELS

Pixels = NDArray[np.uint8]
Paths = Mapping[str, NDArray[np.str_]]  # of each split
SCAN_VERSION = 4  # part of the cache's key: raise it when a scan checks more
ANNOUNCED_FROM = 1000  # labels: a scan of more takes long enough to be announced


@dataclass(frozen=True)
class LabelTable:
    """`classes` [256] maps a pixel value to its class or `ignore_index`; `valid` [256] says which values may occur."""

    classes: Pixels
    valid: NDArray[np.bool_]

    def check(self, path: str, values: NDArray[np.integer]) -> None:
        """Raises UserError if one of the values may not occur."""
        wrong = values[~self.valid[values]]
        if len(wrong):
            good = np.flatnonzero(self.valid)
            runs = [run for run in np.split(good, np.flatnonzero(np.diff(good) > 1) + 1) if len(run)]
            allowed = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
            raise UserError(
                f"{path} holds the label value {wrong[0]}, allowed are {allowed}.",
                hint="See num_classes, reduce_zero_label and ignore_index of the recipe's data section.",
            )


def label_table(num_classes: int, reduce_zero_label: bool, ignore_index: int) -> LabelTable:
    """What each pixel value means.

    As in the reference, 255 is ignored with `reduce_zero_label` whatever `ignore_index` is.
    """
    classes = np.arange(256)
    if reduce_zero_label:
        classes = classes - 1
        classes[[0, 255]] = ignore_index
    return LabelTable(classes.astype(np.uint8), (classes < num_classes) | (classes == ignore_index))


def by_class(pixels: NDArray[np.int64], num_classes: int, ignore_index: int) -> NDArray[np.int64]:
    """Numbers of pixels [256], by class or `ignore_index` -> [num_classes + 1], those that are ignored last.

    A class whose number is `ignore_index` has none.
    """
    counts = pixels[:num_classes].copy()
    counts[ignore_index : ignore_index + 1] = 0
    return np.append(counts, pixels.sum() - counts.sum())


@timed
def read_label(path: str, table: LabelTable, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Class indices [H, W]; UserError for a value that may not occur (a GPU would only say "device-side assert")."""
    pixels, _ = _read_values(path, max_pixels)
    table.check(path, np.flatnonzero(np.bincount(pixels.ravel())))
    return table.classes[pixels]


def _read_values(path: str, max_pixels: int) -> tuple[Pixels, str]:
    """([H, W], "grey" | "palette"); of a palette image the indices. Raises UserError for other kinds.

    A label with EXIF data of its own is turned as an image is.
    """
    with opened(path, max_pixels, formats=("PNG",)) as image:  # JPEG, under another name, would blur the numbers
        mode = image.mode
        turn(image)
        pixels = np.asarray(image)
    if mode.startswith("I"):
        raise UserError(f"{path} is a 16-bit label: save labels with 8 bits, class numbers below 255.")
    if mode not in ("1", "L", "P"):
        raise UserError(
            f"{path} is a colour image ({mode}), not a label with one number per pixel.",
            hint="Convert the colours to class numbers and save a grey or palette PNG.",
        )
    pixels = pixels.astype(np.uint8, copy=False)
    if mode == "L" and (scale := _scale_of_samples(path)) > 1:
        pixels = pixels // scale
    return pixels, "palette" if mode == "P" else "grey"


def _scale_of_samples(path: str) -> int:
    """What Pillow multiplied the numbers of a grey PNG by: it spreads samples of 2 and 4 bits over 0 .. 255."""
    with open(path, "rb") as file:
        head = file.read(26)
    grey = head.startswith(b"\x89PNG") and head[25] == 0  # the byte after the bits per sample is the colour type
    return {2: 85, 4: 17}.get(head[24], 1) if grey else 1


# --- one scan before training -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelScan:
    """What the labels hold: of each pixel value the first file, and by split the number of pixels of each value."""

    first: dict[int, str]
    pixels: dict[str, list[int]]  # 256 numbers for each split

    def labelled(self, split: str, table: LabelTable, ignore_index: int) -> list[int]:
        """The classes that occur in the labels of a split."""
        values = np.flatnonzero(self.pixels[split])
        return sorted({int(table.classes[value]) for value in values} - {ignore_index})

    def class_counts(self, split: str, table: LabelTable, num_classes: int, ignore_index: int) -> NDArray[np.int64]:
        """Pixels of each class in a split; those that are ignored do not count. Zeros without a scan."""
        counts = np.zeros(256, dtype=np.int64)
        np.add.at(counts, table.classes, np.array(self.pixels.get(split, [0] * 256)))
        return by_class(counts, num_classes, ignore_index)[:-1]

    def share_of_zeros(self) -> float:
        """Part of all pixels whose value is 0."""
        pixels = np.sum(list(self.pixels.values()), axis=0)
        return float(pixels[0] / max(1, pixels.sum()))


def scan(images: Paths, labels: Paths, cache: Path | None, max_pixels: int, report: Report) -> LabelScan:
    """Reads the labels of every split, and reports those that cannot be used.

    One process scans and the others get its result, a refusal too. `cache` is a folder that keeps a result without
    problems until a file changes.
    """
    if cache is None:
        return dist.from_main(lambda: _scan(images, labels, max_pixels, report))
    return dist.from_main(lambda: _scan_cached(images, labels, cache, max_pixels))


def _scan_cached(images: Paths, labels: Paths, cache: Path, max_pixels: int) -> LabelScan:
    key = hashlib.blake2b(f"{SCAN_VERSION} {max_pixels}".encode(), digest_size=16)
    for path in np.concatenate([*images.values(), *labels.values()]).tolist():
        with contextlib.suppress(OSError):  # an image that is gone; its label is read all the same
            stat = os.stat(path)
            key.update(f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino} ".encode())
        key.update(os.fsencode(path) + b"\n")
    kept = cache / f"labels-{key.hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # absent or damaged
        content = json.loads(kept.read_text())
        return LabelScan({int(value): path for value, path in content["first"].items()}, content["pixels"])
    found = _scan(images, labels, max_pixels, refuse)
    with contextlib.suppress(OSError, UserError):  # a cache that cannot be written costs time alone
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps({"first": found.first, "pixels": found.pixels}))
    return found


def _scan(images: Paths, labels: Paths, max_pixels: int, report: Report) -> LabelScan:
    number = sum(map(len, labels.values()))
    if number > ANNOUNCED_FROM:
        notice(f"Reading {number} labels once, before training ...")
    first: dict[int, str] = {}
    first_mode: dict[str, str] = {}
    pixels: dict[str, list[int]] = {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        for split in labels:
            total = np.zeros(256, dtype=np.int64)
            paths = zip(images[split].tolist(), labels[split].tolist(), strict=True)
            results = pool.map(lambda pair: _scan_one(pair[0], pair[1], max_pixels), paths)
            for path, found in zip(labels[split].tolist(), results, strict=True):
                if isinstance(found, UserError):
                    report(found)
                    continue
                mode, counts = found
                first_mode.setdefault(mode, path)
                total += counts
                for value in np.flatnonzero(counts).tolist():
                    first.setdefault(value, path)
            pixels[split] = total.tolist()
    if len(first_mode) > 1:
        report(
            UserError(
                f"Some labels are palette images ({first_mode['palette']}) and some are grey ({first_mode['grey']}): "
                "the same number may mean two things.",
                hint="Save all of them the same way, the class number as the pixel value.",
            )
        )
    return LabelScan(first, pixels)


def _scan_one(image_path: str, label_path: str, max_pixels: int) -> tuple[str, NDArray[np.int64]] | UserError:
    """("grey" | "palette", pixels of each value [256]), or the problem, such as another size than its image's."""
    try:
        pixels, mode = _read_values(label_path, max_pixels)
    except UnusableImageError as error:
        return UserError(f"The label {label_path} cannot be used: {error.reason}.")
    except UserError as error:
        return error
    with contextlib.suppress(UnusableImageError):  # training replaces such an image and evaluation names it
        height, width = shown_size(image_path, max_pixels)
        if (height, width) != pixels.shape:
            return UserError(
                f"{label_path} is {pixels.shape[1]} x {pixels.shape[0]} pixels, its image {width} x {height}.",
                hint="Both sizes are taken after the rotation that the file's own EXIF data asks for.",
            )
    return mode, np.bincount(pixels.ravel(), minlength=256)
