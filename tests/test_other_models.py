"""Other models than HcNet, by name or from a file: all three tasks, resume, processes, maps, weights, mistakes."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fresh
import pytest
import small_data
import timm
import torch
from conftest import Hcnet, only_run, outcome
from safetensors.torch import load_file, save_file
from torch import nn

from hcnet_cli import foreign, runs
from hcnet_cli.console import UserError
from hcnet_cli.engine.step import Stepper
from hcnet_cli.models import backbone, hub
from hcnet_cli.profile import count_macs, count_params
from hcnet_cli.tasks.detection import task as detection
from hcnet_cli.tasks.detection.mask_rcnn import MaskRCNN
from hcnet_cli.tasks.segmentation import task as segmentation
from hcnet_cli.tasks.segmentation.upernet import UPerNet
from hcnet_cli.weights import load_into

MY_NET = """
from dataclasses import dataclass

from torch import nn


@dataclass
class Shape:
    dims: tuple = (8, 8, 16, 16)


class MyNet(nn.Module):
    def __init__(self, num_classes, width=8):
        super().__init__()
        dims = Shape().dims
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, s, s), nn.GroupNorm(1, b), nn.GELU(), nn.Dropout(0.3))
            for a, b, s in zip([3, *dims], dims, [4, 2, 2, 2])
        )
        self.feature_info = [{"num_chs": dim, "reduction": 4 * 2**i} for i, dim in enumerate(dims)]
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()

    def forward_intermediates(self, x, indices=None, intermediates_only=True):
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x):
        return self.head(self.forward_intermediates(x)[-1].mean((2, 3)))


def build(num_classes):
    return MyNet(num_classes)
"""
SMALL = {  # a family, made small; all but MyNet with drop path
    "convnext_tiny": ("depths=[1,1,1,1]", "dims=[8,8,16,16]"),
    "swin_tiny_patch4_window7_224": ("embed_dim=8", "depths=[1,1,2,1]", "num_heads=[1,1,2,2]"),
    "resnet18": ("layers=[1,1,1,1]", "channels=[8,8,16,16]"),
    "vit_tiny_patch16_224": ("patch_size=8", "embed_dim=16", "depth=2", "num_heads=2"),
    "my_net.py:build": (),
}
STEPS = (
    *("--set", "schedule.unit=steps", "--set", "schedule.length=3", "--set", "train.eval_every=3"),
    *("--set", "schedule.warmup=0", "--set", "train.log_every=1", "--workers", "0"),
)
TASKS = {
    "pretrain": (*STEPS, "--recipe", "digits", "--batch-size", "4"),
    "finetune-det": (
        *(*STEPS, "--recipe", "digit-scenes", "--batch-size", "2", "--set", "data.img_scale=[64,64]"),
        *("--set", "head.with_masks=false", "--set", "head.fpn_channels=8", "--set", "head.box_head_channels=16"),
        *("--set", "schedule.milestones=[2]"),
    ),
    "finetune-seg": (
        *(*STEPS, "--recipe", "digit-stuff", "--batch-size", "2", "--set", "data.img_scale=[64,64]"),
        *("--set", "data.crop_size=64", "--set", "head.channels=8", "--set", "head.aux_channels=8"),
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    made = (make(root / name) for name, make in small_data.MAKERS.items())
    return dict(zip(TASKS, made, strict=True))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_net.py").write_text(MY_NET)
    return tmp_path


def arguments(task: str, model: str, data: dict[str, Path], *more: str) -> list[str]:
    drop_path = () if ".py" in model else ("--set", "model.drop_path_rate=0.5")
    args = [word for one in SMALL.get(model, ()) for word in ("--set", f"model.args.{one}")]
    return [task, "--model", model, *args, *drop_path, *TASKS[task], "--data", str(data[task]), *more]


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second is spent on the column of inference speed."""
    monkeypatch.setattr("hcnet_cli.profile.throughput", lambda *_, **__: 1.0)


