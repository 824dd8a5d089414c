"""Image classification: cross-entropy on (possibly mixed) labels, top-1 and top-5."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from hcnet_cli import dist, pictures
from hcnet_cli.console import UserError
from hcnet_cli.data.balance import class_counts, class_weights
from hcnet_cli.data.images import check_headers, to_picture
from hcnet_cli.data.loader import Collate, RequestDataset
from hcnet_cli.data.splits import DataSplits
from hcnet_cli.engine import Task
from hcnet_cli.models.backbone import takes_noise
from hcnet_cli.profile import count_macs as macs_of
from hcnet_cli.rng import keyed_uniform
from hcnet_cli.schema import NORMALISATION, DataPart, EvaluationPart, Part
from hcnet_cli.tasks.classification import augment, benchmarks, corruptions, features, image_folder, spec
from hcnet_cli.tasks.classification.augment import Normalise, mix
from hcnet_cli.tasks.classification.loss import ClassLoss
from hcnet_cli.tasks.classification.metric import CALIBRATION, INTERVAL, Accuracy
from hcnet_cli.tasks.classification.several import AnyLabel, GroupMean
from hcnet_cli.tasks.classification.spec import Classes, ClassificationEvaluation, ImageFolder


class ClassificationTask(Task):
    """`model` maps images [B, 3, H, W], which `normalise` makes of a batch, to logits [B, num_classes].

    With `mixup` (timm's, which also smooths) the target is soft; without it plain cross-entropy with `smoothing`.
    `loss` replaces both. `sample_name` names a validation image by its number, `load_image` reads it. `only`: the
    classes that are scored, by number, where they are not all; `class_names` are then theirs. `evaluator` takes what
    Accuracy takes.
    """

    primary = "top1"
    protocol = ""
    protocols = MappingProxyType({**CALIBRATION, **INTERVAL})

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        normalise: Normalise,
        mixup: Mixup | None,
        smoothing: float,
        sample_name: Callable[[int], str] = str,
        loss: nn.Module | None = None,
        class_weights: Sequence[float] = (),
        load_image: Callable[[int], Image.Image] | None = None,
        only: Sequence[int] | None = None,
        evaluator: Callable[..., Accuracy] = Accuracy,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.takes_noise = takes_noise(model.forward)
        self.normalise = normalise
        self.class_names = list(class_names)
        self.sample_name = sample_name
        self.load_image = load_image
        self.mixup = mixup
        usual = SoftTargetCrossEntropy() if mixup else nn.CrossEntropyLoss(label_smoothing=smoothing)
        self.criterion = loss or usual
        self.class_weights = tuple(class_weights)
        self.only = None if only is None else list(only)
        self.make_evaluator = evaluator

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images, target = self.normalise(batch), batch["target"]
        if self.mixup:
            images, target = mix(images, target, batch["step_key"], self.mixup)
        noise = {"noise": keyed_uniform(batch["key"], self.model.num_blocks)} if self.takes_noise else {}
        if draws := getattr(self.model, "drop_path_draws", None):
            draws.noise = keyed_uniform(batch["key"], draws.rows)
        logits = self.model(images, **noise)
        return {"loss_cls": self.criterion(logits.float(), target)}

    def predict(self, batch: dict[str, Any]) -> Tensor:
        logits = self.model(self.normalise(batch)).float()
        return logits if self.only is None else logits[:, self.only]

    def draw_batch(self, batch: dict[str, Any], caption: str) -> Image.Image:
        """See engine.Task. A mixed image is labelled with both classes and their shares: 0.70 cat, + 0.30 dog."""
        images, target = self.normalise(batch), batch["target"]
        lines = [[self.class_names[i]] for i in target.tolist()]
        if self.mixup:
            images, soft = mix(images, target, batch["step_key"], self.mixup)
            for own, (first, second, share) in zip(lines, mixed_classes(target, soft, self.mixup), strict=True):
                if share < 0.995 and first != second:
                    names = [f"× {name}" if name[:1].isdigit() else name for name in self.class_names]
                    own[:] = [f"{share:.2f} {names[first]}", f"+ {1 - share:.2f} {names[second]}"]
        rows = max(map(len, lines))
        _, mean, std = self.normalise.constants.tolist()
        tiles = [
            pictures.tile(to_picture(image, mean, std), [(text, pictures.INK) for text in [*own, ""][:rows]])
            for image, own in zip(images, lines, strict=True)
        ]
        mixing = ", with their shares in the label" if rows > 1 else ""
        return pictures.grid(tiles, 8, f"{caption}{mixing}")

    def evaluator(self) -> Accuracy:
        return self.make_evaluator(len(self.class_names), self.class_names, self.sample_name, self.load_image)


def mixed_classes(target: Tensor, soft: Tensor, mixup: Mixup) -> list[tuple[int, int, float]]:
    """For each image its class, that of the image mixed into it (the other end of the batch), and its own share.

    target [B], soft targets [B, num_classes]. Mixup's smoothing leaves smoothing / num_classes to every class.
    """
    rest = mixup.label_smoothing / soft.shape[1]
    own = (soft.gather(1, target[:, None])[:, 0] - rest) / (1 - mixup.label_smoothing)
    pairs = zip(target.tolist(), target.flip(0).tolist(), own.tolist(), strict=True)
    return [(first, second, min(1.0, max(0.0, share))) for first, second, share in pairs]


def build_task(
    head: Part,
    config: DataPart,
    evaluation: EvaluationPart,
    data: DataSplits,
    backbone: Callable[[int], nn.Module],
    micro_batch: int,
) -> ClassificationTask:
    """See hcnet_cli/build.py."""
    assert isinstance(config, ImageFolder)
    assert isinstance(head, Classes)
    mixup = augment.make_mixup(
        data.info.num_classes,
        mixup=config.mixup,
        cutmix=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        smoothing=config.smoothing,
    )
    model = backbone(data.info.num_classes)
    images = data.val
    assert isinstance(images, image_folder.ImageFolder)
    if type(images) is image_folder.ImageFolder and images.files.members is None:  # in tars all bytes would be read
        paths = map(images.sample_path, range(len(images)))
        dist.from_main(lambda: check_headers(paths, config.max_pixels, data.info.digest))

    normalise = Normalise(config.mean, config.std)
    weights = class_weights(head.class_weights, data)
    loss = None
    if weights or head.loss != "cross-entropy":
        loss = ClassLoss(
            smoothing=config.smoothing,
            gamma=head.focal_gamma if head.loss == "focal" else 0.0,
            weights=weights,
            counts=class_counts(data).tolist() if head.loss == "balanced-softmax" else (),
        )
    return ClassificationTask(
        *(model, data.class_names, normalise, mixup, config.smoothing, images.sample_name, loss, weights),
        load_image=images.load_image,
    )


def build_evaluation(
    task: ClassificationTask, config: DataPart, entry: EvaluationPart, first: EvaluationPart, data: DataSplits
) -> tuple[ClassificationTask, RequestDataset, Collate | None]:
    """See hcnet_cli/build.py."""
    assert isinstance(config, ImageFolder)
    assert isinstance(entry, ClassificationEvaluation)
    assert isinstance(first, ClassificationEvaluation)
    if first.on != "val":
        raise UserError(
            f"The first evaluation decides which weights are best, so it cannot be on {first.on}.",
            hint=f"Give it a name of its own: --set evaluation.NAME.on={first.on}",
        )
    if entry.on == "val" and entry.img_size is None and entry.crop_pct is None:
        return task, data.val, data.val_collate
    assert isinstance(data.val, image_folder.ImageFolder)
    size, crop = entry.img_size or config.img_size, entry.crop_pct or config.crop_pct
    transform = augment.eval_transform(img_size=size, interpolation=config.interpolation, crop_pct=crop)
    resized = f"{size} x {size}, crop {crop:g}"
    if entry.on in spec.IN_FOLDERS:
        if entry.path is None and data.val.files.members is not None:
            raise UserError(
                f"{entry.on} reads image files in folders, and the images of this run are in tars.",
                hint=f"--data FOLDER, where they lie as files: {spec.IN_FOLDERS[entry.on]}.",
            )
        root = Path(os.path.expanduser(entry.path or data.val.folder))
        images = benchmarks.require(entry.on, task.class_names, root, config)
        return _on_benchmark(task, benchmarks.BenchmarkImages(images, transform, config.max_pixels), resized)
    if entry.on in ("knn", "probe"):
        return _on_features(entry.on, task, data, data.val.with_transform(transform), resized)
    if entry.on == "corruptions":
        return _corrupted(task, data.val, transform, resized)
    view = ClassificationTask(
        *(task.model, task.class_names, task.normalise, None, 0.0, task.sample_name), load_image=task.load_image
    )
    view.protocol = resized
    return view, data.val.with_transform(transform), data.val_collate


def _on_benchmark(
    task: ClassificationTask, data: benchmarks.BenchmarkImages, resized: str
) -> tuple[ClassificationTask, RequestDataset, Collate | None]:
    """What scores the model on one of ImageNet's further test sets."""
    images = data.images
    evaluator: Callable[..., Accuracy] = Accuracy
    protocols = {**CALIBRATION, **INTERVAL}
    if images.several:
        evaluator = functools.partial(AnyLabel, labels=images.several)
        protocols = {"ece": CALIBRATION["ece"], **INTERVAL}
    elif images.group is not None:
        evaluator = functools.partial(GroupMean, groups=images.groups, group=images.group)
        protocols = CALIBRATION
    names = task.class_names if images.only is None else [task.class_names[i] for i in images.only]
    view = ClassificationTask(
        *(task.model, names, task.normalise, None, 0.0, images.sample_name), only=images.only, evaluator=evaluator
    )
    view.protocol, view.protocols = f"{images.protocol}, {resized}", MappingProxyType(protocols)
    return view, data, augment.collate


def _corrupted(
    task: ClassificationTask, val: image_folder.ImageFolder, transform: augment.Transform, resized: str
) -> tuple[ClassificationTask, RequestDataset, Collate | None]:
    """What scores the model on corrupted validation images."""
    images = corruptions.CorruptedImages(val, transform)
    group = np.repeat(np.arange(len(corruptions.GROUPS)), len(val))
    view = ClassificationTask(
        *(task.model, task.class_names, task.normalise, None, 0.0, images.sample_name),
        evaluator=functools.partial(GroupMean, groups=corruptions.GROUPS, group=group),
    )
    names = ", ".join(corruptions.STRENGTHS)
    view.protocol = f"computed by hcnet, not ImageNet-C: mean over {names} at 3 severities, {resized}"
    view.protocols = MappingProxyType(CALIBRATION)
    return view, images, augment.collate


class FeatureTask(ClassificationTask):
    """`predict` returns the pooled features [B, D] that the head's last layer takes."""

    def predict(self, batch: dict[str, Any]) -> Tensor:
        maps = self.model.forward_features(self.normalise(batch))
        return self.model.forward_head(maps, pre_logits=True).flatten(1).float()


def _on_features(
    on: str, task: ClassificationTask, data: DataSplits, queries: image_folder.ImageFolder, resized: str
) -> tuple[ClassificationTask, RequestDataset, Collate | None]:
    """What scores the features of the validation images by those of the training images."""
    assert isinstance(data.train, image_folder.ImageFolder)
    if not len(data.train):
        raise UserError(f"{on} compares with the training images, and {data.info.path} has none.")
    if not (hasattr(task.model, "forward_features") and hasattr(task.model, "forward_head")):
        raise UserError(
            f"The model has no features for {on}: {type(task.model).__name__} lacks timm's forward_features and "
            "forward_head."
        )
    bank = len(data.train)
    figures = () if on == "knn" else tuple(CALIBRATION)
    if on == "knn":
        classify = features.nearest_neighbours
        how = f"{features.NEIGHBOURS} nearest neighbours by cosine, votes exp(s / {features.TEMPERATURE:g})"
    else:
        classify = features.linear_probe
        strengths = ", ".join(f"{c:g}" for c in features.STRENGTHS)
        how = f"logistic regression on standardised features, C of {strengths} by a held-out fifth"
    evaluator = functools.partial(features.OnFeatures, bank=bank, classify=classify, figures=figures)
    view = FeatureTask(
        *(task.model, task.class_names, task.normalise, None, 0.0, task.sample_name), evaluator=evaluator
    )
    view.protocol = f"{how}, pooled features of {bank:,} training images, {resized}"
    view.protocols = MappingProxyType({**{name: CALIBRATION[name] for name in figures}, **INTERVAL})
    return view, features.BankAndQueries(data.train, queries), data.val_collate


def count_macs(task: ClassificationTask, size: tuple[int, int]) -> int:
    """Multiply-accumulates for one image of `size` (height, width)."""
    return macs_of(task.model, torch.zeros(1, 3, *size))


def describe_input(config: DataPart, evaluation: EvaluationPart) -> dict[str, Any]:
    """The arguments of timm.data.create_transform that make an image what the model was evaluated on."""
    assert isinstance(config, ImageFolder)
    assert isinstance(evaluation, ClassificationEvaluation)
    return {
        "img_size": evaluation.img_size or config.img_size,
        "crop_pct": evaluation.crop_pct or config.crop_pct,
        "interpolation": config.interpolation,
        "mean": list(config.mean),
        "std": list(config.std),
        "normalisation": NORMALISATION,
    }
