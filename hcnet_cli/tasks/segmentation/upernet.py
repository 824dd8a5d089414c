"""UPerNet: a pyramid decoder that turns any four-stage backbone into a semantic segmentation network.

Unified Perceptual Parsing (Xiao et al., ECCV 2018), section 3.2, with the settings of Swin's ADE20K runs
and an auxiliary fully convolutional head. Module names are mmsegmentation's, so its heads load after
`remap_mmseg_state_dict`.

    image -> backbone -> four maps, strides 4, 8, 16, 32 -> one norm each -> UPerHead -> logits, stride 4
                                   stride 16 also goes to -> FCNHead (training only) -> auxiliary logits

Dimension letters: B batch, C channels, K classes, H x W image, h x w feature map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcnet_cli import dist
from hcnet_cli.models.backbone import Pyramid
from hcnet_cli.tasks.segmentation import spec


class SumOverProcesses(torch.autograd.Function):
    """all_reduce(sum) that gradients pass through: each process's input feeds every process's output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return dist.all_reduce_sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return dist.all_reduce_sum(grads[0])


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all processes in training; `nn.BatchNorm2d` on one process.

    `nn.SyncBatchNorm` does the same on GPUs only. Two reductions, means first, so that the variance is a
    sum of squared deviations and loses no digits to a large mean.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.processes() > 1):
            return super().forward(x)
        full = x.to(self.running_mean.dtype)  # half precision under autocast, as torch's own batch norm does
        var, mean = torch.var_mean(full, dim=(0, 2, 3), correction=0)  # [B, C, h, w] -> [C], [C]
        count = mean.new_tensor([x.numel() / x.shape[1]])
        total = SumOverProcesses.apply(torch.cat([mean * count, count]))
        mean_all, count_all = total[:-1] / total[-1], total[-1]
        var_all = SumOverProcesses.apply((var + (mean - mean_all) ** 2) * count) / count_all
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean_all, self.momentum)
            self.running_var.lerp_(var_all * count_all / (count_all - 1), self.momentum)  # unbiased, as torch
        scale = self.weight * torch.rsqrt(var_all + self.eps)
        shift = self.bias - mean_all * scale
        return torch.addcmul(shift[:, None, None], full, scale[:, None, None]).to(x.dtype)


