"""Outputs that are not numbers have no score."""

from __future__ import annotations

import torch
from torch import Tensor

from hcnet_cli.console import UserError


def require_finite(*outputs: Tensor) -> None:
    """UserError unless a model's outputs for an evaluation are all finite. The host waits for the device once."""
    if not torch.stack([torch.isfinite(one).all() for one in outputs]).all():
        raise UserError(
            "The model's scores are not finite: the weights are broken, or the precision is too low for them.",
            hint="Evaluate with --precision fp32; if that fails too, start from an earlier checkpoint.",
        )
