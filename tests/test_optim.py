"""Protects the schedules and the decay rules: compared with timm and with the rules written out."""

from __future__ import annotations

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from hcnet_cli import optim


@pytest.mark.parametrize("inside", [False, True])
def test_cosine_is_timms(inside: bool) -> None:
    """Swin (warmup_prefix) and the released HcNet code (no prefix), step for step."""
    total, warmup, lr, low = 200, 20, 2e-3, 1e-5
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    reference = CosineLRScheduler(
        optimizer,
        t_initial=total if inside else total - warmup,
        lr_min=low,
        warmup_t=warmup,
        warmup_lr_init=lr * 5e-4,
        warmup_prefix=not inside,
        cycle_limit=1,
        t_in_epochs=False,
    )
    for step in range(total):
        reference.step_update(step)
        ours = optim.lr_at(
            step, lr=lr, total_steps=total, warmup_steps=warmup, warmup_ratio=5e-4, warmup_inside=inside, min_lr=low
        )
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_the_release_drops_to_0_9891_of_the_span_after_warm_up() -> None:
    """REFERENCE section 1.1, computed there in closed form."""
    lr = optim.lr_at(20, lr=2e-3, total_steps=300, warmup_steps=20, warmup_inside=True, min_lr=1e-5)
    assert (lr - 1e-5) / (2e-3 - 1e-5) == pytest.approx(0.9891, abs=5e-5)


def test_multistep_with_linear_warm_up() -> None:
    at = [
        optim.lr_at(s, lr=1.0, total_steps=12, kind="multistep", warmup_steps=4, warmup_ratio=0.001, milestones=(8, 11))
        for s in range(12)
    ]
    assert at[0] == pytest.approx(0.001)
    assert at[2] == pytest.approx(0.001 + 0.999 / 2)
    assert at[4:8] == [1.0] * 4
    assert at[8:11] == pytest.approx([0.1] * 3)
    assert at[11] == pytest.approx(0.01)


def test_poly_as_in_mmseg_0_11() -> None:
    """During warm-up: poly_lr(t) * (1 - (1 - t / warmup) * (1 - ratio)); poly runs over all steps."""
    total, warmup, ratio, lr = 1600, 150, 1e-6, 6e-5
    for step in (0, 1, 77, 149, 150, 800, 1599):
        poly = lr * (1 - step / total)
        factor = 1 - (1 - step / warmup) * (1 - ratio) if step < warmup else 1
        ours = optim.lr_at(step, lr=lr, total_steps=total, kind="poly", warmup_steps=warmup, warmup_ratio=ratio)
        assert ours == pytest.approx(poly * factor, rel=1e-12)


def test_decay_rules() -> None:
    net = nn.ModuleDict({"conv": nn.Conv2d(2, 2, 1), "norm": nn.GroupNorm(1, 2), "bn": nn.BatchNorm2d(2)})
    free = {
        rule: {name for name, p in net.named_parameters() if not optim.decays(name, p, rule)} for rule in ("1d", "norm")
    }
    assert free["1d"] == {"conv.bias", "norm.weight", "norm.bias", "bn.weight", "bn.bias"}
    assert free["norm"] == {"norm.weight", "norm.bias"}
    groups = optim.build_optimizer(net, name="adamw", args={}, lr=1, weight_decay=0.05, no_decay="1d").param_groups
    decayed = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decayed == {id(p): 0.05 if n == "conv.weight" else 0.0 for n, p in net.named_parameters()}
