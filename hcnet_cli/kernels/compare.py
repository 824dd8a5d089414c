"""Whether a faster form computes what its layer computes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5  # of the largest value, in float32; rounding differs by about 1e-6


def same_results(layer: nn.Module, form: Any) -> bool:
    """Compares outputs and gradients of `layer` and of a copy with the class `form` on a small random input.

    The comparison runs in float32 with and without gradients. No random generator of the program is advanced.
    """
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        try:
            plain = copy.deepcopy(layer).float()
            for module in plain.modules():  # hooks observe the model, not the comparison
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
                module._backward_hooks.clear()
            generator = torch.Generator().manual_seed(0)
            for parameter in plain.parameters():
                # Of order one: an initial 0.02 or a bias of zero would hide a difference.
                scale = parameter[0].numel() ** -0.5 if parameter.ndim else 1.0
                parameter.data = torch.randn(parameter.shape, generator=generator) * scale
                parameter.requires_grad_()
            fast: Any = copy.deepcopy(plain)
            fast.__class__ = form
            fast.chunk_elements, fast.checkpoint_elements = 1, 0  # so that a small input takes the form's whole path
            x = form.example(plain, generator)
            return all(_close(a, b) for a, b in zip(_results(plain, x), _results(fast, x), strict=True))
        except Exception:  # an edited layer may refuse the example input: nothing can then be compared
            return False


def _results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The output without gradients, the output with gradients, and the gradients of the input and the parameters."""
    torch.manual_seed(0)
    with torch.no_grad():
        values = layer(x)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        inputs = [leaf, *layer.parameters()]
        gradients = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)
    return [values, out.detach(), *(torch.zeros(1) if g is None else g for g in gradients)]


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or not bool(a.isfinite().all()):
        return False
    return bool((a - b).abs().max() <= TOLERANCE * a.abs().max())
