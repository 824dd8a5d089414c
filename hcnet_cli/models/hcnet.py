"""HcNet: a vision backbone whose blocks take explicit steps of the heat equation.

Paper: "HcNet: Image Modeling with Heat Conduction Equation", IJCAI 2025, https://arxiv.org/abs/2408.05901
Authors' code: https://github.com/ZheminZhang1/HcNet (`remap_official_state_dict` reads its checkpoints)

An image is a temperature field u. A block advances it by one finite-difference step of du/dt = div(k grad u) and
then refines the solution pointwise:

    heat conduction            u'  = u  + r(u) . (S * u)
    refinement approximation   u'' = u' + drop_path(fc2(filters(gelu(fc1(norm(u'))))))

Dimension letters: B batch, C channels, H x W feature map, K stencil size, R mlp ratio. Feature maps have the shape
[B, C, H, W] and stay in memory as channels_last from the stem to the head, so that [B, H, W, C] is a view for which
the 1x1 convolutions are plain matrix products.

This file depends on torch and timm alone and can be lifted into another project.
"""

# Without `from __future__ import annotations`: scripting a graph of torch.fx needs them as types, not as strings.

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import GELU, ClassifierHead, get_act_layer, get_norm_layer, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_module
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.checkpoint import checkpoint

# What `disable` may name, and what is left without it.
DISABLE = {
    "conduction": "no heat conduction step: u' = u",
    "refinement": "no depthwise filters between the two 1x1 convolutions: a plain feed-forward network",
    "gate": "the rate does not see the image: r = sigmoid(a), one learned number per channel",
    "anisotropy": "the fixed 5-point Laplacian (1, 1, -4, 1, 1) / 4 for every channel",
    "conservation": "the raw kernel w instead of the zero-sum stencil: an ordinary depthwise convolution",
}


