"""Images: one reader for all three tasks and `hcnet check`; rescaling, normalising, replacement by the key."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hcnet_cli import check
from hcnet_cli.console import UserError
from hcnet_cli.data.audit import Audit, Item
from hcnet_cli.data.images import (
    UnusableImageError,
    check_headers,
    check_size,
    first_usable,
    is_turned,
    normalise,
    read_image,
    rescale,
    resize,
    shown_size,
    to_tensor,
)
from hcnet_cli.schema import IMAGENET_MEAN, IMAGENET_STD
from hcnet_cli.tasks.classification import image_folder
from hcnet_cli.tasks.detection import coco
from hcnet_cli.tasks.detection.folder import load_split
from hcnet_cli.tasks.segmentation import scene_parsing

WIDTH, HEIGHT = 50, 40
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def noise(*shape: int, high: int = 256, dtype: Any = np.uint8) -> np.ndarray[Any, Any]:
    return np.random.RandomState(0).randint(0, high, shape).astype(dtype)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def clear_palette() -> Image.Image:
    image = Image.fromarray(noise(HEIGHT, WIDTH, high=4), mode="P")
    image.putpalette([1, 2, 3, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    return image


RGB, GREY = noise(HEIGHT, WIDTH, 3), noise(HEIGHT, WIDTH)
DEEP, TWELVE_BIT = noise(HEIGHT, WIDTH, high=65536, dtype=np.uint16), noise(HEIGHT, WIDTH, high=4096, dtype=np.uint16)
ALPHA = noise(HEIGHT, WIDTH, 4)
OVER_WHITE = np.asarray(Image.alpha_composite(Image.new("RGBA", (WIDTH, HEIGHT), "white"), Image.fromarray(ALPHA)))


def three(grey: Any) -> Pixels:
    return np.repeat(np.asarray(grey)[..., None], 3, axis=2).astype(np.uint8)


# name of the file -> (image, options of save, the expected pixels or None for any)
KINDS: dict[str, tuple[Image.Image, dict[str, Any], Pixels | None]] = {
    "rgb.png": (Image.fromarray(RGB), {}, RGB),
    "rgb.jpg": (Image.fromarray(RGB), {}, None),
    "grey.png": (Image.fromarray(GREY), {}, three(GREY)),
    "grey.jpg": (Image.fromarray(GREY), {}, None),
    "one-bit.png": (Image.fromarray(GREY > 127), {}, three(255 * (GREY > 127))),
    "16-bit.png": (Image.fromarray(DEEP), {}, three(DEEP >> 8)),
    "16-bit.tif": (Image.fromarray(DEEP), {}, three(DEEP >> 8)),
    "12-bit-in-16.png": (Image.fromarray(TWELVE_BIT), {}, three(TWELVE_BIT >> 4)),
    "palette.png": (Image.fromarray(RGB).quantize(64), {}, None),
    "clear-palette.png": (clear_palette(), {"transparency": 0}, None),
    "grey-alpha.png": (Image.fromarray(ALPHA[..., :2], mode="LA"), {}, None),
    "rgb-alpha.png": (Image.fromarray(ALPHA), {}, OVER_WHITE[..., :3]),
    "cmyk.jpg": (Image.fromarray(ALPHA, mode="CMYK"), {}, None),
    "turned.png": (Image.fromarray(RGB), {"exif": turned(6)}, np.rot90(RGB, -1)),
    "turned.jpg": (Image.fromarray(RGB), {"exif": turned(8)}, None),
    "mirrored.png": (Image.fromarray(RGB), {"exif": turned(2)}, RGB[:, ::-1]),
    "damaged-exif.jpg": (Image.fromarray(RGB), {"exif": b"Exif\x00\x00XX\x00*garbage"}, None),
}


def write_everywhere(root: Path, name: str, image: Image.Image, options: dict[str, Any]) -> dict[str, Path]:
    """The image in a folder of each format, for both splits; the folders."""
    folders = {kind: root / kind for kind in ("classes", "coco", "scenes")}
    (folders["coco"] / "annotations").mkdir(parents=True)
    for split, scene_split in (("train", "training"), ("val", "validation")):
        places = [f"classes/{split}/cat", f"coco/{split}2017", f"scenes/images/{scene_split}"]
        for place in places:
            (root / place).mkdir(parents=True)
            image.save(root / place / name, **options)
        height, width = shown_size(root / places[0] / name)
        content = {
            "images": [{"id": 1, "file_name": name, "width": width, "height": height}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81}],
            "categories": [{"id": 1, "name": "cat"}],
        }
        (root / f"coco/annotations/instances_{split}2017.json").write_text(json.dumps(content))
        label = root / f"scenes/annotations/{scene_split}/{Path(name).stem}.png"
        label.parent.mkdir(parents=True)
        Image.fromarray(np.ones((height, width), np.uint8)).save(label)
    return folders


def denormalised(image: torch.Tensor) -> Pixels:
    pixels = 255 * (image * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None])
    return pixels.round().byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", KINDS)
def test_all_tasks_and_check_see_the_same_pixels(name: str, tmp_path: Path) -> None:
    """In training and in evaluation; ordinary images are what Pillow's own conversion makes of them."""
    image, options, expected = KINDS[name]
    folders = write_everywhere(tmp_path, name, image, options)
    file = folders["classes"] / "train/cat" / name
    bits = 12 if "12-bit" in name else None  # what is measured over the data
    pixels = np.asarray(read_image(file, bits=bits))
    assert pixels.shape[2] == 3
    if expected is not None:
        np.testing.assert_array_equal(pixels, expected)
    else:
        assert pixels.std() > 10
    if name in ("rgb.jpg", "grey.jpg", "palette.png", "cmyk.jpg"):
        with Image.open(file) as plain:
            np.testing.assert_array_equal(pixels, np.asarray(plain.convert("RGB")))
    whole = {"img_scale": (max(pixels.shape[:2]), min(pixels.shape[:2]))}  # no resizing
    seen: list[Pixels] = []

    index = image_folder.scan(folders["classes"])
    for split in ("train", "val"):
        dataset = image_folder.ImageFolder(index, split, lambda image: {"image": np.asarray(image)})
        seen.append(dataset[0, 1, 0]["image"])
    for split in ("train", "val"):
        annotations, images = load_split(folders["coco"], split, masks=False)
        dataset = coco.CocoDataset(annotations, images, train=split == "train", hflip=0, bits=bits, **whole)
        seen.append(denormalised(dataset[0, 1, 0]["image"]))
        seen.append(np.asarray(dataset.load_image(1)))
    if file.suffix != ".tif":  # the layout has .jpg and .png
        folder = scene_parsing.open_folder(folders["scenes"])
        crop = {"ratio_range": (1.0, 1.0), "crop_size": max(pixels.shape), "hflip": 0, "photometric": False}
        item = scene_parsing.TrainScenes(folder, **whole, **crop)[0, 1, 0]
        seen.append(denormalised(item["image"])[: pixels.shape[0], : pixels.shape[1]])
        seen.append(denormalised(scene_parsing.EvalScenes(folder, **whole)[0, 1, 0]["images"][0]))
    assert len(seen) == (6 if file.suffix == ".tif" else 8)
    for other in seen:
        np.testing.assert_array_equal(other, pixels)

    audit = Audit("", tmp_path, "", "", [], {}, bits=bits)
    items = [Item(str(file), "train"), Item(str(file), "train", size=(pixels.shape[0], pixels.shape[1]))]
    digests = {check.inspect(item, audit).digest for item in items}
    reference = tmp_path / "reference.png"
    Image.fromarray(pixels).save(reference)
    assert digests == {check.inspect(Item(str(reference), "train"), audit).digest}


