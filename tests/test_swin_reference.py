"""UPerNet and Mask R-CNN on Swin: logits equal to transformers' Swin with the same weights, padded windows included."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from hcnet_cli.models import backbone
from hcnet_cli.tasks.detection.mask_rcnn import MaskRCNN, pool
from hcnet_cli.tasks.segmentation.upernet import UPerNet

modeling_upernet = pytest.importorskip("transformers.models.upernet.modeling_upernet", reason="the extra `dev`")
from transformers import SwinConfig  # noqa: E402

SMALL = {"embed_dim": 24, "depths": [2, 1, 1, 2], "num_heads": [1, 2, 4, 8]}
TINY = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
NAMES = (  # timm's (left) and transformers'
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^patch_embed\.norm", "embeddings.norm"),
    (r"^layers\.", "encoder.layers."),
    (r"attn\.relative_position_bias_table", "attention.relative_position_bias.relative_position_bias_table"),
    (r"attn\.proj", "attention.o_proj"),
    (r"norm1", "layernorm_before"),
    (r"norm2", "layernorm_after"),
)


class OnTokens(nn.Module):
    """A norm of maps [B, C, H, W], given tokens [B, H * W, C]: the norm that every backbone's maps get here."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def in_transformers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The downsampling begins a stage in timm and ends the one before there; q, k and v are one tensor in timm."""
    found = {}
    for given, value in state.items():
        name = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", given)
        for ours, theirs in NAMES:
            name = re.sub(ours, theirs, name)
        if "attn.qkv" in name:
            for one, part in zip("qkv", value.chunk(3), strict=True):
                found[name.replace("attn.qkv", f"attention.{one}_proj")] = part
        else:
            found[name] = value
    return found


def upernet_of(args: dict[str, Any]) -> tuple[UPerNet, Any]:
    """Ours and theirs, with the same random weights and statistics."""
    torch.manual_seed(0)
    ours = UPerNet(backbone.create("swin_tiny_patch4_window7_224", 0, args), 7, channels=16, aux_channels=8).eval()
    for name, value in [*ours.named_parameters(), *ours.named_buffers()]:
        if value.ndim == 1:  # biases, norms and statistics are not 0 and 1
            value.data.uniform_(0.5, 1.5)
        elif "relative_position_bias_table" in name:
            value.data.normal_()
    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = modeling_upernet.UperNetConfig(
        backbone_config=SwinConfig(window_size=7, drop_path_rate=0.0, out_features=stages, **args),
        hidden_size=16,
        auxiliary_channels=8,
        auxiliary_in_channels=4 * args["embed_dim"],
        auxiliary_num_convs=1,
        num_labels=7,
    )
    theirs = modeling_upernet.UperNetForSemanticSegmentation(config).eval()
    result = theirs.backbone.swin.load_state_dict(in_transformers_names(ours.backbone.model.state_dict()), strict=False)
    assert set(result.missing_keys) <= {"layernorm.weight", "layernorm.bias"}  # behind the last map
    assert not result.unexpected_keys
    for head in ("decode_head", "auxiliary_head"):
        state = getattr(ours, head).state_dict()
        renamed = {k.replace(".bn.", ".batch_norm.").replace("conv_seg.", "classifier."): v for k, v in state.items()}
        getattr(theirs, head).load_state_dict(renamed)
    for stage, norm in zip(stages, ours.norms, strict=True):
        theirs.backbone.hidden_states_norms[stage] = OnTokens(norm)
    return ours, theirs


