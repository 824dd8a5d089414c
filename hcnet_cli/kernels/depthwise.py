"""Depthwise convolutions of maps that are smaller than the kernel, as the last stages have on small images.

oneDNN falls back to slow reference code there, in the backward pass above all. Zeros around the map are what the
convolution's own padding adds, so the layer's own forward on the padded map, cropped, gives the same values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hcnet_cli.models.hcnet import HeatConduction

from .support import PlainWhenScripted, on_cpu


def padded_to_kernel(convolve: Callable[[Tensor], Tensor], x: Tensor, kernel_size: int) -> Tensor:
    """`convolve(x)`, of a map [B, C, H, W] that is first padded with zeros to the size of the kernel."""
    if not on_cpu(x) or torch.compiler.is_compiling():
        return convolve(x)
    height, width = x.shape[2:]
    bottom, right = max(0, kernel_size - height), max(0, kernel_size - width)
    if not bottom and not right:
        return convolve(x)
    return convolve(F.pad(x, (0, right, 0, bottom)))[:, :, :height, :width]


class PaddedConv2d(PlainWhenScripted, nn.Conv2d):
    """The depthwise filters of a refinement."""

    plain = nn.Conv2d

    @staticmethod
    def example(layer: nn.Conv2d, generator: torch.Generator) -> Tensor:
        return torch.randn(2, layer.in_channels, 2, 1, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return padded_to_kernel(super().forward, x, self.kernel_size[0])


class PaddedConduction(PlainWhenScripted, HeatConduction):
    """The step of the heat equation with its flow computed on a padded map."""

    plain = HeatConduction

    @staticmethod
    def example(layer: HeatConduction, generator: torch.Generator) -> Tensor:
        return torch.randn(2, len(layer.stencil()), 2, 1, generator=generator)

    def flow(self, u: Tensor) -> Tensor:
        return padded_to_kernel(super().flow, u, 2 * self.padding + 1)