def stopped_at_step_2(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> None:
    step = Stepper.step

    def stopping(self: Stepper, number: int, batches: Any) -> Any:
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", stopping)
        assert run().code == 128 + signal.SIGTERM


@pytest.mark.parametrize("model", SMALL)
def test_all_tasks_and_resume_bit_for_bit(
    model: str, data: dict[str, Path], here: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task in TASKS:
        done = hcnet(*arguments(task, model, data, "--name", task))
        assert done.code == 0, done.err
        if task != "pretrain":  # --init auto has found the pretraining
            assert "runs/pretrain/best.safetensors" in done.err
            assert "missing in the file" not in done.err
            assert "re-initialised" not in done.err
    task = "finetune-seg" if model.startswith("swin") else "pretrain"
    again = arguments(task, model, data, "--name", "again")
    stopped_at_step_2(monkeypatch, lambda: hcnet(*again))
    done = hcnet(*again)
    assert "Going on from step 2" in done.err
    assert outcome(here / "results/runs/again") == outcome(here / "results/runs" / task)


def test_two_processes(data: dict[str, Path], here: Path, hcnet: Hcnet) -> None:
    """Micro-batches are the same whoever computes them, but for batch norm's running statistics (the main process's)
    and drop path, which is not drawn by sample here.
    """
    model, common = "resnet18", ("--set", "model.drop_path_rate=0.0")
    fresh.run_two(*arguments("pretrain", model, data, *common, "--name", "two"))
    assert hcnet(*arguments("pretrain", model, data, *common, "--accumulate", "2", "--name", "one")).code == 0
    a, b = (load_file(here / f"results/runs/{name}/last/model.safetensors") for name in ("two", "one"))
    for name, value in a.items():
        if "running_" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, b[name], rtol=1e-4, atol=1e-6, msg=name)
    scored = hcnet("pretrain", *arguments("pretrain", model, data, *common, "--name", "two", "--eval-only")[1:])
    assert scored.code == 0, scored.err
    assert "score otherwise" not in scored.err  # what two processes measured, one measures again


@pytest.mark.parametrize("task", ["pretrain", "finetune-det"])
def test_micro_batches_equal_one_batch(task: str, data: dict[str, Path], here: Path, hcnet: Hcnet) -> None:
    """Of a model without batch norm, drop path included; up to a hundredth of what the learning rates let a weight
    move, for AdamW magnifies the rounding of gradients near zero.
    """
    model, common = "swin_tiny_patch4_window7_224", ("--set", "model.drop_path_rate=0.3", "--init", "none")
    for name, division in (("one", ()), ("two", ("--accumulate", "2"))):
        done = hcnet(*arguments(task, model, data, *common, *division, "--name", name))
        assert done.code == 0, done.err
    a, b = (load_file(here / f"results/runs/{name}/last/model.safetensors") for name in ("one", "two"))
    log = runs.read_log(here / "results/runs/one/metrics.jsonl")
    allowed = sum(entry["lr"] for entry in log if "lr" in entry) / 100
    assert allowed > 0
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=0, atol=allowed, msg=name)


# --- maps -------------------------------------------------------------------------------------------------------------

MAPS = {  # a model of a family: its channels in timm, or of a vision transformer's pyramid
    "convnext_atto": [40, 80, 160, 320],
    "pvt_v2_b0": [32, 64, 160, 256],
    "focalnet_tiny_srf": [96, 192, 384, 768],
    "twins_svt_small": [64, 128, 256, 512],
    "tiny_vit_5m_224": [64, 128, 160, 320],
    "swin_tiny_patch4_window7_224": [96, 192, 384, 768],
    "swinv2_tiny_window8_256": [96, 192, 384, 768],
    "mambaout_femto": [48, 96, 192, 288],
    "resnet10t": [64, 128, 256, 512],
    "efficientnet_b0": [24, 40, 112, 320],
    "vit_tiny_patch16_224": [48, 96, 192, 192],
    "vit_small_patch16_dinov3": [96, 192, 384, 384],
    "xcit_nano_12_p8_224": [64, 128, 128, 128],
}


