"""Optimizers by name (timm's factory), their state as plain data, and the learning rate of each step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from types import MappingProxyType
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from torch import Tensor, nn
from torch.optim import Optimizer

from hcnet_cli.console import UserError, did_you_mean

FUSED_CLASSES = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
FUSED_DEVICES = ("cpu", "cuda")
# Arguments that choose another implementation of the same update; `fused` excludes the other two.
IMPLEMENTATION = ("fused", "foreach", "differentiable", "capturable")
BUILT = ("params", "lr", "weight_decay", "lr_scale", *IMPLEMENTATION)  # keys of a parameter group that are no state


# --- building ---------------------------------------------------------------------------------------------------------


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    args: Mapping[str, Any],
    lr: float,
    weight_decay: float,
    no_decay: str,
    scales: Mapping[str, float] = MappingProxyType({}),
) -> Optimizer:
    """The optimizer `name` of timm over the trainable parameters of `model`, with decay by the rule `no_decay`.

    `args` are the optimizer's own arguments; Muon also takes `fallback_list`, patterns of parameter names that its
    AdamW updates. `scales`: factors on the learning rate by parameter name, 1 for others; a group has its factor as
    `lr_scale`, which whoever sets the rate of a step applies. UserError for an unknown name, a wrong argument, or an
    optimizer that cannot be used here.
    """
    check_optimizer(name, args)
    return _build(model, name, args, lr, weight_decay, no_decay, scales)


def check_optimizer(name: str, args: Mapping[str, Any]) -> None:
    """UserError that names the recipe key, unless this optimizer exists, takes `args` and resumes exactly.

    Needs no model: it is built over one small parameter. tests/test_optim.py proves for every optimizer that passes
    that steps interrupted by saving and loading the state equal uninterrupted ones.
    """
    known = _known_optimizers()
    if name not in known:
        raise UserError(
            f'optim.name: unknown optimizer "{name}".{did_you_mean(name, known)}',
            hint=f"Known (those of timm): {', '.join(known)}.",
        )
    if get_optimizer_info(name).second_order:
        raise UserError(f"optim.name: {name} needs second derivatives, which training does not compute.")
    _check_argument_names(name, args)
    probe = nn.utils.skip_init(nn.Linear, 5, 6)  # draws nothing
    for parameter in probe.parameters():
        parameter.grad = torch.ones_like(nn.init.zeros_(parameter))
    optimizer = _build(probe, name, args, lr=1e-3, weight_decay=0.05, no_decay="1d")
    try:
        with torch.random.fork_rng(devices=[]):
            optimizer.step()
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
        raise _refused(name, error) from None
    if callable(getattr(optimizer, "eval", None)):
        raise UserError(
            f"optim.name: {name} is not supported: it keeps other weights for evaluation than for training."
        )
    if _own_state(optimizer):
        raise UserError(
            f"optim.name: {name} is not supported: it keeps state that a checkpoint cannot hold, so an interrupted "
            "run would give other numbers."
        )


def decays(name: str, parameter: nn.Parameter, rule: str) -> bool:
    """Whether weight decay acts on a parameter.

    "1d": not on biases and 1-D parameters (Swin `optimizer.py set_weight_decay`).
    "norm": not on parameters whose name contains "norm" (Swin detection and segmentation, `paramwise_cfg` custom keys).
    Neither acts on what the model itself spares, see `spared`.
    """
    if rule == "norm":
        return "norm" not in name
    return parameter.ndim > 1 and not name.endswith(".bias")


def spared(model: nn.Module) -> set[str]:
    """Parameters that weight decay never acts on, by the model's or one of its parts' own `no_weight_decay()`: timm's
    models name position tables and class tokens there.
    """
    names: set[str] = set()
    for prefix, module in model.named_modules():
        if callable(named := getattr(module, "no_weight_decay", None)):
            names |= {f"{prefix}.{name}" if prefix else name for name in named()}
    return names


def reads_found_inf(optimizer: Optimizer) -> bool:
    """Whether `optimizer.found_inf`, a flag on the device, makes a step leave the weights as they are."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and isinstance(optimizer, FUSED_CLASSES)


def _build(
    model: nn.Module,
    name: str,
    args: Mapping[str, Any],
    lr: float,
    weight_decay: float,
    no_decay: str,
    scales: Mapping[str, float] = MappingProxyType({}),
) -> Optimizer:
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}
    fallback = plain.pop("fallback_list", ())
    optimizer_class = get_optimizer_class(name, bind_defaults=False)
    device = next(model.parameters()).device.type
    if optimizer_class in FUSED_CLASSES and device in FUSED_DEVICES and not plain.keys() & set(IMPLEMENTATION):
        plain["fused"] = True
    groups = _parameter_groups(model, weight_decay, no_decay, fallback, scales)
    try:
        return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=weight_decay, **plain)
    except (TypeError, ValueError, AssertionError, RuntimeError, ImportError) as error:
        raise _refused(name, error) from None


def _refused(name: str, error: Exception) -> UserError:
    shown = str(error).rstrip(".") or type(error).__name__
    return UserError(f"optim.args: {name} does not accept these arguments: {shown}.")


