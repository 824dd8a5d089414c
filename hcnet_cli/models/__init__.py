"""Models, each told by one file; importing this package registers the HcNet sizes with timm."""

from __future__ import annotations

from .hcnet import (
    DISABLE,
    HcBlock,
    HcNet,
    HcStage,
    HeatConduction,
    RefinementApproximation,
    hcnet_base,
    hcnet_pico,
    hcnet_small,
    hcnet_tiny,
    hcnet_tiny_release,
    remap_official_state_dict,
)

__all__ = [
    "DISABLE",
    "HcBlock",
    "HcNet",
    "HcStage",
    "HeatConduction",
    "RefinementApproximation",
    "hcnet_base",
    "hcnet_pico",
    "hcnet_small",
    "hcnet_tiny",
    "hcnet_tiny_release",
    "remap_official_state_dict",
]
