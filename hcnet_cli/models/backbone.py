"""Any model as a backbone: HcNet by its size, a model of timm by its name, or a function of the user's own.

What the heads of detection and segmentation need is `forward_intermediates` and `feature_info` as timm has them, with
four maps [B, C, H / stride, W / stride] at strides 4, 8, 16 and 32. HcNet offers that itself; `FeatureMaps` gives it to
other models of timm.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from hcnet_cli.console import UserError, did_you_mean, notice

STRIDES = [4, 8, 16, 32]


class FeatureMaps(nn.Module):
    """The maps of a model at strides 4 to 32, with nothing behind the last one; the model itself is `model`."""

    def __init__(self, name: str, model: Any) -> None:
        super().__init__()
        info = list(getattr(model, "feature_info", None) or [])
        strides = [level["reduction"] for level in info]
        if not set(STRIDES) <= set(strides) or not hasattr(model, "forward_intermediates"):
            found = (
                f"has maps at strides {', '.join(map(str, sorted(set(strides))))}"
                if strides
                else "offers no feature maps"
            )
            raise UserError(
                f"The model {name} {found}; detection and segmentation need 4, 8, 16 and 32.",
                hint="Those that have them: hcnet's sizes, convnext, pvt_v2, resnet and others. `pretrain` takes any.",
            )
        self.kept = [len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES]  # the last map of a stride
        self.feature_info = [dict(info[i]) for i in self.kept]
        if hasattr(model, "prune_intermediate_layers"):
            model.prune_intermediate_layers(self.kept, prune_norm=True, prune_head=True)
        self.model = model

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, intermediates_only: bool = True
    ) -> list[Tensor]:
        """Image [B, 3, H, W] -> the maps [B, C, H / stride, W / stride]."""
        assert intermediates_only
        maps = self.model.forward_intermediates(x, indices=self.kept, intermediates_only=True)
        return list(maps) if indices is None else [maps[i] for i in indices]


def create(name: str, num_classes: int, args: Mapping[str, Any], *, drop_path_rate: float | None = None) -> nn.Module:
    """A model of timm by name, or the result of `FUNCTION(num_classes=..., **args)` in FILE.py for "FILE.py:FUNCTION".

    With num_classes 0 it is a backbone for detection and segmentation. `drop_path_rate` goes to models that take it.
    UserError for an unknown name and for arguments that the model does not take.
    """
    if ".py:" in name:
        make = _function(name)
    elif timm.is_model(name):
        make = functools.partial(timm.create_model, name)
    else:
        raise UserError(f'model.name: there is no model "{name}" in timm.{did_you_mean(name, timm.list_models())}')
    drop_path = {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}
    try:
        try:
            model = make(num_classes=num_classes, **{**drop_path, **args})
        except TypeError as error:
            if not drop_path or "drop_path_rate" not in str(error):
                raise
            notice(f"The model {name} has no drop path: model.drop_path_rate is not used.")
            model = make(num_classes=num_classes, **args)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"The model {name} cannot be built with {dict(args)}: {error}") from None
    return model if num_classes else FeatureMaps(name, model)


def _function(name: str) -> Callable[..., nn.Module]:
    """The function that "FILE.py:FUNCTION" names."""
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"model.name: there is no file {path}.")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"model.name: {path} has no function {function}.{did_you_mean(function, dir(module))}")
    result: Callable[..., nn.Module] = found
    return result


@dataclass(frozen=True)
class Pyramid:
    """Where the four maps come from in a backbone, their channels, and whether it takes the draws of drop path."""

    indices: list[int]
    channels: list[int]
    takes_noise: bool

    @staticmethod
    def of(backbone: Any) -> Pyramid:
        """Of a backbone, whose parts behind the last map are pruned: parameters without a gradient stall several
        processes. ValueError where it has no maps at strides 4, 8, 16 and 32.
        """
        info = list(getattr(backbone, "feature_info", None) or [])
        strides = [level["reduction"] for level in info]
        if strides[-4:] != STRIDES or not hasattr(backbone, "forward_intermediates"):
            raise ValueError(
                f"{type(backbone).__name__} cannot carry this head: the last four entries of its feature_info must "
                f"have strides 4, 8, 16, 32 (they have {strides}) and it must have forward_intermediates."
            )
        indices = list(range(len(info)))[-4:]
        if hasattr(backbone, "prune_intermediate_layers"):
            backbone.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
        return Pyramid(indices, [info[i]["num_chs"] for i in indices], takes_noise(backbone.forward_intermediates))

    def norms(self) -> nn.ModuleList:
        """A GroupNorm with one group for each map, whatever norm the backbone itself has."""
        return nn.ModuleList(nn.GroupNorm(1, width) for width in self.channels)

    def maps(self, backbone: Any, norms: nn.ModuleList, x: Tensor, noise: Tensor | None = None) -> list[Tensor]:
        """Image [B, 3, H, W] -> the four normalised maps. noise: [num_blocks, B] uniform, the draws of drop path."""
        given = {"noise": noise} if self.takes_noise else {}
        found = backbone.forward_intermediates(x, indices=self.indices, intermediates_only=True, **given)
        return [norm(feature) for norm, feature in zip(norms, found, strict=True)]


def takes_noise(function: Callable[..., Any]) -> bool:
    """Whether a model draws its drop path from an argument, as HcNet does, and not from torch's generator."""
    return "noise" in inspect.signature(function).parameters
