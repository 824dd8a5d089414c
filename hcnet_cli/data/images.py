"""Images, the same way for every data format: read, rescale, normalise, and replace what cannot be used.

Sizes are (height, width) everywhere.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

from hcnet_cli import rng
from hcnet_cli.cache import cache_dir
from hcnet_cli.console import UserError
from hcnet_cli.data.decoding import timed
from hcnet_cli.data.member import Member, Source
from hcnet_cli.schema import MAX_PIXELS

Size = tuple[int, int]  # height, width
T = TypeVar("T")
# What a file may be, whatever its name says. Pillow knows more, of which some start other programs (EPS: Ghostscript).
FORMATS: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
if "avif" in features.get_supported():  # from Pillow 11.3 on
    FORMATS += ("AVIF",)
MAX_SIDE = 65_535  # pixels, as in JPEG: what an image or an annotation file may declare
DEEP_ENDINGS = (b".png", b".tif", b".tiff", b".pgm", b".pnm")
DEEP_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"P5", b"P2")
HOT_PIXELS = 1000  # one of so many pixels, but at least one of each image, may exceed the measured bits
MAX_ATTEMPTS = 10  # images in a row that cannot be used before training stops

Image.MAX_IMAGE_PIXELS = None  # `opened` has its own limit, a field of the recipe
# Of damaged metadata, as in a few of ImageNet's own files: the pixels are fine, or the image is named.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


# --- reading ----------------------------------------------------------------------------------------------------------


class UnusableImageError(UserError):
    """An image file that cannot be used. Training takes another image, evaluation stops, `hcnet check` lists it."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f"The image {path} cannot be used: {reason}.",
            hint="Replace the file: in an evaluation every image counts. `hcnet check` lists all such files.",
        )
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str]]:
        return type(self), (self.path, self.reason)


