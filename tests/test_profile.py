"""Parameters and multiply-accumulates against counts by hand and published figures; throughput and memory run."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hcnet_cli.profile import count_macs, count_params, evaluating, peak_memory_mb, throughput


class Pieces(nn.Module):
    """One of each that counts, and of each that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 6)
        self.register_buffer("constant", torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.up(self.depthwise(self.conv(x))))) * self.constant
        tokens = self.fc(x.flatten(2).transpose(1, 2))
        return F.softmax(tokens @ tokens.transpose(1, 2), dim=-1).mean()


def test_macs_and_params_by_hand() -> None:
    height, width = 6, 10
    tokens = 4 * height * width
    conv = height * width * 8 * 3 * 9
    depthwise = height * width * 8 * 25
    up = height * width * 8 * 4 * 4
    fc = tokens * 4 * 6
    attention = tokens * tokens * 6
    model = Pieces()
    assert count_macs(model, torch.empty(1, 3, height, width)) == conv + depthwise + up + fc + attention
    assert count_macs(model, torch.empty(3, 3, height, width)) == 3 * (conv + depthwise + up + fc + attention)
    assert count_params(model) == (3 * 8 * 9 + 8) + (8 * 25 + 8) + (8 * 4 * 4 + 4) + 8 + (4 * 6 + 6)


@pytest.mark.parametrize(
    ("name", "params", "gmacs"),
    [("resnet50", 25.6, 4.1), ("swin_tiny_patch4_window7_224", 28.3, 4.5), ("vit_tiny_patch16_224", 5.7, 1.3)],
)
def test_published_figures(name: str, params: float, gmacs: float) -> None:
    """The convention is the papers': attention is counted, whichever kernel computes it."""
    with torch.device("meta"):
        model = timm.create_model(name)
    assert round(count_params(model) / 1e6, 1) == params
    assert round(count_macs(model, torch.empty(1, 3, 224, 224)) / 1e9, 1) == gmacs


def test_counting_leaves_the_model_as_it_was() -> None:
    model = Pieces().train()
    model.conv.eval()  # frozen parts keep their mode
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_macs(model, torch.empty(2, 3, 8, 8))
    assert [module.training for module in model.modules()] == [True, False, True, True, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())


def test_shared_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert count_params(model) == 16
    assert count_macs(model, torch.empty(1, 4)) == 32


def test_evaluating_restores_modes_after_an_error() -> None:
    model = Pieces().train()

    def fail() -> None:
        with evaluating(model):
            assert not model.norm.training
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert model.norm.training


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_throughput_runs_the_model_asked_for(precision: str) -> None:
    seen = []

    class Model(nn.Module):
        in_chans = 1

        def forward(self, x: Tensor) -> Tensor:
            out = F.conv2d(x, torch.ones(1, 1, 1, 1))
            seen.append((x.shape, out.dtype, self.training, torch.is_inference_mode_enabled()))
            return out

    rate = throughput(Model(), 16, batch_size=2, seconds=0.0, device="cpu", precision=precision)
    assert rate > 0
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    assert set(seen) == {(torch.Size([2, 1, 16, 16]), dtype, False, True)}


def test_peak_memory_is_a_plausible_number_of_mib() -> None:
    before = peak_memory_mb()
    block = torch.ones(64 * 2**18)  # 64 MiB, touched
    assert 50 < before <= peak_memory_mb() < 200_000
    assert block.numel() > 0
