"""Faster forms of HcNet's layers on the CPU, applied to a model from outside.

A form is a subclass of the layer that it speeds up, and `accelerate` exchanges the class of each layer: parameters,
hooks, state dict, `isinstance` and deep copies stay what they were. What a form cannot handle (another device, a graph
that is scripted, traced or exported) runs the layer's own forward. How forms are measured: docs/speed.md.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import torch
from torch import nn

from hcnet_cli.kernels.compare import same_results
from hcnet_cli.kernels.depthwise import SmallConduction, SmallConv2d
from hcnet_cli.kernels.linear import PackedLinear
from hcnet_cli.kernels.refinement import LeanRefinement
from hcnet_cli.models.hcnet import HcNet, HeatConduction, RefinementApproximation

SWITCH = "HCNET_KERNELS"  # environment variable; 0 turns every form off

__all__ = ["SWITCH", "LeanRefinement", "PackedLinear", "SmallConduction", "SmallConv2d", "accelerate"]


def accelerate(model: nn.Module, *, inference: bool = False) -> list[str]:
    """Exchanges layers of the HcNets in `model` for faster forms, in place; returns what was done, for people to read.

    Only HcNets are touched, and in them only layers whose class is exactly the known one. Each form is compared with
    the layer's own forward, values and gradients, once per kind and configuration; it is left out where they differ.

    Args:
        model: An HcNet, or a network that contains one. Call this after moving it to its device.
        inference: Also use forms that keep reordered copies of the weights; for a model that no longer trains.
    """
    if os.environ.get(SWITCH, "") == "0":
        return [f"no kernels: {SWITCH}=0"]
    backbones = [module for module in model.modules() if isinstance(module, HcNet)]
    if not backbones:
        return ["no kernels: the model contains no HcNet"]
    device = next(backbones[0].parameters()).device
    if device.type != "cpu":
        return [f"no kernels: they are measured on the CPU only, the model is on {device}"]
    packable = inference and torch.backends.mkldnn.is_available()
    done: Counter[str] = Counter()
    verdicts: dict[tuple[object, ...], bool] = {}
    layers: list[Any] = [layer for backbone in backbones for layer in backbone.modules()]
    for layer in layers:
        if type(layer) in (HeatConduction, SmallConduction):
            _exchange(layer, SmallConduction, "heat conduction on small maps", done, verdicts)
        if type(layer) not in (RefinementApproximation, LeanRefinement):
            continue
        _exchange(layer, LeanRefinement, "lean refinement", done, verdicts)
        if type(layer.filters) in (nn.Conv2d, SmallConv2d):
            _exchange(layer.filters, SmallConv2d, "filters on small maps", done, verdicts)
        for linear in (layer.fc1, layer.fc2) if packable else ():
            if type(linear) in (nn.Linear, PackedLinear):
                _exchange(linear, PackedLinear, "packed linear layer", done, verdicts)
    return [f"{what} x {count}" for what, count in done.items()] or ["no kernels: no layer has a known class"]


def _exchange(
    layer: nn.Module, form: type[nn.Module], name: str, done: Counter[str], verdicts: dict[tuple[object, ...], bool]
) -> None:
    """Gives `layer` the class `form` if their results agree; counts it under `name` in `done`.

    verdicts: results of earlier comparisons by kind and configuration.
    """
    if type(layer) is form:  # accelerated before
        done[name] += 1
        return
    settings = {name: value for name, value in vars(layer).items() if isinstance(value, (bool, int, float, str, tuple))}
    shapes = [(name, tuple(tensor.shape)) for name, tensor in layer.state_dict().items()]
    configuration = (form, repr(layer), str(settings), str(shapes))
    if configuration not in verdicts:
        verdicts[configuration] = same_results(layer, form)
    if verdicts[configuration]:
        layer.__class__ = form
        done[name] += 1
    else:
        done[f"{name} left out (its results differ from the layer's own)"] += 1