@pytest.mark.parametrize("name", MAPS)
def test_four_maps_of_any_image(name: str) -> None:
    """Sizes are rounded up; what lies behind the image, in a multiple of 32, changes no map's size."""
    model = backbone.create(name, 0, {}).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(torch.zeros(2, 3, 50, 75))
    assert [tuple(one.shape) for one in maps] == [
        (2, channels, -(-50 // stride), -(-75 // stride))
        for channels, stride in zip(MAPS[name], (4, 8, 16, 32), strict=True)
    ]


def test_maps_are_timms() -> None:
    """On a size that needs no padding: the maps of timm's own feature extractor with the same weights, NHWC turned."""
    shifts = {"always_partition": True}  # in the last stage too: see test_swin_reference.py
    for name, args in (("swin_tiny_patch4_window7_224", shifts), ("resnet10t", {})):
        model = backbone.create(name, 0, {}).eval()
        extractor = timm.create_model(name, features_only=True, **args).eval()
        ours = model.model.state_dict()
        state = {key: ours.get(key, ours.get(key.replace("layers_", "layers."))) for key in extractor.state_dict()}
        extractor.load_state_dict({key: value for key, value in state.items() if value is not None}, strict=False)
        x = torch.randn(1, 3, 224, 224)
        with torch.no_grad():
            expected = [m.permute(0, 3, 1, 2) if "swin" in name else m for m in extractor(x)[-4:]]
            for found, one in zip(model.forward_intermediates(x), expected, strict=True):
                torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("levit_128s", "has maps at strides 16, 32, 64"),
        ("eva02_tiny_patch14_224", "has maps at stride 14"),
        ("mixer_s32_224", "does not take images of any size"),
        ("hiera_tiny_224", "does not take images of any size"),
        ("maxvit_rmlp_pico_rw_256", "does not take images of any size"),
    ],
)
def test_a_family_that_cannot_carry_a_head_is_refused(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as refused:
        backbone.create(name, 0, {})
    assert "convnext" in str(refused.value.hint)


def test_it_is_refused_before_its_pretraining_is_asked_for(data: dict[str, Path], here: Path, hcnet: Hcnet) -> None:
    """Whoever obeyed would train for hours for nothing."""
    given = ("--data", data["finetune-seg"], *TASKS["finetune-seg"], "--dry-run")
    done = hcnet("finetune-seg", "--model", "mixer_s32_224", *given)
    assert (done.code, "does not take images of any size" in done.err, "pretrain run" in done.err) == (2, True, False)
    done = hcnet("finetune-seg", "--model", "my_net.py:build", *given)
    assert (done.code, "no finished pretrain run of model build" in done.err) == (2, True), done.err


# --- figures of the papers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "params", "macs"),
    [
        ("vit_base_patch16_384", 384, 86.9, 55.5),
        ("swin_tiny_patch4_window7_224", 224, 28.3, 4.5),
        ("convnext_tiny", 224, 28.6, 4.5),
    ],
)
def test_published_costs(name: str, size: int, params: float, macs: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **backbone.size_argument(name, size))
    assert count_params(model) / 1e6 == pytest.approx(params, rel=0.02)
    assert count_macs(model, torch.empty(1, 3, size, size, device="meta")) / 1e9 == pytest.approx(macs, rel=0.02)


def test_published_costs_of_swin_with_heads() -> None:
    """Swin's own figures: Mask R-CNN 267 G and 48 M at 1280 x 800, UPerNet 945 G and 60 M at 2048 x 512."""
    swin = backbone.create("swin_tiny_patch4_window7_224", 0, {})
    detector, segmenter = MaskRCNN(swin, num_classes=80), UPerNet(swin, 150)
    for model, count, params, macs in (
        (detector, detection.count_macs, 48, 267),
        (segmenter, segmentation.count_macs, 60, 945),
    ):
        assert count_params(model) / 1e6 == pytest.approx(params, rel=0.02)
        assert count(SimpleNamespace(model=model.to("meta"))) / 1e9 == pytest.approx(macs, rel=0.02)


# --- weights ----------------------------------------------------------------------------------------------------------


