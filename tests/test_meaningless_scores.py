"""Protects scores: what cannot mean anything is refused, or said before training and by `hcnet check`."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, Hcnet, only_run
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from small_data import MAKERS, classes, coco, noise, opened, scenes
from torch import nn

from hcnet_cli.console import UserError
from hcnet_cli.data import identity
from hcnet_cli.data.loader import SampleRequest
from hcnet_cli.predict import Photo, measure_bits
from hcnet_cli.tasks.detection.annotations import read_annotations
from hcnet_cli.tasks.segmentation import labels
from hcnet_cli.weights import load_into

TRAIN = ("--epochs", 1, "--batch-size", 2, "--workers", 0, *SMALL_MODEL)


def pretrain(hcnet: Hcnet, root: Path, out: Path, *more: object) -> Any:
    return hcnet("pretrain", "--recipe", "pretrain/digits", "--data", root, "--out", out, *TRAIN, *map(str, more))


# --- weights that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["head lost", "head of another size", "further block"])
def test_weights_that_are_not_whole_have_no_score(change: str, tmp_path: Path, hcnet: Hcnet) -> None:
    root = classes(tmp_path / "c")
    assert pretrain(hcnet, root, tmp_path / "o").code == 0
    folder = only_run(tmp_path / "o")
    state = load_file(folder / "best.safetensors")
    heads = [name for name in state if name.startswith("head")]
    assert heads
    if change == "head lost":
        state = {name: value for name, value in state.items() if name not in heads}
    elif change == "head of another size":
        state |= {name: torch.cat([state[name], state[name]]) for name in heads}
    else:
        block = next(name for name in state if name.startswith("stages.0"))
        state[block.replace("stages.0", "stages.9")] = state[block].clone()
    save_file(state, folder / "best.safetensors")
    for command in (("evaluate", folder), ("explain", folder)):
        if command[0] == "explain" and change != "further block":
            continue  # it draws the backbone alone
        done = hcnet(*command)
        assert done.code == 2, done.out
        assert "best.safetensors" in done.err
    done = pretrain(hcnet, root, tmp_path / "o", "--eval-only")
    assert done.code == 2
    assert done.out == ""


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_of_another_kind_of_number_are_refused(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2)
    state = {name: value.to(dtype) for name, value in model.state_dict().items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"bias holds {str(dtype)[6:]}, the model needs float32|weight holds"):
        load_into(model, state, "w.pth")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for good in (torch.float16, torch.bfloat16, torch.float64):
        load_into(model, {name: value.to(good) for name, value in before.items()}, "w.pth")
    norm = nn.BatchNorm2d(2)  # counts its batches in int64
    load_into(norm, norm.state_dict(), "w.pth")
    with pytest.raises(UserError, match="num_batches_tracked holds float32, the model needs int64"):
        load_into(norm, {name: value.float() for name, value in norm.state_dict().items()}, "w.pth")


# --- degenerate problems ----------------------------------------------------------------------------------------------


def test_one_class_is_said_before_training_and_is_wrong_in_check(tmp_path: Path, hcnet: Hcnet) -> None:
    root = classes(tmp_path / "c")
    for split in ("train", "val"):
        (root / split / "b").rename(tmp_path / split)
    done = pretrain(hcnet, root, tmp_path / "o")
    assert "warning" in done.err.split("step ")[0]
    assert "one class alone" in done.err.split("step ")[0]
    checked = hcnet("check", root)
    assert checked.code == 1
    assert "WRONG: scores that mean nothing" in checked.out
    # two classes, of which validation has one
    (tmp_path / "train").rename(root / "train/b")
    checked = hcnet("check", root)
    assert checked.code == 1
    assert 'validation has images of one class alone ("a")' in " ".join(checked.out.split())


def grid(*values: int) -> Any:
    return lambda seed: np.random.RandomState(seed).choice(np.array(values, np.uint8), (40, 40))


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        ((0, 1), "", "one class alone"),
        ((2, 2), "road\ntree\ncar", 'hold one class alone ("tree")'),
        ((0, 1, 2), "background\nperson\ncar", "--set data.reduce_zero_label=false"),
        ((0, 1, 2), "__Background__\nperson\ncar", "--set data.reduce_zero_label=false"),
        ((0, 0, 1, 2), "", "of the pixels are 0 and ignored. If 0 is a class, give --set data.reduce_zero_label=false"),
    ],
)
def test_labels_that_make_scores_meaningless(
    values: tuple[int, ...], names: str, message: str, tmp_path: Path, hcnet: Hcnet, capfd: pytest.CaptureFixture[str]
) -> None:
    root = scenes(tmp_path / "s", labels=grid(*values))
    (root / "classes.txt").write_text(names)
    opened(root)
    assert message in capfd.readouterr().err
    checked = hcnet("check", root)
    assert checked.code == 1
    assert "WRONG: scores that mean nothing" in checked.out
    if "reduce_zero" in message:  # the answer fits
        opened(root, reduce_zero_label=False)
        assert "reduce_zero_label" not in capfd.readouterr().err


def test_labels_that_are_all_ignored_are_refused_before_training(tmp_path: Path) -> None:
    root = scenes(tmp_path / "s")
    for file in (root / "annotations/validation").iterdir():
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(file)
    with pytest.raises(UserError, match="No pixel of the validation labels has a class"):
        opened(root)


def test_good_data_are_not_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, make in MAKERS.items():
        opened(make(tmp_path / kind))
    for name in ("digits", "digit-scenes", "digit-stuff"):
        opened(Path(name))
    assert "warning" not in capsys.readouterr().err


# --- annotations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["0", "false", False, 0.0, None, " 0 "])
def test_a_flag_means_what_it_says(value: object, tmp_path: Path) -> None:
    def change(split: str, content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            entry["iscrowd"] = entry["ignore"] = value

    root = coco(tmp_path / "coco", change=change)
    assert opened(root).info.left_out == {}
    truth = read_annotations(root / "annotations/instances_val2017.json", masks=False, scoring=True).coco()
    assert [entry["iscrowd"] for entry in truth["annotations"]] == [0, 0]


@pytest.mark.parametrize("value", ["1", "True", True, 1])
def test_crowds_alone_are_nothing_to_train_on(value: object, tmp_path: Path) -> None:
    root = coco(
        tmp_path / "coco",
        change=lambda split, content: [
            entry.update(iscrowd=value) for entry in content["annotations"] if split == "train"
        ],
    )
    with pytest.raises(UserError, match=r"train2017\.json has no object to train on: .*crowd: 4"):
        opened(root)


@pytest.mark.parametrize(
    ("key", "value"),
    [("iscrowd", "maybe"), ("iscrowd", 2), ("ignore", []), ("area", "81"), ("area", True), ("bbox", ["4", 4, 9, 9]),
     ("bbox", [True, 4, 9, 9]), ("id", "1"), ("id", True), ("category_id", "1"), ("image_id", "0")],
)  # fmt: skip
def test_values_that_are_no_numbers_are_one_sentence(key: str, value: object, tmp_path: Path) -> None:
    root = coco(tmp_path / "coco", change=lambda split, content: content["annotations"][0].update({key: value}))
    with pytest.raises(UserError, match="instances_train2017"):
        read_annotations(root / "annotations/instances_train2017.json", masks=False)


@pytest.mark.parametrize("value", ["40", 0, -3, 40.5, True, None])
def test_sizes_of_images_are_numbers_of_pixels(value: object, tmp_path: Path) -> None:
    root = coco(tmp_path / "coco", change=lambda split, content: content["images"][0].update(height=value))
    with pytest.raises(UserError, match="height of image id 0"):
        read_annotations(root / "annotations/instances_train2017.json", masks=False)


# --- bits -------------------------------------------------------------------------------------------------------------


def png(values: NDArray[Any], bits: int, colour: int = 0) -> bytes:
    """A PNG file of few bits per sample, spelled out: Pillow writes none."""
    rows = b""
    for row in values.tolist():
        number = 0
        for value in row:
            number = number << bits | value
        rows += b"\0" + number.to_bytes(len(row) * bits // 8, "big")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(i % 256 for i in range(3 * 2**bits))) if colour == 3 else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + palette
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("colour", [0, 3])
def test_label_files_hold_the_numbers_that_are_read(bits: int, colour: int, tmp_path: Path) -> None:
    values = np.random.RandomState(bits).randint(0, min(2**bits, 80), (16, 16))
    file = tmp_path / "label.png"
    file.write_bytes(png(values, bits, colour))
    read = labels.read_label(str(file), labels.label_table(100, False, 255))
    np.testing.assert_array_equal(read, values)


def deep(peak: int) -> Any:
    def pixels(seed: int) -> NDArray[Any]:
        values = np.random.RandomState(seed).randint(0, peak + 1, (40, 40)).astype(np.uint16)
        values[0, 0] = peak
        return values

    return pixels


@pytest.mark.parametrize("kind", MAKERS)
def test_bits_are_measured_in_images_as_large_as_the_recipe_allows(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    monkeypatch.setattr(identity, "deep_peak", lambda path, head, max_pixels: seen.add(max_pixels) or 0)
    opened(MAKERS[kind](tmp_path / kind, pixels=deep(4095), suffix="png"), max_pixels=2 * 10**8)
    assert seen == {2 * 10**8}


def test_another_limit_is_another_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cache knows under a limit that leaves an image out says nothing of the image under another one."""
    root = MAKERS["classes"](tmp_path / "classes", pixels=deep(4095), suffix="png")
    monkeypatch.setattr(identity, "UNSETTLED_SECONDS", -1)  # the cache keeps what was written just now
    assert opened(root, max_pixels=1599).info.bits is None
    assert opened(root).info.bits == 12
    assert [measure_bits([Photo(root / "train/a/0.png", "a")], most) for most in (1599, 1600)] == [None, 12]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(("peak", "bits"), [(1023, 10), (4095, 12), (65535, 16), (255, 8)])
