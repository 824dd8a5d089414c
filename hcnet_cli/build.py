"""The only translator from a recipe to objects: data, model, task, loaders, optimizer, an engine.Job."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import hcnet_cli.models  # registers the sizes with timm
from hcnet_cli import dist, kernels, optim, profile, rng
from hcnet_cli import recipe as rcp
from hcnet_cli.console import UserError, notice
from hcnet_cli.data import embedded, loader
from hcnet_cli.engine import Job, to_device
from hcnet_cli.recipe import Recipe, Steps
from hcnet_cli.runs import DataInfo
from hcnet_cli.sizes import SIZES
from hcnet_cli.tasks.classification import image_folder
from hcnet_cli.tasks.classification.task import ClassificationTask
from hcnet_cli.tasks.detection import coco
from hcnet_cli.tasks.detection import task as detection_task
from hcnet_cli.tasks.detection.mask_rcnn import MaskRCNN
from hcnet_cli.tasks.detection.task import DetectionTask
from hcnet_cli.tasks.segmentation import scene_parsing
from hcnet_cli.tasks.segmentation import task as segmentation_task
from hcnet_cli.tasks.segmentation.task import SegmentationTask
from hcnet_cli.tasks.segmentation.upernet import UPerNet
from hcnet_cli.weights import Account, load_into, read_weights

TRIAL = 0.3  # seconds of a step, above which estimating the time tries no larger batch


@dataclass
class Data:
    """Training and validation samples of a recipe, and what is known of them."""

    info: DataInfo
    train: Any  # Dataset, see data/loader.py
    val: Any
    class_names: list[str]
    img_size: tuple[int, int]  # what MACs and images/s are given for
    collate: loader.Collate | None = None  # of training samples
    val_collate: loader.Collate | None = None
    groups: Any = None
    source: Any = None  # coco.Annotations of the validation images, or scene_parsing.SceneFolder

    def steps(self, recipe: Recipe) -> Steps:
        return rcp.steps(recipe, loader.steps_per_epoch(len(self.train), recipe.train.batch_size, self.groups))


# --- device -----------------------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """What "auto" means: CUDA (this process's own), else Apple's MPS, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f'There is no device "{name}".', hint="Known: auto, cpu, cuda, cuda:N, mps.") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("PyTorch sees no CUDA device here.", hint="Use --device cpu, or install a CUDA build.")
        device = torch.device("cuda", device.index if device.index is not None else dist.local_rank())
        if device.index >= torch.cuda.device_count():
            raise UserError(f"There is no device {device}: PyTorch sees {torch.cuda.device_count()}.")
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("This machine has no MPS device.", hint="Use --device cpu.")
    elif device.type not in ("cpu", "mps"):
        raise UserError(f'The device "{name}" is not supported.', hint="Known: auto, cpu, cuda, cuda:N, mps.")
    return device


def pick_precision(precision: str, device: torch.device) -> str:
    """What "auto" means: bf16 on a GPU that computes it, fp16 on an older one, fp32 elsewhere."""
    if precision == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and device.type == "cpu":
        raise UserError("fp16 training needs a GPU.", hint="Use --precision bf16 or fp32.")
    return precision


# --- data -------------------------------------------------------------------------------------------------------------


def build_data(recipe: Recipe) -> Data:
    """Scans the data and makes the data sets; UserError for what is wrong with them."""
    path = recipe.data.path
    assert path is not None, "the command line fills in data.path"
    root = embedded.data_folder(path)
    if isinstance(recipe.data, rcp.ImageFolder):
        return _image_folder(recipe.data, root)
    if isinstance(recipe.data, rcp.Coco):
        assert isinstance(recipe.head, rcp.MaskRCNN)
        return _coco(recipe.data, root, recipe.head.with_masks)
    return _scene_parsing(recipe.data, root)


def _image_folder(config: rcp.ImageFolder, root: Path) -> Data:
    index = image_folder.scan(root)
    shared: dict[str, Any] = {"img_size": config.img_size, "interpolation": config.interpolation}
    train = image_folder.train_transform(
        **shared,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        vflip=config.vflip,
        color_jitter=config.color_jitter,
        auto_augment=config.auto_augment,
        re_prob=config.re_prob,
        re_mode=config.re_mode,
        re_count=config.re_count,
        mean=config.mean,
    )
    return Data(
        info=DataInfo(
            name=index.name,
            digest=index.digest,
            path=str(root),
            num_train=index.num_train,
            num_val=index.num_val,
            num_classes=len(index.classes),
        ),
        train=image_folder.ImageFolder(index, "train", train),
        val=image_folder.ImageFolder(index, "val", image_folder.eval_transform(**shared, crop_pct=config.crop_pct)),
        class_names=list(index.classes),
        img_size=(config.img_size, config.img_size),
        collate=image_folder.collate,
        val_collate=image_folder.collate,
    )


