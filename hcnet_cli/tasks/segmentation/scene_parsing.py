"""Semantic segmentation data in ADE20K's SceneParsing layout, with the training pipeline of Swin's runs.

    ROOT/images/{training,validation}/**/NAME.jpg          images, .jpg or .png
    ROOT/annotations/{training,validation}/**/NAME.png     one number per pixel, 8 bit, grey or palette
    ROOT/objectInfo150.txt or ROOT/classes.txt             class names, optional

Dimension letters: H x W the image as stored, h x w after resizing, S the side of a training crop.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from hcnet_cli import dist, rng
from hcnet_cli.console import UserError, notice, warn
from hcnet_cli.data import embedded
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.files import replacing
from hcnet_cli.runs import DataInfo
from hcnet_cli.schema import DataPart, Part
from hcnet_cli.tasks.segmentation.spec import SceneParsing

SPLITS = ("training", "validation")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
Pixels = NDArray[np.uint8]


# --- the folder -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SceneFolder:
    """A checked data folder. `images[split]` and `labels[split]` are arrays of paths, paired by position.

    `lut` [256] maps a pixel of a label file to its class index or `ignore_index`; `valid` [256] says which
    may occur.
    """

    root: Path
    name: str
    class_names: tuple[str, ...]
    ignore_index: int
    digest: str
    images: dict[str, NDArray[np.str_]]
    labels: dict[str, NDArray[np.str_]]
    lut: Pixels
    valid: NDArray[np.bool_]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def open_folder(
    root: str | Path,
    *,
    num_classes: int | None = None,
    reduce_zero_label: bool = True,
    ignore_index: int = 255,
    scan_labels: bool = True,
    scan_cache: Path | None = None,
) -> SceneFolder:
    """Pairs images with labels, reads the class names and looks at every label once, before training does.

    `reduce_zero_label`: pixel 0 is ignored and 1 .. K are classes 0 .. K - 1 (ADE20K). The number of
    classes is the class names' if there are any, else `num_classes`, else that of the largest label.
    `scan_cache` is a folder that keeps what a scan found; unchanged files are not read again.

    Raises UserError, naming a file, for an image without label and the reverse, sizes that differ, colour
    or 16-bit labels, palette and grey labels mixed, and label values out of range.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"There is no folder {root}.")
    images, labels = {}, {}
    for split in SPLITS:
        images[split], labels[split] = _pairs(root, split)
    names = _class_names(root)
    if names and num_classes and len(names) != num_classes:
        raise UserError(f"{root} names {len(names)} classes, but the recipe asks for {num_classes}.")
    first_seen: dict[int, str] = {}
    if scan_labels:
        first_seen = _scan_on_main(
            np.concatenate([images[split] for split in SPLITS]),
            np.concatenate([labels[split] for split in SPLITS]),
            scan_cache,
        )
    count = len(names) or num_classes
    if not count:
        classes = [v - reduce_zero_label for v in first_seen if v != 255 and (v or not reduce_zero_label)]
        if not classes:
            raise UserError(
                f"The number of classes of {root} is not known.", hint="Write their names into classes.txt, one a line."
            )
        count = max(classes) + 1
    lut, valid = label_table(count, reduce_zero_label, ignore_index)
    for value, path in sorted(first_seen.items()):
        if not valid[value]:
            raise _out_of_range(path, value, valid)
    missing = count - len({int(lut[value]) for value in first_seen} - {ignore_index})
    if scan_labels and missing:
        source = "" if names or num_classes else " (their number is the largest label's; a classes.txt would name them)"
        warn(f"{missing} of {count} classes occur in no label of {root}{source}.")
    return SceneFolder(
        root=root,
        name="ade20k" if count == 150 and len(images["validation"]) == 2000 else _slug(root.name),
        class_names=names or tuple(f"label {i + reduce_zero_label}" for i in range(count)),
        ignore_index=ignore_index,
        digest=_digest(root, [*images.values(), *labels.values()]),
        images=images,
        labels=labels,
        lut=lut,
        valid=valid,
    )


