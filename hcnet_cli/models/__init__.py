"""Models, one file each; importing this package registers the HcNet sizes with timm."""

from __future__ import annotations

from hcnet_cli.models.hcnet import HcBlock, HcNet, HcStage, HeatConduction, RefinementApproximation
from hcnet_cli.models.official import remap_official_state_dict

__all__ = ["HcBlock", "HcNet", "HcStage", "HeatConduction", "RefinementApproximation", "remap_official_state_dict"]