def _coco(config: rcp.Coco, root: Path, masks: bool) -> Data:
    splits = {split: coco.load_split(root, split, masks=masks) for split in ("train", "val")}
    (train, train_images), (val, val_images) = splits["train"], splits["val"]
    coco.check_same_classes(train, val)
    coco.check_sizes(val, val_images)  # what evaluation cannot do without must not be found after hours of training
    if left_out := {reason: len(ids) for reason, ids in train.dropped.items() if reason != "crowd"}:
        listed = ", ".join(f"{reason}: {count}" for reason, count in left_out.items())
        notice(f"Training objects left out of {train.file.name}: {listed}.")
    given = config.model_dump(exclude={"format", "path", "eval_backend"})
    train_set = coco.CocoDataset(train, train_images, train=True, **given)
    return Data(
        info=DataInfo(
            name=coco.dataset_name(root, val),
            digest=hashlib.sha256(f"{train.digest} {val.digest}".encode()).hexdigest()[:16],
            path=str(root),
            num_train=len(train_set),
            num_val=len(val),
            num_classes=len(val.class_names),
        ),
        train=train_set,
        val=coco.CocoDataset(val, val_images, train=False, **given),
        class_names=val.class_names,
        img_size=(800, 1280),
        collate=coco.collate,
        val_collate=coco.collate,
        groups=train_set.groups,
        source=val,
    )


def _scene_parsing(config: rcp.SceneParsing, root: Path) -> Data:
    folder = scene_parsing.open_folder(
        root,
        num_classes=config.num_classes,
        reduce_zero_label=config.reduce_zero_label,
        ignore_index=config.ignore_index,
        scan_cache=embedded.cache_dir() / "label-scans",
    )
    shared: dict[str, Any] = {"img_scale": config.img_scale, "mean": config.mean, "std": config.std}
    names = {"ratio_range", "crop_size", "cat_max_ratio", "hflip", "photometric"}
    train = scene_parsing.TrainScenes(folder, **shared, **config.model_dump(include=names))
    return Data(
        info=DataInfo(
            name=folder.name,
            digest=folder.digest,
            path=str(root),
            num_train=len(train),
            num_val=len(folder.images["validation"]),
            num_classes=folder.num_classes,
        ),
        train=train,
        val=scene_parsing.EvalScenes(folder, **shared),
        class_names=list(folder.class_names),
        img_size=(512, 2048),
        val_collate=scene_parsing.collate_scenes,
        source=folder,
    )


# --- model and task ---------------------------------------------------------------------------------------------------


def build_backbone(recipe: Recipe, num_classes: int) -> hcnet_cli.models.HcNet:
    """The HcNet of the recipe, initialised from the seed; a recipe field left at null is the size's own."""
    shape = recipe.model.model_dump(include={"depths", "dims", "kernel_size", "mlp_ratio", "drop_path_rate"})
    given = {name: value for name, value in shape.items() if value is not None}
    with rng.seeded(rng.derive(recipe.train.seed, "init")):
        try:
            model: Any = timm.create_model(
                SIZES[recipe.model.size].timm_name, num_classes=num_classes, disable=recipe.model.disable, **given
            )
        except ValueError as error:
            raise UserError(f"The model cannot be built: {error}") from None
    model.set_grad_checkpointing(recipe.model.grad_checkpointing)
    return model


def build_task(recipe: Recipe, data: Data) -> Any:
    """The task with freshly initialised weights, on the CPU, channels-last."""
    head, config = recipe.head, recipe.data
    with rng.seeded(rng.derive(recipe.train.seed, "head")):
        task: nn.Module
        if isinstance(config, rcp.ImageFolder):
            task = _classification(recipe, config, data)
        elif isinstance(head, rcp.MaskRCNN) and isinstance(config, rcp.Coco):
            backbone = build_backbone(recipe, 0)
            model = MaskRCNN(backbone, data.info.num_classes, **head.model_dump(exclude={"kind"}))
            task = DetectionTask(
                model,
                annotation_file=data.source.file,
                category_ids=data.source.category_ids,
                class_names=data.class_names,
                backend=config.eval_backend,
                load_image=data.val.load_image,
            )
        else:
            task = _segmentation(recipe, data)
    return task.to(memory_format=torch.channels_last)


