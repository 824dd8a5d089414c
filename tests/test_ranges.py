"""Protects the ranges of recipe fields: no published recipe is refused, and no value without a meaning is trained."""

from __future__ import annotations

import re
from typing import Any

import pytest
from timm.data import create_transform

from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError
from hcnet_cli.recipe import known_keys, sections
from hcnet_cli.tasks import TASKS
from hcnet_cli.values import as_typed, example

BASES = {"pretrain": "digits", "finetune-det": "digit-scenes", "finetune-seg": "digit-stuff"}
NOT_FINITE = [float("inf"), float("nan"), 1e308]


def resolve(task: str, changes: dict[str, Any]) -> rcp.Recipe:
    file = rcp.recipe_file(BASES[task], task)
    return rcp.resolve(file, [(key, value, f"--set {key}") for key, value in changes.items()]).recipe


SANE: list[tuple[str, dict[str, Any]]] = [  # what published recipes have, a line each
    (
        "pretrain",
        {"optim.lr": 1e-3, "schedule.warmup_ratio": 1e-3, "data.crop_pct": 0.9, "train.batch_size": 1024},
    ),  # Swin
    ("pretrain", {"optim.lr": 4e-3, "train.ema_decay": 0.9999, "model.drop_path_rate": 0.8, "train.batch_size": 4096}),
    ("pretrain", {"optim.lr": 2e-5, "optim.weight_decay": 1e-8, "schedule.min_lr": 2e-7, "data.img_size": 384}),
    (
        "pretrain",
        {"optim.lr": 5e-4, "train.batch_size": 512, "data.color_jitter": 0.3, "optim.clip_grad": None},
    ),  # DeiT
    ("pretrain", {"optim.name": "lamb", "optim.lr": 8e-3, "optim.weight_decay": 0.02, "train.batch_size": 2048}),
    (
        "pretrain",
        {"optim.name": "lion", "optim.lr": 1e-4, "optim.weight_decay": 10.0, "optim.args": {"betas": [0.9, 0.99]}},
    ),
    ("pretrain", {"optim.name": "sgd", "optim.lr": 30.0, "optim.weight_decay": 0.0, "optim.args": {"momentum": 0.9}}),
    ("pretrain", {"optim.args.betas": [0.9, 0.95], "optim.args.eps": 1e-6}),  # MAE
    ("pretrain", {"optim.args.betas": [0, 0.999], "optim.args.eps": 1}),
    ("pretrain", {"data.mean": [0.5] * 3, "data.std": [0.5] * 3, "data.mixup": 0.2, "data.cutmix": 0.0}),  # BEiT, ViT
    ("pretrain", {"data.mean": [0, 0, 0], "data.std": [1, 1, 1], "data.scale": [1, 1], "data.ratio": [1, 1]}),
    ("pretrain", {"data.auto_augment": "rand-m15-n2-mstd1.0-inc1", "data.re_prob": 0.35}),  # MaxViT
    ("pretrain", {"data.auto_augment": "3a", "data.color_jitter": 0.3, "data.crop_pct": 1.0}),  # DeiT III
    ("pretrain", {"data.auto_augment": "augmix-m5-w4-d2", "data.re_mode": "rand", "data.re_count": 3}),
    ("pretrain", {"schedule.kind": "multistep", "schedule.milestones": [30, 60, 90], "schedule.length": 100}),  # ResNet
    ("pretrain", {"schedule.kind": "poly", "schedule.power": 0.9, "schedule.min_lr": 1e-6}),
    ("pretrain", {"schedule.min_lr": 3e-3}),  # constant
    ("pretrain", {"schedule.unit": "steps", "schedule.length": 1_501_200, "train.eval_every": 5000}),
    (
        "pretrain",
        {"model.depths": [3, 3, 27, 3], "model.dims": [192, 384, 768, 1536], "model.mlp_ratio": 4},
    ),  # ConvNeXt
    ("pretrain", {"model.kernel_size": 31, "train.seed": 2**32 - 1, "train.precision": "bf16"}),  # RepLKNet
    ("pretrain", {"data.img_size": 8, "evaluation.val.img_size": 512, "evaluation.val.crop_pct": 0.95}),
    ("finetune-det", {"data.img_scale": [1333, 800], "data.multiscale": list(range(480, 801, 32))}),
    ("finetune-det", {"schedule.kind": "multistep", "schedule.milestones": [8, 11], "schedule.length": 12}),
    (
        "finetune-det",
        {"head.score_thresh": 0.0, "head.nms_thresh": 0.7, "head.max_detections": 300, "data.min_side": 0},
    ),
    ("finetune-det", {"data.img_scale": [2000, 1200], "head.fpn_channels": 256, "head.box_head_channels": 1024}),
    ("finetune-seg", {"data.img_scale": [2048, 512], "data.ratio_range": [0.5, 2.0], "data.crop_size": 512}),
    (
        "finetune-seg",
        {"data.img_scale": [2049, 1025], "data.crop_size": 769, "evaluation.ss.stride": 513},
    ),  # Cityscapes
    ("finetune-seg", {"evaluation.ms.scales": [0.5, 0.75, 1, 1.25, 1.5, 1.75], "head.aux_weight": 0.4}),
    ("finetune-seg", {"data.num_classes": 150, "data.ignore_index": 0, "head.pool_scales": [1], "head.dropout": 0}),
]