@pytest.mark.parametrize("name", KINDS)
def test_reading_gives_no_warning_and_headers_tell_the_size(name: str, tmp_path: Path) -> None:
    image, options, _ = KINDS[name]
    image.save(tmp_path / name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_image(tmp_path / name)
        assert shown_size(tmp_path / name) == (read.height, read.width)
    assert is_turned(tmp_path / name) == (name in ("turned.png", "turned.jpg", "mirrored.png"))


def test_hidden_colours_do_not_show(tmp_path: Path) -> None:
    """White lies under what is transparent, whatever colour the file has there."""
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("LA", (4, 4), (0, 128)).save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png").getpixel((0, 0)) == pytest.approx((127, 127, 127), abs=1)
    clear_palette().save(tmp_path / "c.png", transparency=0)
    colours = {colour for _, colour in read_image(tmp_path / "c.png").getcolors()}
    assert colours == {(255, 255, 255), (200, 0, 0), (0, 200, 0), (0, 0, 200)}


def test_the_annotated_size_decides_whether_exif_is_followed(tmp_path: Path) -> None:
    """Orientation 6 (turn by 90 degrees): the annotation file's size tells which reading was annotated."""
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:10] = 255  # white at the top of the stored image, hence at the right of the turned one
    file = tmp_path / "a.png"
    Image.fromarray(pixels).save(file, exif=turned(6))
    upright, stored = (np.asarray(read_image(file, size)) for size in ((60, 40), (40, 60)))
    assert upright[:, -10:].all()
    assert not upright[:, :30].any()
    assert stored[:10].all()
    assert (upright == np.asarray(read_image(file))).all()
    for size in ((60, 40), (40, 60)):
        check_size(file, size)
    for refuse in (read_image, check_size):
        with pytest.raises(UnusableImageError, match=r"a\.png cannot be used: it is 60 x 40 pixels, .* says 60 x 41\."):
            refuse(file, (41, 60))
    Image.fromarray(pixels[:, :40]).save(file, exif=turned(6))  # as high as wide: turned
    assert (np.asarray(read_image(file, (40, 40))) == np.rot90(pixels[:, :40], -1)).all()


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_are_turned_as_other_files(orientation: int, compression: str | None, deep: bool, tmp_path: Path) -> None:
    """Pillow turns them itself, and mixes up the pixels of an uncompressed one that it maps into memory."""
    image = Image.fromarray(DEEP if deep else GREY)
    image.save(tmp_path / "a.png", exif=turned(orientation))
    image.save(tmp_path / "a.tif", exif=turned(orientation), compression=compression)
    expected = np.asarray(read_image(tmp_path / "a.png"))
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.tif")), expected)
    assert shown_size(tmp_path / "a.tif") == expected.shape[:2]
    check_size(tmp_path / "a.tif", (expected.shape[0], expected.shape[1]))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file or directory"), (b"", "it is not an image"), (b"text", "it is not an image")],
)
def test_what_cannot_be_used_is_one_sentence(tmp_path: Path, content: bytes | None, reason: str) -> None:
    file = tmp_path / "a.jpg"
    if content is not None:
        file.write_bytes(content)
    for use in (read_image, shown_size, lambda path: check_size(path, (1, 1))):
        with pytest.raises(UnusableImageError) as caught:
            use(file)
        assert str(caught.value).startswith(f"The image {file} cannot be used: {reason}")
        back = pickle.loads(pickle.dumps(caught.value))  # as from a worker process
        assert (type(back), str(back), back.hint) == (UnusableImageError, str(caught.value), caught.value.hint)
        assert (back.path, back.reason) == (str(file), caught.value.reason)


