"""The layers of a model, from its stem to its head: what `train.freeze` freezes and `optim.layer_decay` slows down.

A model names them by timm's `group_matcher`: the stem, then the stages, or (fine) their blocks. A vision transformer
has blocks alone, which are then its stages too. What the matcher does not name belongs to the head.
"""

from __future__ import annotations

from typing import Any

from timm.models._manipulate import group_with_matcher
from torch import nn

from hcnet_cli.console import UserError
from hcnet_cli.models.backbone import FeatureMaps

UNMATCHED = "\0"  # a name that no matcher knows: its layer is the head's
HINT = "timm's models and HcNet have group_matcher and get_classifier; a model of your own can (docs/finetuning.md)."


def find_backbone(network: Any) -> tuple[str, Any]:
    """(what its parameters' names begin with, the module) of the part of a network that pretraining trains: a
    classifier is that part itself.
    """
    found = getattr(network, "backbone", None)
    if found is None:
        return "", network
    return ("backbone.model.", found.model) if isinstance(found, FeatureMaps) else ("backbone.", found)


def parameter_layers(backbone: Any, coarse: bool = False) -> tuple[dict[str, int], int]:
    """(the layer of each parameter, the layer of the head). Layer 0 is the stem.

    coarse: a layer for each stage, not for each block. UserError for a model that names no layers.
    """
    name = type(backbone).__name__
    if not hasattr(backbone, "group_matcher"):
        raise UserError(f"{name} does not say what its stages are: it has no group_matcher.", hint=HINT)
    named = [*backbone.named_parameters(), (UNMATCHED, None)]
    try:
        layers: dict[str, int] = group_with_matcher(iter(named), backbone.group_matcher(coarse=coarse), reverse=True)
    except Exception as error:
        raise UserError(f"The group_matcher of {name} fails: {type(error).__name__}: {error}.", hint=HINT) from error
    head = layers.pop(UNMATCHED)
    if head == 0:
        raise UserError(f"{name} does not say what its stages are: its group_matcher names no parameter.", hint=HINT)
    return layers, head


def learning_rate_scales(network: nn.Module, decay: float) -> dict[str, float]:
    """The factor on the learning rate of each parameter of the backbone: decay ^ (layers between it and the head).

    As in BEiT (`LayerDecayValueAssigner`) and timm's `param_groups_layer_decay`; the factor of the head is 1.
    """
    prefix, backbone = find_backbone(network)
    layers, head = parameter_layers(backbone)
    return {f"{prefix}{name}": decay ** (head - layer) for name, layer in layers.items()}


def freeze(network: nn.Module, what: str | int) -> None:
    """Stops the training of a part of a network's backbone: "backbone", all but the head; a number, the stem and as
    many stages.

    Its parameters require no gradient, and its modules are in evaluation mode: batch norm keeps its statistics, nothing
    is dropped. Nobody may call `train()` on the network afterwards. UserError for a model that names no such part.
    """
    prefix, backbone = find_backbone(network)
    if isinstance(what, int):
        layers, head = parameter_layers(backbone, coarse=True)
        if what >= head:
            raise UserError(
                f"train.freeze: {type(backbone).__name__} has {head - 1} stages, not {what}.",
                hint="--freeze backbone freezes all but the head.",
            )
        frozen = [parameter for name, parameter in backbone.named_parameters() if layers[name] <= what]
    else:
        kept = [] if prefix else _head(backbone)
        frozen = [one for one in backbone.parameters() if not any(one is other for other in kept)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for module in backbone.modules():
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def _head(classifier: Any) -> list[nn.Parameter]:
    """The parameters of a classifier's last layer, or of its last layers where it has several."""
    found = classifier.get_classifier() if hasattr(classifier, "get_classifier") else ()
    layers = found if isinstance(found, tuple) else (found,)
    parameters = [one for layer in layers if isinstance(layer, nn.Module) for one in layer.parameters()]
    if not parameters:
        raise UserError(f"{type(classifier).__name__} does not say which layer is its head.", hint=HINT)
    return parameters
