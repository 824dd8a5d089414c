"""Label files: one class number per pixel, 8 bits, grey or palette. What their values mean, and which may occur."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hcnet_cli import dist
from hcnet_cli.console import UserError, notice
from hcnet_cli.data.images import UnusableImageError, opened, shown_size
from hcnet_cli.files import write_text

Pixels = NDArray[np.uint8]
SCAN_VERSION = 1  # part of the cache's key: raise it when a scan checks more
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


def read_label(path: str, table: LabelTable) -> Pixels:
    """Class indices [H, W]; UserError for a value that may not occur (a GPU would only say "device-side assert")."""
    pixels, _ = _read_values(path)
    table.check(path, np.flatnonzero(np.bincount(pixels.ravel())))
    return table.classes[pixels]


def _read_values(path: str) -> tuple[Pixels, str]:
    """([H, W], "grey" | "palette"); of a palette image the indices. Raises UserError for other kinds."""
    with opened(path) as image:
        mode = image.mode
        pixels = np.asarray(image)
    if mode.startswith("I"):
        raise UserError(f"{path} is a 16-bit label: save labels with 8 bits, class numbers below 255.")
    if mode not in ("1", "L", "P"):
        raise UserError(
            f"{path} is a colour image ({mode}), not a label with one number per pixel.",
            hint="Convert the colours to class numbers and save a grey or palette PNG.",
        )
    return pixels.astype(np.uint8, copy=False), "palette" if mode == "P" else "grey"


# --- one scan before training -----------------------------------------------------------------------------------------


def scan(images: NDArray[np.str_], labels: NDArray[np.str_], cache: Path | None) -> dict[int, str]:
    """Pixel value -> the first label file that holds it. Raises UserError for labels that cannot be used.

    The main process scans and broadcasts, a refusal too, so every process stops. `cache` is a folder that keeps the
    result until a file changes.
    """
    result: dict[int, str] | UserError | None = None
    if dist.is_main() or not dist.is_distributed():
        try:
            result = _scan_cached(images, labels, cache) if cache else _scan(images, labels)
        except UserError as error:
            result = error
    result = dist.broadcast(result)
    if isinstance(result, UserError):
        raise result
    assert result is not None
    return result


def _scan_cached(images: NDArray[np.str_], labels: NDArray[np.str_], cache: Path) -> dict[int, str]:
    key = hashlib.blake2b(str(SCAN_VERSION).encode(), digest_size=16)
    for path in [*images.tolist(), *labels.tolist()]:
        stat = os.stat(path)
        key.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    kept = cache / f"labels-{key.hexdigest()}.json"
    if kept.is_file():
        return {int(value): path for value, path in json.loads(kept.read_text()).items()}
    found = _scan(images, labels)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_text(kept, json.dumps(found))
    return found


def _scan(images: NDArray[np.str_], labels: NDArray[np.str_]) -> dict[int, str]:
    if len(labels) > ANNOUNCED_FROM:
        notice(f"Reading {len(labels)} labels once, before training ...")
    first_value: dict[int, str] = {}
    first_mode: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        results = pool.map(_scan_one, images.tolist(), labels.tolist())
        for path, (mode, values) in zip(labels.tolist(), results, strict=True):
            first_mode.setdefault(mode, path)
            if len(first_mode) > 1:
                raise UserError(
                    f"Some labels are palette images ({first_mode['palette']}) and some are grey "
                    f"({first_mode['grey']}): the same number may mean two things.",
                    hint="Save all of them the same way, the class number as the pixel value.",
                )
            for value in values:
                first_value.setdefault(value, path)
    return first_value


def _scan_one(image_path: str, label_path: str) -> tuple[str, list[int]]:
    """("grey" | "palette", the values that occur), after comparing the label's size with its image's header."""
    try:
        pixels, mode = _read_values(label_path)
    except UnusableImageError as error:
        raise UserError(f"The label {label_path} cannot be used: {error.reason}.") from None
    with contextlib.suppress(UnusableImageError):  # training replaces such an image and evaluation names it
        height, width = shown_size(image_path)
        if (height, width) != pixels.shape:
            raise UserError(
                f"{label_path} is {pixels.shape[1]} x {pixels.shape[0]} pixels, its image {width} x {height}.",
                hint="The image's size is taken after the rotation its EXIF data asks for.",
            )
    return mode, np.flatnonzero(np.bincount(pixels.ravel())).tolist()
