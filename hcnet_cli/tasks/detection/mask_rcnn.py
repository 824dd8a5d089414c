"""Mask R-CNN with FPN on any four-stage backbone, with the protocol of Swin's detection code (mmdetection 2.11).

The layers are torchvision's (FPN, RPN head, box and mask heads, NMS, RoIAlign). What happens between them is written
out here, because torchvision departs from the reference at most of those points: rounded anchors, strides inferred
from image sizes, one-sided clamp, other rules for low-quality matches, smooth L1, unaligned RoIAlign, soft mask
targets. `docs/detection.md` has the table, point by point.

Labels: 0 is background, classes are 1..C; mask channel and box regressor of class c stand at c - 1.
Boxes: x1, y1, x2, y2 in pixels, floating point, no "+ 1".
Letters: B images, G ground-truth boxes, N anchors or boxes, C classes, A anchors per place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, batched_nms, box_iou, clip_boxes_to_image, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from hcnet_cli.engine.finite import require_finite
from hcnet_cli.models.backbone import Pyramid
from hcnet_cli.tasks.detection import spec

STRIDES = (4, 8, 16, 32, 64)  # P2..P6; RoIs are taken from the first four
RATIOS = (0.5, 1.0, 2.0)  # height / width of the anchors
RPN_STDS = (1.0, 1.0, 1.0, 1.0)
BOX_STDS = (0.1, 0.1, 0.2, 0.2)
MAX_LOG_RATIO = abs(math.log(16 / 1000))
MASK_SIZE = 28

# (image in the batch, how many, stream) -> that many uniform numbers in [0, 1): who is sampled
Uniform = Callable[[int, int, int], Tensor]


# --- boxes ---------------------------------------------------------------------------------------------------------


def anchors_of(sizes: Sequence[tuple[int, int]], scale: float, device: torch.device | None = None) -> list[Tensor]:
    """Anchors of each level, [h * w * A, 4], rows first, then columns, then ratios.

    sizes: (h, w) of P2..P6. The centre of an anchor is the corner of its cell (mmdetection's center_offset 0); its area
    is (scale * stride)^2.
    """
    levels = []
    for (height, width), stride in zip(sizes, STRIDES, strict=True):
        root = torch.tensor(RATIOS, device=device).sqrt()
        half_w, half_h = scale * stride / root / 2, scale * stride * root / 2
        cell = torch.stack([-half_w, -half_h, half_w, half_h], dim=1)  # [A, 4]
        y, x = torch.meshgrid(
            torch.arange(height, device=device) * stride, torch.arange(width, device=device) * stride, indexing="ij"
        )
        corner = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)  # [h * w, 1, 4]
        levels.append((corner + cell).reshape(-1, 4))
    return levels


def encode(targets: Tensor, boxes: Tensor, stds: Sequence[float]) -> Tensor:
    """What must be added to `boxes` to give `targets`, both [N, 4], as (dx, dy, dw, dh) / stds."""
    size, wanted = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    shift = (targets[:, :2] + targets[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2 / size
    return torch.cat([shift, (wanted / size).log()], dim=1) / boxes.new_tensor(stds)


def decode(deltas: Tensor, boxes: Tensor, stds: Sequence[float]) -> Tensor:
    """The inverse of `encode`; growth and shrinkage are limited to a factor of 1000 / 16. deltas, boxes [..., 4]."""
    shift, log_ratio = (deltas * deltas.new_tensor(stds)).split(2, dim=-1)
    size = boxes[..., 2:] - boxes[..., :2]
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2 + shift * size
    half = size * log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def assign(overlaps: Tensor, pos_iou: float, neg_iou: float, min_pos_iou: float) -> Tensor:
    """Which ground truth a box is responsible for (mmdetection's MaxIoUAssigner).

    overlaps [G, N] -> [N] int64: g + 1, 0 for background, -1 for boxes that count as neither. After the thresholds
    every ground truth also takes the boxes that overlap it most (ties too) from `min_pos_iou` up, the last one winning.
    """
    if overlaps.numel() == 0:
        return torch.zeros(overlaps.shape[1], dtype=torch.int64, device=overlaps.device)
    best, which = overlaps.max(dim=0)
    assigned = torch.full_like(which, -1)
    assigned[best < neg_iou] = 0
    assigned = torch.where(best >= pos_iou, which + 1, assigned)
    best_of_truth = overlaps.max(dim=1, keepdim=True).values  # [G, 1]
    claimed = (overlaps == best_of_truth) & (best_of_truth >= min_pos_iou)  # [G, N]
    truth, box = torch.nonzero(claimed, as_tuple=True)
    claim = torch.zeros_like(which).scatter_reduce(0, box, truth + 1, "amax")
    return torch.where(claim > 0, claim, assigned)


def sample(assigned: Tensor, number: int, pos_fraction: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of up to `number` boxes: positives up to the fraction, the rest background. `uniform` [N] decides who."""

    def choose(pool: Tensor, count: int) -> Tensor:
        if len(pool) <= count:
            return pool
        return pool[uniform[pool].sort(stable=True).indices[:count]].sort().values

    positive = choose(torch.nonzero(assigned > 0)[:, 0], int(number * pos_fraction))
    return positive, choose(torch.nonzero(assigned == 0)[:, 0], number - len(positive))


def roi_levels(boxes: Tensor) -> Tensor:
    """The pyramid level (0..3 for P2..P5) each box [N, 4] is pooled from: 112 pixels is where P3 begins."""
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    return (side / 56 + 1e-6).log2().floor().clamp(0, 3).long()


def pool(features: Sequence[Tensor], boxes: Sequence[Tensor], size: int) -> Tensor:
    """RoIAlign (aligned, adaptive sampling), each box from its level of P2..P5.

    features: [B, c, h, w] per level; boxes: [n, 4] per image -> [N, c, size, size], N over all images.
    """
    rois = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])  # [N, 5]: image, box
    levels = roi_levels(rois[:, 1:])
    pooled = features[0].new_zeros(len(rois), features[0].shape[1], size, size)
    for level, (feature, stride) in enumerate(zip(features[:4], STRIDES, strict=False)):
        here = torch.nonzero(levels == level)[:, 0]
        values = roi_align(feature, rois[here], size, 1 / stride, sampling_ratio=0, aligned=True)
        pooled = pooled.index_put((here,), values.to(pooled.dtype))
    return pooled