def test_a_truncated_image_is_named_with_its_reason(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    Image.fromarray(noise(200, 200, 3)).save(file)
    file.write_bytes(file.read_bytes()[:-900])
    with pytest.raises(UnusableImageError, match=r"a\.jpg cannot be used: image file is truncated"):
        read_image(file)


def test_too_little_memory_is_not_the_images_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Image.Image) -> None:
        raise MemoryError

    Image.fromarray(RGB).save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fails)
    with pytest.raises(MemoryError):
        read_image(tmp_path / "a.png")


# replacement


def unusable(index: int) -> int:
    if index % 2:
        raise UnusableImageError(f"{index}.jpg", "it is odd")
    return 10 * index


def test_a_replacement_is_chosen_by_the_key_among_the_others() -> None:
    assert first_usable(unusable, 4, 7, range(100)) == (4, 40, {})
    chosen = [first_usable(unusable, 3, key, range(100)) for key in range(50)]
    assert chosen == [first_usable(unusable, 3, key, range(100)) for key in range(50)]
    for index, value, replaced in chosen:
        assert value == 10 * index
        assert replaced == {"unreadable": "3.jpg (it is odd)"}  # the file asked for, whatever else was tried
    assert len({index for index, *_ in chosen}) > 20
    assert {first_usable(unusable, 3, key, np.array([8, 12]))[0] for key in range(20)} == {8, 12}


