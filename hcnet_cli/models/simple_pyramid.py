"""Maps at strides 4 to 32 from the single map of a plain vision transformer.

The simple feature pyramid of ViTDet (Li et al., ECCV 2022, section 3): deconvolutions enlarge the map, max pooling
shrinks it. Its 1x1 and 3x3 convolutions belong to the heads here, which have their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn


class SimplePyramid(nn.Module):
    """A map [B, C, H / stride, W / stride] -> one map for each of `strides`; `channels` are theirs.

    Each deconvolution doubles height and width and halves C.
    """

    def __init__(self, width: int, stride: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_level(width, stride, target) for target in strides)
        self.channels = [width // max(1, stride // target) for target in strides]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [level(x) for level in self.levels]


def _level(width: int, stride: int, target: int) -> nn.Module:
    if target > stride:
        return nn.MaxPool2d(target // stride)
    layers: list[nn.Module] = []
    while stride > target:
        if layers:
            layers += [LayerNorm2d(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, stride=2))
        width, stride = width // 2, stride // 2
    return nn.Sequential(*layers)
