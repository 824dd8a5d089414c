"""Folders of images by class, as ImageNet has them: the index, the images, the reference recipe's augmentation.

    ROOT/train/<class>/**/*.JPEG     classes are these folders, in sorted order, and no others
    ROOT/val/<class>/**/*.JPEG

Augmentation is timm's, put together by `timm.data.create_transform` with the arguments of Swin's and HcNet's data code.
Images stay bytes, a quarter of the memory, until a whole batch is normalised on the device.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import Mixup, create_transform
from timm.data import auto_augment as auto_augment_ops
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from torchvision import transforms

from hcnet_cli import rng
from hcnet_cli.console import UserError, did_you_mean
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.runs import DataInfo
from hcnet_cli.schema import DataPart, Part
from hcnet_cli.tasks.classification.spec import ImageFolder as ImageFolderConfig

SIZED = 100  # files of a class whose size enters the digest: all of a small class, about so many of a large one
EXTENSIONS = frozenset(b".jpg .jpeg .png .webp .bmp .tif .tiff .gif .ppm .pgm .jp2".split())
LAYOUT = "An image folder holds train/<class>/ and val/<class>/ with the images inside."
Triple = tuple[float, float, float]  # of the channels

# a few of ImageNet's own files have damaged EXIF data; their pixels are fine
warnings.filterwarnings("ignore", message=".*(EXIF|Truncated File Read)", category=UserWarning, module="PIL")


# --- the index --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Files:
    """The images of a split. Arrays, not Python objects, so that worker processes share this memory for good: counting
    references to a million strings would copy every page of it into each of them.
    """

    names: NDArray[np.uint8]  # bytes of all names one after another, each relative to its class folder
    ends: NDArray[np.int64]  # [N], where each name ends
    labels: NDArray[np.int32]  # [N], index into the classes

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.names[start : self.ends[index]].tobytes())


@dataclass(frozen=True, eq=False)
class Index:
    """What a folder holds. `digest` is a hash of the class and file names, `name` what results call the data."""

    root: Path
    name: str
    digest: str
    classes: tuple[str, ...]
    train: Files
    val: Files

    @property
    def num_train(self) -> int:
        return len(self.train)

    @property
    def num_val(self) -> int:
        return len(self.val)


def scan(root: str | Path) -> Index:
    """Reads the folders; no file is opened, the digest covers names and, of SIZED files a class, sizes.

    Raises UserError for a folder that is not as it should be.
    """
    root = Path(root)
    _check_layout(root)
    try:
        classes = tuple(_subfolders(root / "train"))
        for split in ("train", "val"):
            _check_classes(root / split, classes)
        digest = hashlib.blake2b(digest_size=8)
        files = {split: _files(root / split, classes, digest) for split in ("train", "val")}
    except OSError as error:
        raise UserError(f"{error.filename or root} cannot be read: {error.strerror}.") from None
    name = _dataset_name(root, classes, len(files["val"]))
    return Index(root, name, digest.hexdigest(), classes, files["train"], files["val"])


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _check_layout(root: Path) -> None:
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise UserError(f"The data folder {root} {what}.", hint=LAYOUT)
    missing = [split for split in ("train", "val") if not (root / split).is_dir()]
    if not missing:
        return
    hint = LAYOUT
    if (root / "annotations").is_dir() and any((root / "annotations").glob("instances_*.json")):
        hint = f"It looks like a COCO data set: hcnet finetune-det --data {root}"
    elif any((root / kind / "training").is_dir() for kind in ("images", "annotations")):
        hint = f"It looks like an ADE20K data set: hcnet finetune-seg --data {root}"
    elif found := _subfolders(root):
        hint += f" It has: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}."
    folders = " and no ".join(f"{split}/" for split in missing)
    raise UserError(f"The data folder {root} has no {folders} folder.", hint=hint)


def _check_classes(folder: Path, classes: tuple[str, ...]) -> None:
    """The class folders of a split: some, and none that training does not know."""
    found = _subfolders(folder)
    if not found:
        with os.scandir(folder) as entries:
            loose = any(_is_image(os.fsencode(entry.name)) for entry in entries)
        hint = LAYOUT
        if loose and folder.name == "val":
            hint += " ImageNet's validation images come in one folder; sort them by class first (valprep.sh)."
        raise UserError(f"{folder} holds {'images but ' if loose else ''}no class folders.", hint=hint)
    if unknown := sorted(set(found) - set(classes)):
        raise UserError(
            f"{folder} has {_some(unknown)} that {folder.parent / 'train'} lacks.{did_you_mean(unknown[0], classes)}",
            hint="Classes come from the training folder alone.",
        )


def _some(names: list[str]) -> str:
    quoted = ", ".join(f'"{name}"' for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{'a class' if len(names) == 1 else f'{len(names)} classes'} ({quoted}{more})"


def _is_image(name: bytes) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _image_names(folder: bytes) -> list[bytes]:
    """Images in a folder and below, relative to it, sorted; what starts with a dot is left out."""
    names: list[bytes] = []
    pending = [b""]
    while pending:
        below = pending.pop()
        with os.scandir(os.path.join(folder, below)) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if _is_image(entry.name):
                    names.append(below + entry.name)
                elif entry.is_dir():
                    pending.append(below + entry.name + b"/")
    return sorted(names)


def _files(folder: Path, classes: tuple[str, ...], digest: Any) -> Files:
    present = set(_subfolders(folder))
    blob, ends, counts, empty = bytearray(), [], [], []
    digest.update(b"\0split " + os.fsencode(folder.name))
    for name in classes:
        images = _image_names(os.fsencode(folder / name)) if name in present else []
        if name in present and not images:
            empty.append(name)
        digest.update(b"\0class " + os.fsencode(name))
        step = max(1, len(images) // SIZED)
        for number, image in enumerate(images):
            digest.update(b"\0" + image)
            if number % step == 0:  # replaced files under old names have other sizes
                digest.update(b"%d" % os.stat(os.path.join(os.fsencode(folder / name), image)).st_size)
            blob += image
            ends.append(len(blob))
        counts.append(len(images))
    if empty:
        raise UserError(
            f"{folder} has {_some(empty)} without images.",
            hint=f"Image files end in {' '.join(sorted(e.decode() for e in EXTENSIONS))}.",
        )
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return Files(np.frombuffer(bytes(blob), dtype=np.uint8), np.array(ends, dtype=np.int64), labels)


def _dataset_name(root: Path, classes: tuple[str, ...], num_val: int) -> str:
    """What results call the data: "imagenet-1k" for ILSVRC2012 itself, else the folder's own name."""
    if len(classes) == 1000 and classes[0] == "n01440764" and classes[-1] == "n15075141" and num_val == 50_000:
        return "imagenet-1k"
    name = re.sub(r"[^a-z0-9]+", "-", root.resolve().name.lower()).strip("-") or "data"
    return f"{name}-data" if name == "imagenet-1k" else name