def test_ten_in_a_row_stop_training() -> None:
    tried = []

    def never(index: int) -> int:
        tried.append(index)
        return unusable(1)

    with pytest.raises(UserError, match=r"10 training images in a row cannot be used, the first: 1\.jpg \(it is odd\)"):
        first_usable(never, 0, 5, range(100))
    assert len(tried) == 10


# sizes and values


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 2500), st.integers(1, 2500))
def test_rescaling_fills_the_frame(height: int, width: int, one: int, other: int) -> None:
    """Inside the frame, touching it on one side (half a pixel of rounding), and of the same aspect ratio."""
    h, w = rescale((height, width), (one, other))
    assert max(h, w) <= max(one, other)
    assert min(h, w) <= min(one, other)
    assert max(h, w) == max(one, other) or min(h, w) == min(one, other)
    factor = min(max(one, other) / max(height, width), min(one, other) / min(height, width))
    for new, old in ((h, height), (w, width)):
        assert abs(new - old * factor) <= 0.5 + 1e-6 or new == 1


@pytest.mark.parametrize(
    ("size", "frame", "expected"),
    [
        ((512, 683), (2048, 512), (512, 683)),
        ((768, 1024), (2048, 512), (512, 683)),  # 682.67 rounds up
        ((200, 1600), (2048, 512), (256, 2048)),  # a panorama is bound by the long side
        ((1024, 768), (1024, 256), (341, 256)),
        ((480, 640), (1333, 800), (800, 1067)),  # mmcv.rescale_size
        ((640, 480), (1333, 800), (1067, 800)),
        ((426, 640), (1333, 800), (800, 1202)),
        ((300, 1000), (1333, 800), (400, 1333)),
    ],
)
def test_rescaled_sizes_worked_by_hand(size: tuple[int, int], frame: tuple[int, int], expected: Any) -> None:
    assert rescale(size, frame) == expected


def test_pixels_become_normalised_tensors() -> None:
    """(value - mean) / std with mmsegmentation's and mmdetection's constants of 0..255."""
    image = to_tensor(Image.new("RGB", (5, 3), (124, 116, 104)))
    assert (image.shape, image.dtype) == ((3, 3, 5), torch.uint8)
    expected = (np.array([124, 116, 104]) - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    found = normalise(image, IMAGENET_MEAN, IMAGENET_STD)
    assert found[:, 2, 4].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert resize(image, (6, 2)).shape == (3, 6, 2)


def test_headers_are_looked_at_once_for_a_state_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCNET_CACHE", str(tmp_path / "cache"))
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    check_headers([tmp_path / "good.png"], 1000, "v2-a")
    check_headers([tmp_path / "bad.png"], 1000, "v2-a")  # not looked at
    for max_pixels, digest in ((1000, "v2-b"), (999, "v2-a"), (1000, "v2-b")):
        with pytest.raises(UnusableImageError, match=r"bad\.png"):
            check_headers([tmp_path / "bad.png"], max_pixels, digest)
