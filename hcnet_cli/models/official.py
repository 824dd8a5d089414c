"""The authors' released checkpoints, translated to the names of hcnet.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

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