def test_the_range_of_bits_is_that_of_the_data(kind: str, peak: int, bits: int, tmp_path: Path, hcnet: Hcnet) -> None:
    """In every task, in training and evaluation, and in `hcnet check`."""
    root = MAKERS[kind](tmp_path / kind, pixels=deep(peak), suffix="png")
    if kind == "classes":
        deep_file = root / "train/a/0.png"
        Image.fromarray(noise(1)).save(root / "train/a/8-bit.png")  # other files are what they were
    data = opened(root)
    assert data.info.bits == bits
    assert any(f"{bits}-bit" in line for line in data.info.remarks())
    train: Any = data.train
    if kind == "classes":
        pixels = np.asarray(train.load_image(0))
        np.testing.assert_array_equal(pixels[..., 0], np.asarray(Image.open(deep_file)).astype(int) >> (bits - 8))
    elif kind == "coco":
        np.testing.assert_array_equal(
            np.asarray(train.load_image(0))[..., 0],
            np.asarray(Image.open(root / "train2017/0.png")).astype(int) >> (bits - 8),
        )
    else:
        np.testing.assert_array_equal(
            train.folder.read("training", 0)[0][..., 0],
            np.asarray(Image.open(root / "images/training/0.png")).astype(int) >> (bits - 8),
        )
    items = [data.val[SampleRequest(i, 0, 0)] for i in range(len(data.val))]
    shown = [item["images"][0] if "images" in item else item["image"] for item in items]
    assert all(image.float().std() > 0.1 for image in shown)  # neither black nor white
    assert f"{bits}-bit" in hcnet("check", root).out
    assert opened(root, bits=16).info.bits == 16
    assert opened(root, trust="names").info.bits == bits


