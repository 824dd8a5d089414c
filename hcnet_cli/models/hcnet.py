"""HcNet: a vision backbone whose blocks take explicit steps of the heat equation.

Paper: "HcNet: Image Modeling with Heat Conduction Equation", IJCAI 2025, https://arxiv.org/abs/2408.05901
Authors' code: https://github.com/ZheminZhang1/HcNet (official.py reads its checkpoints)

An image is a temperature field u. A block advances it by one finite-difference step of du/dt = div(k grad u) and
then refines the solution pointwise:

    heat conduction            u'  = u  + r(u) . (S * u)
    refinement approximation   u'' = u' + drop_path(fc2(filters(gelu(fc1(norm(u'))))))

Dimension letters: B batch, C channels, H x W feature map, K stencil size, R mlp ratio. Feature maps have the shape
[B, C, H, W]. On a CPU they stay in memory as channels_last from the stem to the head, so that [B, H, W, C] is a view
for which the 1x1 convolutions are plain matrix products. Faster forms of these layers are applied from outside
(hcnet_cli.kernels).
"""

# No `from __future__ import annotations`: torch.jit.script of a torch.fx graph needs types, not strings.

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, GroupNorm1, get_act_layer, get_norm_layer, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_function
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hcnet_cli.sizes import SIZES, Size, ordered_components

Layer = Callable[..., nn.Module]


class HeatConduction(nn.Module):
    """One explicit step of the heat equation: u' = u + r(u) . (S * u)    (paper, section "Heat Conduction layer").

    S is the learned depthwise kernel w with its sum taken off the centre tap, so it sums to zero: away from the border
    a constant map does not change. r(u) = sigmoid(A mean_HW(u)) is k dt / dx^2 for each image and channel. The authors
    compute conv(u, w) - u * sum(w); with the sum folded into the stencil it is one convolution and one `addcmul`.
    Without gate, anisotropy or conservation: see `hcnet_cli.sizes.COMPONENTS`. The fixed Laplacian is 3 x 3 for any K.
    """

    def __init__(
        self, dim: int, kernel_size: int = 5, gate: bool = True, anisotropy: bool = True, conservation: bool = True
    ) -> None:
        super().__init__()
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 3 (a stencil has a centre); got {kernel_size}.")
        self.conservation = conservation
        self.weight: Tensor
        if anisotropy:
            self.weight = nn.Parameter(torch.empty(dim, 1, kernel_size, kernel_size))
            trunc_normal_(self.weight, std=0.02)
        else:
            laplacian = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]) / 4
            self.register_buffer("weight", laplacian.repeat(dim, 1, 1, 1), persistent=False)
        self.register_buffer("folded", None)  # S as a constant, after `fuse`
        self.padding = self.weight.shape[-1] // 2
        self.gate = nn.Linear(dim, dim, bias=False) if gate else nn.Identity()
        self.rate = None if gate else nn.Parameter(torch.zeros(dim))

    def stencil(self) -> Tensor:
        """S: [C, 1, K, K], each channel's sum is zero (unless conservation is disabled)."""
        folded = self.folded
        if folded is not None:
            return folded
        if not self.conservation:
            return self.weight
        p = self.padding
        return self.weight - F.pad(self.weight.sum(dim=(2, 3), keepdim=True), (p, p, p, p))

    def conduction_rate(self, u: Tensor) -> Tensor:
        """r(u): [B, C, H, W] -> [B, C, 1, 1] in (0, 1); [1, C, 1, 1] without the gate."""
        if self.rate is not None:
            return torch.sigmoid(self.rate)[None, :, None, None]
        return torch.sigmoid(self.gate(u.mean(dim=(2, 3))))[:, :, None, None]

    def flow(self, u: Tensor) -> Tensor:
        """S * u, zero padding: [B, C, H, W]."""
        stencil = self.stencil()
        return F.conv2d(u, stencil, padding=self.padding, groups=stencil.shape[0])

    def forward(self, u: Tensor) -> Tensor:
        return torch.addcmul(u, self.conduction_rate(u), self.flow(u))

    @torch.jit.ignore
    def fuse(self) -> "HeatConduction":
        """For inference (timm's `reparameterize_model`): S is a constant, w is gone."""
        if hasattr(self, "weight"):  # a model may be folded twice
            self.folded = self.stencil().detach()
            del self.weight
        return self


