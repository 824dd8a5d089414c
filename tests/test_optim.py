"""Protects optimizers, their state, schedules and decay rules: compared with torch, timm and the rules written out."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from hcnet_cli import checkpoint, optim
from hcnet_cli.console import UserError
from hcnet_cli.rng import seeded


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


class Net(nn.Module):
    """A channels-last convolution, a norm and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(0):
            self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
            self.norm = nn.GroupNorm(1, 4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.fc = nn.Linear(4, 5)

    def train_on(self, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            with seeded(step):
                images = torch.randn(8, 3, 6, 6).to(memory_format=torch.channels_last)
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (step + 1)
            optimizer.zero_grad()
            self.fc(self.norm(self.conv(images)).mean((2, 3))).square().sum().backward()
            optimizer.step()


def build(net: nn.Module, name: str = "adamw", **args: Any) -> torch.optim.Optimizer:
    return optim.build_optimizer(net, name=name, args=args, lr=0.01, weight_decay=0.05, no_decay="1d")


def test_adamw_is_torchs_with_decayed_parameters_first() -> None:
    ours, theirs = Net(), Net()
    decayed = [theirs.conv.weight, theirs.fc.weight]
    others = [p for p in theirs.parameters() if p.requires_grad and not any(p is q for q in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    ours.train_on(optimizer := build(ours, betas=[0.9, 0.99], eps=1e-7), range(5))
    theirs.train_on(torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), eps=1e-7, fused=True), range(5))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]


def usable() -> list[str]:
    """Every optimizer of timm that may be named."""
    names = []
    for name in optim._known_optimizers():
        with contextlib.suppress(UserError):
            optim.check_optimizer(name, {})
            names.append(name)
    return names


@pytest.mark.parametrize("name", usable())
def test_state_that_was_saved_and_loaded_is_the_same_state(name: str, tmp_path: Path) -> None:
    """Through a checkpoint on the disk: the same weights, and state in the memory layout that the optimizer chose."""
    whole, first, second = Net(), Net(), Net()
    whole.train_on(straight := build(whole, name), range(8))
    first.train_on(before := build(first, name), range(3))
    tensors, rest = optim.state_to_save(before, first)
    checkpoint.write(tmp_path, {"model": first.state_dict(), "optimizer": tensors}, {"optimizer": rest})
    found = checkpoint.read(tmp_path)
    assert found is not None
    second.load_state_dict(found[0]["model"])
    optim.load_state(after := build(second, name), second, found[0]["optimizer"], found[1]["optimizer"])
    second.train_on(after, range(3, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    for ours, theirs in zip(after.state.values(), straight.state.values(), strict=True):
        assert ours.keys() == theirs.keys()
        for slot, value in theirs.items():
            same = torch.equal(ours[slot], value) if isinstance(value, Tensor) else ours[slot] == value
            assert same, slot
            assert not isinstance(value, Tensor) or ours[slot].stride() == value.stride(), slot


def test_loading_keeps_the_implementation_of_this_device() -> None:
    """A run that goes on where its optimizer is not fused, or is: the state says nothing of that."""
    first, second = Net(), Net()
    first.train_on(before := build(first), range(2))
    optim.load_state(after := build(second, foreach=True), second, *optim.state_to_save(before, first))
    assert not optim.reads_found_inf(after)
    assert optim.reads_found_inf(before)
    second.train_on(after, range(2, 4))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("lam", {}, 'optim.name: unknown optimizer "lam". Did you mean "lamb"?'),
        ("fusedlamb", {}, 'optim.name: unknown optimizer "fusedlamb"'),
        ("lookahead_adamw", {}, "optim.name: unknown optimizer"),
        ("adahessian", {}, "optim.name: adahessian needs second derivatives"),
        ("kron", {}, "optim.name: kron is not supported: it keeps state that a checkpoint cannot hold"),
        ("adamw", {"beta": 1}, 'optim.args.beta: adamw has no such argument. Did you mean "betas"?'),
        ("adamw", {"momentum": 0.9}, "optim.args.momentum: adamw has no such argument."),
        ("adamw", {"layer_decay": 0.9}, "optim.args.layer_decay: adamw has no such argument."),
        ("adamw", {"lr": 1}, "optim.args.lr: set optim.lr instead."),
        ("adamw", {"betas": [0.9, 1.5]}, "optim.args: adamw does not accept these arguments: Invalid beta"),
        ("sgd", {"momentum": "high"}, "optim.args: sgd does not accept these arguments"),
        ("muon", {"ns_steps": "many"}, "optim.args: muon does not accept these arguments"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused_in_one_sentence(
    name: str, args: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        optim.check_optimizer(name, args)
    assert str(error.value).startswith(message)


def test_an_optimizer_with_other_weights_for_evaluation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedule-free optimizers exchange the weights in `eval()` and `train()`, which the engine does not call."""
    monkeypatch.setattr(torch.optim.SGD, "eval", lambda self: None, raising=False)
    with pytest.raises(UserError, match="other weights for evaluation"):
        optim.check_optimizer("sgd", {})


def test_muons_fallback_list_names_parameters_of_its_adamw() -> None:
    net = Net()
    optimizer = build(net, "muon", fallback_list=["fc.*"])
    net.train_on(optimizer, range(1))
    used = {name: optimizer.state[p]["use_muon"] for name, p in net.named_parameters() if p.requires_grad}
    assert [name for name, muon in used.items() if muon] == ["conv.weight"]


def test_checking_an_optimizer_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    optim.check_optimizer("sgd", {})
    assert torch.equal(torch.get_rng_state(), before)


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


def test_what_a_model_of_timm_spares_is_not_decayed_wherever_it_stands() -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24, num_heads=(1, 2, 4, 8))
    vit = timm.create_model("vit_tiny_patch16_224", depth=1)
    net = nn.ModuleDict({"backbone": nn.ModuleDict({"model": swin}), "other": vit})
    groups = optim.build_optimizer(net, name="adamw", args={}, lr=1, weight_decay=0.05, no_decay="norm").param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    free = {name for name, p in net.named_parameters() if id(p) not in decayed and "norm" not in name}
    tables = {f"backbone.model.layers.{i}.blocks.0.attn.relative_position_bias_table" for i in range(4)}
    assert free == tables | {"other.pos_embed", "other.cls_token"}