def test_images_of_8_bits_have_no_range_to_measure(tmp_path: Path) -> None:
    for kind, make in MAKERS.items():
        assert opened(make(tmp_path / kind, suffix="png")).info.bits is None


def test_floating_point_images_are_refused(tmp_path: Path, hcnet: Hcnet) -> None:
    root = classes(tmp_path / "c")
    Image.fromarray(np.random.RandomState(0).rand(40, 40).astype(np.float32)).save(root / "val/a/f.tif")
    checked = hcnet("check", root)
    assert checked.code == 1
    assert "floating-point" in checked.out


def test_a_picture_file_of_a_run_is_read_with_its_bits(tmp_path: Path) -> None:
    """The reader of the evaluator's pictures is the one of training."""
    from hcnet_cli.data.images import read_image
    from hcnet_cli.tasks.segmentation.task import SegmentationTask

    content = io.BytesIO()
    Image.fromarray(deep(4095)(0)).save(content, "PNG")
    (tmp_path / "a.png").write_bytes(content.getvalue())
    evaluator = SegmentationTask(nn.Identity(), ["a", "b"], read=functools.partial(read_image, bits=12)).evaluator()
    seen = np.asarray(evaluator.read(str(tmp_path / "a.png")))[..., 0]
    np.testing.assert_array_equal(seen, deep(4095)(0) >> 4)