class RefinementApproximation(nn.Module):
    """The branch fc2(filters(gelu(fc1(norm(u)))))    (paper, section "Refinement Approximation layer")."""

    def __init__(
        self, dim: int, hidden: int, filters: bool = True, act_layer: Layer = nn.GELU, norm_layer: Layer = GroupNorm1
    ) -> None:
        super().__init__()
        self.norm = norm_layer(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act_layer()
        self.filters = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False) if filters else None
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, u: Tensor) -> Tensor:
        # The 1x1 convolutions are linear layers on [B, H, W, C]: on a CPU a view, no copy, one matrix product.
        x = self.norm(u).permute(0, 2, 3, 1)  # [B, C, H, W] -> [B, H, W, C]
        x = self.contract(self.fc1(x))
        return x.permute(0, 3, 1, 2)  # [B, H, W, C] -> [B, C, H, W]

    def contract(self, hidden: Tensor) -> Tensor:
        """fc2(filters(act(hidden))): [B, H, W, RC] -> [B, H, W, C]."""
        x = self.act(hidden)
        if self.filters is not None:
            x = self.filters(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(x)


class HcBlock(nn.Module):
    """A heat conduction step, then its refinement. Drop path applies to the refinement only."""

    def __init__(
        self, dim: int, kernel_size: int = 5, mlp_ratio: float = 4.0, disable: Sequence[str] = (), **layers: Layer
    ) -> None:
        super().__init__()
        self.conduction: nn.Module = nn.Identity()
        if "conduction" not in disable:
            parts = {name: name not in disable for name in ("gate", "anisotropy", "conservation")}
            self.conduction = HeatConduction(dim, kernel_size, **parts)
        filters = "refinement" not in disable
        self.refinement = RefinementApproximation(dim, int(mlp_ratio * dim), filters, **layers)

    def forward(self, u: Tensor, keep: Tensor | None = None) -> Tensor:
        """u: [B, C, H, W]; keep: [B], the factor of each sample's refinement (0 where its path is dropped)."""
        u = self.conduction(u)
        if keep is None:
            return u + self.refinement(u)
        return torch.addcmul(u, self.refinement(u), keep[:, None, None, None].to(u.dtype))


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2: an image at 1/4 of its size."""

    def __init__(self, in_chans: int, dim: int, act_layer: Layer = nn.GELU, norm_layer: Layer = GroupNorm1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
        self.norm1 = norm_layer(dim // 2)
        self.act = act_layer()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = norm_layer(dim)

    def forward(self, x: Tensor) -> Tensor:
        # On a CPU later maps keep channels_last. An image of one channel has both layouts, so its map is converted too.
        x = self.conv1(x.contiguous(memory_format=torch.channels_last))  # [B, 3, H, W] -> [B, C/2, H/2, W/2]
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.act(self.norm1(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # gelu is faster on contiguous memory
        return self.norm2(self.conv2(x))  # [B, C/2, H/2, W/2] -> [B, C, H/4, W/4]


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 between two stages."""

    def __init__(self, dim: int, out_dim: int, norm_layer: Layer = GroupNorm1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=False)
        self.norm = norm_layer(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))  # [B, C, H, W] -> [B, C', H/2, W/2], odd sizes rounded up


