"""Protects `explain`: its numbers are what the heat layers do, and its pictures come for every kind of run."""

from __future__ import annotations

import cmath
import io
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, Done
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import Normalize

from hcnet_cli import build
from hcnet_cli import explain as explaining
from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.explain import explain, load, pictures
from hcnet_cli.explain.heat import (
    HeatStep,
    area,
    diffuse,
    frequencies,
    heat_steps,
    measure,
    parts,
    receptive_field,
    response,
    windows,
)
from hcnet_cli.explain.pictures import draw
from hcnet_cli.models import HcNet
from hcnet_cli.pictures import one_line
from hcnet_cli.runs import DataInfo, RunFolder, RunInfo
from hcnet_cli.weights import load_into

DEPTHS, DIMS = (1, 2, 1, 1), (8, 8, 16, 16)
PICTURES = ["1-stencils.png", "2-rates.png", "3-transfer.png", "4-spread.png"]
HEADS = {"pretrain": "head.fc.weight", "finetune-det": "fpn.inner.0.weight", "finetune-seg": "decode_head.weight"}
SHIPPED = {"pretrain": "digits", "finetune-det": "digit-scenes", "finetune-seg": "digit-stuff"}


def network(disable: tuple[str, ...] = (), seed: int = 0) -> HcNet:
    """Small, with stencils and gates of order one, so that nothing passes by being small."""
    torch.manual_seed(seed)
    model = HcNet(num_classes=0, depths=DEPTHS, dims=DIMS, disable=disable)
    for name, parameter in model.named_parameters():
        if ".conduction." in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def make_run(folder: Path, task: str = "pretrain", data: Path | str = "digits", disable: tuple[str, ...] = ()) -> Path:
    """A run folder as training leaves it, without training."""
    overrides = [("data.path", str(data), ""), ("model.disable", list(disable), "")]
    overrides += [("model.depths", list(DEPTHS), ""), ("model.dims", list(DIMS), "")]
    overrides += [("data.img_size", 16, "")] if task == "pretrain" else [("data.img_scale", [120, 64], "")]
    recipe = rcp.resolve(rcp.recipe_file(SHIPPED[task], task), overrides).recipe
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(rcp.dump_yaml(recipe))
    place = "" if task == "pretrain" else "backbone."
    state = {place + name: value for name, value in network(disable).state_dict().items()}
    save_file({**state, HEADS[task]: torch.zeros(3, 3)}, folder / "best.safetensors")
    about = DataInfo(name="tiny", digest="", path=str(data), num_train=1, num_val=1, num_classes=3)
    info = RunInfo(
        status="finished", task=task, protocol=recipe.protocol, size="pico", variant=rcp.variant(recipe), seed=0,
        fingerprint="", data=about, steps_total=1, batch_size=1,
    )  # fmt: skip
    RunFolder(folder).write(info)
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, folder_of_images: Path) -> Path:
    """A classifier's run, explained."""
    run = make_run(tmp_path_factory.mktemp("drawn") / "run", data=folder_of_images)
    assert [path.name for path in explain(run)] == [*PICTURES, "captions.md", "explain.json"]
    return run


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures, which take most of the time."""
    monkeypatch.setattr("hcnet_cli.explain.draw", lambda found, label: {})


def numbers(run: Path) -> dict[str, Any]:
    found = json.loads((run / "explain" / "explain.json").read_text())
    assert isinstance(found, dict)
    return found


# --- the transfer function --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_transfer_function_is_what_a_step_does_to_a_plane_wave(kernel_size: int) -> None:
    """Against a double loop over the stencil on a periodic grid that every frequency fits."""
    rng = np.random.default_rng(0)
    stencil, rate = rng.normal(size=(3, kernel_size, kernel_size)), np.array([0.2, 0.5, 0.9])
    gain = np.abs(1 + rate[:, None, None] * response(stencil))
    side, half = len(frequencies()), kernel_size // 2
    y, x = np.indices((side, side))
    for row, column in ((0, 0), (24, 24), (30, 7), (1, 47), (24, 31)):
        wave = np.exp(2j * np.pi * (frequencies()[row] * y + frequencies()[column] * x))
        for channel in range(3):
            flow = np.zeros_like(wave)
            for i, j in itertools.product(range(kernel_size), repeat=2):
                flow += stencil[channel, i, j] * wave[np.ix_((y[:, 0] + i - half) % side, (x[0] + j - half) % side)]
            after = wave + rate[channel] * flow
            np.testing.assert_allclose(np.abs(after), gain[channel, row, column], rtol=0, atol=1e-12)


def test_laplacian_is_inside_the_stability_bound_and_its_negative_outside() -> None:
    """1 - r (sin^2(pi fy) + sin^2(pi fx)): damps everything but the mean for r in (0, 1); the negative amplifies it."""
    laplacian = np.array([[[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]]) / 4
    square = np.sin(np.pi * frequencies()) ** 2
    np.testing.assert_allclose(response(laplacian)[0], -(square[:, None] + square[None]), atol=1e-14)
    both = np.concatenate([laplacian, -laplacian])
    step = HeatStep(1, 1, both, np.array([[0.5, 0.5], [0.9, 0.1]]))
    gain = measure([step], [np.ones((8, 8))])["blocks"][0]["gain"]
    assert gain["stable_channels"] == 0.5
    assert gain["above_1"] == (48 * 48 - 1) / (2 * 48 * 48)
    assert gain["max"] == pytest.approx(1 + 0.3 * 2)
    assert gain["radial_mean"][0] == pytest.approx(1)
    high = [abs(1 + r * s) for r, s in ((0.7, -1.0), (0.3, 1.0))]  # at (1/2, 0), one of the pixels of the last ring
    assert min(high) < gain["radial_mean"][-1] < max(high)


def test_a_channel_is_stable_only_if_it_is_for_every_image() -> None:
    """3 x Laplacian: |1 - 6 r| at the highest frequency, so r = 0.3 is inside the bound and r = 0.4 is not."""
    stencil = 3 * np.array([[[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]]) / 4
    for rates, stable in (((0.1, 0.3), 1), ((0.1, 0.4), 0)):  # the mean of either is inside
        step = HeatStep(1, 1, stencil, np.array(rates)[:, None])
        assert measure([step], [np.ones((8, 8))])["blocks"][0]["gain"]["stable_channels"] == stable


# --- rates and stencils -----------------------------------------------------------------------------------------------


def test_rates_are_those_of_each_layer_on_its_own_input() -> None:
    """Against a forward pass by hand, block after block, and sigmoid(A mean(u)) written out."""
    model = network()
    images = [torch.randn(3, 32, 40), torch.randn(3, 17, 33)]  # sizes may differ
    steps = heat_steps(model, images)
    assert [(step.stage, step.block) for step in steps] == [(1, 1), (2, 1), (2, 2), (3, 1), (4, 1)]
    for n, image in enumerate(images):
        u, found = model.stem(image[None]), iter(steps)
        for stage in model.stages:
            u = stage.downsample(u)
            for block in stage.blocks:
                step, mean = next(found), u[0].mean((1, 2))
                logits = [float(row @ mean) for row in block.conduction.gate.weight]
                np.testing.assert_allclose(step.rate[n], [1 / (1 + math.exp(-a)) for a in logits], rtol=1e-5)
                w = block.conduction.weight[:, 0].double()
                w[:, 2, 2] -= w.sum((1, 2))
                np.testing.assert_allclose(step.stencil, w, atol=1e-6)
                u = block(u)
    assert not any(block.conduction._forward_pre_hooks for stage in model.stages for block in stage.blocks)


def test_rate_statistics() -> None:
    rate = np.array([[0.1, 0.5], [0.3, 0.5], [0.2, 0.5]])
    step = HeatStep(1, 1, np.zeros((2, 3, 3)), rate)
    found = measure([step], [np.ones((4, 4))])["blocks"][0]["rate"]
    assert found["mean"] == pytest.approx(0.35)
    assert found["std_over_channels"] == pytest.approx(0.15)
    assert found["std_over_images"] == pytest.approx(np.std([0.1, 0.2, 0.3]) / 2)
    assert (found["percentiles"]["0"], found["percentiles"]["100"]) == (0.1, 0.5)
    assert np.mean(found["density"]) == pytest.approx(1)
    assert np.average(np.linspace(0, 1, 200), weights=found["density"]) == pytest.approx(0.35, abs=0.01)


def test_parts_of_a_stencil_are_orthogonal_and_sum_to_it() -> None:
    stencil = np.random.default_rng(0).normal(size=(6, 5, 5))
    found = parts(stencil)
    np.testing.assert_allclose(found.sum(0), stencil, atol=1e-14)
    for a, b in itertools.combinations(found, 2):
        np.testing.assert_allclose((a * b).sum((1, 2)), 0, atol=1e-13)


@pytest.mark.parametrize(
    ("kind", "stencil"),
    [
        (0, [[0, 1, 0], [1, -4, 1], [0, 1, 0]]),
        (1, [[0, 1, 0], [-1, 0, -1], [0, 1, 0]]),  # conducts along y, sharpens along x
        (1, [[1, 0, -1], [0, 0, 0], [-1, 0, 1]]),
        (2, [[0, 0, 0], [-1, 0, 1], [0, 0, 0]]),  # a derivative: moves the field
    ],
)
def test_kinds_of_stencils(kind: int, stencil: list[list[int]]) -> None:
    energy = np.square(parts(np.array([stencil], dtype=float))).sum((1, 2, 3))
    assert energy[kind] == pytest.approx(np.square(stencil).sum())
    assert energy.sum() == pytest.approx(energy[kind])


def test_shown_channels_and_patterns_are_the_model_s() -> None:
    """The channels shown are actual stencils; the first pattern is what all stencils of a made-up stage share."""
    base = np.array([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    odd = np.array([[0.0, 0, 0], [-1, 0, 1], [0, 0, 0]])
    stencils = np.stack([3 * base, -2 * base, 0.1 * base, odd])
    step = HeatStep(1, 1, stencils, np.full((1, 4), 0.5))
    found = measure([step], [np.ones((8, 8))])["stages"][0]["stencils"]
    first = found["patterns"][0]
    np.testing.assert_allclose(first["stencil"] / first["stencil"][0, 1], base, atol=1e-12)
    assert first["stencil"][1, 1] < 0
    assert first["share"] == pytest.approx(4 * 13.01 / (4 * 13.01 + 2))
    shown = [(entry["kind"], entry["channel"]) for entry in found["channels"]]
    assert shown == [("isotropic", 0), ("isotropic", 1)]  # the others are weaker than half of the channels
    assert found["energy"]["transport"] == pytest.approx(2 / (4 * 13.01 + 2))


# --- spread -----------------------------------------------------------------------------------------------------------


def test_receptive_field_of_one_convolution_is_its_box() -> None:
    """3 x 3 with stride 1: nine pixels around the centre, each with the sum of the squared weights; 0 elsewhere."""
    convolution = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    one = nn.Conv2d(3, 1, 3, padding=1, bias=False)
    nn.init.ones_(one.weight)
    images = [torch.randn(3, 12, 10) for _ in range(16)]
    (box,) = receptive_field(lambda x: [one(x)], images)
    expected = np.zeros((12, 10))
    expected[5:8, 4:7] = 3  # squared gradients of three channels
    np.testing.assert_allclose(box, expected)
    assert area(box, 0.95) == 9
    (field,) = receptive_field(lambda x: [convolution(x)], images * 8)
    exact = convolution.weight.detach().square().sum((0, 1)).numpy()  # random signs have this mean
    np.testing.assert_allclose(field[5:8, 4:7], exact, rtol=0.5)
    assert field.sum() == pytest.approx(field[5:8, 4:7].sum())


def test_receptive_field_estimates_the_squared_jacobian() -> None:
    """Against one gradient for each channel, on a network with norms and gates."""
    model, image = network(), torch.randn(3, 32, 32)

    def features(x: Tensor) -> Any:
        return model.forward_intermediates(x, intermediates_only=True)

    fields = receptive_field(features, [image])
    x = image[None].clone().requires_grad_()
    for field, feature in zip(fields, features(x), strict=True):
        exact = torch.zeros(32, 32)
        for value in feature[0, :, feature.shape[2] // 2, feature.shape[3] // 2]:
            exact += torch.autograd.grad(value, x, retain_graph=True)[0][0].square().sum(0)
        assert field.sum() == pytest.approx(float(exact.sum()), rel=0.5)
        assert np.corrcoef(np.log(field).ravel(), exact.log().numpy().ravel())[0, 1] > 0.7
    again = receptive_field(features, [image])
    assert all(np.array_equal(a, b) for a, b in zip(fields, again, strict=True))


def test_area_is_the_smallest_that_holds_the_share() -> None:
    energy = np.array([[4.0, 1], [3, 2]])
    assert [area(energy, share) for share in (0.3, 0.4, 0.41, 0.7, 0.9, 0.95, 1)] == [1, 1, 2, 2, 3, 4, 4]
    assert area(np.full((10, 10), 0.1), 0.95) == 95


def test_hot_pixel_through_conduction_alone_is_repeated_convolution() -> None:
    """Against plain loops on a larger field; zero-sum stencils keep the heat, step by step."""
    rng = np.random.default_rng(1)
    steps = []
    for block in (1, 2):
        stencil = rng.normal(size=(2, 5, 5)) / 10
        stencil[:, 2, 2] -= stencil.sum((1, 2))
        steps.append(HeatStep(1, block, stencil, rng.uniform(0.1, 0.9, (3, 2))))
    for channel in range(2):
        u = np.zeros((21, 21))
        u[10, 10] = 1
        for step, found in zip(steps, diffuse(steps), strict=True):
            new = u.copy()
            for y, x in itertools.product(range(2, 19), repeat=2):
                around = u[y - 2 : y + 3, x - 2 : x + 3]
                new[y, x] += step.rate[:, channel].mean() * (step.stencil[channel] * around).sum()
            u = new
            np.testing.assert_allclose(found[channel], u[6:15, 6:15], atol=1e-14)
            assert found[channel].sum() == pytest.approx(1)
    stage = measure(steps, [np.ones((8, 8))])["stages"][0]
    assert [entry["heat"] for entry in stage["hot_pixel"]["after"]] == [pytest.approx([1, 1])] * 2
    assert stage["hot_pixel"]["field"].shape == (9, 9)


def test_windows_are_centres_of_one_size() -> None:
    images = [torch.arange(500.0)[None, :, None].expand(3, 500, 40), torch.zeros(3, 400, 31)]
    assert [tuple(window.shape) for window in windows(images)] == [(3, 384, 31)] * 2
    assert windows(images)[0][0, :, 0].tolist() == list(range(58, 442))


# --- runs -------------------------------------------------------------------------------------------------------------


def normalised(data: DataSplits, indices: Iterable[int], recipe: rcp.Recipe) -> list[Tensor]:
    theirs = Normalize(recipe.data.mean, recipe.data.std)
    return [theirs(data.val[index, 0, 0]["image"].permute(2, 0, 1) / 255) for index in indices]


def test_pictures_and_numbers_of_a_run(drawn: Path) -> None:
    """The numbers in the file are those of the model; captions name every picture."""
    for name in PICTURES:
        with Image.open(drawn / "explain" / name) as picture:
            assert picture.width > 1200
            assert picture.getpixel((2, 2))[:3] == (255, 255, 255)  # opaque white, on dark pages too
    found = numbers(drawn)
    assert (found["images"], found["disabled"]) == (10, [])
    assert found["run"] == "run"
    assert list(found["captions"]) == [name[:-4] for name in PICTURES]
    assert [(b["stage"], b["block"]) for b in found["blocks"]] == [(1, 1), (2, 1), (2, 2), (3, 1), (4, 1)]
    _, recipe, backbone = load(drawn)
    data = build.open_data(recipe)
    for block, step in zip(found["blocks"], heat_steps(backbone, normalised(data, range(10), recipe)), strict=True):
        assert block["rate"]["mean"] == pytest.approx(step.rate.mean(), rel=1e-5)
        gain = [
            abs(1 + r * sum(s[i, j] * cmath.exp(2j * cmath.pi * (i - 2) / 2) for i in range(5) for j in range(5)))
            for s, r in zip(step.stencil, step.rate.mean(0), strict=True)
        ]  # at (1/2, 0), the first row and the middle column of the map
        if block["stage"] != 2:  # the map is the mean over a stage's blocks
            assert found["stages"][block["stage"] - 1]["mean_gain"][0][24] == pytest.approx(np.mean(gain), rel=1e-5)
    text = (drawn / "explain" / "captions.md").read_text()
    assert all(f"]({name})" in text for name in PICTURES)
    assert not list((drawn / "explain").glob(".*"))


def test_the_same_run_gives_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    again = explain(drawn, out=tmp_path / "again")
    for file in again:
        assert file.read_bytes() == (drawn / "explain" / file.name).read_bytes(), file.name


@pytest.mark.usefixtures("undrawn")
def test_one_image_instead_of_the_data(drawn: Path, folder_of_images: Path, tmp_path: Path) -> None:
    """The run's evaluation transform is used: a validation image by its file is that validation image."""
    run = tmp_path / "run"
    shutil.copytree(drawn, run, ignore=shutil.ignore_patterns("explain"))
    file = next((folder_of_images / "val" / "red").iterdir())
    explain(run, image=file)
    with Image.open(run / "explain" / "0-photo.png") as photo:  # of the red class: its own pixels, in its own colours
        red, _, blue = np.asarray(photo.convert("RGB"))[200:400, 200:400].mean(axis=(0, 1))
        assert red > blue + 50
    found = numbers(run)
    assert found["images"] == 1
    assert file.name in found["model"]
    _, recipe, backbone = load(run)
    data = build.open_data(recipe)
    (index,) = (i for i in range(10) if data.val.sample_path(i) == str(file))
    steps = heat_steps(backbone, normalised(data, [index], recipe))
    assert [b["rate"]["mean"] for b in found["blocks"]] == pytest.approx([s.rate.mean() for s in steps], rel=1e-5)
    assert "between images" not in found["captions"]["2-rates"]