# --- weights that were made for another use ---------------------------------------------------------------------------

TINTED = ("--set", "data.mean=[0.9,0.9,0.9]", "--set", "data.std=[0.05,0.05,0.05]")


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        (TINTED, "was trained with --set 'data.mean=[0.9,0.9,0.9]', here it is [0.485, 0.456, 0.406]"),
        (("--set", "model.disable=[conservation]"), "is of a model with disable ['conservation'], here it is []"),
    ],
)
def test_weights_are_scored_as_what_they_were_trained_as(
    trained: tuple[str, ...], said: str, tmp_path: Path, hcnet: Hcnet
) -> None:
    root = classes(tmp_path / "c")
    assert pretrain(hcnet, root, tmp_path / "o", *trained).code == 0
    folder = only_run(tmp_path / "o")
    exported = tmp_path / "timm"
    assert hcnet("export", folder, "--format", "timm", "--output", exported).code == 0
    for weights in (folder, exported):
        refused = pretrain(hcnet, root, tmp_path / "e", "--eval-only", "--init", weights)
        assert refused.code == 2
        assert f"{said}: the score would mean nothing." in " ".join(refused.err.split())
        assert not (tmp_path / "e").exists()
    assert pretrain(hcnet, root, tmp_path / "e", "--eval-only", "--init", exported, *trained).code == 0
    warned = pretrain(hcnet, root, tmp_path / "w", "--init", folder, "--dry-run")
    assert said in " ".join(warned.err.split())


def test_the_classes_of_exported_weights_are_compared_too(tmp_path: Path, hcnet: Hcnet) -> None:
    root = classes(tmp_path / "c")
    assert pretrain(hcnet, root, tmp_path / "o").code == 0
    exported = tmp_path / "timm"
    assert hcnet("export", only_run(tmp_path / "o"), "--format", "timm", "--output", exported).code == 0
    for split in ("train", "val"):
        first, *_ = sorted((root / split).iterdir())
        first.rename(root / split / "zebra")
    for weights in (exported, exported / "model.safetensors"):
        refused = pretrain(hcnet, root, tmp_path / "e", "--eval-only", "--init", weights)
        assert refused.code == 2
        assert "is of other classes than the data" in refused.err
    for hostile in ('{"label_names": 5, "pretrained_cfg": {"mean": "x"}}', '{"pretrained_cfg": [1]}', "[", "5"):
        (exported / "config.json").write_text(hostile)
        done = pretrain(hcnet, root, tmp_path / "e", "--eval-only", "--init", exported, "--name", f"e{len(hostile)}")
        assert done.code == 0, done.err


def test_labels_are_scored_by_the_numbers_that_were_trained(tmp_path: Path, hcnet: Hcnet) -> None:
    root = scenes(
        tmp_path / "s", labels=lambda seed: np.random.RandomState(seed).randint(0, 3, (40, 40)).astype(np.uint8)
    )
    line = ("finetune-seg", "--recipe", "digit-stuff", "--data", root, *SMALL_MODEL, "--batch-size", "2")
    line += ("--workers", "0", "--init", "none", "--set", "head.channels=8", "--set", "schedule.length=1")
    line += ("--set", "data.img_scale=[40,40]", "--set", "data.crop_size=32")
    shifted = ("--set", "data.reduce_zero_label=false")
    assert hcnet(*line, *shifted, "--out", tmp_path / "o").code == 0
    again = (*line, "--eval-only", "--init", only_run(tmp_path / "o"), "--out", tmp_path / "e")
    refused = hcnet(*again)
    assert refused.code == 2
    assert "was trained with --set data.reduce_zero_label=false, here it is True" in " ".join(refused.err.split())
    assert hcnet(*again, *shifted).code == 0
