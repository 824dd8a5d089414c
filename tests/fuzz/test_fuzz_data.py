"""Protects whoever trains on data of others: a data folder is read as it means, or refused by one sentence.

Each example changes a valid data set. Training and `hcnet check` have one verdict on it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import struct
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle
from support import examples, watched

sys.path.insert(0, str(Path(__file__).parent.parent))
from small_data import coco, scenes

from hcnet_cli import build
from hcnet_cli import recipe as rcp
from hcnet_cli.check import inspect_images
from hcnet_cli.console import UserError
from hcnet_cli.data.images import UnusableImageError, check_size, deep_peak, read_image, shown_size
from hcnet_cli.data.loader import SampleRequest
from hcnet_cli.tasks.detection import coco as detection
from hcnet_cli.tasks.detection.metric import CocoAP
from hcnet_cli.tasks.segmentation import scene_parsing as segmentation

SPLITS = {"train": 4, "val": 2}


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept of one example for the next, and nothing is printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HCNET_CACHE", str(tmp_path_factory.mktemp("cache") / "c"))
        patch.setattr("hcnet_cli.console.err.quiet", True)
        yield


def resolved(task: str, root: Path) -> rcp.Recipe:
    file = rcp.recipe_file({"finetune-det": "digit-scenes", "finetune-seg": "digit-stuff"}[task], task)
    return rcp.resolve(file, [("data.path", str(root), "test")]).recipe


# --- COCO JSON --------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.sampled_from(
        [0, 1, -1, 5, 0.5, -0.0, 39.999, 41, 1e3, 1e8, 1e30, 1e308, -1e30, float("nan"), float("inf"), -float("inf")]
    ),
    st.sampled_from([2**31, 2**32 - 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**20, 10**400, 65535, 65536, 10**9]),
    st.integers(-100, 2000),
    st.floats(-100, 100),
)
COUNTS = st.one_of(st.text("0123456789:;<=>?@ABCXYZ`ahmno~", max_size=12), st.text(max_size=6), st.just("o" * 3000))
RLES = st.fixed_dictionaries(
    {"size": st.sampled_from([[40, 40], [40, 41], [1, 1600], [10**9, 10**9], None, "x", [40], [40.0, 40]])},
    optional={"counts": st.one_of(COUNTS, st.lists(NUMBERS, max_size=5), st.just([0, 1600]), st.just([1600]), NUMBERS)},
)
POLYGONS = st.lists(st.lists(NUMBERS, min_size=3, max_size=5).map(lambda ring: ring * 2), min_size=1, max_size=3)
VALUES = st.one_of(
    NUMBERS,
    RLES,
    st.none(),
    st.booleans(),
    st.text(max_size=5),
    st.sampled_from(
        ["0", "../../etc/passwd", "/etc/hostname", "a\0b", "\ud800", "x" * 5000, "0.bmp", ".", "", "0.bmp/"]
    ),
    st.lists(NUMBERS, max_size=9),
    st.lists(st.lists(NUMBERS, max_size=9), max_size=3),
    st.just([[1e6 * (-1) ** n for n in range(4000)]]),
    st.just({}),
)


SQUARE = np.zeros((40, 40), np.uint8, order="F")
SQUARE[4:13, 4:13] = 1
COMPRESSED = rle.encode(SQUARE)["counts"].decode()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a JSON document."""
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def valid(split: str) -> dict[str, Any]:
    images = [{"id": i, "file_name": f"{i}.bmp", "width": 40, "height": 40} for i in range(SPLITS[split])]
    masks: list[Any] = [
        [[4, 4, 13, 4, 13, 13]],
        {"size": [40, 40], "counts": [100, 20, 1480]},
        {"size": [40, 40], "counts": COMPRESSED},
        [[4.5, 4, 13, 4.25, 13, 13], [20, 20, 30, 20, 30, 30, 20, 30]],
    ]
    objects = [
        {
            "id": i + 1,
            "image_id": i,
            "category_id": 1 + i % 2,
            "bbox": [4, 4, 9, 9],
            "area": 81,
            "iscrowd": 0,
            "segmentation": masks[i],
        }
        for i in range(SPLITS[split])
    ]
    return {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coco(tmp_path_factory.mktemp("coco") / "data")


def similar(key: Any, value: Any) -> st.SearchStrategy[Any]:
    if key == "segmentation":
        return st.one_of(POLYGONS, RLES, RLES.map(lambda one: one | {"size": [40, 40]}))
    if key == "bbox":
        return st.lists(NUMBERS, min_size=4, max_size=4)
    return NUMBERS if isinstance(value, int | float) else st.text(max_size=9) if isinstance(value, str) else VALUES


def write(root: Path, split: str, content: Any) -> None:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (root / f"annotations/instances_{split}2017.json").write_bytes(text)


def use_detection(root: Path) -> None:
    """Opens the folder, reads every sample and scores the ground truth against itself; then asks `hcnet check`."""
    recipe = resolved("finetune-det", root)
    data, refusal = None, ""
    try:
        data = detection.open_data(recipe.data, recipe.head, root, 0)
        for dataset in (data.train, data.val):
            for index in range(len(dataset)):
                dataset[SampleRequest(index, index, 0)]
        score(data)
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert len(refusal) < 2000
    audit = detection.audit(recipe.data, recipe.head, root)
    inspect_images(audit)
    if refusal:
        said = [finding for finding in audit.findings if finding.wrong or "--no-masks" in finding.what]
        assert audit.problems or said, f"training says {refusal}, check says nothing is wrong"
    else:
        assert not audit.problems


def score(data: detection.CocoSplits) -> None:
    """A box and a mask in each image, as after training."""
    metric = CocoAP(data.annotations, load_image=data.val.load_image, num_pictures=1)
    prediction = {
        "boxes": torch.tensor([[4.0, 4, 13, 13]]),
        "scores": torch.tensor([0.9]),
        "labels": torch.tensor([1]),
        "masks": [rle.encode(SQUARE)],
    }
    for index in range(len(data.val)):
        item = data.val[SampleRequest(index, index, 0)]
        metric.update([prediction], {"target": [item["target"]]})
    assert all(np.isfinite(value) for value in metric.compute().values())
    for i in data.annotations.image_ids.tolist()[:1]:
        metric.load_image(i)  # type: ignore[misc]


@examples()
@given(st.data())
def test_a_changed_annotation_file_is_used_or_refused(coco_folder: Path, data: st.DataObject) -> None:
    contents = {split: valid(split) for split in SPLITS}
    split = data.draw(st.sampled_from(sorted(SPLITS)))
    content = contents[split]
    for _ in range(data.draw(st.integers(1, 3))):
        known = list(places(content))
        if not known:
            break
        change = data.draw(st.sampled_from(["similar"] * 6 + ["set", "set", "remove", "twice", "new key"]))
        if change == "similar":  # a value of the type that is there
            known = [path for path in known if len(path) == 3] or known
        *path, last = data.draw(st.sampled_from(known))
        place = content
        for key in path:
            place = place[key]
        if change == "similar":
            place[last] = copy.deepcopy(data.draw(similar(last, place[last])))
        elif change == "set":
            place[last] = copy.deepcopy(data.draw(VALUES))  # sampled values are shared
        elif change == "remove":
            del place[last]
        elif change == "twice" and isinstance(place, list):
            place.append(copy.deepcopy(place[last]))
        elif isinstance(place, dict):
            place[data.draw(st.text(max_size=3))] = copy.deepcopy(data.draw(VALUES))
    for name, one in contents.items():
        write(coco_folder, name, one)
    with watched():
        use_detection(coco_folder)


@examples()
@given(st.data())
def test_a_damaged_annotation_file_is_refused(coco_folder: Path, data: st.DataObject) -> None:
    content = bytearray(json.dumps(valid("train")).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content)))
        piece = st.one_of(
            st.binary(max_size=4), st.sampled_from([b"[" * 100_000, b'{"a":' * 9000, b"9" * 5000, b"\xff\xfe", b"\0"])
        )
        content[place : place + data.draw(st.integers(0, 30))] = data.draw(piece)
    write(coco_folder, "train", bytes(content))
    write(coco_folder, "val", valid("val"))
    with watched():
        use_detection(coco_folder)


