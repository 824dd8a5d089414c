"""Protects the export of a detector: graphs and postprocess.py, of numpy alone, detect what the run detected."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_data
import timm
import torch
from conftest import SMALL_MODEL, Hcnet, only_run, run_here
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import batched_nms

import hcnet_cli.models.hcnet  # noqa: F401 (registers the sizes)
from hcnet_cli import export
from hcnet_cli.console import UserError
from hcnet_cli.data.images import normalise, rescale, to_tensor
from hcnet_cli.data.images import resize as torch_resize
from hcnet_cli.tasks.detection import export as parts
from hcnet_cli.tasks.detection import mask_rcnn as det
from hcnet_cli.tasks.detection import postprocess as ours
from hcnet_cli.tasks.detection.task import DetectionTask, paste_masks

DOC = (Path(__file__).parent.parent / "docs" / "export.md").read_text()
(PROGRAM,) = [one for one in re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL) if "detect.py" in one]
SMALL_HEAD = ("fpn_channels=16", "box_head_channels=32", "mask_head_channels=16", "num_mask_convs=1")
SEEDS = st.integers(0, 2**32 - 1)


def squares(root: Path) -> Path:
    """Red and green squares on noise: 32 training and 6 validation images of 76 x 60, two objects each."""
    random = np.random.RandomState(0)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", 32), ("val", 6)):
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        (root / f"{split}2017").mkdir()
        for number in range(count):
            pixels = random.randint(0, 60, (60, 76, 3)).astype(np.uint8)
            images.append({"id": number + 1, "file_name": f"{number}.png", "width": 76, "height": 60})
            for _ in range(2):
                side = int(random.randint(14, 26))
                x, y, colour = (int(random.randint(most)) for most in (76 - side, 60 - side, 2))
                pixels[y : y + side, x : x + side, colour] = 230
                corners = [x, y, x + side, y, x + side, y + side, x, y + side]
                one = {"id": len(objects) + 1, "image_id": number + 1, "category_id": 3 + 4 * colour, "iscrowd": 0}
                objects.append({**one, "bbox": [x, y, side, side], "area": side * side, "segmentation": [corners]})
            Image.fromarray(pixels).save(root / f"{split}2017" / f"{number}.png")
        content = {
            "images": images,
            "annotations": objects,
            "categories": [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}],
        }
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return squares(tmp_path_factory.mktemp("squares") / "data")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector that finds the squares: one that hardly does has scores that are equal but for rounding."""
    out = tmp_path_factory.mktemp("detector")
    line = ["finetune-det", "--data", data, "--out", out, "--recipe", "digit-scenes", "--init", "none", *SMALL_MODEL]
    line += ["--batch-size", "4", "--workers", "0"]
    chosen = (
        "data.img_scale=[96,96]",
        "schedule.length=10",
        "schedule.warmup=5",
        "optim.lr=4e-3",
        "train.eval_every=10",
    )
    for one in (*chosen, *(f"head.{field}" for field in SMALL_HEAD)):
        line += ["--set", one]
    run_here(*line)
    folder = only_run(out)
    assert 20 < metrics(folder)["box_AP"] < 90, "a detector that finds nothing, or all, shows nothing"
    return folder


