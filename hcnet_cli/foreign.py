"""Weights of other models: to which model they belong, and their names and shapes as a model of timm has them."""

from __future__ import annotations

import functools
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from hcnet_cli.models.official import remap_official_state_dict
from hcnet_cli.sizes import SIZES
from hcnet_cli.weights import PREFIXES, strip_prefixes

Translation = Callable[[dict[str, Tensor]], dict[str, Tensor]]
# A family of timm -> tensors of which it alone has one. Where a family has those of another too, it stands above it.
SIGNATURES = {
    "swinv2": ("layers.0.blocks.0.attn.cpb_mlp.0.weight",),
    "swinv2_cr": ("stages.0.blocks.0.attn.meta_mlp.fc1.weight",),
    "swin": ("layers.0.blocks.0.attn.relative_position_bias_table",),
    "focalnet": ("layers.0.blocks.0.modulation.f.weight",),
    "davit": ("stages.0.blocks.0.0.cpe1.proj.weight",),
    "twins": ("pos_block.0.proj.0.weight",),
    "mambaout": ("stages.0.blocks.0.fc1.weight",),
    "pvt_v2": ("stages.0.blocks.0.attn.kv.weight",),
    "maxvit": ("stages.0.blocks.0.conv.pre_norm.weight",),
    "mvitv2": ("stages.0.blocks.0.attn.rel_pos_h",),
    "edgenext": ("stages.1.blocks.1.xca.temperature", "stages.1.blocks.2.xca.temperature"),
    "convnext": ("stages.0.blocks.0.conv_dw.weight", "stages.0.0.dwconv.weight"),
    "resnet": ("layer1.0.conv1.weight",),
    "regnet": ("s1.b1.conv1.conv.weight",),
    "densenet": ("features.denseblock1.denselayer1.norm1.weight",),
    "ghostnet": ("blocks.0.0.ghost1.primary_conv.0.weight",),
    "mobilenetv3": ("conv_head.bias",),
    "efficientnet": ("blocks.1.0.conv_pw.weight", "blocks.1.0.conv_exp.weight"),
    "hiera": ("blocks.1.proj.weight", "blocks.2.proj.weight"),
    "xcit": ("blocks.0.local_mp.conv1.weight",),
    "cait": ("blocks_token_only.0.attn.q.weight",),
    "beit": ("blocks.0.attn.relative_position_bias_table",),
    "samvit": ("blocks.0.attn.rel_pos_h",),
    "eva": ("blocks.0.attn.q_bias", "blocks.0.attn.q_proj.weight"),
    "mixer": ("blocks.0.mlp_tokens.fc1.weight",),
    "vit": ("blocks.0.attn.qkv.weight",),
}


def family(names: Iterable[str]) -> str:
    """The family of timm whose tensors have these names; "" where none is recognised."""
    plain = {re.sub(rf"^({'|'.join(map(re.escape, PREFIXES))})+", "", name) for name in names}
    return next((one for one, known in SIGNATURES.items() if not plain.isdisjoint(known)), "")


def owner_hint(state: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """What to type for weights that do not fit a model. `about`: the metadata of their file, where they have some."""
    name, args = about.get("model"), about.get("model_args")
    if isinstance(name, str) and name.isprintable() and 0 < len(name) <= 200:
        size = next((size for size, known in SIZES.items() if known.timm_name == name), "")
        section = "model" if size else "model.args"
        words = ["--size", size] if size else ["--model", name]
        for key, value in args.items() if isinstance(args, dict) else ():
            if key != "drop_path_rate":
                words += ["--set", f"{section}.{key}={json.dumps(value, separators=(',', ':'))}"]
        return f"They are of another model: {shlex.join(words)}"
    if found := family(state):
        return f"They look like those of a {found} of timm: name the model with --model."
    return "Give the --size or --model, and the --set model options, that the weights were trained with."


def translation(model: nn.Module, state: Mapping[str, Tensor]) -> Translation:
    """Translates the names of the authors' checkpoints to HcNet's, and those of others, with other image and window
    sizes, by timm's own function of the model's family.
    """
    module = type(model).__module__
    if module.startswith("timm."):
        change = getattr(sys.modules[module], "checkpoint_filter_fn", None)
        return functools.partial(_by_timm, model, change) if change else dict
    heat = any(".Anisotropic_conv" in name for name in state)
    if heat or (hasattr(model, "stem") and not family(state) and any("patch_embed" in name for name in state)):
        return remap_official_state_dict
    return dict


def _by_timm(model: nn.Module, change: Callable[..., Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    own = model.state_dict()
    named = strip_prefixes(state, own)
    if all(name in named and named[name].shape == value.shape for name, value in own.items()):
        return named
    try:
        changed: dict[str, Tensor] = change(named, model)
    except Exception:  # it expects the weights of its family; load_into says what others lack
        return named
    return changed