# --- images -----------------------------------------------------------------------------------------------------------


def read_image(path: str) -> Image.Image:
    """The image as a viewer shows it, RGB: turned as its EXIF data says, on white where it is transparent.

    16-bit grey keeps its upper 8 bits, where PIL's conversion would clip. Raises whatever PIL does.
    """
    with Image.open(path) as file:
        file.load()
        image: Image.Image = file
        with contextlib.suppress(SyntaxError, ValueError, TypeError, KeyError, OSError):  # EXIF data beyond repair
            ImageOps.exif_transpose(file, in_place=True)
        if image.mode.startswith("I"):
            image = Image.fromarray(np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")  # each of these would copy, even to no end


class ImageFolder(Dataset[dict[str, Any]]):
    """Items of a split: what the transform makes of an image (see `Transform`), `target` int, `sample`, `key`.

    In training the transform draws from the request's key alone, and an image that cannot be read is replaced by one
    that the key chooses; the item then names the file under `unreadable`. In evaluation that is a UserError.
    """

    def __init__(self, index: Index, split: str, transform: Callable[[Image.Image], dict[str, Any]]) -> None:
        self.files: Files = {"train": index.train, "val": index.val}[split]
        self.train = split == "train"
        self.folder = str(index.root / split)
        self.classes = index.classes
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def with_transform(self, transform: Callable[[Image.Image], dict[str, Any]]) -> ImageFolder:
        """The same images behind another transform."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def sample_path(self, index: int) -> str:
        """The file of a sample."""
        return os.path.join(self.folder, self.classes[self.files.labels[index]], self.files.name(index))

    def __getitem__(self, request: tuple[int, int, int]) -> dict[str, Any]:
        index, key, _ = request
        unreadable: dict[str, str] = {}
        for attempt in range(10):
            path = self.sample_path(index)
            try:
                image = read_image(path)
            except MemoryError:
                raise
            except Exception as error:  # decoders raise almost anything on damaged files
                reason = "it is not an image PIL knows" if isinstance(error, UnidentifiedImageError) else str(error)
                if not self.train:
                    raise UserError(
                        f"The image {path} cannot be read: {reason}.",
                        hint="Evaluation counts every image: replace the file, or remove it. `hcnet check` finds all.",
                    ) from None
                unreadable = unreadable or {"unreadable": path}
                index = rng.derive(key, "instead", attempt) % len(self)
                continue
            with rng.seeded(key):
                made = self.transform(image)
            return {**made, "sample": index, "key": key, "target": int(self.files.labels[index]), **unreadable}
        raise UserError(
            f"Ten training images in a row cannot be read, the first: {unreadable['unreadable']}.",
            hint="Check that the disk is mounted and the data set was unpacked completely.",
        )


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch: `image` [B, H, W, 3] uint8; `target`, `sample` and `key` int64 [B]; `holes`, a list of (number in the
    batch, top, left, height, width), and `fill` float32 [N], the numbers that go into them, one hole after another.
    """
    rest = [{name: value for name, value in item.items() if name != "erased"} for item in items]
    erased = [(number, *hole) for number, item in enumerate(items) for hole in item["erased"]]
    return {
        **default_collate(rest),  # in a worker straight into shared memory
        "holes": [(number, top, left, *patch.shape[1:]) for number, top, left, patch in erased],
        "fill": torch.cat([torch.empty(0), *(patch.flatten() for *_, patch in erased)]),
    }


class Normalise(nn.Module):
    """A batch -> images [B, 3, H, W], normalised, then erased; float32, channels-last, on the batch's device.

    Arithmetic and values are those of torchvision's ToTensor and Normalize, to the last bit.
    """

    constants: Tensor  # [3, 3]: 255, mean and std for each channel

    def __init__(self, mean: Triple, std: Triple) -> None:
        super().__init__()
        # 255 is a tensor too: by a plain number CUDA does not divide, it multiplies by the reciprocal
        self.register_buffer("constants", torch.tensor([(255.0,) * 3, mean, std]), persistent=False)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        pixels = batch["image"]  # [B, H, W, 3]
        scale, mean, std = self.constants.repeat(1, pixels.shape[2])  # [W * 3] each: loops over three would be slow
        rows = pixels.flatten(2).float().div_(scale).sub_(mean).div_(std)  # [B, H, W * 3]
        images = rows.view(pixels.shape).permute(0, 3, 1, 2)  # [B, 3, H, W]
        sizes = [(3, height, width) for *_, height, width in batch["holes"]]
        fills = batch["fill"].split([math.prod(size) for size in sizes])
        for (number, top, left, height, width), size, fill in zip(batch["holes"], sizes, fills, strict=True):
            images[number, :, top : top + height, left : left + width] = fill.view(size)
        return images


# --- augmentation -----------------------------------------------------------------------------------------------------


class Transform:
    """PIL image -> `image` [H, W, 3] uint8 and `erased`: (top, left, patch [3, h, w]) of all that random erasing pastes
    once the image is normalised.
    """

    def __init__(self, parts: Sequence[Callable[[Any], Any]], erase: RandomErasing | None = None) -> None:
        self.parts, self.erase = parts, erase

    def __call__(self, image: Image.Image) -> dict[str, Any]:
        for part in self.parts:
            image = part(image)
        erased = _Erased(image.height, image.width)
        if self.erase is not None:
            self.erase(erased)
        return {"image": torch.from_numpy(np.array(image)), "erased": erased.patches}


class _Erased:
    """Stands before timm's RandomErasing in the place of an image [3, H, W] and notes what is pasted."""

    dtype = torch.float32

    def __init__(self, height: int, width: int) -> None:
        self.shape = (3, height, width)
        self.patches: list[tuple[int, int, Tensor]] = []

    def size(self) -> tuple[int, int, int]:
        return self.shape

    def __setitem__(self, place: tuple[slice, slice, slice], patch: Tensor) -> None:
        _, rows, columns = place
        size = 3, rows.stop - rows.start, columns.stop - columns.start
        self.patches.append((rows.start, columns.start, patch.expand(size)))


def train_transform(
    *,
    img_size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    vflip: float = 0.0,
    color_jitter: float | None = 0.4,
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    interpolation: str = "bicubic",
    re_prob: float = 0.25,
    re_mode: str = "pixel",
    re_count: int = 1,
    mean: Triple,
) -> Transform:
    """To [img_size, img_size, 3]; the defaults are Swin's and HcNet's (`data/build.py` of either).

    Random resized crop, flip, RandAugment, random erasing, in this order. As in timm, `color_jitter` has an effect only
    without `auto_augment` (or with "3a"), and RandAugment interpolates as the crop does and pads with `mean`.
    """
    transform: Any = create_transform(
        img_size,
        is_training=True,
        use_prefetcher=True,  # leaves normalising and erasing to others
        scale=scale,
        ratio=ratio,
        hflip=hflip,
        vflip=vflip,
        color_jitter=color_jitter,  # type: ignore[arg-type]  # timm takes None, though it does not say so
        auto_augment=auto_augment,
        interpolation=interpolation,
        mean=mean,
    )
    mend_posterize(transform)
    parts = [
        RandomHorizontalFlip(part.p) if isinstance(part, transforms.RandomHorizontalFlip) else part
        for part in transform.transforms[:-1]  # all but the conversion to a tensor
    ]
    erase = RandomErasing(re_prob, mode=re_mode, max_count=re_count, device="cpu") if re_prob else None
    return Transform(parts, erase)


class RandomHorizontalFlip(transforms.RandomHorizontalFlip):
    """torchvision's for PIL images, from the same draw, without its ways round: 0.1 ms less of an image's five."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1).item() < self.p else image


def mend_posterize(transform: Any) -> None:
    """Makes a transform of timm 1.0.31 work with Pillow 13, see `_posterize`."""
    for part in transform.transforms:
        # of RandAugment and AugMix; of AutoAugment
        for op in [*getattr(part, "ops", []), *itertools.chain(*getattr(part, "policy", []))]:
            if op.aug_fn is auto_augment_ops.posterize:
                op.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """To keep no bit at all, RandAugment's limit, gives black; Pillow 13 refuses it and timm 1.0.31 asks for it."""
    return auto_augment_ops.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def eval_transform(*, img_size: int, crop_pct: float = 0.875, interpolation: str = "bicubic") -> Transform:
    """To [img_size, img_size, 3]: shorter side to floor(img_size / crop_pct), centre crop.

    At crop_pct 0.875 that is the reference's int(256 / 224 * img_size).
    """
    transform: Any = create_transform(img_size, crop_pct=crop_pct, interpolation=interpolation, use_prefetcher=True)
    return Transform(transform.transforms[:-1])


def make_mixup(
    num_classes: int,
    *,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    prob: float = 1.0,
    switch_prob: float = 0.5,
    smoothing: float = 0.1,
) -> Mixup | None:
    """Mixup and cutmix as timm does them, in batch mode, with label smoothing; None if neither would ever act."""
    if not prob or not (mixup or cutmix):
        return None
    return Mixup(
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        prob=prob,
        switch_prob=switch_prob,
        mode="batch",
        label_smoothing=smoothing,
        num_classes=num_classes,
    )


def mix(images: Tensor, target: Tensor, step_key: int, mixup: Mixup) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W], mixed in place, and soft targets [B, num_classes].

    Draws from the step's key, so all micro-batches of a step mix alike, as one batch would. Partners are opposite ends
    of the micro-batch, where the loader puts pairs of the batch.
    """
    if len(images) % 2:
        raise UserError(
            f"Mixup and cutmix mix images in pairs, and a micro-batch of {len(images)} is odd.",
            hint="Choose a --batch-size whose share for each process and micro-batch is even.",
        )
    with rng.seeded(step_key):
        return mixup(images, target)


# --- from a recipe's section ------------------------------------------------------------------------------------------


def open_data(config: DataPart, head: Part, root: Path) -> DataSplits:
    """Scans the folder and makes both data sets; UserError for what is wrong with it."""
    assert isinstance(config, ImageFolderConfig)
    index = scan(root)
    shared: dict[str, Any] = {"img_size": config.img_size, "interpolation": config.interpolation}
    names = {
        *("scale", "ratio", "hflip", "vflip", "color_jitter", "auto_augment"),
        *("re_prob", "re_mode", "re_count", "mean"),
    }
    train = train_transform(**shared, **config.model_dump(include=names))
    return DataSplits(
        info=DataInfo(
            name=index.name,
            digest=index.digest,
            path=str(root),
            num_train=index.num_train,
            num_val=index.num_val,
            num_classes=len(index.classes),
        ),
        train=ImageFolder(index, "train", train),
        val=ImageFolder(index, "val", eval_transform(**shared, crop_pct=config.crop_pct)),
        class_names=list(index.classes),
        img_size=(config.img_size, config.img_size),
        collate=collate,
        val_collate=collate,
    )