# --- PNG files --------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


HEADERS = st.tuples(
    st.sampled_from([0, 1, 39, 40, 41, 65535, 65536, 2**31 - 1, 10**5]),
    st.sampled_from([1, 40, 40, 40, 10**5, 2**31]),
    st.sampled_from([1, 2, 4, 8, 16, 3]),
    st.sampled_from([0, 2, 3, 4, 6, 5]),
    st.just(0),
    st.just(0),
    st.sampled_from([0, 0, 1]),
)


@st.composite
def pngs(draw: st.DrawFn) -> bytes:
    """PNG files whose header, palette, data and further chunks need not fit together."""
    width, height, bits, colour, *rest = draw(HEADERS)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
    line = 1 + min(width, 100) * bits * channels // 8
    if draw(st.booleans()):
        rows = draw(st.sampled_from([b"\0", b"\1\2", b"\0\3\1"])) * (line * min(height, 100))
    else:
        rows = draw(st.binary(max_size=200)) * draw(st.sampled_from([1, 1, 40]))
    body = zlib.compress(rows)
    more = draw(
        st.lists(
            st.tuples(
                st.sampled_from(
                    [b"PLTE", b"tRNS", b"eXIf", b"tEXt", b"zTXt", b"iCCP", b"acTL", b"fcTL", b"gAMA", b"IEND"]
                ),
                st.one_of(st.binary(max_size=40), st.just(bytes(768)), st.just(b"a\0\0" + zlib.compress(bytes(10**6)))),
            ),
            max_size=3,
        )
    )
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, *rest))
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*one) for one in more) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def some_images() -> list[bytes]:
    pixels = np.random.RandomState(0).randint(0, 256, (40, 40, 3)).astype(np.uint8)
    made = []
    for form, image, options in (
        ("PNG", Image.fromarray(pixels), {}),
        ("PNG", Image.fromarray(pixels[..., 0]), {}),
        ("PNG", Image.fromarray(pixels[..., 0].astype(np.uint16) * 16), {}),
        ("PNG", Image.fromarray(pixels).quantize(9), {"transparency": 0}),
        ("JPEG", Image.fromarray(pixels), {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"}),
        ("JPEG", Image.fromarray(pixels), {"progressive": True}),
        ("WEBP", Image.fromarray(pixels), {}),
        ("BMP", Image.fromarray(pixels), {}),
        ("GIF", Image.fromarray(pixels), {}),
        ("PPM", Image.fromarray(pixels), {}),
        ("TIFF", Image.fromarray(pixels), {}),
        ("TIFF", Image.fromarray(pixels), {"compression": "tiff_lzw"}),
        ("TIFF", Image.fromarray(pixels[..., 0].astype(np.uint16) * 16), {"compression": "tiff_deflate"}),
        ("AVIF", Image.fromarray(pixels), {}),
        ("EPS", Image.fromarray(pixels), {}),
        ("PDF", Image.fromarray(pixels), {}),
        ("ICNS", Image.fromarray(pixels).resize((32, 32)), {}),
        ("JPEG2000", Image.fromarray(pixels), {}),
    ):
        file = io.BytesIO()
        image.save(file, form, **options)
        made.append(file.getvalue())
    return made


@st.composite
def damaged(draw: st.DrawFn, files: list[bytes]) -> bytes:
    content = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.one_of(st.integers(0, min(64, len(content))), st.integers(0, len(content))))
        content[place : place + draw(st.integers(0, 4))] = draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"]))
        )
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 5)) == 0 else content)