@pytest.mark.parametrize(("task", "changes"), SANE)
def test_what_published_recipes_have_is_taken(task: str, changes: dict[str, Any]) -> None:
    resolve(task, changes)


NONSENSE: list[tuple[str, str, list[Any]]] = [
    ("pretrain", "data.auto_augment", ["none", "", "rand-m9-mstd", "rand-m", "rand-x3", "augmix-a0", "v1", 3]),
    ("pretrain", "data.mixup", [-1, 1e9, "0,8", [0.8], None]),
    ("pretrain", "data.cutmix", [-0.1, 1e9]),
    ("pretrain", "data.color_jitter", [-1, 3, [0.4, 0.4, 0.4]]),
    ("pretrain", "data.ratio", [[0, 1], [1.3, 0.7], [0.75], [-1, 1], 1, [1, 1e9], [True, True], {"a": 1}]),
    ("pretrain", "data.scale", [[5, 9], [0, 1], [1, 0.5], [-1, 1], [0.1, 0.5, 1], "0.1,1"]),
    ("pretrain", "data.std", [[0, 0, 0], [-1, 1, 1], [58, 57, 57], 0.5, [0.2, 0.2]]),
    ("pretrain", "data.mean", [[123, 116, 103], [-0.1, 0, 0], 0.5]),
    ("pretrain", "data.crop_pct", [0, -1, 100, 1.1]),
    ("pretrain", "data.img_size", [0, 1, 7, -224, 1e6, 224.5, [224, 224]]),
    ("pretrain", "data.smoothing", [1.0, -0.1, 2]),
    ("pretrain", "data.re_count", [0, 10**6]),
    ("pretrain", "data.hflip", [-0.1, 1.1, "50%"]),
    ("pretrain", "data.bits", [1, 64]),
    ("pretrain", "data.path", ["", "a\nb", "\0", 3]),
    ("pretrain", "optim.args.betas", [[1.5, 0.9], [0.9, 1], [-0.1, 0.9], [0.9], 0.9, "0.9", [0.9, float("nan")]]),
    ("pretrain", "optim.args.eps", [-1, 0, 2, "small", [1e-8], True]),
    ("pretrain", "optim.lr", [0, -1, 1e9, "1e-3."]),
    ("pretrain", "optim.weight_decay", [-0.1, 1e9]),
    ("pretrain", "optim.clip_grad", [0, -1, 1e30]),
    ("pretrain", "schedule.length", [0, -1, 10**18, 1.5]),
    ("pretrain", "schedule.milestones", [[3, 1, -5], [3, 1], [0, 3], [2, 2], 3, [10**18]]),
    ("pretrain", "schedule.gamma", [0, 1, -0.1, 1e308]),
    ("pretrain", "schedule.power", [0, -1, 1e9]),
    ("pretrain", "schedule.min_lr", [-1e-6, 0.5]),
    ("pretrain", "schedule.warmup", [-1, 1e18]),
    ("pretrain", "schedule.warmup_ratio", [-0.1, 2]),
    ("pretrain", "train.batch_size", [0, -64, 10**12, 63.5]),
    ("pretrain", "train.accumulate", [0, 3, 65, 10**12]),
    ("pretrain", "train.seed", [-1, 2**32, 2**63, 2**64]),
    ("pretrain", "train.ema_decay", [0, 1, -0.5]),
    ("pretrain", "train.eval_every", [0, -1, 10**18]),
    ("pretrain", "train.eval_batch_size", [0, 10**12]),
    ("pretrain", "train.save_every", [0, -1, 1e9]),
    ("pretrain", "train.log_every", [0, 10**18]),
    ("pretrain", "train.workers", [-1, 10**6]),
    ("pretrain", "model.depths", [[0, 0, 0, 0], [1, 1, 1], [1, 1, 1, 10**6], 2, [-1, 1, 1, 1]]),
    ("pretrain", "model.dims", [[0, 0, 0, 0], [1, 2, 3, 4], [64, 128, 320, 10**6], [64, 128]]),
    ("pretrain", "model.kernel_size", [0, 1, 2, 4, -3, 1001]),
    ("pretrain", "model.mlp_ratio", [0, -4, 1e6]),
    ("pretrain", "model.drop_path_rate", [1, -0.1]),
    ("pretrain", "model.disable", [["gat"], "gate", ["conduction", "gate"]]),
    ("pretrain", "model.size", ["tt", "", 3]),
    ("pretrain", "protocol", ["", " ", "a\nb", None]),
    ("pretrain", "init", ["", None, 3]),
    ("pretrain", "evaluation.val.crop_pct", [0, 100]),
    ("pretrain", "evaluation.val.img_size", [1, 10**6]),
    ("finetune-det", "data.img_scale", [[0, 0], [1333], [10**6, 800]]),
    ("finetune-det", "data.multiscale", [[0], [-800], 800]),
    ("finetune-det", "data.crop_range", [[600, 384], [0, 0]]),
    ("finetune-det", "data.crop_scales", [[], [1]]),
    ("finetune-det", "data.min_side", [-1, 10**6]),
    ("finetune-det", "head.fpn_channels", [0, 10**6]),
    ("finetune-det", "head.score_thresh", [1, -0.1]),
    ("finetune-det", "head.nms_thresh", [0, 1.5]),
    ("finetune-det", "head.max_detections", [0, 10**9]),
    ("finetune-det", "head.num_mask_convs", [-1, 1000]),
    ("finetune-det", "head.anchor_scale", [0, -8, 1e9]),
    ("finetune-seg", "data.ratio_range", [[2, 0.5], [0, 1], [1, 1e9]]),
    ("finetune-seg", "data.crop_size", [0, 1, 10**6]),
    ("finetune-seg", "data.cat_max_ratio", [0, 1.1]),
    ("finetune-seg", "data.num_classes", [0, 10**6]),
    ("finetune-seg", "data.ignore_index", [-1, 256]),
    ("finetune-seg", "head.dropout", [1, -0.1]),
    ("finetune-seg", "head.aux_weight", [-1, 1e9]),
    ("finetune-seg", "head.init_std", [0, 1e9]),
    ("finetune-seg", "head.pool_scales", [[], [0], [1000]]),
    ("finetune-seg", "evaluation.ms.scales", [[], [0], [100]]),
    ("finetune-seg", "evaluation.ss.stride", [0, 10**6]),
]  # fmt: skip