@pytest.mark.parametrize("disable", ["gate", "anisotropy", "conservation"])
def test_disabled_components(disable: str) -> None:
    model = network((disable,))
    images = [torch.randn(3, 16, 16) for _ in range(2)]
    steps = heat_steps(model, images)
    fields = receptive_field(lambda x: model.forward_intermediates(x, intermediates_only=True), images)
    found = {"disabled": list(model.disable), **measure(steps, fields)}
    stage, rate = found["stages"][1], found["blocks"][1]["rate"]
    assert (rate["std_over_images"] < 1e-9) == (disable == "gate")
    raw = model.stages[1].blocks[0].conduction.weight[:, 0].double().numpy()
    shown = [entry["stencil"] for entry in stage["stencils"]["channels"] if entry["block"] == 1]
    if disable == "anisotropy":
        (channel,) = shown
        assert channel.tolist() == [[0, 0.25, 0], [0.25, -1, 0.25], [0, 0.25, 0]]
        assert stage["stencils"]["energy"]["isotropic"] == pytest.approx(1)
        assert found["blocks"][1]["gain"]["stable_channels"] == 1
    heat = np.array(stage["hot_pixel"]["after"][-1]["heat"])
    if disable == "conservation":
        assert all(any(np.array_equal(stencil, w) for w in raw) for stencil in shown)
        assert np.abs(heat - 1).max() > 0.1
        assert abs(stage["mean_gain"][24, 24] - 1) > 1e-3
    else:
        np.testing.assert_allclose(heat, 1, atol=1e-5)
        assert stage["mean_gain"][24, 24] == pytest.approx(1, abs=1e-5)
    assert [f"{name}.png" for name in draw(found, "label")] == PICTURES