IMAGES = some_images()


@examples()
@given(st.one_of(pngs(), damaged(IMAGES), st.binary(max_size=60)))
def test_an_image_is_read_or_cannot_be_used(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "image.png"
    file.write_bytes(content)
    with watched():
        with contextlib.suppress(UnusableImageError):
            image = read_image(file)
            assert image.mode == "RGB"
            assert shown_size(file) == (image.height, image.width)
            assert content not in IMAGES[-4:], "a format that nothing needs"
        for other in (shown_size, partial(check_size, size=(40, 40)), lambda path: deep_peak(path, content[:64])):
            with contextlib.suppress(UnusableImageError):
                other(file)


LABELS = IMAGES[1:4]


@examples()
@given(st.one_of(pngs(), damaged(LABELS), st.binary(max_size=60)))
def test_a_label_is_read_or_refused(scene_folder: Path, content: bytes) -> None:
    (scene_folder / "annotations/training/0.png").write_bytes(content)
    recipe = resolved("finetune-seg", scene_folder)
    with watched():
        refusal = ""
        try:
            data = segmentation.open_data(recipe.data, recipe.head, scene_folder, 0)
            item = data.train[SampleRequest(0, 1, 0)]
            assert set(item["label"].unique().tolist()) <= {*range(len(data.class_names)), recipe.data.ignore_index}
        except UserError as error:
            refusal = str(error)
        assert "\n" not in refusal
        audit = segmentation.audit(recipe.data, recipe.head, scene_folder)
        inspect_images(audit)
        assert bool(audit.problems) == bool(refusal), (refusal, audit.problems)


@pytest.fixture(scope="module")
def scene_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes") / "data")


NAMES = st.one_of(
    st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.text(max_size=30).map(lambda text: text.encode("utf-16")),
    st.text(max_size=30).map(lambda text: b"\xef\xbb\xbf" + text.encode("utf-8", "replace")),
    st.sampled_from(["Straße\nFluß\nHaus\n"]).flatmap(
        lambda text: st.sampled_from([text.encode("cp1252"), text.encode()])
    ),
    st.binary(max_size=30),
)


@examples()
@given(NAMES, st.sampled_from(["classes.txt", "objectInfo150.txt"]))
def test_a_list_of_classes_is_read_or_refused(scene_folder: Path, content: bytes, name: str) -> None:
    from hcnet_cli.tasks.segmentation.folder import _class_names

    root = scene_folder.parent / "names"
    root.mkdir(exist_ok=True)
    for other in root.iterdir():
        other.unlink()
    (root / name).write_bytes(content)
    with watched(), contextlib.suppress(UserError):
        assert all(one.encode() for one in _class_names(root) if one)


def test_every_example_set_is_valid(coco_folder: Path) -> None:
    for split in SPLITS:
        write(coco_folder, split, valid(split))
    recipe = resolved("finetune-det", coco_folder)
    data = build.open_data(recipe)
    assert data.info.num_train == 4
    score(data)  # type: ignore[arg-type]