@register_notrace_function
def split_noise(noise: Tensor | None, depths: list[int]) -> list[Tensor | None]:
    """[sum(depths), B] -> [depth, B] for each stage."""
    parts: list[Tensor | None] = [None for _ in depths]
    if noise is not None:
        if noise.shape[0] != sum(depths):
            raise ValueError(f"noise must have a row for each of the {sum(depths)} blocks; it has {noise.shape[0]}.")
        for i, part in enumerate(noise.split(depths)):
            parts[i] = part
    return parts


@register_notrace_function
def keep_factors(x: Tensor, noise: Tensor | None, rates: Tensor) -> Tensor:
    """[blocks, B]: 0 where the path of a sample is dropped, else 1 / (1 - rate). rates: [blocks]."""
    if noise is None:
        noise = torch.rand(rates.shape[0], x.shape[0], device=x.device)
    return (noise >= rates[:, None]) / (1 - rates[:, None])


class HcStage(nn.Module):
    """Downsampling (except in the first stage) and the blocks of one resolution, one for each drop path rate.

    Draws of drop path are arguments, so gradient checkpointing recomputes with the same draws. `block`: of HcBlock.
    """

    def __init__(
        self, in_dim: int, dim: int, drop_path_rates: Sequence[float], downsample: bool = True, **block: Any
    ) -> None:
        super().__init__()
        self.downsample = Downsample(in_dim, dim, block.get("norm_layer", GroupNorm1)) if downsample else nn.Identity()
        self.blocks = nn.ModuleList(HcBlock(dim, **block) for _ in drop_path_rates)
        self.drop_path_rates: Tensor
        self.register_buffer("drop_path_rates", torch.tensor(drop_path_rates), persistent=False)
        self.has_drop_path = max(drop_path_rates, default=0.0) > 0
        self.grad_checkpointing = False

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """x: [B, C, H, W]; noise: [blocks, B] uniform in [0, 1), the draws of drop path, made here if absent."""
        x = self.downsample(x)
        drops = self.training and self.has_drop_path
        keep: Tensor | None = keep_factors(x, noise, self.drop_path_rates) if drops else None
        for i, block in enumerate(self.blocks):
            block_keep = None if keep is None else keep[i]
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, block_keep, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, block_keep)
        return x