def label_table(num_classes: int, reduce_zero_label: bool, ignore_index: int) -> tuple[Pixels, NDArray[np.bool_]]:
    """(lut [256], valid [256]): what each pixel value of a label file means, and which values may occur.

    As in the reference, 255 is ignored with `reduce_zero_label` whatever `ignore_index` is.
    """
    lut = np.arange(256)
    if reduce_zero_label:
        lut = lut - 1
        lut[[0, 255]] = ignore_index
    return lut.astype(np.uint8), (lut < num_classes) | (lut == ignore_index)


def _pairs(root: Path, split: str) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
    """Sorted paths of a split's images and, at the same positions, of their labels."""
    found: dict[str, dict[str, str]] = {}
    for kind in ("images", "annotations"):
        folder = root / kind / split
        if not folder.is_dir():
            raise UserError(
                f"{root} has no folder {kind}/{split}.",
                hint="Expected: images/training, images/validation, annotations/training, annotations/validation.",
            )
        suffixes = IMAGE_SUFFIXES if kind == "images" else {".png"}
        files: dict[str, str] = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in suffixes and not path.name.startswith("."):
                stem = path.relative_to(folder).with_suffix("").as_posix()
                if stem in files:
                    raise UserError(f"{files[stem]} and {path} have the same name: one label cannot serve both.")
                files[stem] = str(path)
        found[kind] = files
    images, labels = found["images"], found["annotations"]
    for have, lack, what in ((images, labels, "label"), (labels, images, "image")):
        if lonely := sorted(have.keys() - lack.keys()):
            raise UserError(
                f"{len(lonely)} of {len(have)} files have no {what}, the first is {have[lonely[0]]}.",
                hint=f"images/{split}/NAME.jpg and annotations/{split}/NAME.png belong together.",
            )
    if not images:
        raise UserError(f"There is no image in {root / 'images' / split}.")
    return np.array(list(images.values())), np.array([labels[stem] for stem in images])


def _class_names(root: Path) -> tuple[str, ...]:
    """From classes.txt, one name a line, or ADE20K's objectInfo150.txt, the last column of a table with a
    header.
    """
    if (path := root / "classes.txt").is_file():
        return tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    if (path := root / "objectInfo150.txt").is_file():
        rows = [line.split("\t") for line in path.read_text("utf-8").splitlines()[1:] if line.strip()]
        return tuple(row[-1].split(",")[0].strip() for row in rows)
    return ()


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "scenes"


def _digest(root: Path, files: Sequence[NDArray[np.str_]]) -> str:
    """Of relative names and sizes: a folder that was moved or unpacked again is the same data."""
    digest = hashlib.blake2b(digest_size=8)
    for path in np.concatenate(list(files)).tolist():
        digest.update(f"{Path(path).relative_to(root).as_posix()} {os.stat(path).st_size}\n".encode())
    return digest.hexdigest()


# --- a look at every label ------------------------------------------------------------------------------------


def _scan_on_main(images: NDArray[np.str_], labels: NDArray[np.str_], cache: Path | None) -> dict[int, str]:
    """`_scan` once for all processes of a group: a refusal reaches every one of them."""
    result: dict[int, str] | UserError | None = None
    if dist.is_main() or not dist.is_distributed():
        try:
            result = _scan(images, labels, cache)
        except UserError as error:
            result = error
    result = dist.broadcast(result)
    if isinstance(result, UserError):
        raise result
    assert result is not None
    return result