def mask_targets(masks: Tensor, which: Tensor, boxes: Tensor) -> Tensor:
    """The part of the masks inside boxes, as 0 and 1: masks [G, H, W] uint8, which [N], boxes [N, 4] -> [N, 28, 28]."""
    rois = torch.cat([which[:, None].to(boxes), boxes], dim=1)
    cut = roi_align(masks[:, None].to(boxes), rois, MASK_SIZE, 1.0, sampling_ratio=0, aligned=True)
    return (cut[:, 0] >= 0.5).to(boxes)


def pad_batch(images: Sequence[Tensor], divisor: int = 32) -> Tensor:
    """Images [3, H, W] of any sizes -> [B, 3, H', W'], zeros to the right and below, sides divisible by `divisor`."""
    height, width = (max(image.shape[d] for image in images) for d in (1, 2))
    height, width = (math.ceil(side / divisor) * divisor for side in (height, width))
    return torch.stack([F.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images])


def _mean_weights(like: Tensor, counts: Sequence[int]) -> Tensor:
    """A weight for each of the samples of all images: the weighted sum is the mean over images of their means."""
    return torch.cat([like.new_full((n,), 1 / (len(counts) * max(n, 1))) for n in counts])


# --- model ---------------------------------------------------------------------------------------------------------


class MaskRCNN(nn.Module):
    """FPN and Mask R-CNN on a backbone with timm's `forward_intermediates` and `feature_info`; nothing is frozen.

    The backbone's last four maps (strides 4, 8, 16, 32) get one GroupNorm(1) each, new to every checkpoint. Without
    masks this is Faster R-CNN. Box and mask widths and the counts of proposals may shrink for small data.

    num_classes: without background. settings: fields of the recipe's section, `spec.MaskRCNN`, which has the defaults.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, **settings: Any) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {num_classes}")
        self.settings = use = spec.MaskRCNN(**settings)
        self.pyramid = Pyramid.of(backbone)
        self.num_classes, self.with_masks = num_classes, use.with_masks
        self.backbone: Any = backbone
        self.norms = self.pyramid.norms()
        self.fpn = FeaturePyramidNetwork(self.pyramid.channels, use.fpn_channels, extra_blocks=LastLevelMaxPool())
        self.rpn_head = RPNHead(use.fpn_channels, num_anchors=len(RATIOS))
        self.box_head = TwoMLPHead(use.fpn_channels * 7 * 7, use.box_head_channels)
        self.box_score = nn.Linear(use.box_head_channels, num_classes + 1)
        self.box_delta = nn.Linear(use.box_head_channels, num_classes * 4)
        if use.with_masks:
            layers = (use.mask_head_channels,) * use.num_mask_convs
            self.mask_head = MaskRCNNHeads(use.fpn_channels, layers, dilation=1)
            width = use.mask_head_channels if layers else use.fpn_channels
            self.mask_score = MaskRCNNPredictor(width, use.mask_head_channels, num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        """As the reference, where torchvision's own initialisation differs."""
        for module in (*self.fpn.modules(), *self.box_head.modules()):
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.normal_(self.box_score.weight, std=0.01)
        nn.init.normal_(self.box_delta.weight, std=0.001)
        heads = [self.box_head, self.box_score, self.box_delta, *([self.mask_score] if self.with_masks else [])]
        for name, parameter in (item for head in heads for item in head.named_parameters()):
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]] | None = None,
        *,
        noise: Tensor | None = None,
        uniform: Uniform | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses when targets are given, else detections in the coordinates of the images given, or UserError for
        scores, boxes or masks that are not finite.

        images: normalised, [3, H, W] each. targets: boxes [G, 4] float, labels [G] int64 from 1, masks [G, H, W] uint8
        (with masks). noise: for the backbone's drop path. uniform: decides which anchors and RoIs are sampled; torch's
        generator when absent.

        Each loss is the mean over images of a mean over that image's samples, so that k micro-batches averaged equal
        one batch. The reference averages over all samples of the images on a GPU: the same when every image fills
        its quota, and always with one image per GPU.
        """
        features = self.features(pad_batch(images), noise)
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        if targets is None:
            return self._detect(features, self._proposals(features, sizes)[0], sizes)
        draw = uniform or (lambda image, number, stream: torch.rand(number))
        proposals, losses = self._proposals(features, sizes, targets, draw)
        return losses | self._roi_losses(features, proposals, targets, draw)

    def features(self, x: Tensor, noise: Tensor | None = None) -> list[Tensor]:
        """[B, 3, H, W] -> P2..P6, [B, fpn_channels, H / stride, W / stride]."""
        maps = self.pyramid.maps(self.backbone, self.norms, x, noise)
        return list(self.fpn({str(i): feature for i, feature in enumerate(maps)}).values())

    # --- region proposals ---

    def _proposals(
        self,
        features: list[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]] | None = None,
        draw: Uniform | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals [N, 4] of each image and, with targets, the RPN's losses.

        An image looks only at anchors of its own padded area, so its samples don't depend on its neighbours' sizes.
        """
        score_maps, delta_maps = self.rpn_head(features)
        grids = [(feature.shape[2], feature.shape[3]) for feature in features]
        device = features[0].device
        scores = [m.permute(0, 2, 3, 1).flatten(1).float() for m in score_maps]  # [B, A, h, w] -> [B, h * w * A]
        deltas = [m.permute(0, 2, 3, 1).reshape(len(m), -1, 4).float() for m in delta_maps]  # -> [B, h * w * A, 4]
        anchors = anchors_of(grids, self.settings.anchor_scale, device)

        proposals, losses = [], []
        for b, size in enumerate(sizes):
            own = [self._own_area(size, grid, stride, device) for grid, stride in zip(grids, STRIDES, strict=True)]
            score = [s[b, k] for s, k in zip(scores, own, strict=True)]
            delta = [d[b, k] for d, k in zip(deltas, own, strict=True)]
            anchor = [a[k] for a, k in zip(anchors, own, strict=True)]
            proposals.append(self._keep_best(score, delta, anchor, size))
            if targets is not None and draw is not None:
                losses.append(self._rpn_losses(score, delta, anchor, targets[b]["boxes"], partial(draw, b)))
        means = (torch.stack(part).mean() for part in zip(*losses, strict=True))
        return proposals, dict(zip(("loss_rpn_cls", "loss_rpn_box"), means, strict=False))

    @staticmethod
    def _own_area(size: tuple[int, int], grid: tuple[int, int], stride: int, device: torch.device) -> Tensor | slice:
        """Which anchors of a level lie on the image's own area, padded to 32 pixels."""
        rows, columns = (min(math.ceil(math.ceil(s / 32) * 32 / stride), g) for s, g in zip(size, grid, strict=True))
        if (rows, columns) == grid:
            return slice(None)
        inside = torch.zeros(*grid, len(RATIOS), dtype=torch.bool, device=device)
        inside[:rows, :columns] = True
        return torch.nonzero(inside.flatten())[:, 0]

    @torch.no_grad()
    def _keep_best(
        self, scores: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], size: tuple[int, int]
    ) -> Tensor:
        if not self.training:
            require_finite(*scores, *deltas)
        use, boxes, best, levels = self.settings, [], [], []
        before, after = (
            (use.rpn_pre_train, use.rpn_post_train) if self.training else (use.rpn_pre_test, use.rpn_post_test)
        )
        for level, (score, delta, anchor) in enumerate(zip(scores, deltas, anchors, strict=True)):
            top, index = score.topk(min(before, len(score)))
            boxes.append(clip_boxes_to_image(decode(delta[index], anchor[index], RPN_STDS), size))
            best.append(top.sigmoid())
            levels.append(torch.full_like(index, level))
        box, score, level_of = torch.cat(boxes), torch.cat(best), torch.cat(levels)
        solid = torch.nonzero((box[:, 2:] > box[:, :2]).all(dim=1))[:, 0]
        box, score, level_of = box[solid], score[solid], level_of[solid]
        return box[batched_nms(box, score, level_of, 0.7)[:after]]

    def _rpn_losses(
        self,
        scores: list[Tensor],
        deltas: list[Tensor],
        anchors: list[Tensor],
        truth: Tensor,
        draw: Callable[[int, int], Tensor],
    ) -> tuple[Tensor, Tensor]:
        score, delta, anchor = torch.cat(scores), torch.cat(deltas), torch.cat(anchors)
        assigned = assign(box_iou(truth, anchor), pos_iou=0.7, neg_iou=0.3, min_pos_iou=0.3)
        positive, negative = sample(assigned, self.settings.rpn_batch, 0.5, draw(len(anchor), 2).to(anchor.device))
        sampled = torch.cat([positive, negative])
        number = max(len(sampled), 1)
        wanted = (assigned[sampled] > 0).to(score)
        cls = F.binary_cross_entropy_with_logits(score[sampled], wanted, reduction="sum") / number
        target = encode(truth[assigned[positive] - 1], anchor[positive], RPN_STDS)
        return cls, F.l1_loss(delta[positive], target, reduction="sum") / number

    # --- boxes and masks ---

    def _roi_losses(
        self,
        features: list[Tensor],
        proposals: list[Tensor],
        targets: Sequence[dict[str, Tensor]],
        draw: Uniform,
    ) -> dict[str, Tensor]:
        boxes, truths, positives = [], [], []  # per image: sampled boxes; ground truth of each (0: none); positives
        for b, (proposal, target) in enumerate(zip(proposals, targets, strict=True)):
            truth = target["boxes"].to(proposal)
            assigned = assign(box_iou(truth, proposal), pos_iou=0.5, neg_iou=0.5, min_pos_iou=0.5)
            # ground truth joins the proposals after the assignment, each box responsible for itself
            own = torch.arange(1, len(truth) + 1, device=truth.device)
            candidates, assigned = torch.cat([truth, proposal]), torch.cat([own, assigned])
            uniform = draw(b, len(candidates), 3).to(truth.device)
            positive, negative = sample(assigned, self.settings.box_batch, 0.25, uniform)
            chosen = torch.cat([positive, negative])
            boxes.append(candidates[chosen])
            truths.append(assigned[chosen])
            positives.append(len(positive))

        scores, deltas = self._box_outputs(pool(features, boxes, 7))
        labels = torch.cat([F.pad(t["labels"], (1, 0))[k] for t, k in zip(targets, truths, strict=True)])  # [N]
        weights = _mean_weights(scores, [len(k) for k in truths])
        losses = {"loss_cls": (F.cross_entropy(scores, labels, reduction="none") * weights).sum()}
        index = torch.nonzero(labels)[:, 0]
        boxes = [b[:n] for b, n in zip(boxes, positives, strict=True)]  # from here on those with an object alone
        truths = [k[:n] - 1 for k, n in zip(truths, positives, strict=True)]
        objects = list(zip(targets, truths, boxes, strict=True))
        wanted = torch.cat([encode(t["boxes"][k], b, BOX_STDS) for t, k, b in objects])
        off = (deltas.reshape(len(deltas), -1, 4)[index, labels[index] - 1] - wanted).abs().sum(dim=1)
        losses["loss_box"] = (off * weights[index]).sum()
        if self.with_masks:
            wanted = torch.cat([mask_targets(t["masks"], k, b) for t, k, b in objects])
            logits = self._mask_logits(features, boxes, labels[index])
            wrong = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=(1, 2))
            losses["loss_mask"] = (wrong * _mean_weights(wrong, positives)).sum()
        return losses

    def _mask_logits(self, features: list[Tensor], boxes: list[Tensor], labels: Tensor) -> Tensor:
        """[N, 28, 28] in float32 of boxes [n, 4] per image, each in the channel of its class; labels [N] from 1."""
        logits = self.mask_score(self.mask_head(pool(features, boxes, 14))).float()  # [N, C, 28, 28]
        return logits[torch.arange(len(logits), device=logits.device), labels - 1]

    def _box_outputs(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """[N, c, 7, 7] -> class logits [N, 1 + C], box deltas [N, 4 * C], in float32."""
        hidden = self.box_head(pooled)
        return self.box_score(hidden).float(), self.box_delta(hidden).float()

    def _detect(
        self, features: list[Tensor], proposals: list[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Boxes [N, 4], scores [N] (falling), labels [N] from 1, masks [N, 28, 28] probabilities inside the boxes."""
        scores, deltas = self._box_outputs(pool(features, proposals, 7))
        require_finite(scores, deltas)
        counts = [len(p) for p in proposals]
        found = []
        for score, delta, proposal, size in zip(
            scores.softmax(dim=1).split(counts), deltas.split(counts), proposals, sizes, strict=True
        ):
            box = decode(delta.reshape(-1, self.num_classes, 4), proposal[:, None], BOX_STDS)  # [N, C, 4]
            which, label = torch.nonzero(score[:, 1:] > self.settings.score_thresh, as_tuple=True)
            kept = clip_boxes_to_image(box[which, label], size)
            kept_score = score[which, label + 1]
            best = batched_nms(kept, kept_score, label, self.settings.nms_thresh)[: self.settings.max_detections]
            found.append({"boxes": kept[best], "scores": kept_score[best], "labels": label[best] + 1})
        if self.with_masks:
            boxes, labels = [d["boxes"] for d in found], torch.cat([d["labels"] for d in found])
            masks = self._mask_logits(features, boxes, labels).sigmoid()
            require_finite(masks)
            for detection, mask in zip(found, masks.split(list(map(len, boxes))), strict=True):
                detection["masks"] = mask
        return found

    def forward_dummy(self, image: Tensor) -> None:
        """What the papers count as the cost of a detector: backbone, FPN, RPN, 1000 box RoIs, 100 mask RoIs.

        image [1, 3, H, W] (Swin-Transformer-Object-Detection tools/analysis_tools/get_flops.py).
        """
        features = self.features(image)
        self.rpn_head(features)
        channels = features[0].shape[1]
        self._box_outputs(image.new_zeros(1000, channels, 7, 7))
        if self.with_masks:
            self.mask_score(self.mask_head(image.new_zeros(100, channels, 14, 14)))
