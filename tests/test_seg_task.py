"""The segmentation task: losses, accumulation, whole and sliding inference, several scales, bounded
memory.
"""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import hcnet_cli.models  # noqa: F401  (registers HcNet with timm)
from hcnet_cli.console import UserError
from hcnet_cli.tasks.segmentation import task as task_module
from hcnet_cli.tasks.segmentation.spec import SPEC
from hcnet_cli.tasks.segmentation.task import SegmentationTask, View, label_map, protocol, windows
from hcnet_cli.tasks.segmentation.upernet import UPerNet

NAMES = [str(c) for c in range(5)]


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only lose by sharing the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_task(**kwargs):
    """Five classes, every part narrow, the same weights on every call."""
    torch.manual_seed(0)
    backbone = timm.create_model("hcnet_pico", dims=(8, 12, 16, 20), depths=(1, 1, 1, 1), drop_path_rate=0.3)
    model = UPerNet(backbone, len(NAMES), channels=16, aux_channels=8)
    for head in (model.decode_head, model.auxiliary_head):
        nn.init.normal_(head.conv_seg.weight)  # far from the near-uniform start
    return SegmentationTask(model, NAMES, **kwargs)


def make_batch(count=8, size=24, ignored=(0.0, 0.9, 0.2, 1.0, 0.5, 0.0, 0.7, 0.1)):
    """Random images; sample i has the share ignored[i] of its pixels ignored, quite unequal."""
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(0, len(NAMES), (count, size, size), generator=generator, dtype=torch.uint8)
    for i in range(count):
        label[i, : round(size * ignored[i])] = 255
    return {
        "image": torch.randn(count, 3, size, size, generator=generator),
        "label": label,
        "key": torch.arange(100, 100 + count),
        "sample": torch.arange(count),
    }


def part(batch, chosen):
    return {name: tensor[chosen] for name, tensor in batch.items()}


def fix_statistics(task):
    """Batch norms use their running statistics, everything else trains."""
    task.train()
    for module in task.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def gradients(task, batches):
    """Of the mean over micro-batches of the summed losses."""
    task.zero_grad()
    losses = []
    for batch in batches:
        loss = sum(task(batch).values()) / len(batches)
        loss.backward()
        losses.append(loss.detach())
    return sum(losses), [p.grad.clone() for p in task.parameters()]


# --- losses ---------------------------------------------------------------------------------------------------


def test_losses_average_over_all_pixels_and_weigh_the_auxiliary_head():
    """Written out: log-softmax at every pixel of the upsampled logits, ignored ones as zero, divided by all
    pixels.
    """
    task, batch = make_task(aux_weight=0.4), make_batch()
    task.eval()
    outputs = [torch.randn(8, 5, 6, 6), torch.randn(8, 5, 2, 2)]
    task.model.forward = lambda *_: outputs
    losses = task(batch)
    assert list(losses) == ["loss_decode", "loss_aux"]
    for (name, weight), logits in zip((("loss_decode", 1.0), ("loss_aux", 0.4)), outputs, strict=True):
        log_p = F.interpolate(logits, (24, 24), mode="bilinear", align_corners=False).log_softmax(1)
        total = 0.0
        for b, y, x in (batch["label"] != 255).nonzero().tolist():
            total -= log_p[b, int(batch["label"][b, y, x]), y, x].item()
        assert losses[name].item() == pytest.approx(weight * total / (8 * 24 * 24), rel=1e-5)


