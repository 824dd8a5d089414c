"""Protects whoever trains on data of others: nothing foreign runs or fills the memory, and what is wrong is said at
once, the same by training and by `hcnet check`.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Hcnet
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle
from small_data import MAKERS, classes, coco, noise, opened, save, scenes

from hcnet_cli.console import UserError
from hcnet_cli.data.images import FORMATS, UnusableImageError, check_size, read_image, shown_size
from hcnet_cli.data.loader import SampleRequest
from hcnet_cli.tasks.detection import masks
from hcnet_cli.tasks.detection.annotations import Annotations, read_annotations

IMAGES = {"classes": "train/a/0", "coco": "train2017/0", "scenes": "images/training/0"}  # the first training image


# --- image files ------------------------------------------------------------------------------------------------------


def png(values: NDArray[Any], size: tuple[int, int] | None = None, bits: int = 16) -> bytes:
    """A PNG file spelled out: [H, W] or [H, W, C] of up to 16 bits, or any header over the same data."""
    values = values.reshape(*values.shape[:2], -1)
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else np.uint8).tobytes() for row in values)
    width, height = size or (values.shape[1], values.shape[0])

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(values: NDArray[Any], photometric: int = 1) -> bytes:
    """A TIFF file spelled out: [H, W] or [H, W, 3] of 16 or 32 bits, with sign where the numbers have one.

    Pillow reads and does not write such files. `photometric`: 0 where white is zero, 1 where black is, 2 for colours.
    """
    values = values.reshape(*values.shape[:2], -1)
    height, width, channels = values.shape
    bits, kind = 8 * values.itemsize, 2 if values.dtype.kind == "i" else 1
    entries = [  # tag, type (3: short, 4: long), count, value
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, bits if channels == 1 else 146), (259, 3, 1, 1),
        (262, 3, 1, photometric), (273, 4, 1, 152), (277, 3, 1, channels), (278, 4, 1, height),
        (279, 4, 1, values.nbytes), (284, 3, 1, 1), (339, 3, 1, kind),
    ]  # fmt: skip
    ifd = struct.pack("<H", 11) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    head = (b"II*\0" + struct.pack("<I", 8) + ifd).ljust(146, b"\0")
    return head + struct.pack("<HHH", bits, bits, bits) + values.tobytes()


@pytest.mark.parametrize("form", ["EPS", "PDF", "ICNS", "JPEG2000", "TGA", "PCX"])
def test_what_no_training_needs_is_not_opened(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its name says. Pillow gives EPS files to the first Ghostscript of PATH."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    Image.fromarray(noise(0)).resize((32, 32)).save(tmp_path / "a.png", form)
    for use in (read_image, shown_size):
        with pytest.raises(UnusableImageError, match="it is not an image in one of the formats PNG, JPEG"):
            use(tmp_path / "a.png")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", FORMATS)
def test_formats_that_are_read_are_read_under_any_name(form: str, tmp_path: Path) -> None:
    Image.fromarray(noise(0)).save(tmp_path / "a.jpg", form)
    assert read_image(tmp_path / "a.jpg").size == (40, 40)


@pytest.mark.parametrize("size", [(13_000, 13_000), (65_536, 1), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_header(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(png(noise(0), size, bits=8))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it is decoded"))
    for use in (read_image, shown_size, lambda path: check_size(path, (size[1], size[0]))):
        with pytest.raises(UnusableImageError, match=rf"it is {size[0]} x {size[1]} pixels, and at most 100,000,000"):
            use(tmp_path / "a.png")


@pytest.mark.parametrize("kind", MAKERS)
def test_an_image_over_the_limit_is_one_that_cannot_be_read(kind: str, tmp_path: Path, hcnet: Hcnet) -> None:
    def change(split: str, content: dict[str, Any]) -> None:
        if split == "train":
            content["images"][0].update(width=70, height=70)

    root = coco(tmp_path / kind, change=change) if kind == "coco" else MAKERS[kind](tmp_path / kind)
    file = root / f"{IMAGES[kind]}.bmp"
    save(file, 0, lambda seed: np.zeros((70, 70, 3), np.uint8))
    if kind == "scenes":
        save(root / "annotations/training/0.png", 0, lambda seed: np.ones((70, 70), np.uint8))
    train = opened(root).train
    first = next(i for i in range(len(train)) if train.sample_path(i) == str(file))
    assert "unreadable" not in train[SampleRequest(first, 1, 0)]
    if kind == "scenes":
        with pytest.raises(UserError, match=r"70 x 70 pixels, and at most 4,000 \(data.max_pixels\)"):
            opened(root, max_pixels=4000)  # of labels, all are needed
        return
    train = opened(root, max_pixels=4000).train
    item = train[SampleRequest(first, 1, 0)]
    assert f"{file} (it is 70 x 70 pixels, and at most 4,000 (data.max_pixels)" in item["unreadable"]
    done = hcnet("check", root, "--set", "data.max_pixels=4000")
    assert done.code == 1
    assert "WRONG: train images that cannot be used (1)" in done.out


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_12_bits_are_as_light_as_they_are(kind: str, channels: int, tmp_path: Path) -> None:
    """Pillow alone would keep the upper 8 of 16 bits: black."""
    values = np.random.RandomState(channels).randint(0, 4096, (40, 40, channels)).astype(np.uint16)
    if channels in (2, 4):
        values[..., -1] = 65535  # opaque
    root = MAKERS[kind](tmp_path / kind, suffix="png")
    file = root / f"{IMAGES[kind]}.png"
    file.write_bytes(png(values))
    assert opened(root).info.bits == 12
    colours = values[..., :3] if channels > 2 else values[..., :1].repeat(3, axis=2)
    np.testing.assert_array_equal(np.asarray(read_image(file, bits=12)), colours >> 4)
    np.testing.assert_array_equal(np.asarray(read_image(file, (40, 40), bits=16)), colours >> 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_clear_colour_of_16_bits_lies_on_white(channels: int, tmp_path: Path) -> None:
    """As one of 8 bits does. A pixel that is the colour but for its lower bits is shown."""
    values = np.full((4, 4, channels), 4000, dtype=np.uint16)
    values[0, 0] = 1000
    values[0, 1, 0] = 4001
    content = png(values)
    colour = struct.pack(">" + "H" * channels, *[4000] * channels)
    chunk = struct.pack(">I", len(colour)) + b"tRNS" + colour + struct.pack(">I", zlib.crc32(b"tRNS" + colour))
    (tmp_path / "a.png").write_bytes(content.replace(content[33:], chunk + content[33:]))
    seen = np.asarray(read_image(tmp_path / "a.png", bits=12))
    assert seen[0, 0].tolist() == [1000 >> 4] * 3
    assert seen[0, 1].tolist() == [4001 >> 4] * 3
    assert (seen[1:] == 255).all()


def test_colour_tiffs_of_16_bits_are_refused(tmp_path: Path) -> None:
    values = np.random.RandomState(0).randint(0, 4096, (40, 40, 3)).astype(np.uint16)
    (tmp_path / "a.tif").write_bytes(tiff(values, photometric=2))
    with Image.open(tmp_path / "a.tif") as plain:
        np.testing.assert_array_equal(np.asarray(plain), values >> 8)  # nearly black
    with pytest.raises(UnusableImageError, match=r"a\.tif cannot be used: it is a colour TIFF of more than 8 bits"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_numbers_below_zero_are_refused(dtype: Any, tmp_path: Path, hcnet: Hcnet) -> None:
    """As CT has them. In 8 bits all of them would be black, which nothing would say."""
    values = np.random.RandomState(0).randint(-1024, 3000, (40, 40)).astype(dtype)
    values[0, 0] = -1024
    root = classes(tmp_path / "data")
    file = root / "train/a/ct.tif"
    file.write_bytes(tiff(values))
    with Image.open(file) as plain:
        np.testing.assert_array_equal(np.asarray(plain), values)
    with pytest.raises(UnusableImageError, match=r"ct\.tif cannot be used: its pixels go down to -1024, .* 16-bit PNG"):
        read_image(file)
    done = hcnet("check", root)
    assert done.code == 1
    assert "WRONG: train images that cannot be used (1): train/a/ct.tif (its pixels go down to -1024" in " ".join(
        done.out.split()
    )
    file.write_bytes(tiff(values.clip(0)))
    np.testing.assert_array_equal(np.asarray(read_image(file, bits=12))[..., 0], values.clip(0) >> 4)


def test_a_tiff_of_16_bits_where_white_is_zero_is_no_negative(tmp_path: Path) -> None:
    """Pillow inverts such files of 8 bits alone. The measured bits are those of the inverted numbers."""
    values = np.random.RandomState(0).randint(0, 4096, (40, 40)).astype(np.uint16)
    root = classes(tmp_path / "data")
    file = root / "train/a/x-ray.tif"
    file.write_bytes(tiff(65535 - values, photometric=0))
    assert opened(root).info.bits == 12
    np.testing.assert_array_equal(np.asarray(read_image(file, bits=12))[..., 0], values >> 4)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_hot_pixel_does_not_decide_how_bright_the_data_are(kind: str, tmp_path: Path) -> None:
    def pixels(seed: int) -> NDArray[Any]:
        values = np.random.RandomState(seed).randint(0, 1024, (40, 40)).astype(np.uint16)
        values[3, 4] = 65535
        return values

    root = MAKERS[kind](tmp_path / kind, pixels=pixels, suffix="png")
    assert opened(root).info.bits == 10
    seen = np.asarray(read_image(root / f"{IMAGES[kind]}.png", bits=10))
    assert seen[3, 4].tolist() == [255] * 3
    assert seen.mean() > 100


@pytest.mark.parametrize("kind", MAKERS)
def test_a_pipe_is_never_waited_for(kind: str, tmp_path: Path) -> None:
    root = MAKERS[kind](tmp_path / kind)
    file = root / f"{IMAGES[kind]}.bmp"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UnusableImageError, match="it is not a regular file"):
        read_image(file)
    if kind == "coco":
        with pytest.raises(UserError, match=r"no folder holds the images"):
            opened(root)
    elif kind == "scenes":
        with pytest.raises(UserError, match=r"1 of 4 files have no image"):
            opened(root)
    else:
        assert opened(root).info.left_out == {"train files that are not images": 1}


# --- annotation files -------------------------------------------------------------------------------------------------


def annotations(tmp_path: Path, change: Callable[[dict[str, Any]], object], **arguments: Any) -> Annotations:
    """Of an image of 40 x 40 with an object that has a mask, after a change."""
    content: dict[str, Any] = {
        "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 40}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 1,
                "bbox": [4, 4, 9, 9],
                "area": 81,
                "iscrowd": 0,
                "segmentation": [[4, 4, 13, 4, 13, 13]],
            }
        ],
    }
    change(content)
    (tmp_path / "a.json").write_text(json.dumps(content))
    return read_annotations(tmp_path / "a.json", **arguments)


ZIGZAG = [float(x) for n in range(3000) for x in (4000 * (-1) ** n, 4000 * (-1) ** n)]


@pytest.mark.parametrize("crowd", [0, 1])
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[4, 4, 1e8, 4, 13, 13]], "a polygon with a point far outside its image of height 40, width 40"),
        ([[4, 4, 1e30, 4, 13, 13]], "a polygon with a point far outside"),
        ([[4, 4, float("inf"), 4, 13, 13]], "a polygon with a point far outside"),
        ([[4, 4, float("nan"), 4, 13, 13]], "a polygon with a point far outside"),
        ([[4, 4, 10**400, 4, 13, 13]], "a polygon whose coordinates are not all numbers"),
        ([[4, 4, 13, 4, 13, 13], [4, 4, 13, 4, 13]], "a polygon with an odd number of coordinates"),
        ([4, 4, 13, 4, 13, 13], "neither a list of polygons nor an RLE"),
        ([ZIGZAG], "polygons whose outline is 24,000,000 pixels long"),
        ("text", "neither a list of polygons nor an RLE"),
        ({"size": [40, 40], "counts": ""}, "a mask of 0 pixels in an image of 1600"),
        ({"size": [40, 40], "counts": "zzz~~~"}, '"counts" are not all whole numbers'),
        ({"size": [40, 40], "counts": "o" * 10**6}, '"counts" are not all whole numbers'),
        ({"size": [40, 41], "counts": [1640]}, r"a mask of size \[40, 41\] in an image of height 40, width 40"),
        ({"size": [40, 40], "counts": [1599]}, "a mask of 1599 pixels"),
        ({"size": [40, 40], "counts": [1601, -1]}, '"counts" are not all whole numbers'),
        ({"size": [40, 40], "counts": [2**64, 1600]}, '"counts" are not all whole numbers'),
        ({"size": [40, 40], "counts": [True, 1599]}, '"counts" are not all whole numbers'),
        ({"size": [40, 40]}, '"counts" are neither a list nor text'),
        ({"size": "x" * 10**6}, "a mask of size 'xxx"),
    ],
)
def test_masks_are_checked_before_they_reach_c(mask: Any, words: str, crowd: int, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0].update(segmentation=mask, iscrowd=crowd)

    for scoring in (False, True):
        with pytest.raises(UserError, match=rf"a\.json: annotation id 1 has .*{words}") as caught:
            annotations(tmp_path, change, scoring=scoring)
        assert len(str(caught.value)) < 400
    assert len(annotations(tmp_path, change, masks=False).boxes) == 1 - crowd  # boxes alone do not need them


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
def test_run_lengths_are_those_of_pycocotools(height: int, width: int, seed: int) -> None:
    """Every mask that pycocotools writes is taken; the runs are counted by hand."""
    random = np.random.RandomState(seed)
    mask = (random.rand(height, width) < random.rand()).astype(np.uint8)
    code = rle.encode(np.asfortranarray(mask))["counts"].decode()
    flat = np.concatenate([[0], mask.flatten(order="F")])
    places = np.flatnonzero(np.diff(flat))
    assert masks._runs(code) == np.diff(np.concatenate([[0], places, [mask.size]])).tolist()
    packed = masks.pack({"size": [height, width], "counts": code}, height, width)
    np.testing.assert_array_equal(masks.decode(masks.unpack(packed, height, width), height, width), mask)


@pytest.mark.parametrize(
    ("where", "values", "words"),
    [
        ("images", {"file_name": "/etc/hostname"}, "file_name of image id 7 leads out of the images' folder"),
        ("images", {"file_name": "b/../../a.png"}, "file_name of image id 7 leads out of the images' folder"),
        ("images", {"file_name": "a\0.png"}, "file_name of image id 7 is 'a.*, not a file's name"),
        ("images", {"file_name": "\ud800"}, "file_name of image id 7 is .*, not a file's name"),
        ("images", {"file_name": "a\n.png"}, "file_name of image id 7 is 'a.*, not a file's name"),
        ("images", {"file_name": "a" * 5000}, "file_name of image id 7 is 'aaa.*, not a file's name"),
        ("images", {"file_name": 3}, "file_name of image id 7 is 3, not a file's name"),
        ("images", {"width": 10**9}, "width of image id 7 is 1000000000, not a number of pixels from 1 to 65,535"),
        ("images", {"width": 10**400}, "width of image id 7 is 1000.*, not a number of pixels"),
        ("images", {"id": 10**20}, '1 of its images are not objects with an "id", an integer of at most 64 bits'),
        ("images", {"id": True}, "1 of its images are not objects"),
        ("categories", {"name": ["a"]}, r"name of category id 1 is \['a'\], not a text"),
        ("annotations", {"image_id": [7]}, r"annotation id 1 is of image id \[7\], which the file does not list"),
        ("annotations", {"category_id": True}, "annotation id 1 is of category id True, which"),
        ("annotations", {"bbox": [0, 0, 1e30, 9]}, "bbox of annotation id 1 lies far outside its image"),
        ("annotations", {"bbox": [0, 0, 10**400, 9]}, "bbox of annotation id 1 is not"),
        ("annotations", {"area": float("nan")}, '"area" of annotation id 1 is nan, not a number'),
        ("annotations", {"area": -5}, '"area" of annotation id 1 is -5, not a number from 0 up'),
        ("annotations", {"area": 10**400}, '"area" of annotation id 1 is 1000.*, not a number'),
        ("annotations", {"iscrowd": {}}, '"iscrowd" of annotation id 1 is {}, neither 0 nor 1'),
    ],
)
def test_values_are_what_their_types_say(where: str, values: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        annotations(tmp_path, lambda content: content[where][0].update(values))
    assert len(str(caught.value)) < 400


def test_an_area_of_null_is_one_that_is_missing(tmp_path: Path) -> None:
    truth = annotations(tmp_path, lambda content: content["annotations"][0].update(area=None), scoring=True).truth
    assert truth is not None
    assert truth.areas.tolist() == [81]


@pytest.mark.parametrize("content", [b"[" * 10**6, b'{"images": ' + b"9" * 5000, b"\xff\xfe\0", b"nul"])
def test_what_is_no_json_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
        read_annotations(tmp_path / "a.json")


def test_links_out_of_the_data_folder_are_counted(tmp_path: Path, hcnet: Hcnet, capfd: Any) -> None:
    root = coco(tmp_path / "coco")
    os.rename(root / "val2017", tmp_path / "val2017")  # a split's folder may be anywhere
    (root / "val2017").symlink_to(tmp_path / "val2017")
    opened(root)
    assert "links out" not in capfd.readouterr().err
    for number in (0, 1):
        os.rename(root / f"train2017/{number}.bmp", tmp_path / f"{number}.bmp")
        (root / f"train2017/{number}.bmp").symlink_to(tmp_path / f"{number}.bmp")
    opened(root)
    said = " ".join(capfd.readouterr().err.split())
    assert f"2 images are links out of the folder, the first is {root}/train2017/0.bmp" in said
    hcnet("check", root, "--output", tmp_path / "found.json")
    findings = json.loads((tmp_path / "found.json").read_text())["findings"]
    (linked,) = [one["files"] for one in findings if one["what"] == "images that are links out of the data folder"]
    assert linked == ["train2017/0.bmp", "train2017/1.bmp"]


# --- hcnet check ------------------------------------------------------------------------------------------------------


def all_problems(root: Path, hcnet: Hcnet) -> list[str]:
    """What check lists, after comparing it with what training says."""
    output = root.parent / "found.json"
    done = hcnet("check", root, "--output", output)
    assert done.code == 2
    listed: list[str] = json.loads(output.read_text())["problems"]
    with pytest.raises(UserError) as caught:
        opened(root)
    assert str(caught.value) in listed
    for problem in listed:  # wherever the lines are broken
        assert "".join(f"WRONG: {problem}".split()) in "".join(done.out.split())
    assert "".join(listed[0].split()) in "".join(done.err.split())
    return listed


def test_check_lists_every_contradiction_of_a_coco_folder(tmp_path: Path, hcnet: Hcnet) -> None:
    def change(split: str, content: dict[str, Any]) -> None:
        first, second, *_ = content["annotations"]
        if split == "val":
            first["category_id"] = 9
            content["categories"][1]["name"] = "three"
        else:
            first["bbox"] = "none"
            second["area"] = "large"
            content["images"][2]["height"] = 0
            content["images"][3]["file_name"] = "lost.bmp"

    listed = all_problems(coco(tmp_path / "coco", change=change), hcnet)
    for words in (
        "height of image id 2 is 0",
        "bbox of annotation id 1 is not",
        '"area" of annotation id 2',
        "lost.bmp is missing",
        "annotation id 1 is of category id 9",
        "different categories",
    ):
        assert sum(words in problem for problem in listed) == 1, words
    assert len(listed) == 6


def test_check_lists_every_contradiction_of_a_folder_of_scenes(tmp_path: Path, hcnet: Hcnet) -> None:
    root = scenes(tmp_path / "scenes")
    (root / "annotations/training/0.png").unlink()
    save(root / "annotations/training/1.png", 0, lambda seed: np.ones((9, 9), np.uint8))
    save(root / "annotations/training/2.png", 0, lambda seed: np.full((40, 40), 77, np.uint8))
    save(root / "annotations/validation/0.png", 0, noise)
    (root / "classes.txt").write_bytes("Straße\nFluß\nHaus\n".encode("cp1252"))
    listed = all_problems(root, hcnet)
    for words in ("1 of 4 files have no label", "1.png is 9 x 9 pixels", "is a colour image", "is not UTF-8 text"):
        assert sum(words in problem for problem in listed) == 1, words
    (root / "classes.txt").write_text("road\ntree\ncar\n")
    assert sum("holds the label value 77" in problem for problem in all_problems(root, hcnet)) == 1


def test_check_lists_every_contradiction_of_a_folder_of_images(tmp_path: Path, hcnet: Hcnet) -> None:
    root = classes(tmp_path / "classes")
    for place in ("val/cat", "train/empty", "val/dog"):
        (root / place).mkdir()
    listed = all_problems(root, hcnet)
    assert len(listed) == 2
    assert '2 classes ("cat", "dog") that' in listed[0]
    assert 'a class ("empty") without images' in listed[1]


def test_a_missing_folder_is_answered_with_every_layout(tmp_path: Path, hcnet: Hcnet) -> None:
    (tmp_path / "empty").mkdir()
    for path in ("nowhere", "empty"):
        done = hcnet("check", tmp_path / path, "--output", tmp_path / "found.json")
        assert done.code == 2
        for layout in ("train/<class>/", "annotations/instances_{train,val}2017.json", "annotations/{training,val"):
            assert layout in done.err.replace("\n", ""), path
    assert json.loads((tmp_path / "found.json").read_text())["problems"]


# --- encodings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "names"),
    [("utf-8", True), ("utf-8-sig", True), ("cp1252", False), ("utf-16", False), ("utf-16-le", False)],
)
def test_class_lists_are_utf_8_or_refused(encoding: str, names: bool, tmp_path: Path) -> None:
    root = scenes(tmp_path / "scenes")
    (root / "classes.txt").write_bytes("Straße\nBaum\nAuto\n".encode(encoding))
    if names:
        assert opened(root).class_names == ["Straße", "Baum", "Auto"]
        return
    with pytest.raises(UserError, match=r"classes\.txt is not UTF-8 text \(line 1\)"):
        opened(root)


def test_a_path_that_is_not_utf_8_is_refused_at_once(tmp_path: Path, hcnet: Hcnet, monkeypatch: Any) -> None:
    name = os.fsdecode(os.fsencode(classes(tmp_path / "c")) + b"\xff")
    os.rename(tmp_path / "c", name)
    done = hcnet("pretrain", "--data", name, "--dry-run")
    assert done.code == 2
    assert "An argument is not UTF-8 text" in done.err
    monkeypatch.setenv("HCNET_IMAGENET", name)
    done = hcnet("pretrain", "--dry-run")
    assert done.code == 2
    assert "$HCNET_IMAGENET is not UTF-8 text" in done.err


def test_labels_are_png_files(tmp_path: Path) -> None:
    """JPEG under another name would be read, with numbers that nobody wrote."""
    root = scenes(tmp_path / "scenes")
    content = io.BytesIO()
    Image.fromarray(np.ones((40, 40), np.uint8)).save(content, "JPEG")
    (root / "annotations/training/0.png").write_bytes(content.getvalue())
    with pytest.raises(UserError, match=r"0\.png cannot be used: it is not an image in the format PNG"):
        opened(root)