def test_without_conduction_the_receptive_fields_are_left(
    tmp_path: Path, folder_of_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", data=folder_of_images, disable=("conduction",))
    assert [path.name for path in explain(run)] == ["4-spread.png", "captions.md", "explain.json"]
    assert "no heat conduction" in capsys.readouterr().err
    found = numbers(run)
    assert (found["disabled"], found["blocks"]) == (["conduction"], [])
    assert all(stage.keys() == {"stage", "receptive_field"} for stage in found["stages"])


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """One folder that is COCO's and ADE20K's layout at once: two training and two validation images, 60 x 40."""
    root, pixels = tmp_path / "scenes", np.random.RandomState(0)
    for coco_split, scene_split in (("train2017", "training"), ("val2017", "validation")):
        for place in (coco_split, f"images/{scene_split}", f"annotations/{scene_split}"):
            (root / place).mkdir(parents=True)
        images, objects = [], []
        for number in (1, 2):
            picture = Image.fromarray(pixels.randint(0, 255, (40, 60, 3)).astype(np.uint8))
            picture.save(root / coco_split / f"{number}.jpg")
            picture.save(root / "images" / scene_split / f"{number}.jpg")
            label = Image.fromarray(pixels.randint(0, 4, (40, 60)).astype(np.uint8))
            label.save(root / "annotations" / scene_split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.jpg", "width": 60, "height": 40})
            square = {"bbox": [5, 5, 20, 20], "area": 400, "segmentation": [[5, 5, 25, 5, 25, 25, 5, 25]]}
            objects.append({"id": number, "image_id": number, "category_id": 1, "iscrowd": 0, **square})
        content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "thing"}]}
        (root / "annotations" / f"instances_{coco_split}.json").write_text(json.dumps(content))
    return root


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("task", ["finetune-det", "finetune-seg"])
def test_the_backbone_inside_a_detector_and_a_segmenter(task: str, tmp_path: Path, scenes: Path) -> None:
    run = make_run(tmp_path / "run", task, scenes)
    explain(run)
    found = numbers(run)
    assert found["images"] == 2
    assert found["stages"][0]["receptive_field"]["image"] == [64, 96]  # 40 x 60 fitted to 64 x 120
    by_hand = network().stages[3].blocks[0].conduction.stencil()[:, 0].numpy()
    shown = [entry for entry in found["stages"][3]["stencils"]["channels"] if entry["block"] == 1]
    for entry in shown:
        np.testing.assert_allclose(entry["stencil"], by_hand[entry["channel"]], rtol=1e-4, atol=1e-6)
    assert shown
    split = "images/validation" if task == "finetune-seg" else "val2017"
    explain(run, image=scenes / split / "1.jpg", out=tmp_path / "one")
    one = json.loads((tmp_path / "one" / "explain.json").read_text())
    assert one["stages"][0]["receptive_field"]["image"] == [64, 96]