@pytest.mark.parametrize(("task", "key", "values"), NONSENSE, ids=lambda one: one if isinstance(one, str) else "")
def test_a_value_without_a_meaning_is_refused_in_one_sentence(task: str, key: str, values: list[Any]) -> None:
    """It names the flag, the key, the value and what the key takes; numbers take neither NaN nor infinity."""
    for value in [*values, *NOT_FINITE]:
        with pytest.raises(UserError) as error:
            resolve(task, {key: value})
        text = str(error.value)
        assert text.startswith(f"--set {key}: "), text
        assert f'"{key}"' in text or key == "train.accumulate"
        assert re.search(r"[^.][.?]$", text), text
        assert "\n" not in text
        assert len(text) < 320


@pytest.mark.parametrize("task", TASKS)
def test_every_field_has_an_example_that_it_takes(task: str) -> None:
    """What a refusal proposes is taken, as it is typed."""
    seen = 0
    for section, parts in sections(task).items():
        for part in parts:
            for name, field in part.model_fields.items():
                key = f"{section}.{name}"
                if name in ("format", "kind", "when") or (field.annotation is str and not example(field)):
                    continue
                value = example(field)
                assert value is not None or key == "evaluation.val.when", key
                typed = as_typed(key, value).removeprefix("--set ").strip("'")
                changes = dict([rcp.parse_override(typed)])
                needs = {"model.args": {"model.name": "convnext_tiny"}, "schedule.warmup": {}}.get(key, {})
                resolve(task, {**needs, **changes})
                seen += 1
    assert len(known_keys(task)) >= seen > 40


def test_timm_takes_the_policies_that_the_recipe_takes() -> None:
    """The grammar here against timm's own parser: what passes here is built there."""
    names = ["rand-m9-mstd0.5-inc1", "rand", "rand-n3-p0.5", "rand-mmax20-m15", "rand-m9-tweights", "rand-mstd101"]
    names += ["augmix", "augmix-m5-w4-d2-b1-a0.5", "v0", "v0r-mstd0.5", "original", "originalr", "3a", "rand-t3aw-m3"]
    for name in names:
        resolve("pretrain", {"data.auto_augment": name})
        create_transform(32, is_training=True, auto_augment=name)
    for name in ("none", "v1", "rand-x3", "rand-m9.5", "augmix-q1"):
        with pytest.raises(UserError):
            resolve("pretrain", {"data.auto_augment": name})
        with pytest.raises((AssertionError, ValueError)):
            create_transform(32, is_training=True, auto_augment=name)


def test_the_form_of_a_value_that_is_shown_is_the_one_to_type() -> None:
    with pytest.raises(UserError) as error:
        resolve("pretrain", {"data.ratio": 1})
    assert re.fullmatch(r"For example: --set 'data\.ratio=\[0\.75,1\.33\]'", error.value.hint)
    with pytest.raises(UserError) as error:
        rcp.resolve(rcp.recipe_file("digits", "pretrain"), [("optim.lr", -1, "--lr")])
    assert str(error.value) == '--lr: "optim.lr" cannot be -1: it takes a number above 0 and of at most 100.'
    assert error.value.hint == "For example: --lr 0.001"