FAMILIES = {  # whose weights -> what they are called
    "beit_base_patch16_224": "beit",
    "cait_xxs24_224": "cait",
    "convnext_atto": "convnext",
    "convnextv2_atto": "convnext",
    "densenet121": "densenet",
    "edgenext_xx_small": "edgenext",
    "efficientnet_b0": "efficientnet",
    "eva02_base_patch14_224": "eva",
    "eva02_tiny_patch14_224": "eva",
    "ghostnet_050": "ghostnet",
    "hcnet_pico": "",
    "hiera_base_224": "hiera",
    "hiera_tiny_224": "hiera",
    "mambaout_femto": "mambaout",
    "maxvit_rmlp_pico_rw_256": "maxvit",
    "mixer_s32_224": "mixer",
    "mobilenetv3_small_050": "mobilenetv3",
    "mvitv2_tiny": "mvitv2",
    "pvt_v2_b0": "pvt_v2",
    "regnetx_002": "regnet",
    "resnet10t": "resnet",
    "samvit_base_patch16": "samvit",
    "swin_tiny_patch4_window7_224": "swin",
    "swinv2_cr_tiny_224": "swinv2_cr",
    "swinv2_tiny_window8_256": "swinv2",
    "tf_efficientnetv2_b0": "efficientnet",
    "vgg11": "",
    "vit_tiny_patch16_224": "vit",
    "xcit_nano_12_p8_224": "xcit",
}


class Keeps(nn.Module):
    """Keeps tables of positions from one call to the next; `draws`: and needs numbers that a meta tensor has not."""

    def __init__(self, draws: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 4, 4), torch.nn.utils.weight_norm(nn.Linear(8, 5))
        self.tables: dict[int, torch.Tensor] = {}
        self.scale: torch.Tensor | None = None
        self.draws = draws

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if x.shape[-1] not in self.tables:
            self.tables[x.shape[-1]] = torch.arange(x.shape[-1], device=x.device)
        if self.scale is None:
            self.scale = torch.ones((), device=x.device)
        x = (x + self.tables[x.shape[-1]]).mean((2, 3)) * self.scale
        if self.draws:
            x = x + torch.randn(8)
            x = x if x.sum() > 0 else -x
        return self.head(x)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("draws", [False, True])
def test_counting_leaves_the_model_and_random_numbers_as_they_were(draws: bool) -> None:
    model, before = Keeps(draws), torch.get_rng_state()
    assert count_macs(model, torch.empty(1, 3, 32, 32)) == 8 * 8 * 8 * 3 * 4 * 4 + 8 * 5
    assert not model.tables
    assert model.scale is None
    assert torch.equal(torch.get_rng_state(), before)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "side", "unseen"),
    [("vit_tiny_patch16_224", 40, 8), ("vit_tiny_patch16_224", 48, 0), ("mixer_s32_224", 48, 16), ("resnet10t", 33, 0)],
)
def test_rows_that_a_model_does_not_see_are_named(
    name: str, side: int, unseen: int, capfd: pytest.CaptureFixture[str]
) -> None:
    args = {"depth": 1} if name.startswith("vit") else {}
    model = backbone.create(name, 3, args, img_size=side)
    said = " ".join(capfd.readouterr().err.split())
    assert (f"the last {unseen} of {side} rows and columns change nothing" in said) == bool(unseen)
    assert (f"--set data.img_size={side - unseen}" in said) == bool(unseen)
    image = torch.rand(1, 3, side, side, requires_grad=True)
    made = model.eval().forward_features(image)
    (made * torch.rand_like(made)).sum().backward()
    assert int((image.grad.abs().sum((0, 1, 2)) == 0).sum()) == unseen  # the columns without a gradient


def test_families_are_known_by_their_tensors() -> None:
    found = {}
    with torch.device("meta"):
        for name in FAMILIES:
            names = timm.create_model(name).state_dict()
            found[name] = foreign.family(names)
            assert foreign.family(f"module.backbone.{one}" for one in names) == found[name]
    assert found == FAMILIES


def test_weights_of_another_model_name_it(data: dict[str, Path], here: Path, hcnet: Hcnet) -> None:
    """By the metadata of a run's weights, or by their tensors; not by another --size."""
    assert hcnet(*arguments("pretrain", "convnext_tiny", data, "--name", "run")).code == 0
    whose = shlex.join(["--model", "convnext_tiny", "--set", "model.args.depths=[1,1,1,1]"])
    done = hcnet(*arguments("pretrain", "resnet18", data, "--init", "results/runs/run", "--dry-run"))
    assert (done.code, whose in done.err) == (2, True), done.err
    save_file(timm.create_model("resnet10t").state_dict(), "weights.safetensors")
    done = hcnet("pretrain", *TASKS["pretrain"], "--data", data["pretrain"], "--init", "weights.safetensors")
    assert (done.code, "look like those of a resnet of timm" in done.err) == (2, True), done.err
    assert "0 of" in done.err


