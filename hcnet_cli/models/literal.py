"""HcNet spelt out literally: the authors' released formulation, layout and names, the unit of tests and of hcnet bench.

Each line is one term of the equations (paper; `HcNet/models/HcNet.py` of the authors' repository), with the separate
passes over the feature map and the contiguous layout that the released model has. Nothing of `hcnet_cli` is used.
Parameters have the authors' names and shapes, so random tensors in that layout can be run here and, remapped, there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def literal_step(u: Tensor, w: Tensor, gate: Tensor) -> Tensor:
    """One step: u + sigmoid(A mean(u)) * (conv(u, w) - u * sum(w)); w [C, 1, K, K], gate (A) [C, C, 1, 1]."""
    around = F.conv2d(u, w, padding=w.shape[-1] // 2, groups=u.shape[1])
    second_derivative = around - u * w.sum(dim=(1, 2, 3))[None, :, None, None]
    rate = torch.sigmoid(F.conv2d(F.adaptive_avg_pool2d(u, 1), gate))
    return u + rate * second_derivative


class Mlp(nn.Module):
    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, ratio * dim, 1)
        self.Filters = nn.Conv2d(ratio * dim, ratio * dim, 3, padding=1, groups=ratio * dim, bias=False)
        self.fc2 = nn.Conv2d(ratio * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.Filters(F.gelu(self.fc1(x))))


class Block(nn.Module):
    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.Anisotropic_conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)
        self.DeltaT_DeltaD = nn.Conv2d(dim, dim, 1, bias=False)
        self.norm2 = nn.GroupNorm(1, dim)
        self.mlp = Mlp(dim)

    def forward(self, u: Tensor) -> Tensor:
        u = literal_step(u, self.Anisotropic_conv.weight, self.DeltaT_DeltaD.weight)
        return u + self.mlp(self.norm2(u))


class Downsample(nn.Module):
    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.GroupNorm(1, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


class Layer(nn.Module):
    """The blocks of one resolution; the downsampling stands at the end."""

    def __init__(self, dim: int, depth: int, out_dim: int | None, kernel_size: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, kernel_size) for _ in range(depth))
        self.downsample = None if out_dim is None else Downsample(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class PatchEmbed(nn.Module):
    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
        self.norm1 = nn.GroupNorm(1, dim // 2)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(1, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x)))))


class ReferenceHcNet(nn.Module):
    """Images [B, in_chans, H, W] of any size -> logits [B, num_classes]."""

    def __init__(
        self,
        depths: Sequence[int] = (5, 5, 14, 5),
        dims: Sequence[int] = (64, 128, 320, 512),
        num_classes: int = 1000,
        in_chans: int = 3,
        kernel_size: int = 5,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(in_chans, dims[0])
        self.layers = nn.ModuleList(
            Layer(dim, depth, out_dim, kernel_size)
            for dim, depth, out_dim in zip(dims, depths, [*dims[1:], None], strict=True)
        )
        self.norm = nn.GroupNorm(1, dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(dim=(2, 3)))