OWN = """
from hcnet_cli.models import HcNet
from hcnet_cli.models.backbone import create


class Mine(HcNet):
    def __init__(self, num_classes, **rest):
        super().__init__(num_classes=num_classes, depths=(1, 2, 1, 1), dims=(8, 8, 16, 16), **rest)


def other(num_classes):
    return create("convnext_atto", num_classes, {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}).model
"""


def own_run(folder: Path, function: str, data: Path) -> str:
    """A run as make_run's, of the user's own model OWN; returns what --model names."""
    make_run(folder, "finetune-det", data)
    (folder / "model.py").write_text(OWN)
    overrides = [("model.name", f"{folder}/model.py:{function}", ""), ("data.path", str(data), "")]
    recipe = rcp.resolve(rcp.recipe_file("digit-scenes", "finetune-det"), overrides).recipe
    (folder / "recipe.yaml").write_text(rcp.dump_yaml(recipe))
    info = RunFolder(folder).require()
    info.size, info.model, info.model_file, info.variant = "", function, recipe.model.digest, ""
    RunFolder(folder).write(info)
    return recipe.model.name


@pytest.mark.usefixtures("undrawn")
def test_an_hcnet_in_a_file_of_the_user_s_own(tmp_path: Path, scenes: Path, hcnet: Callable[..., Done]) -> None:
    """A subclass has heat layers; its file runs only if it is named; other models of the file are refused."""
    run = tmp_path / "run"
    named = own_run(run, "Mine", scenes)
    refused = hcnet("explain", run)
    assert (refused.code, f"--model {named}" in refused.err) == (2, True), refused.err
    done = hcnet("explain", run, "--model", named)
    assert done.code == 0, done.err
    found = numbers(run)
    assert found["model"].startswith("Mine · finetune-det")
    assert [(b["stage"], b["block"]) for b in found["blocks"]] == [(1, 1), (2, 1), (2, 2), (3, 1), (4, 1)]
    named = own_run(tmp_path / "other", "other", scenes)
    with pytest.raises(UserError, match="only HcNet has heat layers"):
        load(tmp_path / "other", named)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a run: it has no run\.json"):
        explain(tmp_path / "nowhere")