def _scan(images: NDArray[np.str_], labels: NDArray[np.str_], cache: Path | None) -> dict[int, str]:
    """Pixel value -> the first label file that holds it. Raises UserError for labels that cannot be used."""
    stamp = hashlib.blake2b(b"1", digest_size=16)  # the version of what is checked
    for path in np.concatenate([images, labels]).tolist():
        stat = os.stat(path)
        stamp.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    kept = cache / f"labels-{stamp.hexdigest()}.json" if cache else None
    if kept and kept.is_file():
        return {int(value): path for value, path in json.loads(kept.read_text()).items()}
    if len(labels) > 1000:
        notice(f"Looking at {len(labels)} labels once, before training ...")
    first_seen: dict[int, str] = {}
    first_mode: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        facts = pool.map(_look_at, images.tolist(), labels.tolist())
        for path, (mode, values) in zip(labels.tolist(), facts, strict=True):
            first_mode.setdefault(mode, path)
            if len(first_mode) > 1:
                grey, palette = first_mode["grey"], first_mode["palette"]
                raise UserError(
                    f"Some labels are palette images ({palette}) and some are grey ({grey}): "
                    "the same number may mean two things.",
                    hint="Save all of them the same way, the class number as the pixel value.",
                )
            for value in values:
                first_seen.setdefault(value, path)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as temporary:
            temporary.write_text(json.dumps(first_seen))
    return first_seen


def _look_at(image_path: str, label_path: str) -> tuple[str, list[int]]:
    """("grey" | "palette", the values that occur), after checking the label against its image's header."""
    try:
        with Image.open(image_path) as image:
            size = image.size[::-1] if image.getexif().get(0x0112, 1) >= 5 else image.size
    except Exception:  # whatever a broken file makes the decoder raise; training skips it, evaluation names it
        size = None
    try:
        pixels, mode = _label_pixels(label_path)
    except UnreadableError as error:
        raise UserError(str(error)) from None
    if size and size != pixels.shape[::-1]:
        raise UserError(
            f"{label_path} is {pixels.shape[1]} x {pixels.shape[0]} pixels, its image {size[0]} x {size[1]}.",
            hint="The image's size is taken after the rotation its EXIF data asks for.",
        )
    return mode, np.flatnonzero(np.bincount(pixels.ravel(), minlength=256)).tolist()


def _out_of_range(path: str, value: int, valid: NDArray[np.bool_]) -> UserError:
    good = np.flatnonzero(valid)
    runs = [run for run in np.split(good, np.flatnonzero(np.diff(good) > 1) + 1) if len(run)]
    allowed = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return UserError(
        f"{path} holds the label value {value}, allowed are {allowed}.",
        hint="See num_classes, reduce_zero_label and ignore_index of the recipe's data section.",
    )


# --- files ----------------------------------------------------------------------------------------------------


class UnreadableError(Exception):
    """A file that does not decode."""

    def __init__(self, path: str, error: Exception) -> None:
        super().__init__(f"{path} cannot be read ({str(error) or type(error).__name__}).")
        self.path = path


def _image_pixels(path: str) -> Pixels:
    """RGB, [H, W, 3], turned as EXIF says."""
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))  # a copy: torch wants to write
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, ...
        raise UnreadableError(path, error) from None


def _label_pixels(path: str) -> tuple[Pixels, str]:
    """([H, W], "grey" | "palette"); of a palette image the indices. Raises UserError for other kinds."""
    try:
        with Image.open(path) as image:
            mode = image.mode
            pixels = np.asarray(image)
    except Exception as error:
        raise UnreadableError(path, error) from None
    if mode.startswith("I"):
        raise UserError(f"{path} is a 16-bit label: save labels with 8 bits, class numbers below 255.")
    if mode not in ("1", "L", "P"):
        raise UserError(
            f"{path} is a colour image ({mode}), not a label with one number per pixel.",
            hint="Convert the colours to class numbers and save a grey or palette PNG.",
        )
    return pixels.astype(np.uint8, copy=False), "palette" if mode == "P" else "grey"


def read_label(path: str, lut: Pixels, valid: NDArray[np.bool_]) -> Pixels:
    """Class indices [H, W]; UserError for a value out of range (a GPU would only say "device-side
    assert").
    """
    pixels, _ = _label_pixels(path)
    counts = np.bincount(pixels.ravel(), minlength=256)
    if counts[~valid].any():
        raise _out_of_range(path, int(np.flatnonzero((counts > 0) & ~valid)[0]), valid)
    return lut[pixels]