@pytest.mark.parametrize(
    ("args", "size"), [(SMALL, (256, 352)), (SMALL, (96, 64)), (TINY, (128, 256))], ids=["small", "low", "Swin-T"]
)
def test_upernet_on_swin(args: dict[str, Any], size: tuple[int, int]) -> None:
    """Sizes that no window divides; the last stage's map is larger or smaller than a window."""
    ours, theirs = upernet_of(args)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected, got = theirs(x).logits, ours(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(F.interpolate(got, size, mode="bilinear"), expected, rtol=1e-4, atol=1e-4)


def pyramid_by_hand(maps: Sequence[Tensor], weights: dict[str, Tensor]) -> list[Tensor]:
    """FPN (Lin et al., CVPR 2017): laterals, nearest enlargement, sum, 3x3; P6 is every second pixel of P5."""
    laterals = [
        F.conv2d(m, weights[f"inner_blocks.{i}.0.weight"], weights[f"inner_blocks.{i}.0.bias"])
        for i, m in enumerate(maps)
    ]
    for i in (2, 1, 0):
        laterals[i] = laterals[i] + laterals[i + 1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    levels = [
        F.conv2d(m, weights[f"layer_blocks.{i}.0.weight"], weights[f"layer_blocks.{i}.0.bias"], padding=1)
        for i, m in enumerate(laterals)
    ]
    return [*levels, levels[-1][:, :, ::2, ::2]]


def test_mask_rcnn_on_swin() -> None:
    """Objectness, class and mask logits of given boxes, from transformers' maps and the layers written out."""
    segmenter, theirs = upernet_of(SMALL)
    detector = MaskRCNN(
        segmenter.backbone, 5, fpn_channels=16, box_head_channels=32, mask_head_channels=16, num_mask_convs=2
    ).eval()
    detector.norms.load_state_dict(segmenter.norms.state_dict())
    for module in (detector.rpn_head, detector.box_score, detector.mask_score):
        for value in module.parameters():
            value.data.normal_(std=0.3)
    x = torch.randn(1, 3, 128, 192)
    boxes = torch.tensor([[3.0, 5, 60, 90], [100, 20, 190, 120], [0, 0, 192, 128], [40, 40, 48, 50]])
    labels = torch.tensor([1, 5, 3, 2])
    w = detector.state_dict()
    with torch.no_grad():
        features = detector.features(x)
        scores = detector._box_outputs(pool(features, [boxes], 7))[0]
        masks = detector._mask_logits(features, [boxes], labels)
        objectness = detector.rpn_head(features)[0]

        fpn = {name[4:]: value for name, value in w.items() if name.startswith("fpn.")}
        levels = pyramid_by_hand(theirs.backbone(x).feature_maps, fpn)
        for found, level in zip(objectness, levels, strict=True):
            hidden = F.relu(F.conv2d(level, w["rpn_head.conv.0.0.weight"], w["rpn_head.conv.0.0.bias"], padding=1))
            expected = F.conv2d(hidden, w["rpn_head.cls_logits.weight"], w["rpn_head.cls_logits.bias"])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for box, label, score, mask in zip(boxes, labels, scores, masks, strict=True):
            area = float((box[2] - box[0]) * (box[3] - box[1])) ** 0.5
            level = min(max(int(torch.log2(torch.tensor(area / 56 + 1e-6)).floor()), 0), 3)  # mmdetection's rule
            cut = [
                roi_align(levels[level], [box[None]], side, 1 / 4 / 2**level, sampling_ratio=0, aligned=True)
                for side in (7, 14)
            ]
            hidden = cut[0].flatten(1)
            for layer in ("fc6", "fc7"):
                hidden = F.relu(F.linear(hidden, w[f"box_head.{layer}.weight"], w[f"box_head.{layer}.bias"]))
            expected = F.linear(hidden, w["box_score.weight"], w["box_score.bias"])[0]
            torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)
            hidden = cut[1]
            for i in range(2):
                hidden = F.relu(F.conv2d(hidden, w[f"mask_head.{i}.0.weight"], w[f"mask_head.{i}.0.bias"], padding=1))
            up = F.relu(
                F.conv_transpose2d(hidden, w["mask_score.conv5_mask.weight"], w["mask_score.conv5_mask.bias"], stride=2)
            )
            expected = F.conv2d(up, w["mask_score.mask_fcn_logits.weight"], w["mask_score.mask_fcn_logits.bias"])
            torch.testing.assert_close(mask, expected[0, label - 1], rtol=1e-4, atol=1e-4)
