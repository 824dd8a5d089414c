"""When a faster form may run."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def on_cpu(x: Tensor) -> bool:
    """Whether x is a tensor on the CPU that is computed now or in a compiled graph, not traced for another program."""
    if not isinstance(x, Tensor) or x.device.type != "cpu":  # torch.fx passes placeholders
        return False
    return not torch.jit.is_tracing() and not torch.compiler.is_exporting()


class PlainWhenScripted:
    """Gives torch.jit.script the layer itself, because TorchScript cannot call the forward of a base class.

    torch.jit.script puts that layer into the model too, so the model is as it was before `accelerate`.
    """

    plain: type[nn.Module]

    def __prepare_scriptable__(self) -> nn.Module:
        layer = self.plain.__new__(self.plain)
        layer.__dict__.update({k: v for k, v in self.__dict__.items() if not k.startswith("_packed_")})
        layer.__dict__["_modules"] = dict(self.__dict__["_modules"])
        return layer