def test_accumulation_4_x_2_equals_1_x_8_with_unequal_ignored_areas():
    """Loss and gradients, drop path and dropout included, with the batch norms' statistics held fixed."""
    task, batch = make_task().double(), make_batch()
    batch["image"] = batch["image"].double()
    task.pixel_loss = lambda logits, label: SegmentationTask.pixel_loss(task, logits, label)
    fix_statistics(task)
    loss, whole = gradients(task, [batch])
    split_loss, split = gradients(task, [part(batch, slice(i, i + 2)) for i in range(0, 8, 2)])
    torch.testing.assert_close(split_loss, loss, rtol=1e-6, atol=1e-7)
    for got, expected in zip(split, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_batch_statistics_are_those_of_a_micro_batch():
    """What accumulation cannot keep equal, here so that nobody forgets it: batch norm sees one micro-batch
    at a time.
    """
    task, batch = make_task(), make_batch()
    task.train()
    loss, _ = gradients(task, [batch])
    split_loss, _ = gradients(task, [part(batch, slice(i, i + 2)) for i in range(0, 8, 2)])
    assert abs(split_loss - loss) > 1e-4


def test_a_sample_is_dropped_out_by_its_own_key():
    """Which paths and channels are dropped follows the sample into any batch and any place of it."""
    task, batch = make_task(), make_batch(ignored=[0] * 8)
    fix_statistics(task)
    with torch.no_grad():
        alone = [sum(task(part(batch, [i, i])).values()).item() for i in range(8)]
        shuffled = [sum(task(part(batch, [i, 7 - i])).values()).item() for i in range(8)]
    for i in range(8):
        assert shuffled[i] == pytest.approx((alone[i] + alone[7 - i]) / 2, rel=1e-5)
    moved = part(batch, [0, 0])
    moved["key"] = moved["key"] + 1000
    assert sum(task(moved).values()).item() != pytest.approx(alone[0], rel=1e-5)


def test_a_batch_without_a_labelled_pixel_trains_on():
    """Zero loss and zero gradients, not NaN."""
    task = make_task().train()
    loss, grads = gradients(task, [make_batch(count=2, ignored=(1.0, 1.0))])
    assert loss == 0
    assert all(not grad.any() for grad in grads)


def test_a_few_steps_learn():
    """The loss on one batch falls by half: gradients reach what they should."""
    task, batch = make_task().train(), make_batch(count=4)
    batch["image"] = F.interpolate(batch["image"][..., :3, :3], scale_factor=8.0)
    batch["label"] = (batch["image"].sum(1) > 0).to(torch.uint8)  # a rule the image tells
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = sum(task(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- prediction -----------------------------------------------------------------------------------------------


def evaluation_batch(*sizes, ratios=(1.0,), original=None):
    """One image list per sample at the given network sizes, labels of the original size."""
    generator = torch.Generator().manual_seed(2)
    images = [[torch.randn(3, int(h * r), int(w * r), generator=generator) for r in ratios] for h, w in sizes]
    labels = [torch.zeros(original or size, dtype=torch.uint8) for size in sizes]
    return {"images": images, "label": labels}


@torch.no_grad()
def test_slide_equals_whole_when_the_image_is_one_window():
    """To the last bit, at a size given exactly and at one smaller than the window."""
    whole, slide = make_task().eval(), make_task(mode="slide", crop_size=48, stride=32).eval()
    batch = evaluation_batch((48, 48), (40, 31), original=(61, 45))
    for one, two in zip(whole.predict(batch), slide.predict(batch), strict=True):
        assert one.shape == (61, 45)
        assert torch.equal(one, two)


def test_windows_that_leave_gaps_are_refused(hcnet, tmp_path):
    given = ("finetune-seg", "--recipe", "small", "--data", "digit-stuff", "--init", "none", "--out", tmp_path)
    done = hcnet(*given, "--eval-mode", "slide", "--dry-run")
    assert (done.code, "Traceback" in done.err) == (2, False), done.err
    assert "Windows of 256 pixels (data.crop_size) every 341 pixels leave gaps" in done.err
    done = hcnet(*given, "--eval-mode", "slide", "--set", "evaluation.ss.stride=256", "--dry-run")
    assert done.code == 0, done.err


@torch.no_grad()
def test_prediction_does_not_depend_on_the_batch():
    task = make_task(flip=True).eval()
    batch = evaluation_batch((40, 40), (33, 50), (40, 40), original=(50, 50))
    together = task.predict(batch)
    alone = [task.predict({name: values[i : i + 1] for name, values in batch.items()})[0] for i in range(3)]
    assert all(torch.equal(one, two) for one, two in zip(together, alone, strict=True))


def reference_probabilities(model, image, size, mode="whole", crop=0, stride=0, flipped=False):
    """The reference's inference of one pass, in its order and at full resolution, all classes at once."""
    x = image[None].flip(-1) if flipped else image[None]

    def encode_decode(y):
        return F.interpolate(model(y), y.shape[2:], mode="bilinear", align_corners=False)

    if mode == "whole":
        logits = encode_decode(x)
    else:
        height, width = x.shape[2:]
        total, count = torch.zeros(1, 5, height, width), torch.zeros(1, 1, height, width)
        for i in range(max(height - crop + stride - 1, 0) // stride + 1):
            for j in range(max(width - crop + stride - 1, 0) // stride + 1):
                bottom, right = min(i * stride + crop, height), min(j * stride + crop, width)
                top, left = max(bottom - crop, 0), max(right - crop, 0)
                total[:, :, top:bottom, left:right] += encode_decode(x[:, :, top:bottom, left:right])
                count[:, :, top:bottom, left:right] += 1
        logits = total / count
    p = F.interpolate(logits, size, mode="bilinear", align_corners=False).softmax(1)[0]
    return p.flip(-1) if flipped else p


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("elements", [2**24, 3000])
@torch.no_grad()
def test_multi_scale_and_flip_average_probabilities(mode, elements, monkeypatch):
    """Softmax at the original size, mirrored back, averaged; the same when classes are taken a few at a
    time.
    """
    monkeypatch.setattr(task_module, "MAX_ELEMENTS", elements)
    task = make_task(flip=True, mode=mode, crop_size=40, stride=27).eval()
    size = (37, 59)
    batch = evaluation_batch((40, 64), ratios=(0.5, 1.0, 1.75), original=size)
    mean = sum(
        reference_probabilities(task.model, image, size, mode, 40, 27, flipped)
        for image in batch["images"][0]
        for flipped in (False, True)
    )
    got = task.predict(batch)[0]
    assert got.dtype == torch.uint8
    # where two classes are as likely as each other, rounding may decide
    top = mean.topk(2, dim=0).values
    clear = top[0] - top[1] > 1e-4
    assert clear.float().mean() > 0.99
    assert torch.equal(got[clear].long(), mean.argmax(0)[clear])


@pytest.mark.parametrize("elements", [2**24, 1000])
@torch.no_grad()
def test_a_single_pass_is_the_argmax_of_the_resized_logits(elements, monkeypatch):
    monkeypatch.setattr(task_module, "MAX_ELEMENTS", elements)
    task = make_task().eval()
    batch = evaluation_batch((40, 64), original=(53, 70))
    p = reference_probabilities(task.model, batch["images"][0][0], (53, 70))
    top = p.topk(2, dim=0).values
    clear = top[0] - top[1] > 1e-4
    assert torch.equal(task.predict(batch)[0][clear].long(), p.argmax(0)[clear])


def test_memory_stays_bounded_with_150_classes(monkeypatch):
    """No tensor at full resolution holds more than MAX_ELEMENTS numbers, however many classes and passes
    there are.
    """
    monkeypatch.setattr(task_module, "MAX_ELEMENTS", 2**16)
    largest = 0
    real = task_module.resize

    def watched(x, size):
        nonlocal largest
        out = real(x, size)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(task_module, "resize", watched)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(150, 16, 24, generator=generator)
    views = [View((64, 96), [(0, 0, 64, 96)], [logits], flipped) for flipped in (False, True)]
    got = label_map(views, (90, 140))
    assert got.shape == (90, 140)
    assert largest <= 2**16
    assert got.unique().numel() > 100  # nearly every class wins somewhere


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 30), st.integers(1, 30))
def test_windows_cover_the_image(height, width, crop, stride):
    """Inside the image, of the window's size (or the image's), every pixel seen; the reference's count of
    windows.
    """
    stride = min(crop, stride)
    seen = torch.zeros(height, width)
    boxes = windows(height, width, (crop, crop), stride)
    for top, left, h, w in boxes:
        assert (h, w) == (min(crop, height), min(crop, width))
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
        seen[top : top + h, left : left + w] += 1
    assert seen.min() >= 1
    rows, columns = (max(side - crop + stride - 1, 0) // stride + 1 for side in (height, width))
    assert len(boxes) == rows * columns


def test_protocol_says_how_a_score_was_made():
    assert protocol((2048, 512)) == "ss, whole, 2048x512"
    assert protocol((2048, 512), mode="slide") == "ss, slide 512/341, 2048x512"
    multi = protocol((2048, 512), ratios=SPEC.evaluations["ms"]["scales"], flip=True)
    assert multi == "ms 0.5-1.75 + flip, whole, 2048x512"


def test_logits_that_are_not_finite_have_no_score():
    task = make_task().eval()
    nn.init.constant_(task.model.decode_head.conv_seg.bias, torch.nan)
    with pytest.raises(UserError, match="scores are not finite"):
        task.predict(evaluation_batch((32, 32)))


def test_evaluating_twice_with_one_model():
    """A second task on the same model evaluates it at several scales."""
    task = make_task()
    multi = SegmentationTask(task.model, NAMES, flip=True)
    assert multi.model is task.model
    batch = evaluation_batch((32, 32), ratios=(0.5, 1.0)) | {"sample": torch.tensor([0]), "path": ["a.jpg"]}
    evaluator = multi.eval().evaluator()
    with torch.no_grad():
        evaluator.update(multi.predict(batch), batch)
    assert set(evaluator.compute()) == {"mIoU", "mAcc", "aAcc", "num_present"}


def test_other_backbones_train_too():
    """A timm backbone without `noise` draws its own drop path."""
    model = UPerNet(timm.create_model("convnext_atto"), 5, channels=16, aux_channels=8)
    losses = SegmentationTask(model, NAMES)(make_batch(count=2, size=32))
    assert all(loss.isfinite() for loss in losses.values())


def test_task_can_be_copied():
    """Moving averages of weights (timm's ModelEmaV3) deep-copy a model."""
    task = make_task()
    assert copy.deepcopy(task.model).num_dropout == task.model.num_dropout == 24