# --- geometry and colour --------------------------------------------------------------------------------------


def rescaled_size(height: int, width: int, img_scale: tuple[float, float]) -> tuple[int, int]:
    """(h, w): the largest of this aspect ratio within `img_scale` (long side, short side), rounded half
    up.
    """
    factor = min(max(img_scale) / max(height, width), min(img_scale) / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_image(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """[H, W, 3] -> [h, w, 3], bilinear as OpenCV's: two taps, no smoothing when it shrinks (Pillow
    smooths).
    """
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]  # channels last: the fast path
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()


def resize_label(label: Pixels, size: tuple[int, int]) -> Pixels:
    """[H, W] -> [h, w], nearest as OpenCV's (resizeNN): floor(i * scale) in float64; in float32, as torch does it, some
    exact multiples fall short.
    """
    rows, columns = (
        np.minimum(np.floor(np.arange(after) * (1 / (after / before))).astype(int), before - 1)
        for before, after in zip(label.shape, size, strict=True)
    )
    return label.take(rows, axis=0).take(columns, axis=1)


def random_crop(label: Pixels, crop_size: int, cat_max_ratio: float, ignore_index: int) -> tuple[slice, slice]:
    """A window of at most S x S, drawn again up to ten times while one class covers `cat_max_ratio` of it
    or more.
    """

    def draw() -> tuple[slice, slice]:
        top, left = (np.random.randint(max(side - crop_size, 0) + 1) for side in label.shape)
        return slice(top, top + crop_size), slice(left, left + crop_size)

    window = draw()
    if cat_max_ratio < 1:
        for _ in range(10):
            counts = np.bincount(label[window].ravel(), minlength=256)
            counts[ignore_index] = 0
            if np.count_nonzero(counts) > 1 and counts.max() < cat_max_ratio * counts.sum():
                break
            window = draw()
    return window


def photometric_distortion(pixels: Pixels) -> Pixels:
    """Brightness +-32, contrast and saturation x 0.5-1.5, hue +-18 of 180, each with probability 1/2.

    Contrast comes second or last, a coin decides. Every step ends in 8 bits, as in the reference. [H, W,
    3], RGB.
    """

    def coin() -> bool:
        return bool(np.random.randint(2))

    def scaled(values: NDArray[Any], factor: float = 1.0, offset: float = 0.0) -> Pixels:
        return np.clip(values.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)

    if coin():
        pixels = scaled(pixels, offset=np.random.uniform(-32, 32))
    contrast_first = coin()
    if contrast_first and coin():
        pixels = scaled(pixels, np.random.uniform(0.5, 1.5))
    if coin():
        hue, saturation, value = rgb_to_hsv(pixels)
        pixels = hsv_to_rgb(hue, scaled(saturation, np.random.uniform(0.5, 1.5)), value)
    if coin():
        hue, saturation, value = rgb_to_hsv(pixels)
        shifted = (hue.astype(np.int16) + np.random.randint(-18, 18)) % 180
        pixels = hsv_to_rgb(shifted.astype(np.uint8), saturation, value)
    if not contrast_first and coin():
        pixels = scaled(pixels, np.random.uniform(0.5, 1.5))
    return pixels


def rgb_to_hsv(pixels: Pixels) -> tuple[Pixels, Pixels, Pixels]:
    """[H, W, 3] -> hue in 0..179 (2 degrees each), saturation, value: OpenCV's 8-bit definition, bit for
    bit.
    """
    red, green, blue = (pixels[..., i].astype(np.int32) for i in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    saturation = (spread * _PER_VALUE[value] + 2048) >> 12
    sector = np.where(
        value == red,
        green - blue,
        np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    hue = (sector * _PER_SPREAD[spread] + 2048) >> 12
    hue += (hue < 0) * 180
    return hue.astype(np.uint8), saturation.astype(np.uint8), value.astype(np.uint8)


# 12-bit fixed point: 255 / value and 30 / spread (180 half degrees over six sectors)
_PER_VALUE = np.array([0, *(round(255 * 4096 / i) for i in range(1, 256))], dtype=np.int32)
_PER_SPREAD = np.array([0, *(round(30 * 4096 / i) for i in range(1, 256))], dtype=np.int32)


def hsv_to_rgb(hue: Pixels, saturation: Pixels, value: Pixels) -> Pixels:
    """The way back, [H, W] each -> [H, W, 3]; at most one grey level from OpenCV's, through float
    rounding.
    """
    position = hue.astype(np.float32) * np.float32(1 / 30)  # 0 .. 6 around the circle
    v = value.astype(np.float32)
    chroma = v * saturation.astype(np.float32) * np.float32(1 / 255)
    channels = []
    for start in (5, 3, 1):  # red, green, blue: a trapezoid each, shifted by a third of the circle
        k = (position + start) % 6
        channels.append(v - chroma * np.clip(np.minimum(k, 4 - k), 0, 1))
    return np.stack(channels, axis=-1).astype(np.uint8)  # cut off, not rounded: OpenCV does so


def normalise(pixels: Pixels, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """[h, w, 3] uint8 -> [3, h, w] float32; mean and std of values in 0..1."""
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float()
    return (image - 255 * torch.tensor(mean)[:, None, None]) / (255 * torch.tensor(std)[:, None, None])


def pad(image: Tensor, size: int, value: float) -> Tensor:
    """[..., h, w] -> [..., S, S], `value` at the bottom and at the right."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, size - width, 0, size - height), value=value)


# --- data sets ------------------------------------------------------------------------------------------------


class TrainScenes:
    """Augmented crops. The reference's order: resize, crop, flip, photometric distortion, normalise, pad.

    `img_scale` (long side, short side) times a ratio drawn from `ratio_range` bounds the resized image. An
    item has `image` [3, S, S] float32 and `label` [S, S] uint8; all its randomness comes from the request's
    key. An image or label that cannot be read is replaced by another, chosen by the key, and named in
    `unreadable`.
    """

    def __init__(
        self,
        folder: SceneFolder,
        split: str = "training",
        *,
        img_scale: tuple[int, int] = (2048, 512),
        ratio_range: tuple[float, float] = (0.5, 2.0),
        crop_size: int = 512,
        cat_max_ratio: float = 0.75,
        hflip: float = 0.5,
        photometric: bool = True,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        self.folder = folder
        self.images, self.labels = folder.images[split], folder.labels[split]
        self.img_scale = img_scale
        self.ratio_range = ratio_range
        self.crop_size = crop_size
        self.cat_max_ratio = cat_max_ratio
        self.hflip = hflip
        self.photometric = photometric
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, request: tuple[int, int, int]) -> dict[str, Any]:
        index, key, _ = request
        item: dict[str, Any] = {"sample": index, "key": key}
        for candidate in self._candidates(index, key):
            try:
                pixels = _image_pixels(str(self.images[candidate]))
                label = read_label(str(self.labels[candidate]), self.folder.lut, self.folder.valid)
                break
            except UnreadableError as error:
                item["unreadable"] = error.path
        else:
            raise UserError(f"{item['unreadable']} cannot be read, nor can ten others.")
        with rng.seeded(key):
            pixels, label = self.augment(pixels, label)
        item["image"] = pad(normalise(pixels, self.mean, self.std), self.crop_size, 0)
        item["label"] = pad(torch.from_numpy(label), self.crop_size, self.folder.ignore_index)
        return item

    def sample_path(self, index: int) -> str:
        """The file behind a sample."""
        return str(self.images[index])

    def _candidates(self, index: int, key: int) -> Iterator[int]:
        yield index
        for attempt in range(10):
            yield rng.derive(key, "instead", attempt) % len(self)

    def augment(self, pixels: Pixels, label: Pixels) -> tuple[Pixels, Pixels]:
        """[H, W, 3], [H, W] -> a crop of both, of at most S x S. Draws from numpy's global generator."""
        ratio = np.random.uniform(*self.ratio_range)
        long_side, short_side = (int(side * ratio) for side in self.img_scale)
        size = rescaled_size(label.shape[0], label.shape[1], (long_side, short_side))
        label = resize_label(label, size)
        pixels = resize_image(pixels, size)
        window = random_crop(label, self.crop_size, self.cat_max_ratio, self.folder.ignore_index)
        pixels, label = pixels[window], label[window]
        if np.random.uniform() < self.hflip:
            pixels, label = pixels[:, ::-1], label[:, ::-1]
        if self.photometric:
            pixels = photometric_distortion(pixels)
        return pixels, np.ascontiguousarray(label)


class EvalScenes:
    """Whole images, one resized copy for each ratio, and the label at its original size.

    An item has `images`, a list of [3, h, w] float32 (one per ratio, each resized from the original within
    `img_scale` times the ratio), `label` [H, W] uint8 and `path`. Use `collate_scenes` with it: sizes differ.
    """

    def __init__(
        self,
        folder: SceneFolder,
        split: str = "validation",
        *,
        img_scale: tuple[int, int] = (2048, 512),
        ratios: Sequence[float] = (1.0,),
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        self.folder = folder
        self.images, self.labels = folder.images[split], folder.labels[split]
        self.scales = [(int(img_scale[0] * ratio), int(img_scale[1] * ratio)) for ratio in ratios]
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, request: tuple[int, int, int]) -> dict[str, Any]:
        index, key, _ = request
        path = str(self.images[index])
        try:
            pixels = _image_pixels(path)
            label = read_label(str(self.labels[index]), self.folder.lut, self.folder.valid)
        except UnreadableError as error:
            raise UserError(str(error), hint="Every validation image counts: replace the file.") from None
        sizes = [rescaled_size(label.shape[0], label.shape[1], scale) for scale in self.scales]
        return {
            "sample": index,
            "key": key,
            "images": [normalise(resize_image(pixels, size), self.mean, self.std) for size in sizes],
            "label": torch.from_numpy(label),
            "path": path,
        }


def collate_scenes(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Lists over the samples, since no two need to be of one size; `sample` and `key` as int64 tensors
    [B].
    """
    batch: dict[str, Any] = {name: [item[name] for item in items] for name in items[0]}
    return batch | {name: torch.tensor(batch[name], dtype=torch.int64) for name in ("sample", "key")}


# --- from a recipe's section ------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class SceneSplits(DataSplits):
    """With the folder, for evaluations at other scales."""

    folder: SceneFolder


def open_data(config: DataPart, head: Part, root: Path) -> SceneSplits:
    """Pairs images with labels, looks at every label once, and makes both data sets; UserError for what is wrong."""
    assert isinstance(config, SceneParsing)
    folder = open_folder(
        root,
        num_classes=config.num_classes,
        reduce_zero_label=config.reduce_zero_label,
        ignore_index=config.ignore_index,
        scan_cache=embedded.cache_dir() / "label-scans",
    )
    shared: dict[str, Any] = {"img_scale": config.img_scale, "mean": config.mean, "std": config.std}
    names = {"ratio_range", "crop_size", "cat_max_ratio", "hflip", "photometric"}
    train = TrainScenes(folder, **shared, **config.model_dump(include=names))
    return SceneSplits(
        info=DataInfo(
            name=folder.name,
            digest=folder.digest,
            path=str(root),
            num_train=len(train),
            num_val=len(folder.images["validation"]),
            num_classes=folder.num_classes,
        ),
        train=train,
        val=EvalScenes(folder, **shared),
        class_names=list(folder.class_names),
        img_size=(512, 2048),
        val_collate=collate_scenes,
        folder=folder,
    )
