"""hcnet bench roofline: one layer counted by hand, the whole model against an independent count of its operations."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import Hcnet
from torch import nn

from hcnet_cli import profile
from hcnet_cli.bench import models as bench
from hcnet_cli.bench import roofline

H100 = roofline.Machine(3.35e12, 989e12, "bf16")
PAGE = (Path(__file__).parent.parent / "docs" / "speed.md").read_text()
SMALL = ("--models", "hcnet_pico", "--img-size", "32", "--batch-size", "4")


def counted(layer: nn.Module, *shape: int, train: bool = False) -> dict[str, roofline.Cost]:
    layer.to("meta", torch.bfloat16)
    with torch.set_grad_enabled(train), roofline.Counter(H100) as counter:
        out = layer(torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=train))
        if train:
            out.backward(torch.empty_like(out))
    return counter.costs


def test_a_layer_of_each_kind_is_the_count_by_hand() -> None:
    """Bytes: input, weight and output once, two each in bf16. Operations: two for a multiply-accumulate."""
    cost = counted(nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False), 2, 8, 14, 14)["depthwise convolution"]
    values = 2 * 8 * 14 * 14
    assert (cost.kernels, cost.operations, cost.bytes) == (1, 2 * 25 * values, 2 * (2 * values + 8 * 25))
    assert cost.seconds == pytest.approx(cost.bytes / 3.35e12)  # 25 FLOP/byte at most: memory binds
    cost = counted(nn.Linear(2048, 4096, bias=False), 4096, 2048)["linear"]
    assert cost.operations == 2 * 4096 * 2048 * 4096
    assert cost.bytes == 2 * (4096 * 2048 + 2048 * 4096 + 4096 * 4096)
    assert cost.seconds == pytest.approx(cost.operations / 989e12)  # 1,024 FLOP/byte: the products bind
    cost = counted(nn.Conv2d(3, 16, 3, stride=2, padding=1), 2, 3, 32, 32)["convolution"]
    assert cost.operations == 2 * (2 * 16 * 16 * 16) * 27
    cost = counted(nn.GELU(), 2, 10)["activation"]
    assert (cost.operations, cost.bytes) == (20, 80)


def test_the_backward_pass_of_a_convolution_is_twice_the_forward_pass() -> None:
    """The gradients of the input and of the weight, each as many multiply-accumulates as the output."""
    forward = counted(nn.Conv2d(8, 8, 5, padding=2, groups=8), 2, 8, 14, 14)["depthwise convolution"].operations
    both = counted(nn.Conv2d(8, 8, 5, padding=2, groups=8), 2, 8, 14, 14, train=True)["depthwise convolution"]
    assert both.operations == 3 * forward


@pytest.mark.parametrize("name", ["hcnet_pico", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_the_products_of_a_model_are_those_that_profile_counts(name: str) -> None:
    size = 224 if "swin" in name else 64
    costs = roofline.count(name, "infer", 2, size, H100)
    kinds = ("linear", "convolution", "depthwise convolution", "attention")
    products = sum(costs[kind].operations for kind in kinds if kind in costs)
    macs = profile.count_macs(bench.create(name, size, ""), torch.zeros(1, 3, size, size))
    assert products == pytest.approx(2 * 2 * macs, rel=0.01)  # attention counts the elements of its softmax, too


def test_the_command_prints_every_kind_and_the_sum(hcnet: Hcnet, tmp_path: Path) -> None:
    done = hcnet("bench", "roofline", *SMALL, "--mode", "infer,train", "--output", tmp_path / "x.json")
    assert done.code == 0, done.err
    for table in json.loads((tmp_path / "x.json").read_text()):
        *kinds, whole = table["rows"]
        assert {"linear", "depthwise convolution", "norm"} <= {row["kind"] for row in kinds}
        for key in ("gflop", "mb", "microseconds"):
            assert sum(row[key] for row in kinds) == pytest.approx(whole[key])
        assert whole["images_per_second"] == pytest.approx(1e6 / whole["microseconds"], rel=1e-3)
    assert hcnet("bench", "roofline", *SMALL, "--precision", "bf16,fp32").code == 2


def test_the_rows_of_hcnet_on_the_page_are_what_the_command_prints(hcnet: Hcnet, tmp_path: Path) -> None:
    (line,) = re.findall(r"^    (hcnet bench roofline .*)$", PAGE, flags=re.MULTILINE)
    words = shlex.split(line)[1:]
    words[words.index("--models") + 1], words[-1] = "hcnet_tiny", str(tmp_path / "roofline.md")
    assert hcnet(*words).code == 0
    made = [row.replace(" ", "") for row in (tmp_path / "roofline.md").read_text().splitlines() if "hcnet_tiny" in row]
    assert len(made) > 5
    page = PAGE.replace(" ", "")
    assert all(row in page for row in made)
