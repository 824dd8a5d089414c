"""Depthwise convolutions of maps that are smaller than the kernel, as the last stages have on small images.

oneDNN falls back to slow reference code there, in the backward pass above all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hcnet_cli.kernels.support import PlainWhenScripted, on_cpu
from hcnet_cli.models.hcnet import HeatConduction


def is_small(x: Tensor, kernel_size: int) -> bool:
    """Whether the maps x [B, C, H, W] are smaller than the kernel, in a program that is neither compiled nor traced."""
    return on_cpu(x) and not torch.compiler.is_compiling() and min(x.shape[2:]) < kernel_size


def small_depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """The depthwise convolution of x [B, C, H, W] with weight [C, 1, K, K] and zero padding.

    Taps that reach beyond the whole map are cut off. With gradients, the map is padded with zeros to the size of the
    remaining kernel, so that oneDNN has fast code for the backward pass.
    """
    height, width = x.shape[2:]
    cut = max(0, weight.shape[-1] // 2 - max(height, width) + 1)
    weight = weight[:, :, cut : weight.shape[2] - cut, cut : weight.shape[3] - cut]
    kernel_size = weight.shape[-1]
    if torch.is_grad_enabled() and min(height, width) < kernel_size:
        x = F.pad(x, (0, max(0, kernel_size - width), 0, max(0, kernel_size - height)))
    out = F.conv2d(x, weight, padding=kernel_size // 2, groups=len(weight))
    return out[:, :, :height, :width]


class SmallConv2d(PlainWhenScripted, nn.Conv2d):
    """The depthwise filters of a refinement."""

    plain = nn.Conv2d

    @staticmethod
    def example(layer: nn.Conv2d, generator: torch.Generator) -> Tensor:
        return torch.randn(2, layer.in_channels, 2, 1, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return small_depthwise(x, self.weight) if is_small(x, self.kernel_size[0]) else super().forward(x)


class SmallConduction(PlainWhenScripted, HeatConduction):
    """The step of the heat equation."""

    plain = HeatConduction

    @staticmethod
    def example(layer: HeatConduction, generator: torch.Generator) -> Tensor:
        return torch.randn(2, len(layer.stencil()), 2, 1, generator=generator)

    def flow(self, u: Tensor) -> Tensor:
        return small_depthwise(u, self.stencil()) if is_small(u, 2 * self.padding + 1) else super().flow(u)
