"""Images, the same way for every data format: read, rescale, normalise, and replace what cannot be used.

Sizes are (height, width) everywhere.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from hcnet_cli import rng
from hcnet_cli.console import UserError

Size = tuple[int, int]  # height, width
T = TypeVar("T")
EXTENSIONS = frozenset(  # of the files that are taken as images
    [
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff"),
        *(".gif", ".ppm", ".pgm", ".pnm", ".jp2"),
    ]
)
DEEP_ENDINGS = (b".png", b".tif", b".tiff", b".pgm", b".pnm", b".jp2")
DEEP_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"P5", b"P2", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
MAX_ATTEMPTS = 10  # images in a row that cannot be used before training stops

# A few of ImageNet's own files have damaged EXIF data; their pixels are fine.
warnings.filterwarnings("ignore", message=".*(EXIF|Truncated File Read)", category=UserWarning, module="PIL")


# --- reading ----------------------------------------------------------------------------------------------------------


class UnusableImageError(UserError):
    """An image file that cannot be used. Training takes another image, evaluation stops, `hcnet check` lists it."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f"The image {path} cannot be used: {reason}.",
            hint="Replace the file, since every validation image counts. `hcnet check` lists all such files.",
        )
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str]]:
        return type(self), (self.path, self.reason)


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """An open image file. What goes wrong with it inside the block becomes an UnusableImageError."""
    try:
        with Image.open(path) as file:
            yield file
    except (MemoryError, UserError):
        raise
    except UnidentifiedImageError:
        raise UnusableImageError(str(path), "it is not an image that Pillow can read") from None
    except Exception as error:  # decoders raise almost anything on damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnusableImageError(str(path), reason.rstrip(".")) from None


def read_image(path: str | Path, size: Size | None = None, bits: int | None = None) -> Image.Image:
    """An image as a viewer shows it, in RGB: turned as its EXIF data says, on white where it is transparent.

    Grey of more than 8 bits keeps the upper 8 of its `bits` (None: 16). Every format and `hcnet check` give the bits
    that the whole data set uses (`data.bits`): Pillow's own conversion would clip at 255, and 16 would turn 12-bit
    images black. `size` is what an annotation file says: an image that has it as stored, but not as shown, is not
    turned, and any other size is an UnusableImageError.
    """
    with opened(path) as file:
        file.load()
        stored = file.height, file.width
        image: Image.Image = file
        if size is None or size == _shown_size(file) or size != stored:
            with contextlib.suppress(SyntaxError, ValueError, TypeError, KeyError, OSError):  # damaged EXIF data
                ImageOps.exif_transpose(file, in_place=True)
        if size is not None and size != (image.height, image.width):
            raise _other_size(path, stored, size)
        if image.mode == "F":
            raise UnusableImageError(str(path), "its pixels are floating-point numbers, whose range is not known")
        if image.mode.startswith("I"):
            image = Image.fromarray(np.clip(np.asarray(image) >> ((bits or 16) - 8), 0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")  # converting RGB to RGB would copy it


def may_be_deep(name: bytes) -> bool:
    """Whether a file of this name may be a grey image of more than 8 bits."""
    return name.lower().endswith(DEEP_ENDINGS)


def largest_deep_value(path: str | Path, head: bytes) -> int:
    """The largest value of a grey image of more than 8 bits; 0 for any other file. `head`: its first 64 bytes.

    Only PNG files that say so and formats whose header does not tell it in one place are opened.
    """
    if head.startswith(b"\x89PNG"):
        if head[24:26] != b"\x10\x00":  # bits per sample, colour type: 16, grey
            return 0
    elif not head.startswith(DEEP_STARTS):
        return 0
    try:
        with opened(path) as file:
            return max(0, int(np.asarray(file).max())) if file.mode.startswith("I") else 0
    except UnusableImageError:
        return 0


def check_size(path: str | Path, size: Size) -> None:
    """Raises UnusableImageError where `read_image` would because of the size; reads the file's header alone."""
    with opened(path) as file:
        if size not in (_shown_size(file), (file.height, file.width)):
            raise _other_size(path, (file.height, file.width), size)


def shown_size(path: str | Path) -> Size:
    """The size of an image as `read_image` gives it, from the file's header; UnusableImageError if there is none."""
    with opened(path) as file:
        return _shown_size(file)


def is_turned(path: str | Path) -> bool:
    """Whether EXIF data turns or mirrors the image."""
    with opened(path) as file:
        return _orientation(file) > 1


def _shown_size(file: Image.Image) -> Size:
    return (file.width, file.height) if _orientation(file) >= 5 else (file.height, file.width)


def _orientation(file: Image.Image) -> int:
    """The EXIF orientation: 1 is upright, from 5 on height and width change places."""
    with contextlib.suppress(SyntaxError, ValueError, TypeError, KeyError, OSError):  # damaged EXIF data
        value = file.getexif().get(ExifTags.Base.Orientation, 1)
        if value in range(1, 9):
            return int(value)
    return 1


def _other_size(path: str | Path, found: Size, expected: Size) -> UnusableImageError:
    return UnusableImageError(
        str(path),
        f"it is {found[1]} x {found[0]} pixels, its annotation file says {expected[1]} x {expected[0]}",
    )


def first_usable(
    load: Callable[[int], T], index: int, key: int, others: Sequence[int] | NDArray[np.integer]
) -> tuple[int, T, dict[str, str]]:
    """Loads sample `index` or, where it cannot be used, one of `others` that the key chooses.

    Returns the index of the loaded sample, what `load` gave, and what a training item says of the file that was
    replaced: {"unreadable": "PATH (REASON)"}, else {}. UserError after MAX_ATTEMPTS samples that cannot be used.
    """
    replaced: dict[str, str] = {}
    for attempt in range(MAX_ATTEMPTS):
        try:
            return index, load(index), replaced
        except UnusableImageError as error:
            replaced = replaced or {"unreadable": f"{error.path} ({error.reason})"}
            index = int(others[rng.derive(key, "instead", attempt) % len(others)])
    raise UserError(
        f"{MAX_ATTEMPTS} training images in a row cannot be used, the first: {replaced['unreadable']}.",
        hint="Check that the disk is mounted and that the data set was unpacked completely.",
    )


# --- sizes and values -------------------------------------------------------------------------------------------------


def rescale(size: Sequence[int], frame: Sequence[float]) -> Size:
    """The largest (height, width) of the aspect ratio of `size` in a frame (long side, short side), rounded half up.

    mmcv's `rescale_size`. It enlarges small images too.
    """
    height, width = size
    factor = min(max(frame) / max(height, width), min(frame) / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def to_tensor(image: Image.Image) -> Tensor:
    """The pixels as uint8 [3, H, W], contiguous."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def resize(image: Tensor, size: Size) -> Tensor:
    """Uint8 [C, H, W] -> [C, *size]: bilinear with two taps and no antialiasing, as OpenCV's (Pillow antialiases)."""
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Uint8 [3, H, W] -> float32; mean and std are those of values in 0..1."""
    return (image.float() - 255 * torch.tensor(mean)[:, None, None]) / (255 * torch.tensor(std)[:, None, None])