def test_a_run_without_weights(drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(drawn, run, ignore=shutil.ignore_patterns("best.safetensors"))
    with pytest.raises(UserError, match=r"has no best\.safetensors"):
        explain(run)


def test_weights_of_another_model(drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(drawn, run)
    state = network().state_dict()
    save_file({k: v for k, v in state.items() if "gate" not in k}, run / "best.safetensors")
    with pytest.raises(UserError, match=r"lacks stages\.0\.blocks\.0\.conduction\.gate\.weight"):
        explain(run)


@pytest.mark.usefixtures("undrawn")
def test_data_that_are_gone_ask_for_an_image(drawn: Path, folder_of_images: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", data=tmp_path / "moved")
    with pytest.raises(UserError, match="moved does not exist") as caught:
        explain(run)
    assert "--image" in caught.value.hint
    assert not (run / "explain").exists()
    picture = next((folder_of_images / "val" / "green").iterdir())
    assert [path.name for path in explain(run, image=picture)] == ["0-photo.png", "captions.md", "explain.json"]


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file"), (b"not an image", "it is not an image")])
def test_an_image_that_cannot_be_read(drawn: Path, tmp_path: Path, content: bytes | None, reason: str) -> None:
    file = tmp_path / "picture.png"
    if content:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"picture\.png cannot be used: {reason}"):
        explain(drawn, image=file)


def test_a_photo_of_12_bits_is_not_black(tmp_path: Path) -> None:
    """In a 16-bit file, of a run whose images have 8: as the same photo in 8 bits."""
    values = np.random.default_rng(0).integers(2048, 4096, (40, 40))
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray((values >> 4).astype(np.uint8)).save(tmp_path / "plain.png")
    recipe = rcp.resolve(rcp.recipe_file("digits", "pretrain")).recipe
    info = Mock(**{"data.bits": None})
    deep, plain = (explaining._one_image(recipe, info, tmp_path / name) for name in ("deep.png", "plain.png"))
    assert torch.equal(deep[0][0], plain[0][0])


def test_images_have_the_size_of_the_evaluation(folder_of_images: Path) -> None:
    """evaluation.val.img_size, where it is another than training's."""
    values = {"data.path": str(folder_of_images), "data.img_size": 32, "evaluation.val.img_size": 48}
    file = rcp.recipe_file("digits", "pretrain")
    resolved = rcp.resolve(file, [(key, value, "test") for key, value in values.items()])
    info = Mock(**{"data.bits": None})
    picture = next((folder_of_images / "val" / "green").iterdir())
    (one,), _ = explaining._one_image(resolved.recipe, info, picture)
    several, _ = explaining._validation_images(resolved.recipe, info)
    assert {tuple(image.shape) for image in (one, *several)} == {(3, 48, 48)}


def test_a_place_that_cannot_be_written(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        explain(drawn, out=tmp_path / "file")


@pytest.mark.parametrize("name", ["$x_1^$ $", "a\nb", "\x1b[31m", "\u202e中文\ud800", "x" * 100_000])
def test_a_label_is_drawn_whatever_it_holds(name: str) -> None:
    """Matplotlib reads $...$ as mathematics and fails where it is none."""
    sheet = pictures.Sheet(0.5, "title", "subtitle")
    sheet.text(0, 0, one_line(name))
    sheet.figure.savefig(io.BytesIO(), format="png", dpi=20)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("swin_tiny_patch4_window7_224", {"depths": [1, 2, 1, 2], "embed_dim": 8, "num_heads": [1, 1, 1, 1]}),
        ("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 12, "num_heads": 1}),
    ],
)
def test_maps_of_a_classifier_are_those_of_the_size_it_was_trained_at(name: str, args: dict[str, Any]) -> None:
    """Windows as small as its maps, tables for its patches, padded as in training; images of other sizes fit too."""
    recipe = rcp.resolve(
        rcp.recipe_file("digits", "pretrain"),
        [("model.name", name, ""), ("model.args", args, ""), ("data.img_size", 48, "")],
    ).recipe
    trained: Any = build.build_backbone(recipe, 3).eval()
    maps: Any = build.build_backbone(recipe, 0).eval()
    report = load_into(maps.model, trained.state_dict(), "trained")
    assert [key for key in (*report.missing, *report.reinitialised) if not key.startswith("norm")] == []
    maps.pyramid = None
    image = torch.randn(1, 3, 48, 48)
    found = maps.forward_intermediates(image)
    theirs = trained.forward_intermediates(image, intermediates_only=True)
    torch.testing.assert_close(found, theirs[-len(found) :])
    assert maps.forward_intermediates(torch.randn(1, 3, 96, 128))[0].shape[2:] in {(24, 32), (6, 8)}


def test_receptive_fields_of_two_backbones_side_by_side(
    folder_of_images: Path, tmp_path: Path, hcnet: Callable[..., Done]
) -> None:
    """HcNet's are those of its own picture; a model of timm needs no heat layers; both see the same images."""
    runs = []
    small_convnext = ("--model", "convnext_atto", "--set", "model.args.depths=[1,1,1,1]")
    small_convnext += ("--set", "model.args.dims=[8,8,16,16]")
    for name, model in (("heat", SMALL_MODEL), ("conv", small_convnext)):
        line = ("pretrain", "--recipe", "digits", *model, "--data", folder_of_images, "--out", tmp_path, "--name", name)
        done = hcnet(*line, "--epochs", "1", "--batch-size", "8", "--set", "data.img_size=64", "--workers", "0")
        assert done.code == 0, done.err
        runs.append(tmp_path / "runs" / name)
    done = hcnet("explain", *runs, "--out", tmp_path / "both")
    assert done.code == 0, done.err
    with Image.open(tmp_path / "both" / "receptive-fields.png") as picture:
        assert picture.width > 1000
    heat, conv = json.loads((tmp_path / "both" / "receptive-fields.json").read_text())
    assert (heat["pixels"], conv["pixels"]) == ([64, 64], [64, 64])
    assert "convnext_atto" in conv["model"]
    assert hcnet("explain", runs[0]).code == 0
    alone = json.loads((runs[0] / "explain" / "explain.json").read_text())
    assert heat["area"] == [stage["receptive_field"]["area"] for stage in alone["stages"]]
    # 4 x 4 pixels to a token, then 7 x 7 tokens in the one block of the first stage
    assert conv["area"][0]["99"] <= 28 * 28
    refused = hcnet("explain", *runs)
    assert refused.code == 2
    assert "Name a folder: --out FOLDER" in refused.err
