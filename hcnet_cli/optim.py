"""Optimizer, parameter groups and learning rate, all as plain functions of plain arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn


def decays(name: str, parameter: nn.Parameter, rule: str) -> bool:
    """Whether weight decay acts on a parameter.

    "1d": biases and 1-D parameters are free (Swin `optimizer.py set_weight_decay`).
    "norm": only names containing "norm" are free (Swin detection and segmentation, `paramwise_cfg` custom keys).
    """
    if rule == "norm":
        return "norm" not in name
    return parameter.ndim > 1 and not name.endswith(".bias")


def adamw(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    no_decay: str,
) -> torch.optim.AdamW:
    """AdamW with decay on the parameters that `no_decay` ("1d" or "norm") leaves; frozen parameters stay out."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[decays(name, parameter, no_decay)].append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": weight_decay * decay} for decay, params in groups.items() if params],
        lr=lr,
        betas=betas,
        eps=eps,
        fused=next(model.parameters()).device.type in ("cpu", "cuda"),
    )


def lr_at(
    step: int,
    *,
    lr: float,
    total_steps: int,
    kind: str = "cosine",
    warmup_steps: int = 0,
    warmup_ratio: float = 1e-3,
    warmup_inside: bool = False,
    min_lr: float = 0.0,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
    power: float = 1.0,
) -> float:
    """Learning rate of optimizer step `step` (the first is 0).

    cosine     rises linearly from lr * warmup_ratio to lr, then falls to min_lr; over what the warm-up leaves, or, with
               `warmup_inside`, over all steps, the warm-up hiding the beginning (timm CosineLRScheduler with and
               without warmup_prefix)
    multistep  lr * gamma^(milestones passed), times the warm-up factor (mmcv StepLrUpdaterHook, linear warm-up)
    poly       lr falls to min_lr as (1 - step/total)^power, times the warm-up factor (mmcv PolyLrUpdaterHook)

    The warm-up factor of the last two goes linearly from warmup_ratio to 1.
    """
    warming = step < warmup_steps
    factor = warmup_ratio + (1 - warmup_ratio) * step / warmup_steps if warming else 1.0
    if kind == "cosine":
        if warming:
            return lr * factor
        start = 0 if warmup_inside else warmup_steps
        done = min(1.0, (step - start) / max(1, total_steps - start))
        return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done))
    if kind == "multistep":
        return lr * gamma ** sum(step >= milestone for milestone in milestones) * factor
    assert kind == "poly", kind
    return (min_lr + (lr - min_lr) * (1 - min(1.0, step / total_steps)) ** power) * factor
