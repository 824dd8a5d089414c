"""Protects `hcnet export`: a file is left only if another program gets from it what the run got."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import small_data
import timm
import torch
from conftest import SMALL_MODEL, Hcnet, only_run
from safetensors.torch import load_file

from hcnet_cli import export, pretrained
from hcnet_cli.tasks.segmentation.upernet import AveragePool

DOC = (Path(__file__).parent.parent / "docs" / "export.md").read_text()
PROGRAMS = {code.split()[1]: code for code in re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)}
GUARD = "import sys\nfor one in ('torch', 'hcnet_cli'): sys.modules[one] = None\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


def trained(root: Path, hcnet: Hcnet, task: str, data: Path, *more: str) -> Path:
    out = root / f"{task}-out"
    if not out.exists():
        done = hcnet(task, "--data", data, "--out", out, *SMALL_MODEL, *more, "--workers", 0)
        assert done.code == 0, done.err
    return only_run(out)


def classifier(root: Path, hcnet: Hcnet, images: Path) -> Path:
    more = ("--recipe", "digits", "--set", "data.img_size=64", "--set", "data.crop_pct=0.9", "--epochs", "2")
    return trained(root, hcnet, "pretrain", images, *more, "--batch-size", "8")


def test_onnx_runtime_alone_gets_the_top1_of_the_run(
    root: Path, hcnet: Hcnet, folder_of_images: Path, tmp_path: Path
) -> None:
    run = classifier(root, hcnet, folder_of_images)
    done = hcnet("export", run, "--output", tmp_path / "model.onnx")
    assert done.code == 0, done.err
    assert "for images of any size" in done.err
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    axes = [one.shape for one in (*session.get_inputs(), *session.get_outputs())]
    assert axes == [["batch", 3, "height", "width"], ["batch", 3]]
    (tmp_path / "classify.py").write_text(GUARD + PROGRAMS["classify.py"])
    line = [sys.executable, "-I", tmp_path / "classify.py", tmp_path / "model.onnx", folder_of_images / "val"]
    found = subprocess.run(line, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    record = json.loads((run / "run.json").read_text())
    assert found.stdout.strip() == f"top1 {record['metrics']['top1']:.2f}"
    small_data.evaluate_and_predict(hcnet, run, "val", tmp_path)


def test_a_plain_loop_gets_the_top1_of_the_run(
    root: Path,
    hcnet: Hcnet,
    folder_of_images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """And for each image the logit of the best class that the run's evaluation kept."""
    run = classifier(root, hcnet, folder_of_images)
    code = PROGRAMS["score.py"]
    assert len(code.splitlines()) <= 30
    monkeypatch.setattr(sys, "argv", ["score.py", str(run / "best.safetensors"), str(folder_of_images / "val")])
    names: dict[str, Any] = {}
    exec(code, names)  # the program of the page
    assert capfd.readouterr().out == f"top1 {json.loads((run / 'run.json').read_text())['metrics']['top1']}\n"
    with (run / "final" / "predictions.csv").open() as file:
        kept = {row["image"].removeprefix("val/"): row for row in csv.DictReader(file)}
    assert len(kept) == 10
    for (path, _), (image, _) in zip(names["images"].samples, names["images"], strict=True):
        best, which = names["model"](image[None])[0].detach().max(0)
        row = kept[str(Path(path).relative_to(folder_of_images / "val"))]
        assert names["about"]["classes"][which] == row["class_1"]
        assert float(best) == pytest.approx(float(row["score_1"]), abs=1e-5)


def test_timm_loads_the_folder(root: Path, hcnet: Hcnet, folder_of_images: Path, tmp_path: Path) -> None:
    run = classifier(root, hcnet, folder_of_images)
    assert hcnet("export", run, "--format", "timm", "--output", tmp_path / "m").code == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    data = timm.data.resolve_data_config({}, model=model)
    assert (*data["input_size"], data["crop_pct"], data["interpolation"]) == (3, 64, 64, 0.9, "bicubic")
    state = model.state_dict()
    for name, tensor in load_file(run / "best.safetensors").items():
        assert torch.equal(state[name], tensor)
    card = (tmp_path / "m" / "README.md").read_text()
    assert "top1" in card
    started = ("pretrain", *SMALL_MODEL, "--recipe", "digits", "--data", folder_of_images, "--init", tmp_path / "m")
    planned = hcnet(*started, "--batch-size", "8", "--dry-run")
    assert planned.code == 0, planned.err
    assert pretrained.weights_file(str(tmp_path / "m")) == tmp_path / "m" / "model.safetensors"
    assert str(folder_of_images.parent) not in card


@pytest.mark.parametrize("ending", ["pt2", "pt"])
def test_pytorch_without_hcnet_loads_it(
    ending: str, root: Path, hcnet: Hcnet, folder_of_images: Path, tmp_path: Path
) -> None:
    run = classifier(root, hcnet, folder_of_images)
    file = tmp_path / f"model.{ending}"
    done = hcnet("export", run, "--output", file)
    assert done.code == 0, done.err
    assert "as the run" in done.err
    load = "torch.export.load(sys.argv[1]).module()" if ending == "pt2" else "torch.jit.load(sys.argv[1])"
    code = f"import sys, torch; sys.modules['hcnet_cli'] = None; print(tuple({load}(torch.zeros(2, 3, 64, 64)).shape))"
    found = subprocess.run([sys.executable, "-I", "-c", code, file], capture_output=True, text=True)
    assert found.stdout.strip() == "(2, 3)", found.stderr