def _parameter_groups(
    model: nn.Module, weight_decay: float, no_decay: str, fallback: Sequence[str], scales: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Decayed parameters first. The order is part of the result: it changes the last bits of the gradient norm."""
    members: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    exempt = spared(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_fallback = any(fnmatch(name, pattern) for pattern in fallback)
            decayed = name not in exempt and decays(name, parameter, no_decay)
            members.setdefault((not decayed, in_fallback, scales.get(name, 1.0)), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if spared else weight_decay,
            **({"use_fallback": True} if in_fallback else {}),
            **({"lr_scale": scale} if scale != 1 else {}),
        }
        for (spared, in_fallback, scale), parameters in sorted(members.items(), key=lambda item: item[0])
    ]


def _known_optimizers() -> list[str]:
    """The names in timm, without those that need apex or bitsandbytes."""
    names = [str(name) for name in list_optimizers()]
    return [name for name in names if not isinstance(get_optimizer_info(name).opt_class, str)]


def _check_argument_names(name: str, args: Mapping[str, Any]) -> None:
    """Each must be an argument of the optimizer; timm's factory would drop some of the others silently."""
    info = get_optimizer_info(name)
    parameters = inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters
    own = [key for key in parameters if key not in ("params", "lr", "weight_decay")]
    dropped = [key for key, taken in (("eps", info.has_eps), ("betas", info.has_betas)) if not taken]
    known = [key for key in own if key not in dropped] + (["fallback_list"] if "muon" in name else [])
    for key in args:
        if key in ("lr", "weight_decay"):
            raise UserError(f"optim.args.{key}: set optim.{key} instead.")
        if key not in known:
            raise UserError(
                f"optim.args.{key}: {name} has no such argument.{did_you_mean(key, known)}",
                hint=f"Its arguments: {', '.join(known)}. --set 'optim.args={{...}}' replaces all of them.",
            )


# --- state ------------------------------------------------------------------------------------------------------------
#
# torch.distributed.checkpoint.state_dict does the same by parameter name, but makes the state of a new optimizer by a
# step with zero gradients, which also advances counters kept elsewhere, and loses the memory layout of channels-last
# tensors. Optimizer.state_dict has neither fault.


def state_to_save(optimizer: Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, the rest as JSON-able data) of an optimizer's state.

    A tensor of a parameter's state is named "<parameter>:<slot>"; one of a parameter group, "group <number>:<key>".
    The rest has the same names. TypeError for state that is neither a tensor nor plain data.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, Any] = {}
    for parameter, slots in optimizer.state.items():
        found |= {f"{names[parameter]}:{slot}": value for slot, value in slots.items()}
    for number, group in enumerate(optimizer.param_groups):
        found |= {f"group {number}:{key}": group[key] for key in _changed_keys(optimizer, group)}
    if own := _own_state(optimizer):
        raise TypeError(f"state of the optimizer itself: {', '.join(own)}")
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in found.items() if not isinstance(value, Tensor)}
    for name, value in rest.items():
        if not isinstance(value, (int, float, str, bool, type(None))):
            raise TypeError(f"{name} is a {type(value).__name__}")
    return tensors, rest


def load_state(optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Gives a new optimizer the state that `state_to_save` returned, each tensor in its parameter's memory layout.

    UserError if the state is of other parameters.
    """
    packed = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {parameter: name for name, parameter in model.named_parameters()}
    place = {names[parameter]: index for index, parameter in enumerate(parameters)}
    for key, value in {**tensors, **rest}.items():
        owner, _, slot = key.rpartition(":")
        if owner in place:
            packed["state"].setdefault(place[owner], {})[slot] = value
        elif owner.startswith("group ") and int(owner[6:]) < len(packed["param_groups"]):
            packed["param_groups"][int(owner[6:])][slot] = value
        else:
            raise UserError(
                f"The checkpoint has optimizer state of {owner}, which is not trained here.",
                hint="It belongs to another model. Start over with --fresh, or give this run another --name.",
            )
    packed["state"] = dict(sorted(packed["state"].items()))  # in the order of the parameters, as the optimizer makes it
    optimizer.load_state_dict(packed)
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                slots[slot] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _own_state(optimizer: Optimizer) -> set[str]:
    """What an optimizer keeps apart from its parameters and groups, such as Kron's random generator."""
    return set(optimizer.state_dict()) - {"state", "param_groups"}


def _changed_keys(optimizer: Optimizer, group: Mapping[str, Any]) -> list[str]:
    """Keys of a parameter group that hold state: what the optimizer added (LAMB's `step`) or changed since."""

    def as_built(key: str) -> bool:
        if key not in optimizer.defaults or isinstance(group[key], Tensor):
            return False
        return bool(group[key] == optimizer.defaults[key])

    return [key for key in group if key not in BUILT and not as_built(key)]


# --- learning rate ----------------------------------------------------------------------------------------------------


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
    """Learning rate of optimizer step `step`; the first step is 0.

    cosine     Warm-up rises linearly from lr * warmup_ratio to lr; a cosine then falls to min_lr. The cosine starts
               after warm-up (timm CosineLRScheduler with warmup_prefix) or, with `warmup_inside`, at step 0, where
               warm-up replaces its beginning (without warmup_prefix).
    multistep  lr * gamma^(milestones passed), times the warm-up factor (mmcv StepLrUpdaterHook, linear warm-up).
    poly       lr falls to min_lr as (1 - step/total)^power, times the warm-up factor (mmcv PolyLrUpdaterHook).

    The warm-up factor of the last two rises linearly from warmup_ratio to 1.
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
    left: float = (1 - min(1.0, step / total_steps)) ** power
    return (min_lr + (lr - min_lr) * left) * factor