def metrics(run: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((run / "run.json").read_text())["metrics"]
    return found


# --- numpy and the model's own code -----------------------------------------------------------------------------------


def some_boxes(random: np.random.RandomState, number: int) -> ours.Array:
    corners = random.uniform(0, 200, (number, 2))
    return np.concatenate([corners, corners + random.uniform(0, 120, (number, 2))], axis=1).astype(np.float32)


@given(SEEDS, st.sampled_from([0, 1, 30, 1000, 1300]), st.sampled_from([0.3, 0.5, 0.7]))
@settings(max_examples=25, deadline=None)
def test_nms_is_torchvisions(seed: int, number: int, threshold: float) -> None:
    random = np.random.RandomState(seed)
    boxes, scores = some_boxes(random, number), random.permutation(number).astype(np.float32)
    groups = random.randint(0, 5, number)
    expected = batched_nms(*map(torch.from_numpy, (boxes, scores, groups)), threshold)
    assert ours.nms(boxes, scores, groups, threshold).tolist() == expected.tolist()


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_decoding_and_clipping_are_torchvisions(seed: int) -> None:
    """And, where a box grows or shrinks much, the model's: torchvision limits growth alone."""
    random = np.random.RandomState(seed)
    boxes = some_boxes(random, 20) + np.float32([0, 0, 1, 1])
    deltas = random.normal(0, 1, (20, 4)).astype(np.float32)
    found = ours.decode(deltas, boxes)
    expected = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(torch.from_numpy(deltas), torch.from_numpy(boxes))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-3)
    clipped = det.clip_boxes_to_image(torch.from_numpy(found), (90, 70)).numpy()
    np.testing.assert_array_equal(ours.clip(found, (90, 70)), clipped)
    deltas[:, 2:] *= 5
    expected = det.decode(torch.from_numpy(deltas), torch.from_numpy(boxes), det.RPN_STDS)
    np.testing.assert_allclose(ours.decode(deltas, boxes), expected.numpy(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("size", [(32, 32), (96, 160), (800, 1344)])
def test_anchors_are_the_models(size: tuple[int, int]) -> None:
    sizes = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in det.STRIDES]
    for found, expected in zip(ours.anchors(size, 8.0), det.anchors_of(sizes, 8.0), strict=True):
        np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize(("size", "frame"), [((40, 61), (96, 64)), ((333, 200), (128, 100)), ((64, 64), (64, 64))])
def test_preparing_is_that_of_the_evaluation(size: tuple[int, int], frame: tuple[int, int]) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (*size, 3)).astype(np.uint8)
    about = {"img_size": list(frame), "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    image = to_tensor(Image.fromarray(pixels))
    expected = normalise(torch_resize(image, rescale(size, frame)), about["mean"], about["std"]).numpy()
    found = ours.prepare(pixels, about)
    assert found.shape == expected.shape
    levels = np.abs(found - expected) * 255 * np.array(about["std"])[:, None, None]  # of grey; 0 on x86
    assert levels.max() < 1.01


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_pasting_is_that_of_the_evaluation(seed: int) -> None:
    random = np.random.RandomState(seed)
    masks = random.uniform(0, 1, (6, 28, 28)).astype(np.float32)
    boxes = some_boxes(random, 6)
    boxes[0] = [20, 20, 20, 50]  # without area
    expected = paste_masks(torch.from_numpy(masks), torch.from_numpy(boxes), 150, 170)
    for mask, box, code in zip(masks, boxes, expected, strict=True):
        assert (ours.paste(mask, box, (150, 170)) != rle.decode(code).astype(bool)).sum() <= 1  # 0.5 but for rounding


@pytest.mark.parametrize("with_masks", [True, False])
def test_the_parts_detect_what_the_model_detects(with_masks: bool) -> None:
    """Without a file between: the graphs as modules, on images of several sizes, and without any detection."""
    torch.manual_seed(0)
    backbone = timm.create_model("hcnet_pico", dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), drop_path_rate=0.0)
    head = {"fpn_channels": 16, "box_head_channels": 32, "mask_head_channels": 16, "num_mask_convs": 1}
    model = det.MaskRCNN(backbone, num_classes=3, with_masks=with_masks, score_thresh=0.2, rpn_post_test=200, **head)
    task = DetectionTask(model).eval()
    torch.nn.init.normal_(model.rpn_head.cls_logits.weight, std=1.0)
    torch.nn.init.normal_(model.box_score.weight, std=0.1)
    files = {name: graph.module for name, graph in parts.graphs(task).items()}
    assert list(files) == ["maps", "boxes", "masks"][: 2 + with_masks]
    exported = parts.ExportedTask(task, files, parts.settings(task))
    generator = torch.Generator().manual_seed(0)
    sizes = [(64, 96), (50, 130), (200, 90)]
    batch = {
        "image": [torch.randn(3, *size, generator=generator) for size in sizes],
        "target": [{"orig_size": torch.tensor([2 * size[0], 77])} for size in sizes],
    }
    with torch.inference_mode():
        found, expected = exported.predict(batch), task.predict(batch)
        for ours_, theirs in zip(found, expected, strict=True):
            assert ours_.keys() == theirs.keys()
            assert len(theirs["scores"]) > 10
            same = parts.pairs(ours_, theirs)
            assert same.any(axis=0).all()
            assert same.any(axis=1).all()
        everything = sum(len(one["scores"]) for one in (*found, *expected))
        assert exported.compare() == f"{everything} of {everything} detections in 3 images are the model's. "
        model.settings = model.settings.model_copy(update={"score_thresh": 0.999})
        (none,) = parts.ExportedTask(task, files, parts.settings(task)).predict({k: v[:1] for k, v in batch.items()})
        assert none["boxes"].shape == (0, 4)
        assert none.get("masks", []) == []


def test_other_detections_are_not_passed_over() -> None:
    """A change of 0.05 pixels goes, one of 0.2 pixels or of the score by 0.002 does not."""
    code = rle.encode(np.ones((40, 40), np.uint8, order="F"))
    one = {
        "boxes": torch.tensor([[1.0, 1, 30, 30], [5, 5, 20, 20]]),
        "scores": torch.tensor([0.9, 0.8]),
        "labels": torch.tensor([1, 2]),
        "masks": [code, code],
    }
    half = rle.encode(np.asfortranarray(np.arange(1600).reshape(40, 40) < 800, np.uint8))
    for change, same in (
        ({}, True),
        ({"boxes": one["boxes"] + 0.05}, True),
        ({"boxes": one["boxes"] + 0.2}, False),
        ({"scores": one["scores"] - 0.002}, False),
        ({"labels": one["labels"] + 1}, False),
        ({"masks": [half, half]}, False),
    ):
        assert parts.pairs({**one, **change}, one).tolist() == [[same, False], [False, same]]
    task = parts.ExportedTask.__new__(parts.ExportedTask)
    task.found, task.other, task.compared = 100, 3, 8
    with pytest.raises(UserError, match="97 of 100 detections in 8 images are the same"):
        task.compare()