def _classification(recipe: Recipe, config: rcp.ImageFolder, data: Data) -> ClassificationTask:
    mixup = image_folder.make_mixup(
        data.info.num_classes,
        mixup=config.mixup,
        cutmix=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        smoothing=config.smoothing,
    )
    model = build_backbone(recipe, data.info.num_classes)
    normalise = image_folder.Normalise(config.mean, config.std)
    return ClassificationTask(model, data.class_names, normalise, mixup, config.smoothing)


def _segmentation(recipe: Recipe, data: Data) -> SegmentationTask:
    head = recipe.head
    assert isinstance(head, rcp.UPerNet)
    together = recipe.train.batch_size // recipe.train.accumulate
    if together < 2:
        raise UserError(
            f"UPerNet trains on two or more images at a time (its batch norm sees 1 x 1 maps), not on {together}.",
            hint="Choose a larger --batch-size or fewer micro-batches (--accumulate).",
        )
    shape = head.model_dump(exclude={"kind", "aux_weight"})
    model = UPerNet(build_backbone(recipe, 0), data.info.num_classes, **shape)
    return _segmentation_task(recipe, data, model, (1.0,), flip=False, suffix="")


def several_scales(recipe: Recipe, data: Data, model: nn.Module) -> SegmentationTask:
    """The task that evaluates a trained UPerNet at several scales, mirrored too if training mirrored."""
    assert isinstance(recipe.data, rcp.SceneParsing)
    flip = recipe.data.hflip > 0  # digits are other signs in a mirror
    return _segmentation_task(recipe, data, model, segmentation_task.MULTI_SCALE, flip=flip, suffix="_ms")


def _segmentation_task(
    recipe: Recipe, data: Data, model: nn.Module, ratios: Sequence[float], flip: bool, suffix: str
) -> SegmentationTask:
    head, config = recipe.head, recipe.data
    assert isinstance(head, rcp.UPerNet)
    assert isinstance(config, rcp.SceneParsing)
    how: Any = {"mode": config.eval_mode, "crop_size": config.crop_size, "stride": config.eval_stride, "flip": flip}
    return SegmentationTask(
        model,
        data.class_names,
        aux_weight=head.aux_weight,
        ignore_index=config.ignore_index,
        suffix=suffix,
        protocol=segmentation_task.protocol(config.img_scale, ratios=ratios, **how),
        **how,
    )


def build_multi_scale(recipe: Recipe, data: Data, job: Job) -> Job:
    """The job that evaluates the model of a segmentation job at several scales, by the same engine."""
    config = recipe.data
    assert isinstance(config, rcp.SceneParsing)
    images = scene_parsing.EvalScenes(
        data.source, img_scale=config.img_scale, ratios=segmentation_task.MULTI_SCALE, mean=config.mean, std=config.std
    )
    task = several_scales(recipe, data, job.task.model).to(job.device)
    return dataclasses.replace(job, task=task, val=_eval_loader(recipe, images, data), ema=None)


def macs(task: Any, data: Data) -> int:
    """Multiply-accumulates for one image of `data.img_size`, counted as the tables of the task count."""
    if isinstance(task, DetectionTask):
        return detection_task.detection_macs(task.model, *data.img_size)
    return profile.count_macs(task.model, torch.zeros(1, 3, *data.img_size))


# --- weights to start from --------------------------------------------------------------------------------------------


def read_init(source: str) -> tuple[str, dict[str, Tensor]]:
    """(name, state dict) of a run folder, a safetensors file or a PyTorch checkpoint."""
    path = Path(source)
    if path.is_dir():
        best = path / "best.safetensors"
        if not best.is_file():
            inside = sorted(str(file.parent) for file in path.glob("runs/*/best.safetensors"))
            raise UserError(
                f"{path} is not a run with weights: it has no best.safetensors.",
                hint=f"Runs in it: {', '.join(inside[:3])}{' ...' * (len(inside) > 3)}" if inside else "",
            )
        path = best
    return str(path), read_weights(path)


def load_init(model: Any, name: str, state: dict[str, Tensor]) -> Account:
    """Loads what fits: a whole model's weights into the whole, a backbone's into the backbone; the authors' names are
    translated.
    """
    official = any(".Anisotropic_conv" in key or "patch_embed" in key for key in state)
    remap = hcnet_cli.models.remap_official_state_dict if official else dict
    backbone = getattr(model, "backbone", None)
    whole = backbone is None or any(key.split(".")[0] in ("fpn", "rpn_head", "decode_head") for key in state)
    target: Any = model if whole else backbone
    return load_into(target, state, name, remap)