def test_weights_of_another_image_size_are_resampled_as_timm_does(here: Path) -> None:
    args = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    small = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, **args)
    large = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3, **args)
    translated = foreign.translation(large, small.state_dict())(small.state_dict())
    expected = timm.layers.resample_abs_pos_embed(small.pos_embed, (8, 8), num_prefix_tokens=1)
    torch.testing.assert_close(translated["pos_embed"], expected)
    report = load_into(large, small.state_dict(), "small", foreign.translation(large, small.state_dict()))
    assert report.resampled == ["pos_embed"]
    assert "resampled to other images or windows: pos_embed" in str(report)
    assert not load_into(small, small.state_dict(), "small").resampled


class Hub(BaseHTTPRequestHandler):
    """A stand-in of the hub on this machine: one file of one repository, and what was asked."""

    content = b""
    asked: ClassVar[list[tuple[str, str]]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append((self.command, self.path))
        found = self.path == "/timm/resnet10t.c3_in1k/resolve/main/model.safetensors"
        self.send_response(200 if found else 404)
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Content-Length", str(len(self.content) if found else 0))
        self.end_headers()
        if found and self.command == "GET":
            self.wfile.write(self.content)

    def log_message(self, *_: Any) -> None:
        pass


def test_weights_come_from_the_hub_once_and_without_it_one_question_is_asked(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub.content, Hub.asked = b"weights", []
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    try:
        assert hub.pretrained_weights("resnet10t").read_bytes() == b"weights"
        assert ("GET", "/timm/resnet10t.c3_in1k/resolve/main/model.safetensors") in Hub.asked
        Hub.asked.clear()
        assert hub.pretrained_weights("resnet10t").read_bytes() == b"weights"
        assert not Hub.asked  # the cache
    finally:
        server.shutdown()
        server.server_close()
    tried = []
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: (tried.append(to), connect(self, to))[1])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "empty"))
    with pytest.raises(UserError, match="the Hugging Face hub was not reached"):
        hub.pretrained_weights("resnet10t")
    assert len(tried) == 1