class ConvModule(nn.Module):
    """Convolution without bias, batch norm, ReLU; keeps h x w."""

    def __init__(self, in_chans: int, out_chans: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = BatchNorm(out_chans)  # called bn, not norm: the reference decays its weight
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear to `size` (height, width), pixel corners not aligned; x itself where it has that size.

    An exported graph is for every size, so it may not depend on this shortcut; the values are the same.
    """
    if not torch.compiler.is_exporting() and x.shape[2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class AveragePool(nn.AdaptiveAvgPool2d):
    """Means over scale x scale cells. An exported graph computes them as products, for ONNX has no adaptive pooling."""

    def __init__(self, scale: int) -> None:
        super().__init__(scale)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return super().forward(x)
        rows, columns = (self._cells(side, x) for side in x.shape[2:])  # [scale, H], [scale, W]
        return rows @ x @ columns.T

    def _cells(self, side: int, x: Tensor) -> Tensor:
        """Weights [scale, side]: cell i is the mean from floor(i side / scale) to ceil((i + 1) side / scale)."""
        place, cell = torch.arange(side, device=x.device), torch.arange(self.scale, device=x.device)[:, None]
        start, end = cell * side // self.scale, ((cell + 1) * side + self.scale - 1) // self.scale
        inside = ((place >= start) & (place < end)).to(x.dtype)
        return inside / inside.sum(dim=1, keepdim=True)


class SegHead(nn.Module):
    """What both heads end with: channel dropout and a 1x1 classifier, N(0, init_std).

    Dropout removes whole channels of an image. `noise` [C, B], uniform in [0, 1), decides which; without
    it, torch's generator does.
    """

    def __init__(self, channels: int, num_classes: int, dropout: float, init_std: float) -> None:
        super().__init__()
        self.channels = channels
        self.dropout = dropout
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=init_std)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]

    def classify(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """Feature map [B, C, h, w] -> logits [B, K, h, w]."""
        if self.training and self.dropout > 0:
            if noise is None:
                x = F.dropout2d(x, self.dropout)
            else:
                keep = (noise >= self.dropout).T.to(x.dtype) / (1 - self.dropout)  # [C, B] -> [B, C]
                x = x * keep[:, :, None, None]
        return self.conv_seg(x)


class UPerHead(SegHead):
    """Pyramid pooling on the last map, a top-down path through all four, fused at stride 4."""

    def __init__(
        self,
        in_chans: Sequence[int],
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        init_std: float = 0.01,
    ) -> None:
        super().__init__(channels, num_classes, dropout, init_std)
        *lower, top = in_chans
        self.psp_modules = nn.ModuleList(
            nn.Sequential(AveragePool(scale), ConvModule(top, channels, 1)) for scale in pool_scales
        )
        self.bottleneck = ConvModule(top + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(chans, channels, 1) for chans in lower)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in lower)
        self.fpn_bottleneck = ConvModule(len(in_chans) * channels, channels, 3)

    def forward(self, features: Sequence[Tensor], noise: Tensor | None = None) -> Tensor:
        """Features at strides 4, 8, 16, 32 -> logits [B, K, H/4, W/4]."""
        *lower, top = features
        pooled = [resize(module(top), top.shape[2:]) for module in self.psp_modules]
        x = self.bottleneck(torch.cat([top, *pooled], dim=1))  # [B, C, H/32, W/32]
        outs = [x]  # the pooled level goes on as it is, without an fpn_conv
        stages = zip(lower, self.lateral_convs, self.fpn_convs, strict=True)
        for feature, lateral, fpn_conv in reversed(list(stages)):
            x = lateral(feature) + resize(x, feature.shape[2:])  # the sum goes down, its convolution goes out
            outs.insert(0, fpn_conv(x))
        size = outs[0].shape[2:]
        fused = torch.cat([resize(out, size) for out in outs], dim=1)
        return self.classify(self.fpn_bottleneck(fused), noise)  # [B, 4C, H/4, W/4] -> [B, K, H/4, W/4]


class FCNHead(SegHead):
    """One 3x3 convolution and a classifier on a single map; used in training only."""

    def __init__(
        self, in_chans: int, num_classes: int, channels: int = 256, dropout: float = 0.1, init_std: float = 0.01
    ) -> None:
        super().__init__(channels, num_classes, dropout, init_std)
        self.convs = nn.Sequential(ConvModule(in_chans, channels, 3))

    def forward(self, feature: Tensor, noise: Tensor | None = None) -> Tensor:
        """[B, C, h, w] -> logits [B, K, h, w]."""
        return self.classify(self.convs(feature), noise)


class UPerNet(nn.Module):
    """Backbone, one norm per output, UPerHead and auxiliary FCNHead.

    `backbone` is any model with timm's `feature_info` and `forward_intermediates` (models/backbone.py); its last four
    maps are used. Any image size works that the backbone takes. `settings` are fields of the recipe's section,
    `spec.UPerNet`, which has the defaults.

    In training the result is (logits, auxiliary logits) at strides 4 and 16; in evaluation the logits alone.
    Upsampling to the image is left to the caller, who knows the size wanted.
    """

    def __init__(self, backbone: Any, num_classes: int, **settings: Any) -> None:
        super().__init__()
        use = spec.UPerNet(**settings)
        self.backbone = backbone
        self.pyramid = Pyramid.of(backbone)
        in_chans, ends = self.pyramid.channels, {"dropout": use.dropout, "init_std": use.init_std}
        self.num_classes = num_classes
        self.norms = self.pyramid.norms()
        self.decode_head = UPerHead(in_chans, num_classes, use.channels, use.pool_scales, **ends)
        self.auxiliary_head = FCNHead(in_chans[2], num_classes, use.aux_channels, **ends)

    @property
    def num_dropout(self) -> int:
        """Rows of `dropout_noise` that `forward` takes: one number per channel of either head."""
        return self.decode_head.channels + self.auxiliary_head.channels

    def forward(
        self, x: Tensor, noise: Tensor | None = None, dropout_noise: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Image [B, 3, H, W] -> logits [B, K, H/4, W/4]; in training also auxiliary ones [B, K, H/16, W/16].

        `noise` [num_blocks, B], of the backbone's drop path where it takes it, and `dropout_noise` [num_dropout, B] are
        uniform in [0, 1); without them torch draws. Raises ValueError in training on a single image: a 1 x 1 pooled map
        of one image has no batch statistics.
        """
        if self.training and x.shape[0] * dist.processes() < 2:
            raise ValueError(
                "UPerNet trains on two or more images at a time (its batch norm sees 1 x 1 maps): "
                "use a larger batch, fewer accumulation steps or more processes."
            )
        features = self.pyramid.maps(self.backbone, self.norms, x, noise)  # strides 4, 8, 16, 32
        if not self.training:
            return self.decode_head(features)
        main = aux = None
        if dropout_noise is not None:
            main, aux = dropout_noise.split([self.decode_head.channels, self.auxiliary_head.channels])
        return self.decode_head(features, main), self.auxiliary_head(features[2], aux)


def remap_mmseg_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The two heads in an mmsegmentation UPerNet checkpoint, for `load_state_dict(..., strict=False)`.

    Takes the checkpoint or its `state_dict`, saved from a parallel wrapper or not. The backbone is left
    out: there each backbone has names of its own, and holds its output norms. Raises ValueError where no
    UPerHead is.
    """
    state_dict = state_dict.get("state_dict", state_dict)
    names = {name.removeprefix("module."): name for name in state_dict}
    if "decode_head.fpn_bottleneck.conv.weight" not in names:
        raise ValueError("The checkpoint holds no UPerHead: decode_head.fpn_bottleneck.conv.weight is missing.")
    heads = ("decode_head.", "auxiliary_head.")
    return {ours: state_dict[theirs] for ours, theirs in names.items() if ours.startswith(heads)}