# --- the job ----------------------------------------------------------------------------------------------------------


def build_job(recipe: Recipe, data: Data, task: Any, device: torch.device) -> Job:
    """Everything the engine needs; `task` is moved to `device`."""
    train = recipe.train
    plan = data.steps(recipe)
    task.to(device)
    kernels.accelerate(task.model)
    if train.compile:
        task.model.compile()  # in place: names in checkpoints stay as they are
    batches = loader.TrainLoader(
        data.train,
        batch_size=train.batch_size,
        accumulate=train.accumulate,
        total_steps=plan.total,
        seed=train.seed,
        workers=train.workers,
        collate=data.collate,
        groups=data.groups,
        **_place(),
    )
    schedule = recipe.schedule
    ema = None
    if train.ema_decay is not None:
        ema = ModelEmaV3(task.model, decay=train.ema_decay)
    return Job(
        task=task,
        train=batches,
        val=_eval_loader(recipe, data.val, data),
        describe=data.train.describe,
        optimizer=optim.adamw(
            task.model,
            lr=recipe.optim.lr,
            weight_decay=recipe.optim.weight_decay,
            betas=recipe.optim.betas,
            eps=recipe.optim.eps,
            no_decay=recipe.optim.no_decay,
        ),
        lr_at=functools.partial(
            optim.lr_at,
            lr=recipe.optim.lr,
            total_steps=plan.total,
            kind=schedule.kind,
            warmup_steps=plan.warmup,
            warmup_ratio=schedule.warmup_ratio,
            warmup_inside=schedule.warmup_inside,
            min_lr=schedule.min_lr,
            milestones=plan.milestones,
            gamma=schedule.gamma,
            power=schedule.power,
        ),
        total_steps=plan.total,
        batch_size=train.batch_size,
        accumulate=train.accumulate,
        eval_every=plan.eval_every,
        log_every=train.log_every,
        save_minutes=train.save_every,
        clip_grad=recipe.optim.clip_grad,
        precision=train.precision,
        device=device,
        seed=train.seed,
        ema=ema,
        describe_weights={
            "model": SIZES[recipe.model.size].timm_name,
            "model_args": recipe.model.model_dump_json(exclude={"size", "grad_checkpointing"}, exclude_none=True),
            "task": recipe.task,
            "data": data.info.name,
            "classes": json.dumps(data.class_names),
        },
    )


def _place() -> dict[str, int]:
    return {"rank": dist.rank() if dist.is_distributed() else 0, "world_size": dist.processes()}


def _eval_loader(recipe: Recipe, images: Any, data: Data) -> loader.EvalLoader:
    train = recipe.train
    size = train.eval_batch_size or train.batch_size // (train.accumulate * dist.processes())
    return loader.EvalLoader(images, batch_size=size, workers=train.workers, collate=data.val_collate, **_place())


# --- estimates --------------------------------------------------------------------------------------------------------


def saved_activations(task: Any, image: tuple[int, int]) -> int:
    """Bytes of activations kept for the backward pass of one image, fp32; counted on the meta device."""
    seen: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        seen[id(x.untyped_storage())] = x.untyped_storage().nbytes()
        kept.append(x)  # alive, so that no id is used twice
        return x

    kept: list[Tensor] = []
    model = task.model
    was_training = model.training
    state = {
        name: torch.empty_like(value, device="meta").requires_grad_(value.is_floating_point())
        for name, value in [*model.named_parameters(), *model.named_buffers()]
    }
    own = {id(value.untyped_storage()) for value in state.values()}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        torch.func.functional_call(model.train(), state, (torch.zeros(1, 3, *image, device="meta"),))
    model.train(was_training)
    return sum(size for storage, size in seen.items() if storage not in own)


def seconds_per_image(recipe: Recipe, data: Data, task: Any, device: torch.device) -> float:
    """Forward and backward time of one training image, measured on a few batches of real data. Rough.

    Of two images first, then, while that takes no time to speak of, of up to as many as training takes together.
    """
    most = recipe.train.batch_size // (recipe.train.accumulate * dist.processes())
    size, seconds = 0, 0.0
    task.to(device).train()
    while size < most and seconds < TRIAL:
        size = min(4 * size or 2, most)
        batches = loader.TrainLoader(
            data.train, batch_size=size, accumulate=1, total_steps=2, seed=0, workers=0, collate=data.collate
        )
        for batch in batches.iterate(0):
            begun = time.perf_counter()
            losses = task(to_device(batch, device))
            torch.stack(list(losses.values())).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begun
    task.zero_grad(set_to_none=True)
    return seconds / size