def test_pretrained_weights_that_cannot_be_fetched(data: dict[str, Path], here: Path, hcnet: Hcnet,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """One sentence that says what to bring where; without the flag nothing is fetched (see conftest.offline)."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "hub"))
    done = hcnet("pretrain", "--model", "resnet10t", *TASKS["pretrain"], "--data", data["pretrain"], "--pretrained")
    assert (done.code, "Traceback" in done.err) == (2, False), done.err
    assert "hf download timm/resnet10t.c3_in1k model.safetensors" in done.err
    for given, words in (
        (("--size", "pico"), "There are no weights in timm of HcNet"),
        (("--model", "my_net.py:build"), "There are no weights in timm of my_net.py:build"),
        (("--model", "resnet10t", "--init", "none"), "--init does too"),
    ):
        done = hcnet("pretrain", *given, *TASKS["pretrain"], "--data", data["pretrain"], "--pretrained")
        assert (done.code, words in done.err) == (2, True), done.err


def test_pretrained_weights_are_loaded_and_accounted_for(
    data: dict[str, Path], here: Path, hcnet: Hcnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(timm.create_model("resnet10t", num_classes=5).state_dict(), "model.safetensors")
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: "model.safetensors")
    given = ("--model", "resnet10t", *TASKS["pretrain"], "--data", data["pretrain"], "--set", "data.mean=[0.5,0.5,0.5]")
    done = hcnet("pretrain", *given, "--pretrained", "--name", "a")
    assert done.code == 0, done.err
    assert "re-initialised (shape differs): fc.bias, fc.weight" in done.err
    assert "--set 'data.mean=[0.485,0.456,0.406]'" in done.err
    assert hcnet("pretrain", *given, "--init", "model.safetensors", "--name", "b").code == 0
    assert hcnet("pretrain", *given, "--name", "c").code == 0
    prints = [runs.read_record(here / f"results/runs/{name}/run.json").fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


# --- a file of one's own ----------------------------------------------------------------------------------------------


def test_an_edited_file_is_another_run_and_the_copy_goes_on(data: dict[str, Path], here: Path, hcnet: Hcnet) -> None:
    given = arguments("pretrain", "my_net.py:build", data)
    assert hcnet(*given).code == 0
    run = only_run(here / "results")
    assert (run / "model.py").read_text() == MY_NET
    info = runs.read_record(run / "run.json")
    assert (info.model, len(info.model_file)) == ("build", 16)

    (here / "my_net.py").write_text(MY_NET.replace("0.3", "0.4"))
    assert "This run is finished" not in hcnet(*given).err
    assert len(list((here / "results/runs").iterdir())) == 2
    done = hcnet(*arguments("pretrain", "my_net.py:build", data, "--name", run.name))
    assert (done.code, "model.digest" in done.err) == (2, True), done.err

    (here / "my_net.py").unlink()
    copied = arguments("pretrain", f"{run}/model.py:build", data)
    assert "This run is finished" in hcnet(*copied).err
    done = hcnet("evaluate", run)
    assert (done.code, f"--model {run}/model.py:build" in done.err) == (2, True), done.err
    done = hcnet("evaluate", run, "--model", f"{run}/model.py:build")
    assert (done.code, "Equal to the run's record" in done.err) == (0, True), done.err


def test_no_recipe_and_no_study_runs_a_file(data: dict[str, Path], here: Path, hcnet: Hcnet) -> None:
    (here / "my_net.py").write_text("raise SystemExit('it ran')")
    done = hcnet("recipes", "cp", "pretrain/digits", "mine.yaml")
    text = (here / "mine.yaml").read_text()
    assert "\nmodel:" in text
    before, after = text[: text.index("\nmodel:")], text[text.index("\ndata:") :]
    (here / "mine.yaml").write_text(f"{before}\nmodel: {{name: 'my_net.py:build'}}\n{after}")
    done = hcnet("pretrain", "--recipe", "mine.yaml", "--data", data["pretrain"])
    assert (done.code, "which runs only if the command line names it" in done.err) == (2, True), done.err
    (here / "study.yaml").write_text("title: t\narms: {a: {}, b: {model.name: 'my_net.py:build'}}\n")
    done = hcnet("ablate", "--study", "study.yaml", "--dry-run")
    assert (done.code, "which runs only if the command line names it" in done.err) == (2, True), done.err


MISTAKES = {
    "my_net.py:bild": 'Did you mean "build"?',
    "my_nets.py:build": "There is no file my_nets.py",
    "my_net.py": "FILE.py:FUNCTION",
    "import.py:build": "import.py cannot be executed: ModuleNotFoundError: No module named 'nowhere' (line 2)",
    "exit.py:build": "exit.py cannot be executed: SystemExit: no (line 1)",
    "syntax.py:build": "syntax.py cannot be executed: SyntaxError",
    "other.py:raises": "KeyError: 'dims' (line 3)",
    "other.py:number": "other.py:number returned int",
    "other.py:logits": "returned [1, 7] for one image",
    "other.py:Draws": "other.py:Draws answers otherwise when it is asked again",
    "other.py:Mixes": "other.py:Mixes answers otherwise for an image alone than for the same image in a batch",
    "other.py:frozen": "No parameter of the model is trained",
    "other.py:waves": "The model's 3.phase is a complex64 tensor",
    "convnext_tny": 'Did you mean "convnext_tiny"?',
    "hcnet_tiny": "--size t",
    "beside.py:build": "beside.py imports blocks.py, which lies beside it: a run keeps beside.py alone",
    "maxvit_rmlp_pico_rw_256": "does not take images of 100 x 100",
}
FILES = {
    "beside.py": "import torch\nfrom blocks import Block\ndef build(num_classes): return Block()\n",
    "blocks.py": "from torch import nn\nclass Block(nn.Module): pass\n",
    "import.py": "import os\nimport nowhere\n",
    "exit.py": "raise SystemExit('no')\n",
    "syntax.py": "def build(:\n",
    "other.py": "import torch\nfrom torch import nn\n"
    "def raises(num_classes): raise KeyError('dims')\n"
    "def number(num_classes): return 3\n"
    "def logits(num_classes): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7))\n"
    "def small(num_classes): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))\n"
    "class Draws(nn.Module):\n"
    "    def __init__(self, num_classes):\n"
    "        super().__init__()\n"
    "        self.inner = small(num_classes)\n"
    "    def forward(self, x): return self.inner(x + torch.rand_like(x))\n"
    "class Mixes(Draws):\n"
    "    def forward(self, x): return self.inner(x) - self.inner(x).mean(0)\n"
    "def frozen(num_classes): return small(num_classes).requires_grad_(False)\n"
    "class Wave(nn.Module):\n"
    "    def __init__(self):\n"
    "        super().__init__()\n"
    "        self.phase = nn.Parameter(torch.ones(1, dtype=torch.complex64))\n"
    "    def forward(self, x): return (x * self.phase).real\n"
    "def waves(num_classes): return small(num_classes).append(Wave())\n",
}


@pytest.mark.parametrize("model", MISTAKES)
def test_mistakes_are_one_sentence(model: str, data: dict[str, Path], here: Path, hcnet: Hcnet) -> None:
    for name, text in FILES.items():
        (here / name).write_text(text)
    size = ("--set", "data.img_size=100") if model.startswith("maxvit") else ()
    done = hcnet("pretrain", "--model", model, *TASKS["pretrain"], *size, "--data", data["pretrain"])
    assert (done.code, "Traceback" in done.err) == (2, False), done.err
    assert MISTAKES[model] in done.err
    assert not (here / "results").exists()


def test_further_mistakes(data: dict[str, Path], here: Path, hcnet: Hcnet) -> None:
    for given, words in (
        (("--model", "resnet18", "--size", "t"), "--size is for HcNet, --model for other models"),
        (("--size", "t", "--set", "model.name=resnet18"), "--set model.name for other models"),
        (("--model", "resnet18", "--set", "model.args.depth=3"), "unexpected keyword argument 'depth'"),
        (("--model", "resnet18", "--set", "model.args.chanels=[8,8,8,8]"), 'Did you mean "channels"?'),
        (("--model", "my_net.py:MyNet", "--set", "model.args.widht=8"), 'Did you mean "width"?'),
    ):
        done = hcnet("pretrain", *given, *TASKS["pretrain"], "--data", data["pretrain"])
        assert (done.code, words in done.err) == (2, True), done.err


def test_a_file_without_maps_is_told_where_to_read_of_them(data: dict[str, Path], here: Path, hcnet: Hcnet) -> None:
    (here / "my_net.py").write_text(MY_NET.replace("forward_intermediates", "maps"))
    done = hcnet(*arguments("finetune-seg", "my_net.py:build", data, "--init", "none", "--dry-run"))
    assert (done.code, "offers no feature maps" in done.err, "convnext" in done.err) == (2, True, False), done.err
    assert "docs/extending.md" in done.err
    page = (Path(__file__).parents[1] / "docs/extending.md").read_text()
    assert "forward_intermediates" in page.partition("\n## A backbone\n")[2].partition("\n## ")[0]


def test_maps_that_are_not_those_promised() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.feature_info = [{"num_chs": 3, "reduction": stride} for stride in (4, 8, 16, 32)]
            self.conv = nn.Conv2d(3, 3, 1)

        def forward_intermediates(self, x: torch.Tensor, indices: Any = None, intermediates_only: bool = True) -> Any:
            return [self.conv(x)] * 4

    with pytest.raises(UserError, match="feature_info promises"):
        backbone._try_maps("mine", backbone.FeatureMaps("mine", Wrong()), freeze_unused=False)


def test_bench_and_pretrain_build_the_same_model() -> None:
    from hcnet_cli.bench import choices
    from hcnet_cli.bench import models as bench

    ours = backbone.create("vit_tiny_patch16_224", 1000, {}, img_size=64)
    timed = bench.create(choices.model_name("vit_tiny_patch16_224"), 64, "")
    assert {n: v.shape for n, v in ours.state_dict().items()} == {n: v.shape for n, v in timed.state_dict().items()}