# --- files ------------------------------------------------------------------------------------------------------------


def test_onnx_runtime_alone_gets_the_ap_of_the_run(run: Path, data: Path, hcnet: Hcnet, tmp_path: Path) -> None:
    done = hcnet("export", run, "--format", "onnx", "--output", tmp_path / "folder")
    assert done.code == 0, done.err
    assert re.search(r"(\d+) of \1 detections in 6 images are the model's", done.err)
    files = {path.name for path in (tmp_path / "folder").iterdir()}
    assert files == {"maps.onnx", "boxes.onnx", "masks.onnx", "postprocess.py"}
    guard = "import sys\nfor one in ('torch', 'hcnet_cli'): sys.modules[one] = None\n"
    (tmp_path / "detect.py").write_text(guard + PROGRAM)
    given = [tmp_path / "folder", data / "annotations" / "instances_val2017.json", data / "val2017"]
    found = subprocess.run([sys.executable, "-I", tmp_path / "detect.py", *given], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    scores = dict(re.findall(r"^(bbox|segm) AP ([\d.]+)$", found.stdout, flags=re.MULTILINE))
    expected = metrics(run)
    assert scores == {"bbox": f"{expected['box_AP']:.1f}", "segm": f"{expected['mask_AP']:.1f}"}
    small_data.evaluate_and_predict(hcnet, run, "val", tmp_path)


def test_the_graphs_in_pytorch_detect_what_predict_says_of_a_photo(run: Path, hcnet: Hcnet, tmp_path: Path) -> None:
    done = hcnet("export", run, "--format", "pt2", "--output", tmp_path / "folder")
    assert done.code == 0, done.err
    photo = tmp_path / "photo.png"
    pixels = np.random.RandomState(5).randint(0, 60, (100, 70, 3)).astype(np.uint8)
    pixels[30:60, 20:50, 1] = 230
    Image.fromarray(pixels).save(photo)
    assert hcnet("predict", run, photo, "--output", tmp_path / "p", "--workers", "0").code == 0
    expected = json.loads((tmp_path / "p" / "predictions.json").read_text())["annotations"]

    extra = {"hcnet": ""}

    def graph(name: str) -> ours.Graph:
        with (tmp_path / "folder" / f"{name}.pt2").open("rb") as file:
            return parts._of_arrays(torch.export.load(file, extra_files=extra).module())

    graphs = {name: graph(name) for name in ("maps", "boxes", "masks")}
    about = json.loads(extra["hcnet"])
    boxes, scores, labels, masks = ours.detect(ours.prepare(pixels, about), (100, 70), about, **graphs)
    assert len(boxes) > 0
    assert masks is not None
    assert [one["category_id"] for one in expected] == (labels + 1).tolist()
    assert [one["score"] for one in expected] == pytest.approx(scores.tolist(), abs=1e-5)
    for one, (x1, y1, x2, y2), box, mask in zip(expected, boxes.tolist(), boxes, masks, strict=True):
        assert one["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-2)
        assert one["area"] == pytest.approx(ours.paste(mask, box, (100, 70)).sum(), abs=2)


def test_a_folder_that_detects_otherwise_is_not_left(
    run: Path, hcnet: Hcnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs stay in memory here: writing them takes long, and is not what goes wrong."""
    graphs: dict[str, Any] = {}

    def write(change: Any, graph: Any, path: Path, *_: object) -> None:
        graphs[path.name] = change(path.name, graph.module)
        path.write_bytes(b"")

    monkeypatch.setitem(export.LOADERS, "pt2", lambda path: graphs[path.name])
    line = ("export", run, "--format", "pt2", "--output", tmp_path / "folder")

    def otherwise(change: Any, message: str) -> None:
        monkeypatch.setitem(export.FORMATS, "pt2", functools.partial(write, change))
        done = hcnet(*line)
        assert done.code == 2
        assert message in done.err
        assert not list(tmp_path.iterdir())

    def shifted(name: str, module: Any) -> Any:
        return module if name != "masks.pt2" else lambda *given: module(*given) + 1e-3

    otherwise(shifted, "The pt2 file computes otherwise than the model")
    monkeypatch.setattr(ours, "BOX_STDS", (0.5, 0.5, 0.5, 0.5))
    otherwise(lambda name, module: module, "The file scores box_AP")


def test_mistakes(run: Path, hcnet: Hcnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    why = "Mask R-CNN chooses boxes between its parts, which a single graph does not hold: it is written as "
    for arguments, message in (
        (("--output", "model.pt"), f"{why}onnx or pt2, not as torchscript."),
        (("--output", "model", "--format", "timm"), f"{why}onnx or pt2, not as timm."),
        (("--output", "model.onnx"), f"{why}a folder, and model.onnx names a file."),
    ):
        done = hcnet("export", run, *arguments)
        assert done.code == 2
        assert message in done.err
        assert "hcnet export RUN --format onnx --output model" in done.err
    assert not list(tmp_path.iterdir())