@contextlib.contextmanager
def opened(path: Source, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """An open image file; only its header is read so far. What goes wrong with it becomes an UnusableImageError.

    So are a file in no format of `formats`, one that declares more than `max_pixels`, and one whose numbers have no
    known range.
    """
    try:
        if not isinstance(path, Member) and os.path.exists(path) and not os.path.isfile(path):
            raise UnusableImageError(str(path), "it is not a regular file")  # a pipe would be waited for
        with Image.open(_readable(path), formats=formats) as file:
            if reason := _refusal(file, max_pixels):
                raise UnusableImageError(str(path), reason)
            if file.format == "TIFF":
                file.filename = ""  # else Pillow maps the file in its turned size, which mixes up the pixels
            yield file
    except (MemoryError, UserError):
        raise
    except UnidentifiedImageError:
        reason = f"it is not an image in {'the format' if len(formats) == 1 else 'one of the formats'} "
        raise UnusableImageError(str(path), reason + ", ".join(formats)) from None
    except Exception as error:  # decoders raise almost anything on damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnusableImageError(str(path), reason.rstrip(".")) from None


def _readable(path: Source) -> str | Path | io.BytesIO:
    """What Pillow opens: a path, or the bytes of a file in a tar."""
    return io.BytesIO(path.read()) if isinstance(path, Member) else path


def _refusal(file: Image.Image, max_pixels: int) -> str:
    """Why an image is not decoded, by its header; "" if it is."""
    if file.width * file.height > max_pixels or max(file.size) > MAX_SIDE:
        return (
            f"it is {file.width} x {file.height} pixels, and at most {max_pixels:,} (data.max_pixels) with sides up to "
            f"{MAX_SIDE:,} are read"
        )
    if file.mode == "F":
        return "its pixels are floating-point numbers, whose range is not known"
    if file.format == "TIFF" and not file.mode.startswith("I") and max(file.tag_v2.get(258, (1,))) > 8:  # type: ignore[attr-defined]
        return "it is a colour TIFF of more than 8 bits, which would lose its dark values; save it as a 16-bit PNG"
    return ""


@timed
def read_image(
    path: Source, size: Size | None = None, bits: int | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """An image as a viewer shows it, in RGB: turned as its EXIF data says, on white where it is transparent.

    An image of more than 8 bits keeps the upper 8 of its `bits` (None: 16). Every format and `hcnet check` give the
    bits that the whole data set uses (`data.bits`): Pillow's own conversion would clip grey images at 255, and the
    upper 8 of 16 bits would turn 12-bit images black. `size` is what an annotation file says: an image that has it as
    stored, but not as shown, is not turned, and any other size is an UnusableImageError.
    """
    with opened(path, max_pixels) as file:
        values = _deep_values(path, file)
        file.load()
        stored = file.height, file.width
        image: Image.Image = file
        if values is not None:
            image = _in_8_bits(values, bits or 16)
            if (clear := file.info.get("transparency")) is not None:  # a colour, which is compared in all its bits
                shown = values != clear if values.ndim == 2 else (values != clear).any(axis=2)
                image.putalpha(Image.fromarray(np.uint8(255) * shown))
            image.info["exif"] = file.info.get("exif")
        if size is None or size == _shown_size(file) or size != stored:
            turn(image)
        if size is not None and size != (image.height, image.width):
            raise _other_size(path, stored, size)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")  # converting RGB to RGB would copy it


def turn(image: Image.Image) -> None:
    """Turns an image as its EXIF data says, in place. Values change their places alone."""
    with contextlib.suppress(SyntaxError, ValueError, TypeError, KeyError, OSError):  # damaged EXIF data
        ImageOps.exif_transpose(image, in_place=True)


def _deep_values(path: Source, file: Image.Image) -> NDArray[np.integer] | None:
    """The numbers of an image of more than 8 bits, [H, W] or [H, W, C]; None for any other.

    UnusableImageError for numbers below 0: which of them is black is not known, and 8 bits would clip them all.
    Pillow drops the lower bytes of a 16-bit PNG in colour, and with them all of a 12-bit image's dark half. Its decoder
    gives them where it is told another order of the bytes.
    """
    if file.mode.startswith("I"):
        values = np.asarray(file)
        if values.min() < 0:
            raise UnusableImageError(
                str(path),
                f"its pixels go down to {values.min()}, and numbers below 0 would all be black; map the range that "
                "matters to 0 .. 65535 and save a 16-bit PNG",
            )
        white_is_zero = file.format == "TIFF" and file.tag_v2.get(262) == 0  # type: ignore[attr-defined]
        return 65535 - values if white_is_zero else values  # Pillow inverts those of 8 bits alone
    layout = str(file.tile[0][3]) if file.format == "PNG" and file.tile else ""  # type: ignore[attr-defined]
    if layout in ("RGB;16B", "RGBA;16B"):
        high, low = _decoded_as(path, layout), _decoded_as(path, layout.replace("16B", "16L"))
    elif layout == "LA;16B":
        both = _decoded_as(path, "RGBA")  # grey and opacity, two bytes each
        high, low = both[..., 0::2], both[..., 1::2]
    else:
        return None
    return high.astype(np.uint16) << 8 | low


def _decoded_as(path: Source, layout: str) -> NDArray[np.uint8]:
    """The pixels of a PNG file whose bytes are taken in another layout."""
    with Image.open(_readable(path), formats=("PNG",)) as file:
        file.tile = [(*tile[:3], layout) for tile in file.tile]  # type: ignore[misc, attr-defined, unused-ignore]
        return np.asarray(file)


def _in_8_bits(values: NDArray[np.integer], bits: int) -> Image.Image:
    """The upper 8 of `bits`; opacity, which is always 16 bits, keeps its own."""
    grey = np.clip(values >> (bits - 8), 0, 255).astype(np.uint8)
    if values.ndim == 3 and values.shape[2] in (2, 4):
        grey[..., -1] = values[..., -1] >> 8
    return Image.fromarray(grey)


def may_be_deep(name: bytes) -> bool:
    """Whether a file of this name may be an image of more than 8 bits."""
    return name.lower().endswith(DEEP_ENDINGS)


def deep_peak(path: Source, head: bytes, max_pixels: int = MAX_PIXELS) -> int:
    """The value that all but a few hot pixels of an image of more than 8 bits do not exceed, from 1 up.

    0 for any other file. `head`: its first 64 bytes. Only PNG files that say so and formats whose header does not tell
    it in one place are opened.
    """
    if head.startswith(b"\x89PNG"):
        if head[24:25] != b"\x10":  # bits per sample
            return 0
    elif not head.startswith(DEEP_STARTS):
        return 0
    try:
        with opened(path, max_pixels) as file:
            values = _deep_values(path, file)
    except UnusableImageError:
        return 0
    if values is None:
        return 0
    if values.ndim == 3:
        values = values[..., : values.shape[2] - (values.shape[2] in (2, 4))].max(axis=2)  # without opacity
    flat = values.ravel()
    place = max(0, flat.size - 1 - max(1, flat.size // HOT_PIXELS))
    return max(1, int(np.partition(flat, place)[place]))


def bits_of(peak: int) -> int | None:
    """How many bits images use whose largest `deep_peak` this is; None where there is none of more than 8 bits."""
    return max(8, peak.bit_length()) if peak else None


def check_size(path: Source, size: Size, max_pixels: int = MAX_PIXELS) -> None:
    """Raises UnusableImageError where `read_image` would because of the header, which is all that is read."""
    with opened(path, max_pixels) as file:
        if size not in (_shown_size(file), (file.height, file.width)):
            raise _other_size(path, (file.height, file.width), size)


def shown_size(path: Source, max_pixels: int = MAX_PIXELS) -> Size:
    """The size of an image as `read_image` gives it, from the file's header; UnusableImageError if there is none."""
    with opened(path, max_pixels) as file:
        return _shown_size(file)


def check_headers(paths: Iterable[Source], max_pixels: int, digest: str) -> None:
    """Raises UnusableImageError for the first file that its header tells cannot be used.

    An evaluation needs every image: this must not be found after hours of training. `digest`: of the data, whose files
    are looked at once.
    """
    seen = cache_dir() / "headers" / f"{digest}-{max_pixels}"
    if seen.exists():
        return
    for path in paths:
        with opened(path, max_pixels):
            pass
    with contextlib.suppress(OSError):
        seen.parent.mkdir(parents=True, exist_ok=True)
        seen.touch()


def is_turned(path: Source, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether EXIF data turns or mirrors the image."""
    with opened(path, max_pixels) as file:
        return _orientation(file) > 1


def _shown_size(file: Image.Image) -> Size:
    turned = _orientation(file) >= 5 and file.format != "TIFF"  # of which Pillow gives the turned size
    return (file.width, file.height) if turned else (file.height, file.width)


def _orientation(file: Image.Image) -> int:
    """The EXIF orientation: 1 is upright, from 5 on height and width change places."""
    with contextlib.suppress(SyntaxError, ValueError, TypeError, KeyError, OSError):  # damaged EXIF data
        value = file.getexif().get(ExifTags.Base.Orientation, 1)
        if value in range(1, 9):
            return int(value)
    return 1


def _other_size(path: Source, found: Size, expected: Size) -> UnusableImageError:
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


def to_picture(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """A normalised image [3, H, W] as a picture: the opposite of `normalise`; what is beyond black and white is cut."""
    image = image.detach().float().cpu()
    pixels = (image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]).clamp(0, 1) * 255
    return Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Uint8 [3, H, W] -> float32; mean and std are those of values in 0..1."""
    return (image.float() - 255 * torch.tensor(mean)[:, None, None]) / (255 * torch.tensor(std)[:, None, None])