def test_the_maps_are_those_that_timm_takes_from_the_weights(
    root: Path, hcnet: Hcnet, folder_of_images: Path, tmp_path: Path
) -> None:
    run = classifier(root, hcnet, folder_of_images)
    done = hcnet("export", run, "--features", "--output", tmp_path / "maps.pt")
    assert done.code == 0, done.err
    assert "Largest difference to PyTorch" in done.err
    assert hcnet("export", run, "--format", "timm", "--output", tmp_path / "m").code == 0
    expected = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True, features_only=True).eval()
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        for found, one in zip(torch.jit.load(tmp_path / "maps.pt")(x), expected(x), strict=True):
            torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-5)
    refused = hcnet("export", run, "--features", "--format", "timm", "--output", tmp_path / "n")
    assert (refused.code, "features_only=True" in refused.err) == (2, True)


def test_onnx_runtime_alone_gets_the_miou_of_the_run(root: Path, hcnet: Hcnet, tmp_path: Path) -> None:
    more = ("--recipe", "digit-stuff", "--init", "none", "--batch-size", "2", "--set", "schedule.length=2")
    more += ("--set", "data.img_scale=[64,64]", "--set", "head.channels=8", "--set", "head.aux_channels=8")
    run = trained(root, hcnet, "finetune-seg", small_data.scenes(root / "scenes"), *more)
    done = hcnet("export", run, "--output", tmp_path / "model.onnx")
    assert done.code == 0, done.err
    assert "for images of any size" in done.err
    assert re.search(r"mIoU [\d.]+, as the run", done.err)
    (tmp_path / "segment.py").write_text(GUARD + PROGRAMS["segment.py"])
    line = [sys.executable, "-I", tmp_path / "segment.py", tmp_path / "model.onnx"]
    line += [root / "scenes" / kind / "validation" for kind in ("images", "annotations")]
    found = subprocess.run(line, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == f"mIoU {json.loads((run / 'run.json').read_text())['metrics']['mIoU']:.2f}"
    small_data.evaluate_and_predict(hcnet, run, "ss", tmp_path)


@pytest.mark.parametrize("size", [(7, 9), (1, 1), (6, 12), (5, 3)])
def test_pooling_as_products_is_adaptive_pooling(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for scale in (1, 2, 3, 6):
        pool = AveragePool(scale)
        expected = pool(x)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_exporting", lambda: True)
            assert torch.allclose(pool(x), expected, atol=1e-12)


def test_a_file_that_computes_otherwise_is_not_left(
    root: Path, hcnet: Hcnet, folder_of_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = classifier(root, hcnet, folder_of_images)
    load = export.LOADERS["torchscript"]
    monkeypatch.setitem(export.LOADERS, "torchscript", lambda path: lambda x: load(path)(x) + 1e-3)
    done = hcnet("export", run, "--output", tmp_path / "model.pt")
    assert done.code == 2
    assert "computes otherwise than the model" in done.err
    assert not list(tmp_path.iterdir())
    # logits agree, and the score does not
    monkeypatch.setitem(export.LOADERS, "torchscript", load)
    monkeypatch.setattr(
        export, "_InPlace", lambda file: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(3))
    )
    done = hcnet("export", run, "--output", tmp_path / "model.pt")
    assert done.code == 2
    assert "The file scores top1" in done.err
    assert not list(tmp_path.iterdir())


def test_data_that_are_elsewhere(root: Path, hcnet: Hcnet, folder_of_images: Path, tmp_path: Path) -> None:
    run = classifier(root, hcnet, folder_of_images)
    other = small_data.classes(tmp_path / "other")
    done = hcnet("export", run, "--data", other, "--output", tmp_path / "model.pt")
    assert done.code == 0
    assert "holds other data than the run was validated on" in done.err
    assert "Its score was not compared." in done.err


def test_mistakes(
    root: Path, hcnet: Hcnet, folder_of_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = classifier(root, hcnet, folder_of_images)
    monkeypatch.chdir(tmp_path)
    Path("there.onnx").write_bytes(b"")
    for arguments, message in (
        ((run, "--output", "model.xyz"), "The ending of model.xyz names no format."),
        ((run, "--output", "model", "--format", "onx"), 'Unknown format "onx".'),
        ((run, "--output", "model.onnx", "--format", "pt2"), "A file of the format pt2 ends in .pt2."),
        ((run, "--output", "there.onnx"), "there.onnx exists already."),
        (("nowhere", "--output", "model.onnx"), "There is no run nowhere."),
    ):
        done = hcnet("export", *arguments)
        assert done.code == 2
        assert message in done.err
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    done = hcnet("export", run, "--output", "model.onnx")
    assert done.code == 2
    assert "pip install 'hcnet[export]'" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]
