"""What the heat conduction layer means: conservation, the decay of modes, the sum over neighbours."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hcnet_cli.models.hcnet import HeatConduction
from hcnet_cli.models.literal import literal_step


def layer(dim: int = 4, kernel_size: int = 5, **switches: bool) -> HeatConduction:
    """In float64, with a kernel and a gate of order one instead of 0.02, so that nothing passes by being small."""
    torch.manual_seed(0)
    conduction = HeatConduction(dim, kernel_size, **switches).double()
    for parameter in conduction.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return conduction


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("gate", [True, False])
def test_constant_field_is_at_rest(kernel_size: int, gate: bool) -> None:
    u = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)[None, :, None, None].expand(2, 4, 11, 13)
    change = layer(kernel_size=kernel_size, gate=gate)(u) - u
    p = kernel_size // 2
    assert change[..., p:-p, p:-p].abs().max() < 1e-12
    assert change[..., 0, 0].abs().max() > 1e-2  # outside the image it is cold: heat leaves through the border


def test_constant_field_is_not_at_rest_without_conservation() -> None:
    u = torch.ones(1, 4, 9, 9, dtype=torch.float64)
    change = layer(conservation=False)(u) - u
    assert change[..., 2:-2, 2:-2].abs().max() > 1e-2


def test_stencil_sums_to_zero_whatever_is_learned() -> None:
    conduction = layer(dim=16)
    assert conduction.stencil().sum(dim=(2, 3)).abs().max() < 1e-12
    off_centre = (conduction.stencil() - conduction.weight).abs() > 1e-15
    assert off_centre.nonzero()[:, 2:].unique(dim=0).tolist() == [[2, 2]]  # the centre tap alone is changed


@pytest.mark.parametrize(("p", "q"), [(0, 0), (1, 0), (0, 3), (2, 5), (4, 4)])
@pytest.mark.parametrize("rate_logit", [-3.0, 0.0, 4.0])
def test_cosine_mode_decays_by_the_factor_of_the_explicit_scheme(p: int, q: int, rate_logit: float) -> None:
    """With the 5-point Laplacian / 4, periodic borders and a constant rate r: 1 - r (sin^2(pi p/H) + sin^2(pi q/W))."""
    height, width, dim = 12, 16, 3
    conduction = layer(dim, gate=False, anisotropy=False)
    torch.nn.init.constant_(conduction.rate, rate_logit)
    rate = 1 / (1 + math.exp(-rate_logit))
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    mode = torch.cos(2 * math.pi * (p * y / height + q * x / width) + 0.3).expand(1, dim, height, width)
    factor = 1 - rate * (math.sin(math.pi * p / height) ** 2 + math.sin(math.pi * q / width) ** 2)
    assert -1 < factor <= 1  # inside the stability limit for every r in (0, 1)
    u = mode
    for step in range(1, 6):
        u = conduction(F.pad(u, (1, 1, 1, 1), mode="circular"))[..., 1:-1, 1:-1]
        torch.testing.assert_close(u, factor**step * mode, rtol=0, atol=1e-12)


def double_loop(u: Tensor, w: Tensor, rate: Tensor) -> Tensor:
    """Pixel by pixel, from the differences to its neighbours: u' = u + r * sum over (i, j) of w_ij (u_ij - u)."""
    batch, dim, height, width = u.shape
    half = w.shape[-1] // 2
    out = torch.empty_like(u)
    for b in range(batch):
        for c in range(dim):
            for y in range(height):
                for x in range(width):
                    flow = 0.0
                    for i in range(-half, half + 1):
                        for j in range(-half, half + 1):
                            inside = 0 <= y + i < height and 0 <= x + j < width
                            neighbour = u[b, c, y + i, x + j].item() if inside else 0.0
                            flow += w[c, 0, i + half, j + half].item() * (neighbour - u[b, c, y, x].item())
                    out[b, c, y, x] = u[b, c, y, x] + rate[b, c] * flow
    return out


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_layer_equals_a_double_loop_over_pixels(kernel_size: int) -> None:
    """Borders included, on a field that is smaller than two stencils."""
    conduction = layer(2, kernel_size)
    u = torch.randn(2, 2, 5, 7, dtype=torch.float64)
    rate = torch.empty(2, 2, dtype=torch.float64)
    for b in range(2):
        for c in range(2):
            logit = sum(conduction.gate.weight[c, k].item() * u[b, k].mean().item() for k in range(2))
            rate[b, c] = 1 / (1 + math.exp(-logit))
    expected = double_loop(u, conduction.weight.detach(), rate)
    torch.testing.assert_close(conduction(u).detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_folded_step_equals_the_literal_step(kernel_size: int, memory_format: torch.memory_format) -> None:
    """One convolution with the folded stencil == conv(u, w) - u * sum(w): values and every gradient, to 1e-10."""
    conduction = layer(6, kernel_size)
    u = torch.randn(3, 6, 9, 8, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    w = conduction.weight.detach().clone().requires_grad_()
    gate = conduction.gate.weight.detach()[:, :, None, None].clone().requires_grad_()
    cotangent = torch.randn(3, 6, 9, 8, dtype=torch.float64)

    folded = conduction(u)
    folded_grads = torch.autograd.grad(folded, (u, conduction.weight, conduction.gate.weight), cotangent)
    literal = literal_step(u, w, gate)
    literal_grads = torch.autograd.grad(literal, (u, w, gate), cotangent)
    assert (folded - literal).abs().max() <= 1e-10
    for ours, theirs in zip(folded_grads, literal_grads, strict=True):
        assert (ours - theirs.reshape(ours.shape)).abs().max() <= 1e-10
