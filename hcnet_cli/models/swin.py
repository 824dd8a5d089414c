"""Swin's windows on maps that they do not divide, as in Swin's own code: the map is padded, then shifted.

timm shifts first, so that the rows and columns that wrap around stand before the padding, and its mask, made for the
padded map, lets them attend to the other side of the image.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn


def _padded(x: Tensor, window: tuple[int, int]) -> Tensor:
    """[B, H, W, C] -> H and W multiples of the window's, zeros at the right and bottom."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % window[1], 0, -x.shape[1] % window[0]))


class _Block(SwinTransformerBlock):
    def _attn(self, x: Tensor) -> Tensor:
        found: Tensor = super()._attn(_padded(x, self.window_size))  # type: ignore[no-untyped-call]
        return found[:, : x.shape[1], : x.shape[2]]


class _BlockV2(SwinTransformerV2Block):
    def _attn(self, x: Tensor) -> Tensor:
        return super()._attn(_padded(x, self.window_size))[:, : x.shape[1], : x.shape[2]]


def pad_before_shifting(model: nn.Module) -> None:
    """Changes the blocks of a Swin of timm in place; other models stay as they are."""
    for module in model.modules():
        if type(module) is SwinTransformerBlock:
            module.__class__ = _Block
        elif type(module) is SwinTransformerV2Block:
            module.__class__ = _BlockV2