@register_notrace_module  # torch.fx cannot follow a branch on the device
class GroupNorm1(nn.GroupNorm):
    """GroupNorm with one group that leaves channels_last tensors in channels_last on every device.

    PyTorch's own kernel does so on the CPU only; elsewhere it converts to the contiguous layout, two hidden copies
    per norm, so there the same arithmetic is spelt out (float32 statistics, one pass to read and one to write).
    """

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__(1, num_channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return F.group_norm(x, 1, self.weight, self.bias, self.eps)
        return _group_norm_any_layout(x, self.weight, self.bias, self.eps)


def _group_norm_any_layout(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    var, mean = torch.var_mean(x.float(), dim=(1, 2, 3), correction=0, keepdim=True)  # [B, C, H, W] -> [B, 1, 1, 1]
    scale = torch.rsqrt(var + eps) * weight.float()[:, None, None]  # [B, C, 1, 1]
    shift = bias.float()[:, None, None] - mean * scale
    # The weight's type: float32 under autocast, as autocast does for group_norm, and bf16 for a model in bf16.
    return torch.addcmul(shift, x, scale).to(weight.dtype)


def _depthwise_backward(grad: Tensor, u: Tensor, weight: Tensor, of_u: bool = True) -> tuple[Any, Tensor]:
    """Gradients of a depthwise convolution with respect to u (if wanted) and the weight [C, 1, K, K].

    On the CPU that of u is the convolution with the turned kernel, which oneDNN computes faster than what it calls
    the gradient. That of the weight is put together from 3 x 3 windows of a padded map: oneDNN has quick code for
    these alone, if the map is not smaller itself. A 5 x 5 stencil takes half of the time in float32, a tenth in
    bfloat16.
    """
    (channels, _, k, _), (height, width) = weight.shape, u.shape[2:]
    p = k // 2

    def backward(u: Tensor, weight: Tensor, padding: int, of_u: bool = False) -> Any:
        return torch.ops.aten.convolution_backward(
            grad, u, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], channels, [of_u, True, False]
        )[:2]

    if u.device.type != "cpu":
        return backward(u, weight, p, of_u)
    grad_u = F.conv2d(grad, weight.flip(2, 3), padding=p, groups=channels) if of_u else None
    if k < 3 or (k == 3 and min(height, width) >= 3):
        return grad_u, backward(u, weight, p)[1]
    grad_weight, padded = torch.empty_like(weight), F.pad(u, (p, p, p, p))
    starts = sorted({*range(0, k - 2, 3), k - 3})  # windows that cover K taps; where two overlap they agree
    for i in starts:
        for j in starts:
            window = (..., slice(i, i + 3), slice(j, j + 3))
            shifted = padded[:, :, i : i + height + 2, j : j + width + 2].contiguous(memory_format=torch.channels_last)
            grad_weight[window] = backward(shifted, weight[window], 0)[1]
    return grad_u, grad_weight


class _Mean(torch.autograd.Function):
    """mean_HW(u) whose gradient stays one number for each image and channel.

    That of `Tensor.mean` is a whole map, and a contiguous one, which is slow to add to maps in channels_last.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.shape = u.shape
        if u.dtype == torch.bfloat16:  # `mean` would copy the map to float32; a sum is in the range of bfloat16
            return u.sum(dim=(2, 3)) / (u.shape[2] * u.shape[3])
        return u.mean(dim=(2, 3))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        height, width = ctx.shape[2:]
        return (grad / (height * width))[:, :, None, None].expand(ctx.shape)


@register_notrace_function
def map_mean(u: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C]."""
    return u.mean(dim=(2, 3)) if torch.jit.is_scripting() else _Mean.apply(u)


class _Conduct(torch.autograd.Function):
    """u + r . (S * u) with the gradients of `_depthwise_backward`, in few passes over the maps."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, stencil: Tensor, rate: Tensor) -> Tensor:
        flow = F.conv2d(u, stencil, padding=stencil.shape[-1] // 2, groups=stencil.shape[0])
        ctx.save_for_backward(u, stencil, rate, flow)
        return torch.addcmul(u, rate, flow)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        u, stencil, rate, flow = ctx.saved_tensors
        of_u = ctx.needs_input_grad[0]
        grad_u, grad_stencil = _depthwise_backward(grad * rate, u, stencil, of_u)
        return grad + grad_u if of_u else None, grad_stencil, (grad * flow).sum_to_size(rate.shape)


@register_notrace_function
def conduct(u: Tensor, stencil: Tensor, rate: Tensor) -> Tensor:
    """The step u + r . (S * u), zero padding. u: [B, C, H, W]; stencil: [C, 1, K, K]; rate: [B or 1, C, 1, 1]."""
    if not torch.jit.is_scripting() and u.device.type == "cpu":
        if not torch.compiler.is_compiling():
            # taps that reach beyond the whole map meet zeros alone, and oneDNN is slow where a kernel exceeds its map
            beyond = max(0, stencil.shape[-1] // 2 - max(u.shape[2:]) + 1)
            stencil = stencil[:, :, beyond : stencil.shape[2] - beyond, beyond : stencil.shape[3] - beyond]
        if stencil.requires_grad and torch.is_grad_enabled():
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else u.dtype
            return _Conduct.apply(u.to(dtype), stencil.to(dtype), rate.to(dtype))
    return torch.addcmul(u, rate, F.conv2d(u, stencil, padding=stencil.shape[-1] // 2, groups=stencil.shape[0]))


class HeatConduction(nn.Module):
    """One explicit step of the heat equation: u' = u + r(u) . (S * u)    (paper, section "Heat Conduction layer").

    S is the learned depthwise kernel w with its sum taken off the centre tap, so it sums to zero and a constant field
    is at rest. r(u) = sigmoid(A mean_HW(u)) is the coefficient k dt / dx^2 of each image and channel. The authors
    compute conv(u, w) - u * sum(w); with the sum folded into the stencil it is one convolution and one `addcmul`.

    Args:
        dim: C.
        kernel_size: K, odd. The fixed Laplacian (without `anisotropy`) is 3 x 3 whatever K.
        gate: False: r = sigmoid(a), a learned number per channel that does not see the image.
        anisotropy: False: the 5-point Laplacian / 4 for every channel, nothing learned.
        conservation: False: w itself instead of S.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 5,
        *,
        gate: bool = True,
        anisotropy: bool = True,
        conservation: bool = True,
    ) -> None:
        super().__init__()
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size must be odd and at least 3, so that a stencil has a centre; got {kernel_size}."
            )
        if not anisotropy and not conservation:
            raise ValueError(
                "Without anisotropy the stencil is a fixed Laplacian: there is no conservation to disable."
            )
        self.conservation = conservation
        self.weight: Tensor
        if anisotropy:
            self.weight = nn.Parameter(torch.empty(dim, 1, kernel_size, kernel_size))
            trunc_normal_(self.weight, std=0.02)
        else:
            laplacian = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]) / 4
            self.register_buffer("weight", laplacian.expand(dim, 1, 3, 3).contiguous(), persistent=False)
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
        return torch.sigmoid(self.gate(map_mean(u)))[:, :, None, None]

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> "HeatConduction":
        """For inference (timm's `reparameterize_model`): S is a constant, w is gone."""
        if hasattr(self, "weight"):  # a model may be folded twice
            self.folded = self.stencil().detach()
            del self.weight
        return self

    def forward(self, u: Tensor) -> Tensor:
        return conduct(u, self.stencil(), self.conduction_rate(u))