class HcNet(nn.Module):
    """HcNet with timm's backbone contract. Takes images [B, in_chans, H, W] of any size from 8 x 8 up.

    Args:
        num_classes: Classes of the linear head; 0: no head, pooled features come out.
        global_pool: "avg", or "" for unpooled features (with num_classes 0).
        depths, dims, kernel_size, mlp_ratio: Blocks and C of each stage, K, R.
        drop_rate, drop_path_rate: Dropout before the head; drop path of the last block, growing linearly from 0.
        act_layer, norm_layer: timm names or classes; a norm takes the number of channels.
        disable: Components left out, names of `hcnet_cli.sizes.COMPONENTS`.
    """

    def __init__(
        self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg",
        depths: Sequence[int] = SIZES["t"].depths, dims: Sequence[int] = SIZES["t"].dims,
        kernel_size: int = 5, mlp_ratio: float = 4.0, drop_rate: float = 0.0, drop_path_rate: float = 0.0,
        act_layer: str | Layer = "gelu", norm_layer: str | Layer | None = None, disable: Sequence[str] = (),
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if len(depths) != len(dims) or not depths:
            raise ValueError(f"depths and dims must name the same stages; got {len(depths)} and {len(dims)} of them.")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1); got {drop_path_rate}.")
        self.disable = ordered_components([disable] if isinstance(disable, str) else disable)
        act, norm = get_act_layer(act_layer), get_norm_layer(norm_layer) or GroupNorm1
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.depths = list(depths)
        self.stem = Stem(in_chans, dims[0], act, norm)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        block = {"kernel_size": kernel_size, "mlp_ratio": mlp_ratio, "disable": self.disable}
        stages = [
            HcStage(dims[max(i - 1, 0)], dims[i], rates[i].tolist(), i > 0, act_layer=act, norm_layer=norm, **block)
            for i in range(len(depths))
        ]
        self.stages: Any = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.num_features = self.head_hidden_size = dims[-1]
        self.norm = norm(self.num_features)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.stages.apply(_init_block_weights)
        self.head.apply(_init_block_weights)
        self.to(device=device, dtype=dtype)

    @property
    def num_blocks(self) -> int:
        """Rows of `noise`."""
        return sum(self.depths)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for timm's layer-wise learning-rate decay: one per block, or one per stage."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """No names: the authors exempt only 1-D parameters, which optimizer builders recognise by their shape."""
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes` (0: none), optionally with another pooling ("": none)."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head.to(next(self.parameters())).apply(_init_block_weights)

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False, noise: Tensor | None = None,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:  # fmt: skip
        """The final map and a list of stages' maps, or only the list (`intermediates_only`).

        indices: the last n stages if an int, these stages if a list, all if None. norm: apply the final norm to the
        last stage's map in the list. stop_early: skip the stages behind the last one of `indices`; the final map is
        then not normed. output_fmt: "NCHW", or "NLC" ([B, HW, C]) for the maps in the list. noise: as in `forward`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f'output_fmt must be "NCHW" or "NLC"; got "{output_fmt}".')
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: max_index + 1] if stop_early else self.stages
        stage_noise = split_noise(noise, self.depths)
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(stages):
            x = stage(x, stage_noise[i])
            if i in take_indices:
                y = self.norm(x) if norm and i == len(self.stages) - 1 else x
                intermediates.append(y if output_fmt == "NCHW" else y.flatten(2).transpose(1, 2))
        if intermediates_only:
            return intermediates
        return (self.norm(x) if len(stages) == len(self.stages) else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages behind the last one of `indices` (and norm, and head); returns the indices kept."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: max_index + 1]
        self.depths = self.depths[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """[B, in_chans, H, W] -> [B, C, H/32, W/32], normed. noise: as in `forward`."""
        x = self.stem(x)
        stage_noise = split_noise(noise, self.depths)
        for i, stage in enumerate(self.stages):
            x = stage(x, stage_noise[i])
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, C, H, W] -> [B, num_classes]; the pooled features [B, C] with `pre_logits`."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Logits [B, num_classes] of images [B, in_chans, H, W].

        noise: [num_blocks, B] uniform in [0, 1). In training, block i leaves out the refinement of sample b where
        noise[i, b] < its drop path rate. Drawn from torch's generator if None; not used in evaluation.
        """
        return self.forward_head(self.forward_features(x, noise))


def _init_block_weights(module: nn.Module) -> None:
    """As the authors do: normal weights, zero biases inside blocks and head; stem and downsampling keep PyTorch's."""
    if isinstance(module, Downsample):
        module.conv.reset_parameters()
    elif isinstance(module, (nn.Linear, nn.Conv2d)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_CFG = {
    "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.875,
    "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
    "first_conv": "stem.conv1", "classifier": "head.fc", "license": "mit",
}  # fmt: skip
default_cfgs = generate_default_cfgs({f"{size.timm_name}.untrained": dict(_CFG) for size in SIZES.values()})


def _entry_point(size: Size) -> Callable[..., HcNet]:
    """The function that timm.create_model(size.timm_name) calls."""

    def create(pretrained: bool = False, **kwargs: Any) -> HcNet:
        # "getter" runs forward_intermediates, so drop path works in training as in the classifier
        feature_cfg = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter", "flatten_sequential": True}
        arguments = {"depths": size.depths, "dims": size.dims, **kwargs}
        return build_model_with_cfg(HcNet, size.timm_name, pretrained, feature_cfg=feature_cfg, **arguments)

    create.__name__ = create.__qualname__ = size.timm_name
    return create


for _size in SIZES.values():
    globals()[_size.timm_name] = register_model(_entry_point(_size))
