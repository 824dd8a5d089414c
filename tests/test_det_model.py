"""Mask R-CNN: geometry, assignment, sampling and losses against formulas written out here; cost; batching."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hcnet_cli.models.hcnet  # noqa: F401 (registers the sizes)
from hcnet_cli.profile import count_params
from hcnet_cli.rng import keyed_uniform
from hcnet_cli.tasks.detection import mask_rcnn as det
from hcnet_cli.tasks.detection.mask_rcnn import MaskRCNN
from hcnet_cli.tasks.detection.task import count_macs

SMALL = {
    "fpn_channels": 16,
    "box_head_channels": 32,
    "mask_head_channels": 16,
    "num_mask_convs": 1,
    "anchor_scale": 4.0,
    "rpn_pre_train": 60,
    "rpn_post_train": 40,
    "rpn_pre_test": 60,
    "rpn_post_test": 40,
    "rpn_batch": 32,
    "box_batch": 24,
}


def small(**changes) -> MaskRCNN:
    torch.manual_seed(0)
    backbone = timm.create_model("hcnet_pico", dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), drop_path_rate=0.0)
    return MaskRCNN(backbone, num_classes=3, **{**SMALL, **changes})


def some_targets(number: int, size: int = 64, objects: int = 2) -> list[dict[str, Tensor]]:
    random = np.random.RandomState(number)
    targets = []
    for _ in range(number):
        corner = random.randint(0, size // 2, (objects, 2))
        boxes = np.concatenate([corner, corner + random.randint(8, size // 2, (objects, 2))], axis=1)
        masks = np.zeros((objects, size, size), dtype=np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
            mask[y1:y2, x1:x2] = 1
        targets.append(
            {
                "boxes": torch.tensor(boxes, dtype=torch.float32),
                "labels": torch.tensor(random.randint(1, 4, objects)),
                "masks": torch.tensor(masks),
            }
        )
    return targets


def keyed(keys: Tensor):
    return lambda image, number, stream: keyed_uniform(keys[image : image + 1], number, stream)[:, 0]


# --- cost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "macs", "params"), [("hcnet_tiny_release", 267.2, 47.6), ("hcnet_tiny", 256.1, 48.3)])
def test_cost_is_that_of_the_papers_convention(name: str, macs: float, params: float) -> None:
    """1280 x 800, 1000 box RoIs, 100 mask RoIs, 80 classes (REFERENCE 2.3)."""
    model = MaskRCNN(timm.create_model(name), num_classes=80)
    assert round(count_macs(SimpleNamespace(model=model)) / 1e9, 1) == macs
    assert round(count_params(model) / 1e6, 1) == params


# --- anchors and box coder --------------------------------------------------------------------------------------------


def test_anchors_stand_on_cell_corners_unrounded() -> None:
    """Centre = cell index * stride, area = (8 * stride)^2, ratio = height / width, order rows, columns, ratios."""
    sizes = [(6, 7), (3, 4), (2, 2), (1, 1), (1, 1)]
    for level, anchors in enumerate(det.anchors_of(sizes, 8)):
        stride = 4 * 2**level
        expected = []
        for row, column in itertools.product(range(sizes[level][0]), range(sizes[level][1])):
            for ratio in (0.5, 1.0, 2.0):
                width, height = 8 * stride / math.sqrt(ratio), 8 * stride * math.sqrt(ratio)
                x, y = column * stride, row * stride
                expected.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
        torch.testing.assert_close(anchors, torch.tensor(expected))


coordinate = st.floats(0, 800, width=32)
side = st.floats(2, 600, width=32)
a_box = st.tuples(coordinate, coordinate, side, side).map(lambda v: [v[0], v[1], v[0] + v[2], v[1] + v[3]])


@given(a_box, a_box)
@settings(max_examples=50, deadline=None)
def test_box_coder_is_the_written_formula_and_inverts(box: list[float], target: list[float]) -> None:
    (x1, y1, x2, y2), (u1, v1, u2, v2) = box, target
    expected = [
        ((u1 + u2) / 2 - (x1 + x2) / 2) / (x2 - x1) / 0.1,
        ((v1 + v2) / 2 - (y1 + y2) / 2) / (y2 - y1) / 0.1,
        math.log((u2 - u1) / (x2 - x1)) / 0.2,
        math.log((v2 - v1) / (y2 - y1)) / 0.2,
    ]
    boxes, targets = torch.tensor([box], dtype=torch.float64), torch.tensor([target], dtype=torch.float64)
    deltas = det.encode(targets, boxes, det.BOX_STDS)
    assert deltas[0].tolist() == pytest.approx(expected, abs=1e-6)
    if max(abs(expected[2]), abs(expected[3])) * 0.2 < math.log(1000 / 16):
        torch.testing.assert_close(det.decode(deltas, boxes, det.BOX_STDS), targets, atol=1e-6, rtol=1e-6)


def test_decoding_limits_growth_and_shrinkage_to_62_5() -> None:
    box = torch.tensor([[100.0, 100.0, 110.0, 120.0]])
    wide = det.decode(torch.tensor([[0.0, 0.0, 50.0, -50.0]]), box, det.RPN_STDS)[0]
    assert (wide[2] - wide[0]).item() == pytest.approx(625, rel=1e-5)
    assert (wide[3] - wide[1]).item() == pytest.approx(20 / 62.5, rel=1e-4)


def test_roi_levels_change_at_112_224_448() -> None:
    """floor(log2(sqrt(area) / 56 + 1e-6)), kept in 0..3 (mmdetection SingleRoIExtractor)."""
    sides = [10, 111.9, 112, 223.9, 224, 447.9, 448, 2000]
    boxes = torch.tensor([[5.0, 5.0, 5 + s, 5 + s] for s in sides])
    assert det.roi_levels(boxes).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


# --- who is responsible for what --------------------------------------------------------------------------------------


def assign_by_loops(overlaps: np.ndarray, pos: float, neg: float, min_pos: float) -> list[int]:
    """MaxIoUAssigner as its documentation tells it, box by box and truth by truth."""
    truths, boxes = overlaps.shape
    result = []
    for n in range(boxes):
        best = overlaps[:, n].max() if truths else 0
        result.append(0 if best < neg else -1)
        if truths and best >= pos:
            result[n] = int(overlaps[:, n].argmax()) + 1
    for g in range(truths):
        if boxes and overlaps[g].max() >= min_pos:
            for n in range(boxes):
                if overlaps[g, n] == overlaps[g].max():
                    result[n] = g + 1
    return result


@given(
    st.integers(0, 4), st.integers(0, 12), st.integers(0, 10**6), st.sampled_from([(0.7, 0.3, 0.3), (0.5, 0.5, 0.5)])
)
@settings(max_examples=60, deadline=None)
def test_assignment_equals_the_loops(truths: int, boxes: int, seed: int, limits: tuple[float, float, float]) -> None:
    """Coarse overlaps, so ties and exact thresholds happen."""
    overlaps = (np.random.RandomState(seed).randint(0, 11, (truths, boxes)) / 10).astype(np.float32)
    ours = det.assign(torch.tensor(overlaps).reshape(truths, boxes), *limits)
    limits32 = [float(np.float32(v)) for v in limits]
    assert ours.tolist() == assign_by_loops(overlaps, *limits32)


@given(st.lists(st.integers(-1, 3), max_size=40), st.integers(1, 30), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_sampling_fills_the_quota(assigned: list[int], number: int, key: int) -> None:
    """Positives up to the fraction, background for the rest, never more than there are, never an ignored one."""
    labels = torch.tensor(assigned, dtype=torch.int64)
    uniform = keyed_uniform(torch.tensor([key]), max(len(labels), 1))[: len(labels), 0]
    positive, negative = det.sample(labels, number, 0.5, uniform)
    assert (labels[positive] > 0).all()
    assert (labels[negative] == 0).all()
    assert len(positive) == min(int((labels > 0).sum()), number // 2)
    assert len(negative) == min(int((labels == 0).sum()), number - len(positive))
    assert len(set(positive.tolist()) | set(negative.tolist())) == len(positive) + len(negative)


def test_every_candidate_is_as_likely() -> None:
    counts = torch.zeros(8)
    for key in range(400):
        positive, _ = det.sample(torch.ones(8, dtype=torch.int64), 4, 0.5, keyed_uniform(torch.tensor([key]), 8)[:, 0])
        counts[positive] += 1
    assert counts.sum() == 800
    assert (counts - 100).abs().max() < 40


def test_sampling_depends_on_the_image_alone() -> None:
    """The same image gives the same losses alone and at any place among others of its size, for a given key.

    Images of other sizes only share the padding, which normalisation over the map does feel; anchors do not.
    """
    model = small().train()
    images = [torch.randn(3, 64, 64) for _ in range(3)]
    targets = some_targets(3)
    keys = torch.tensor([11, 22, 33])
    alone = [model([images[i]], [targets[i]], uniform=keyed(keys[i : i + 1])) for i in range(3)]
    order = [2, 0, 1]
    together = model([images[i] for i in order], [targets[i] for i in order], uniform=keyed(keys[order]))
    for name, value in together.items():
        mean = torch.stack([losses[name] for losses in alone]).mean()
        torch.testing.assert_close(value, mean, atol=1e-5, rtol=1e-4)


def test_micro_batches_average_to_the_batch() -> None:
    """Gradients too: two micro-batches of 2, averaged, equal one batch of 4."""
    model = small().train()
    images = [torch.randn(3, 64, 64) for _ in range(4)]
    targets = some_targets(4)
    targets[1] = {k: v[:0] for k, v in targets[1].items()}  # one without objects
    keys = torch.arange(4)

    def gradients(parts: list[list[int]]) -> list[Tensor]:
        model.zero_grad()
        for part in parts:
            losses = model([images[i] for i in part], [targets[i] for i in part], uniform=keyed(keys[part]))
            (sum(losses.values()) / len(parts)).backward()
        return [p.grad.clone() for p in model.parameters()]

    for whole, split in zip(gradients([[0, 1, 2, 3]]), gradients([[0, 1], [2, 3]]), strict=True):
        torch.testing.assert_close(whole, split, atol=1e-5, rtol=1e-3)


def test_anchors_on_the_padding_of_a_batch_are_not_used() -> None:
    """The number of anchors an image draws from is that of its own area, whatever its neighbours."""
    drawn: dict[tuple[int, int], list[int]] = {}

    def spy(width: int):
        def uniform(image: int, number: int, stream: int) -> Tensor:
            if image == 0 and stream == 2:
                drawn.setdefault((0, width), []).append(number)
            return torch.rand(number)

        return uniform

    model = small().train()
    target = some_targets(1, 64)[0]
    for width in (64, 128):
        model([torch.randn(3, 64, 64), torch.randn(3, 64, width)], [target, target], uniform=spy(width))
    assert drawn[0, 64] == drawn[0, 128] == [3 * (16**2 + 8**2 + 4**2 + 2**2 + 1)]


# --- losses against formulas ------------------------------------------------------------------------------------------


def test_rpn_losses_are_bce_and_plain_l1_over_all_sampled_anchors() -> None:
    model = small().train()
    anchors = det.anchors_of([(4, 4), (2, 2), (1, 1), (1, 1), (1, 1)], 4.0)
    torch.manual_seed(1)
    scores = [torch.randn(len(a)) for a in anchors]
    deltas = [torch.randn(len(a), 4) for a in anchors]
    truth = torch.tensor([[0.0, 0.0, 14.0, 15.0]])
    cls, box = model._rpn_losses(scores, deltas, anchors, truth, lambda number, stream: torch.zeros(number))
    flat, score, delta = torch.cat(anchors), torch.cat(scores), torch.cat(deltas)
    from torchvision.ops import box_iou

    assigned = assign_by_loops(box_iou(truth, flat).numpy(), 0.7, 0.3, 0.3)
    positive = [n for n, a in enumerate(assigned) if a > 0][:16]
    negative = [n for n, a in enumerate(assigned) if a == 0][: 32 - len(positive)]
    assert positive
    total_cls = sum(math.log1p(math.exp(-score[n].item())) for n in positive)
    total_cls += sum(math.log1p(math.exp(score[n].item())) for n in negative)
    total_box = 0.0
    for n in positive:
        x1, y1, x2, y2 = flat[n].tolist()
        wanted = [
            (7.0 - (x1 + x2) / 2) / (x2 - x1),
            (7.5 - (y1 + y2) / 2) / (y2 - y1),
            math.log(14 / (x2 - x1)),
            math.log(15 / (y2 - y1)),
        ]
        total_box += sum(abs(d - w) for d, w in zip(delta[n].tolist(), wanted, strict=True))
    number = len(positive) + len(negative)
    assert cls.item() == pytest.approx(total_cls / number, rel=1e-4)
    assert box.item() == pytest.approx(total_box / number, rel=1e-4)


def test_box_and_mask_losses_are_the_written_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross-entropy over all RoIs, L1 on the class's own box divided by all RoIs, BCE on the class's own mask."""
    model = small(box_batch=8).train()
    target = some_targets(1)[0]
    truth, labels = target["boxes"], target["labels"]
    proposals = torch.cat([truth + torch.tensor([1.0, 0.0, 2.0, 1.0]), torch.tensor([[0.0, 0.0, 5.0, 5.0]] * 5)])
    scores, deltas = torch.randn(7, 4), torch.randn(7, 12)
    logits = torch.randn(2, 3, 28, 28)
    monkeypatch.setattr(model, "_box_outputs", lambda pooled: (scores, deltas))
    monkeypatch.setattr(model.mask_score, "forward", lambda pooled: logits)
    features = [torch.randn(1, 16, 64 // s, 64 // s) for s in det.STRIDES]
    losses = model._roi_losses(features, [proposals], [target], lambda image, n, stream: torch.arange(n) / n)
    # a quarter of 8 may be positive, uniform numbers rise: the first two of four are taken, the truths themselves
    wanted = torch.cat([labels, torch.zeros(5, dtype=torch.int64)])
    cls = -sum(scores.log_softmax(1)[n, wanted[n]].item() for n in range(7)) / 7
    box = sum(deltas[n].reshape(3, 4)[labels[n] - 1].abs().sum().item() for n in range(2)) / 7  # wanted deltas are 0
    bce = 0.0
    for n in range(2):
        logit = logits[n, labels[n] - 1]  # a filled box is 1 everywhere inside itself
        bce += torch.log1p(torch.exp(-logit)).mean().item() / 2
    assert losses["loss_cls"].item() == pytest.approx(cls, rel=1e-5)
    assert losses["loss_box"].item() == pytest.approx(box, rel=1e-5)
    assert losses["loss_mask"].item() == pytest.approx(bce, rel=1e-5)


def test_mask_targets_are_the_box_cut_out_and_halved() -> None:
    """A mask whose left half is set, cut by its own box and by the right half of it."""
    masks = torch.zeros(1, 56, 56, dtype=torch.uint8)
    masks[0, :, :28] = 1
    boxes = torch.tensor([[0.0, 0.0, 56.0, 56.0], [28.0, 0.0, 56.0, 56.0], [14.0, 0.0, 42.0, 28.0]])
    cut = det.mask_targets(masks, torch.zeros(3, dtype=torch.int64), boxes)
    assert cut[0].sum() == 28 * 14
    assert cut[0, :, :14].all()
    assert cut[1].sum() == 0
    assert cut[2].sum() == 28 * 14


def test_pooling_reads_a_linear_field_exactly() -> None:
    """Aligned RoIAlign of the field f(x, y) = x gives the x of the bins' centres, in pixels, on every level."""
    features = []
    for stride in det.STRIDES:
        x = (torch.arange(1024 // stride) + 0.5) * stride
        features.append(x.expand(1, 1, 1024 // stride, -1).contiguous())
    boxes = torch.tensor([[100.0, 90.0, 170.0, 160.0], [100.0, 90.0, 240.0, 230.0], [200.0, 200.0, 900.0, 900.0]])
    for box, pooled in zip(boxes, det.pool(features, [boxes], 7), strict=True):
        width = box[2] - box[0]
        expected = box[0] + width * (torch.arange(7) + 0.5) / 7
        torch.testing.assert_close(pooled[0], expected.expand(7, 7), atol=1e-2, rtol=0)


# --- the whole model --------------------------------------------------------------------------------------------------


def test_initialisation_is_the_references() -> None:
    model = small(fpn_channels=32, box_head_channels=64)
    stds = {
        model.rpn_head.cls_logits.weight: 0.01,
        model.box_score.weight: 0.01,
        model.box_delta.weight: 0.001,
        model.fpn.inner_blocks[0][0].weight: math.sqrt(2 / (8 + 32)),  # Xavier: sqrt(2 / (fan in + fan out))
        model.box_head.fc6.weight: math.sqrt(2 / (32 * 49 + 64)),
    }
    for weight, std in stds.items():
        assert weight.std().item() == pytest.approx(std, rel=0.15)
    heads = [n for n, _ in model.named_parameters() if n.endswith("bias") and not n.startswith(("backbone", "norms"))]
    assert all(not dict(model.named_parameters())[n].any() for n in heads)


def test_every_parameter_gets_a_gradient_even_without_objects() -> None:
    """Under several processes a parameter without gradient would stall the run; nothing is frozen."""
    model = small().train()
    nothing = {k: v[:0] for k, v in some_targets(1)[0].items()}
    sum(model([torch.randn(3, 64, 64)], [nothing]).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.requires_grad] == []


def test_detections_keep_the_rules() -> None:
    """Scores above the threshold, falling, at most so many, boxes inside the image, no overlap above 0.5 in a class."""
    from torchvision.ops import box_iou

    model = small(score_thresh=0.2, max_detections=20).eval()
    with torch.no_grad():
        model.box_score.weight.normal_(std=0.5)
        (found,) = model([torch.randn(3, 50, 70)])
    assert 0 < len(found["boxes"]) <= 20
    assert (found["scores"] > 0.2).all()
    assert (found["scores"].diff() <= 0).all()
    assert (found["boxes"] >= 0).all()
    assert (found["boxes"] <= torch.tensor([70, 50, 70, 50])).all()
    assert set(found["labels"].tolist()) <= {1, 2, 3}
    assert found["masks"].shape == (len(found["boxes"]), 28, 28)
    overlap = box_iou(found["boxes"], found["boxes"]).fill_diagonal_(0)
    same = found["labels"][:, None] == found["labels"][None]
    assert (overlap[same] <= 0.5).all()


def test_proposals_are_torchvision_s_where_it_follows_the_reference() -> None:
    """Best per level, clip, NMS within a level, best of all: the same boxes from torchvision's filter_proposals."""
    from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork

    model = small().eval()
    theirs = RegionProposalNetwork(
        AnchorGenerator(), None, 0.7, 0.3, 256, 0.5, {"testing": 60, "training": 0}, {"testing": 40, "training": 0}, 0.7
    ).eval()
    anchors = det.anchors_of([(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)], 4.0)
    torch.manual_seed(2)
    scores = [torch.randn(len(a)) for a in anchors]
    deltas = [torch.randn(len(a), 4) * 0.4 for a in anchors]
    ours = model._keep_best(scores, deltas, anchors, (50, 60))
    boxes = torch.cat([det.decode(d, a, det.RPN_STDS) for d, a in zip(deltas, anchors, strict=True)])
    (expected,), _ = theirs.filter_proposals(
        boxes[None], torch.cat(scores)[None], [(50, 60)], [len(a) for a in anchors]
    )
    assert len(ours) == 40
    torch.testing.assert_close(ours, expected)


def test_detections_are_torchvision_s_where_it_follows_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax, threshold, clip, NMS within a class, best of all: the same from torchvision's postprocess_detections."""
    from torchvision.models.detection.roi_heads import RoIHeads

    model = small(with_masks=False, max_detections=12).eval()
    theirs = RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, (10.0, 10.0, 5.0, 5.0), 0.05, 0.5, 12)
    torch.manual_seed(3)
    corner = torch.rand(60, 2) * 60
    proposals = torch.cat([corner, corner + 5 + torch.rand(60, 2) * 40], dim=1)
    scores, deltas = torch.randn(60, 4) * 2, torch.randn(60, 12)
    monkeypatch.setattr(model, "_box_outputs", lambda pooled: (scores, deltas))
    features = [torch.zeros(1, 16, 128 // s, 128 // s) for s in det.STRIDES]
    (ours,) = model._detect(features, [proposals], [(90, 100)])
    with_background = torch.cat([torch.zeros(60, 4), deltas], dim=1)
    (boxes,), (best,), (labels,) = theirs.postprocess_detections(scores, with_background, [proposals], [(90, 100)])
    torch.testing.assert_close(ours["boxes"], boxes)
    torch.testing.assert_close(ours["scores"], best)
    assert torch.equal(ours["labels"], labels)


def test_without_masks_it_is_faster_rcnn() -> None:
    model = small(with_masks=False).train()
    target = {k: v for k, v in some_targets(1)[0].items() if k != "masks"}
    assert set(model([torch.randn(3, 64, 64)], [target])) == {"loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box"}
    assert "masks" not in model.eval()([torch.randn(3, 64, 64)])[0]


def test_box_arithmetic_stays_in_float32_under_autocast() -> None:
    model = small().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([torch.randn(3, 64, 64)], some_targets(1))
        assert {v.dtype for v in losses.values()} == {torch.float32}
        found = model.eval()([torch.randn(3, 64, 64)])[0]
    assert found["boxes"].dtype == torch.float32


def test_any_four_stage_backbone_of_timm_serves() -> None:
    model = MaskRCNN(timm.create_model("resnet18"), num_classes=3, **SMALL).train()
    assert set(model([torch.randn(3, 64, 64)], some_targets(1))) >= {"loss_mask"}
    with pytest.raises(ValueError, match="strides 4, 8, 16, 32"):
        MaskRCNN(timm.create_model("vit_tiny_patch16_224"), num_classes=3)


def test_padding_is_to_the_right_and_below() -> None:
    batch = det.pad_batch([torch.ones(3, 33, 20), torch.ones(3, 10, 64)])
    assert batch.shape == (2, 3, 64, 64)
    assert batch[0].sum() == 3 * 33 * 20
    assert batch[1, :, :10, :64].all()
