"""Linear layers of maps by oneDNN, with weights reordered once. PyTorch's own linear layer calls BLAS in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hcnet_cli.kernels.support import PlainWhenScripted, on_cpu


class PackedLinear(PlainWhenScripted, nn.Linear):
    """For inference in float32. The reordered copy is made at the first pass and again when the weight has changed."""

    plain = nn.Linear

    @staticmethod
    def example(layer: nn.Linear, generator: torch.Generator) -> Tensor:
        return torch.randn(3, 5, 4, layer.in_features, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        usable = on_cpu(x) and x.dtype is self.weight.dtype is torch.float32 and x.ndim == 4
        if not usable or self.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        if torch.compiler.is_compiling():
            # The compiler reorders constants itself, but only those of convolutions.
            return F.conv2d(x.permute(0, 3, 1, 2), self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1)
        if self.weight.is_inference():  # made in inference mode: changes of such a weight cannot be seen
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed(), self.bias, "none", [], "")

    def _packed(self) -> Tensor:
        """The weight in oneDNN's order."""
        weight = self.weight
        key = (weight.data_ptr(), weight._version)  # load_state_dict changes the version, .to() the memory
        if self.__dict__.get("_packed_key") != key:
            self.__dict__["_packed_key"] = key
            self.__dict__["_packed_weight"] = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        return self.__dict__["_packed_weight"]

    def __getstate__(self) -> dict[str, Any]:
        """Without the copy: copies and pickles make their own."""
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_packed_")}