HIDDEN_VALUES = 2**21  # of a refinement at a time on the CPU, so that its hidden maps stay in the processor's cache


def _images(x: Tensor, hidden_dim: int) -> int:
    """How many images of maps [B, H, W, C] a refinement computes at a time: on a GPU all of them."""
    if x.device.type != "cpu":
        return len(x)
    most = max(1, HIDDEN_VALUES // (x.shape[1] * x.shape[2] * hidden_dim))
    images = max(1, len(x))
    turns = -(-images // most)
    return -(-images // turns)  # turns of 4 and 4 images instead of 5 and 3


def _has_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies matrices of x's type on x's device: PyTorch asks another library (BLAS) by default."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear without a gradient, on the CPU by oneDNN: 5 to 25 % faster than BLAS on an AMD processor."""
    if _has_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _filters_of_gelu(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(x) as [B, C, H, W] and its depthwise filters as [B, H, W, C]. x: [B, H, W, C]; weight: [C, 1, 3, 3]."""
    act = F.gelu(x).permute(0, 3, 1, 2)
    return act, F.conv2d(act, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0]).permute(0, 2, 3, 1)


def _cat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _refine(x: Tensor, w1: Tensor, b1: Tensor, filters: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, list[Tensor]]:
    """fc2(filters(gelu(fc1(x)))), a few images at a time, and fc1(x) of each turn."""
    hidden, out = [], []
    for part in x.split(_images(x, len(w1))):
        hidden.append(_linear(part, w1, b1))
        out.append(_linear(_filters_of_gelu(hidden[-1], filters)[1], w2, b2))
    return _cat(out), hidden


def _refine_backward(
    grad: Tensor, x: Tensor, w1: Tensor, filters: Tensor, w2: Tensor, hidden: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Gradients with respect to x, w1, b1, filters, w2, b2; those of the weights in `dtype`."""
    grads_x: list[Tensor] = []
    sums: list[Tensor] = []
    sizes = [len(h) for h in hidden]
    for h, part, grad_part in zip(hidden, x.split(sizes), grad.contiguous().split(sizes), strict=True):
        rows = grad_part.flatten(0, 2)  # [B, H, W, C] -> [BHW, C]
        act, filtered = _filters_of_gelu(h, filters)
        grad_w2 = rows.t() @ filtered.flatten(0, 2)
        del filtered  # each map makes room in the cache for the next one
        grad_act, grad_filters = _depthwise_backward(_linear(grad_part, w2.t()).permute(0, 3, 1, 2), act, filters)
        del act
        grad_h = grad_act.permute(0, 2, 3, 1)
        torch.ops.aten.gelu_backward.grad_input(grad_h, h, grad_input=grad_h)
        grads_x.append(_linear(grad_h, w1.t()))
        grad_rows = grad_h.flatten(0, 2)
        of_weights = [grad_rows.t() @ part.flatten(0, 2), grad_rows.sum(0), grad_filters, grad_w2, rows.sum(0)]
        of_weights = [t.to(dtype) for t in of_weights]  # to be summed in float32 under autocast
        sums = [s.add_(t) for s, t in zip(sums, of_weights, strict=True)] if sums else of_weights
    return [_cat(grads_x), *sums]


# In a graph of the compiler these two are operators, called as they are. What it makes of their insides on a CPU takes
# half as long again, in nearly twice the memory: products by BLAS, and it keeps what they compute again.
_refine_op = torch.library.custom_op("hcnet::refine", _refine, mutates_args=())
_refine_backward_op = torch.library.custom_op("hcnet::refine_backward", _refine_backward, mutates_args=())


@_refine_op.register_fake
def _(x: Tensor, w1: Tensor, b1: Tensor, filters: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, list[Tensor]]:
    return torch.empty_like(x), [part.new_empty(*part.shape[:3], len(w1)) for part in x.split(_images(x, len(w1)))]


@_refine_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, w1: Tensor, filters: Tensor, w2: Tensor, hidden: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    b1, b2 = w1[:, 0], w2[:, 0]
    return [
        torch.empty_like(x),
        *(torch.empty(t.shape, dtype=dtype, device=t.device) for t in (w1, b1, filters, w2, b2)),
    ]


class _Refine(torch.autograd.Function):
    """fc2(filters(gelu(fc1(x)))), a few images at a time, of which the backward pass finds x and fc1(x) alone.

    The hidden maps are R times as large as anything else. gelu and filters are cheap beside the matrix products, so
    they are computed again; what passes between them stays in the cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, filters: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        ctx.dtype = w1.dtype
        w1, b1, filters, w2, b2 = (t.to(x.dtype) for t in (w1, b1, filters, w2, b2))
        forward = _refine_op if torch.compiler.is_compiling() else _refine
        out, hidden = forward(x, w1, b1, filters, w2, b2)
        ctx.save_for_backward(x, w1, filters, w2, *hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, filters, w2, *hidden = ctx.saved_tensors
        backward = _refine_backward_op if torch.compiler.is_compiling() else _refine_backward
        return tuple(backward(grad, x, w1, filters, w2, hidden, ctx.dtype))


@register_notrace_function
def refine(x: Tensor, w1: Tensor, b1: Tensor, filters: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """fc2(filters(gelu(fc1(x)))) for training. x: [B, H, W, C]; w1: [RC, C]; filters: [RC, 1, 3, 3]; w2: [C, RC]."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return _Refine.apply(x.contiguous(), w1, b1, filters, w2, b2)


class RefinementApproximation(nn.Module):
    """The branch fc2(filters(gelu(fc1(norm(u)))))    (paper, section "Refinement Approximation layer").

    Args:
        dim: C.
        hidden_dim: R * C.
        filters: False: no depthwise 3x3 filters, a plain feed-forward network.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        filters: bool = True,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = GroupNorm1,
    ) -> None:
        super().__init__()
        self.norm = norm_layer(dim)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = act_layer()
        self.is_gelu = isinstance(self.act, (nn.GELU, GELU)) and getattr(self.act, "approximate", "none") == "none"
        self.filters = (
            nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, bias=False) if filters else None
        )
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, u: Tensor) -> Tensor:
        # The 1x1 convolutions are linear layers on [B, H, W, C], a view of channels_last: no copy, one matrix product.
        x = self.norm(u).permute(0, 2, 3, 1)  # [B, C, H, W] -> [B, H, W, C]
        if not torch.jit.is_scripting() and self._learns(x.device.type):
            filters: Any = self.filters
            x = refine(x, self.fc1.weight, self.fc1.bias, filters.weight, self.fc2.weight, self.fc2.bias)
            return x.permute(0, 3, 1, 2)  # [B, H, W, C] -> [B, C, H, W]
        return self.mlp(x).permute(0, 3, 1, 2)  # [B, H, W, C] -> [B, C, H, W]

    def mlp(self, x: Tensor) -> Tensor:
        """fc2(filters(gelu(fc1(x)))). x: [B, H, W, C]."""
        x = self.act(self.fc1(x))  # [B, H, W, C] -> [B, H, W, RC]
        if self.filters is not None:
            x = self.filters(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(x)  # [B, H, W, RC] -> [B, H, W, C]

    @torch.jit.ignore
    def _learns(self, device: str) -> bool:
        """Whether to keep little for a backward pass; but for the CPU the compiler decides that itself."""
        plain = isinstance(self.fc1, nn.Linear) and isinstance(self.fc2, nn.Linear)  # not packed, nor of an adapter
        plain = plain and self.is_gelu and self.filters is not None
        if torch.compiler.is_compiling() and (device != "cpu" or torch.compiler.is_exporting()):
            return False
        return plain and torch.is_grad_enabled()

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """For inference (timm's `reparameterize_model`): what the CPU gains from; elsewhere it changes nothing."""
        if isinstance(self.fc1, PackedLinear):  # folded before
            return self
        hidden_dim = self.fc1.out_features
        folded: Any = self
        folded.fc1, folded.fc2 = PackedLinear(self.fc1), PackedLinear(self.fc2)
        if self.is_gelu:
            folded.act = GeluInPlace()
        return RefinementByImages(folded, hidden_dim)


class PackedLinear(nn.Module):
    """A linear layer of maps [B, H, W, C] with constant weights, on the CPU in the order in which oneDNN computes.

    In float32 that is faster than F.linear, which calls another library (BLAS). torch.compile reorders constants
    itself, but sends linear layers in float32 to BLAS and 1x1 convolutions to oneDNN: its graph then has the latter.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.constant: Tensor
        self.bias: Tensor
        self.register_buffer("constant", linear.weight.detach())
        self.register_buffer("bias", linear.bias.detach())
        self._pack()

    def _pack(self) -> None:
        self.packed: Tensor | None = None
        if _has_onednn(self.constant):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.constant)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.device.type == "cpu" and x.dtype == torch.float32:
            return F.conv2d(x.permute(0, 3, 1, 2), self.constant[:, :, None, None], self.bias).permute(0, 2, 3, 1)
        if self.packed is None or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return F.linear(x, self.constant, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        super()._apply(fn, recurse)  # .to(device), .bfloat16(): the packed copy follows
        self._pack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}  # oneDNN's order is of one machine

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()


class GeluInPlace(nn.Module):
    """gelu into its input's memory, which PyTorch has no module for: one map of the cache's instead of two."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(x)


class RefinementByImages(nn.Module):
    """A refinement for inference on the CPU: a few images at a time, so that the hidden maps stay in the cache.

    They are R times as large as anything else in the network; for a whole batch they would go through main memory.
    """

    def __init__(self, branch: RefinementApproximation, hidden_dim: int) -> None:
        super().__init__()
        self.branch = branch
        self.hidden_dim = hidden_dim

    def forward(self, u: Tensor) -> Tensor:
        x = self.branch.norm(u).permute(0, 2, 3, 1)  # [B, C, H, W] -> [B, H, W, C]
        images = _images(x, self.hidden_dim)
        several = len(x) > images
        if torch.compiler.is_compiling():  # a graph for any size has no number of turns
            several = statically_known_true(several)
        x = torch.cat([self.branch.mlp(part) for part in x.split(images)]) if several else self.branch.mlp(x)
        return x.permute(0, 3, 1, 2)  # [B, H, W, C] -> [B, C, H, W]


class HcBlock(nn.Module):
    """A heat conduction step, then its refinement. Drop path falls on the refinement only."""

    def __init__(
        self,
        dim: int,
        kernel_size: int = 5,
        mlp_ratio: float = 4.0,
        disable: Sequence[str] = (),
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = GroupNorm1,
    ) -> None:
        super().__init__()
        self.conduction: nn.Module = nn.Identity()
        if "conduction" not in disable:
            self.conduction = HeatConduction(
                dim,
                kernel_size,
                gate="gate" not in disable,
                anisotropy="anisotropy" not in disable,
                conservation="conservation" not in disable,
            )
        self.refinement = RefinementApproximation(
            dim,
            int(mlp_ratio * dim),
            filters="refinement" not in disable,
            act_layer=act_layer,
            norm_layer=norm_layer,
        )

    def forward(self, u: Tensor, keep: Tensor | None = None) -> Tensor:
        """u: [B, C, H, W]; keep: [B], the factor of each sample's refinement (0 where its path is dropped)."""
        u = self.conduction(u)
        if keep is None:
            return u + self.refinement(u)
        return torch.addcmul(u, self.refinement(u), keep[:, None, None, None].to(u.dtype))


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2: an image at 1/4 of its size."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = GroupNorm1,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
        self.norm1 = norm_layer(dim // 2)
        self.act = act_layer()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = norm_layer(dim)

    def forward(self, x: Tensor) -> Tensor:
        # The one layout conversion of the network is that of the image: from here on everything keeps channels_last.
        # (An image of one channel has both layouts at once, so its first map may still need the conversion.)
        x = self.conv1(x.contiguous(memory_format=torch.channels_last))  # [B, 3, H, W] -> [B, C/2, H/2, W/2]
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.act(self.norm1(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # of contiguous memory: twice as fast
        return self.norm2(self.conv2(x))  # [B, C/2, H/2, W/2] -> [B, C, H/4, W/4]


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 between two stages."""

    def __init__(self, dim: int, out_dim: int, norm_layer: Callable[..., nn.Module] = GroupNorm1) -> None:
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
    """[blocks, B]: 0 where the path of a sample is dropped, else what keeps the expectation. rates: [blocks]."""
    if noise is None:
        noise = torch.rand(rates.shape[0], x.shape[0], device=x.device)
    return (noise >= rates[:, None]) / (1 - rates[:, None])


class HcStage(nn.Module):
    """Downsampling (but for the first stage) and the blocks of one resolution.

    `drop_path_rates` has a number per block. The draws of drop path are arguments, not a generator's state, so the
    recomputation of gradient checkpointing sees the same ones.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        drop_path_rates: Sequence[float],
        *,
        downsample: bool = True,
        kernel_size: int = 5,
        mlp_ratio: float = 4.0,
        disable: Sequence[str] = (),
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = GroupNorm1,
    ) -> None:
        super().__init__()
        self.downsample = Downsample(in_dim, dim, norm_layer) if downsample else nn.Identity()
        self.blocks = nn.ModuleList(
            HcBlock(dim, kernel_size, mlp_ratio, disable, act_layer, norm_layer) for _ in drop_path_rates
        )
        self.drop_path_rates: Tensor
        self.register_buffer("drop_path_rates", torch.tensor(drop_path_rates), persistent=False)
        self.has_drop_path = max(drop_path_rates, default=0.0) > 0
        self.grad_checkpointing = False

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """x: [B, C, H, W]; noise: [blocks, B] uniform in [0, 1), the draws of drop path, made here if absent."""
        x = self.downsample(x)
        keep: Tensor | None = None
        if self.training and self.has_drop_path:
            keep = keep_factors(x, noise, self.drop_path_rates)
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
        in_chans: Channels of the images.
        num_classes: Classes of the linear head; 0: no head, pooled features come out.
        global_pool: "avg", or "" for unpooled features (with num_classes 0).
        depths: Blocks of each stage.
        dims: C of each stage.
        kernel_size: K of the stencils.
        mlp_ratio: R, hidden channels of the refinement over C.
        drop_rate: Dropout before the head, from torch's generator (the paper's recipe has none).
        drop_path_rate: Drop path of the last block; it grows linearly from 0 over all blocks.
        act_layer: Activation, timm name or class.
        norm_layer: Norm, timm name or class taking the number of channels.
        disable: Components left out, see `DISABLE`.

    Raises:
        ValueError: an argument, or a combination of disabled components, has no meaning.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (5, 5, 14, 5),
        dims: Sequence[int] = (64, 128, 320, 512),
        kernel_size: int = 5,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: str | Callable[..., nn.Module] = "gelu",
        norm_layer: str | Callable[..., nn.Module] | None = None,
        disable: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if len(depths) != len(dims) or not depths:
            raise ValueError(f"depths and dims must name the same stages; got {len(depths)} and {len(dims)} of them.")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1); got {drop_path_rate}.")
        self.disable = _check_disable(disable)
        act = get_act_layer(act_layer)
        norm = GroupNorm1 if norm_layer is None else get_norm_layer(norm_layer)

        self.in_chans = in_chans
        self.depths = list(depths)
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.stem = Stem(in_chans, dims[0], act, norm)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        self.stages: Any = nn.Sequential(
            *(
                HcStage(
                    dims[max(i - 1, 0)],
                    dims[i],
                    rates[i].tolist(),
                    downsample=i > 0,
                    kernel_size=kernel_size,
                    mlp_ratio=mlp_ratio,
                    disable=self.disable,
                    act_layer=act,
                    norm_layer=norm,
                )
                for i in range(len(depths))
            )
        )
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.num_features = self.head_hidden_size = dims[-1]
        self.norm = norm(self.num_features)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.stages.apply(_init_block_weights)
        self.head.apply(_init_block_weights)

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
        """None by name: the authors spare 1-D parameters alone, and every optimizer builder knows those by shape."""
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
        """A new head for `num_classes` (0: none), optionally with another pooling ("" : none)."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head.apply(_init_block_weights)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        noise: Tensor | None = None,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps of chosen stages, and the final one.

        Args:
            x: Images [B, in_chans, H, W].
            indices: The last n stages if an int, these stages if a list, all if None.
            norm: Apply the final norm to the last stage's map among the intermediates.
            stop_early: Leave out the stages behind the last one asked for.
            output_fmt: "NCHW" ([B, C, H, W]), or "NLC" ([B, HW, C]) for the intermediates.
            intermediates_only: Return the list alone.
            noise: [num_blocks, B] uniform in [0, 1), the draws of drop path.

        Returns:
            The list of intermediates, or (final map, list). The final map is normed if the last stage was computed.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f'output_fmt must be "NCHW" or "NLC"; got "{output_fmt}".')
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: max_index + 1] if stop_early else self.stages
        last = len(self.stages) - 1
        stage_noise = split_noise(noise, self.depths)
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(stages):
            x = stage(x, stage_noise[i])
            if i in take_indices:
                y = self.norm(x) if norm and i == last else x
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
        noise[i, b] < its drop path rate. The model draws it from torch's generator if it is None; evaluation
        ignores it.
        """
        return self.forward_head(self.forward_features(x, noise))


def _check_disable(disable: Sequence[str]) -> tuple[str, ...]:
    """The disabled components once each, in the order of `DISABLE`; ValueError where they have no meaning."""
    names = [disable] if isinstance(disable, str) else list(disable)
    for name in names:
        if name not in DISABLE:
            close = difflib.get_close_matches(name, DISABLE, n=1)
            hint = f' Did you mean "{close[0]}"?' if close else ""
            raise ValueError(f'Unknown component "{name}" to disable; there are {", ".join(DISABLE)}.{hint}')
    inner = [name for name in ("gate", "anisotropy", "conservation") if name in names]
    if "conduction" in names and inner:
        raise ValueError(f"Without conduction there is no {' or '.join(inner)} to disable: name conduction alone.")
    if "anisotropy" in names and "conservation" in names:
        raise ValueError(
            "Without anisotropy the stencil is a fixed Laplacian that sums to zero: there is no raw kernel that "
            "disabling conservation could use."
        )
    return tuple(name for name in DISABLE if name in names)


def _init_block_weights(module: nn.Module) -> None:
    """As the authors do: normal weights, zero biases inside blocks and head; stem and downsampling keep PyTorch's."""
    if isinstance(module, Downsample):
        module.conv.reset_parameters()
    elif isinstance(module, (nn.Linear, nn.Conv2d)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# The authors' names (left) and ours.
_OFFICIAL_NAMES = (
    (r"^patch_embed\.", "stem."),
    (r"^layers\.", "stages."),
    (r"\.Anisotropic_conv\.", ".conduction."),
    (r"\.DeltaT_DeltaD\.", ".conduction.gate."),
    (r"\.blocks\.(\d+)\.norm2\.", r".blocks.\1.refinement.norm."),
    (r"\.mlp\.Filters\.", ".refinement.filters."),
    (r"\.mlp\.(fc1|fc2)\.", r".refinement.\1."),
    (r"\.downsample\.reduction\.", ".downsample.conv."),
    (r"^head\.", "head.fc."),
)


def remap_official_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the authors' released checkpoint (`HcNet/models/HcNet.py`, 2025) under this file's names.

    Takes the state dict or the training checkpoint that holds it under "model". Prefixes of DataParallel and
    torch.compile go; `mean_num` buffers go; 1x1 convolutions become linear layers; unknown names stay as they are, for
    the loader to report.

    Raises:
        ValueError: the tensors belong to the 2024 file or to the 3x3 file, which use other operators, or not to HcNet.
    """
    if isinstance(state_dict.get("model"), Mapping):
        state_dict = state_dict["model"]
    tensors = {re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor for name, tensor in state_dict.items()}
    kernels = [tensor for name, tensor in tensors.items() if name.endswith(".Anisotropic_conv.weight")]
    if any(name.endswith((".fc_0.weight", ".mlp.dwconv.weight")) for name in tensors) and not kernels:
        raise ValueError(
            "This checkpoint is of the authors' 2024 single-file version (HcNet.py), which conducts heat by a fixed "
            "3x3 mean and has no learned stencil: its weights mean nothing here."
        )
    if any(name.endswith(".fc_0.weight") for name in tensors) or any(k.shape[-1] == 3 for k in kernels):
        raise ValueError(
            "This checkpoint is of the authors' 3x3 version (HcNet-architecture.py), whose stencil has another centre "
            "tap: its weights mean nothing here. Only the 5x5 version (HcNet/models/HcNet.py) can be read."
        )
    if not kernels:
        raise ValueError("This is not an official HcNet checkpoint: it has no Anisotropic_conv weights.")

    remapped = {}
    for name, tensor in tensors.items():
        if name.endswith(".mean_num"):
            continue
        # their downsampling ends a stage, ours begins the next one
        name = re.sub(r"^layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample", name)
        for theirs, ours in _OFFICIAL_NAMES:
            name = re.sub(theirs, ours, name)
        if name.endswith((".gate.weight", ".fc1.weight", ".fc2.weight")):
            tensor = tensor.flatten(1)  # [out, in, 1, 1] -> [out, in]
        remapped[name] = tensor
    return remapped


def _checkpoint_filter(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """For timm's loading of pretrained weights: our names as they are, the authors' remapped."""
    return state_dict if "stem.conv1.weight" in state_dict else remap_official_state_dict(state_dict)


def _create_hcnet(variant: str, pretrained: bool = False, **kwargs: Any) -> HcNet:
    return build_model_with_cfg(
        HcNet,
        variant,
        pretrained,
        pretrained_filter_fn=_checkpoint_filter,
        # "getter" runs forward_intermediates, so drop path works in training as in the classifier
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter", "flatten_sequential": True},
        **kwargs,
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "mit",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "hcnet_pico.untrained": _cfg(),
        "hcnet_tiny.untrained": _cfg(),
        "hcnet_tiny_release.untrained": _cfg(),
        "hcnet_small.untrained": _cfg(),
        "hcnet_base.untrained": _cfg(),
    }
)


@register_model
def hcnet_pico(pretrained: bool = False, **kwargs: Any) -> HcNet:
    """1.66 M parameters, 0.31 G MACs at 224: this project's, for the embedded data sets."""
    model_args = {"depths": (2, 2, 4, 2), "dims": (32, 64, 128, 160)}
    return _create_hcnet("hcnet_pico", pretrained, **(model_args | kwargs))


@register_model
def hcnet_tiny(pretrained: bool = False, **kwargs: Any) -> HcNet:
    """28.62 M parameters, 4.22 G MACs at 224: the example of the authors' model file, the abstract's "28M, 4.1G"."""
    model_args = {"depths": (5, 5, 14, 5), "dims": (64, 128, 320, 512)}
    return _create_hcnet("hcnet_tiny", pretrained, **(model_args | kwargs))


@register_model
def hcnet_tiny_release(pretrained: bool = False, **kwargs: Any) -> HcNet:
    """27.99 M parameters, 4.76 G MACs at 224: the authors' training configuration `HcNet-T.yaml`."""
    model_args = {"depths": (3, 8, 18, 3), "dims": (64, 128, 320, 512)}
    return _create_hcnet("hcnet_tiny_release", pretrained, **(model_args | kwargs))


@register_model
def hcnet_small(pretrained: bool = False, **kwargs: Any) -> HcNet:
    """49.84 M parameters, 8.16 G MACs at 224: this project's, to the budget of Swin-S."""
    model_args = {"depths": (5, 8, 36, 5), "dims": (64, 128, 320, 512)}
    return _create_hcnet("hcnet_small", pretrained, **(model_args | kwargs))


@register_model
def hcnet_base(pretrained: bool = False, **kwargs: Any) -> HcNet:
    """87.22 M parameters, 14.65 G MACs at 224: this project's, to the budget of Swin-B."""
    model_args = {"depths": (5, 8, 31, 5), "dims": (96, 192, 448, 704)}
    return _create_hcnet("hcnet_base", pretrained, **(model_args | kwargs))
