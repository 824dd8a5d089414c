"""Object detection and instance segmentation, declared: recipe sections, metrics, table, protocols, embedded data."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hcnet_cli.console import UserError
from hcnet_cli.schema import (
    Channels,
    Count,
    DataPart,
    EvaluationPart,
    Fraction,
    Part,
    Side,
    Sides,
    SidesFromTo,
    field,
)
from hcnet_cli.tasks.spec import Column, Format, Metric, Option, Spec

FOLDER = "hcnet_cli.tasks.detection"


class MaskRCNN(Part):
    """FPN and Mask R-CNN; the defaults are the reference's (Swin detection, mmdetection)."""

    kind: Literal["mask-rcnn"] = "mask-rcnn"
    with_masks: bool = field(True, "Predict masks; false: Faster R-CNN.")
    fpn_channels: Channels = field(256, "Channels of the feature pyramid.")
    box_head_channels: Channels = field(1024, "Channels of the box head.")
    mask_head_channels: Channels = field(256, "Channels of the mask head.")
    num_mask_convs: int = field(4, "Convolutions of the mask head.", ge=0, le=64)
    anchor_scale: float = field(8.0, "Side of an anchor in strides of its level.", ge=0.1, le=100)
    rpn_pre_train: Count = field(2000, "Proposals per level before NMS, in training.")
    rpn_post_train: Count = field(1000, "Proposals per image after NMS, in training.")
    rpn_pre_test: Count = field(1000, "Proposals per level before NMS, in evaluation.")
    rpn_post_test: Count = field(1000, "Proposals per image after NMS, in evaluation.")
    rpn_batch: Count = field(256, "Anchors per image that the proposal losses sample.")
    box_batch: Count = field(512, "Proposals per image that the box losses sample.")
    score_thresh: float = field(0.05, "Detections below this score are dropped.", ge=0, lt=1)
    nms_thresh: float = field(0.5, "Overlap (IoU) above which the weaker of two detections is dropped.", gt=0, le=1)
    max_detections: Count = field(100, "Detections per image.")


class Coco(DataPart):
    """A COCO folder: train2017/, val2017/, annotations/instances_*.json."""

    format: Literal["coco"]
    img_scale: Sides = field((1333, 800), "Long and short side that an image is rescaled to fit.", unit="pixels")
    multiscale: tuple[Side, ...] = field(
        (),
        "Short sides to draw from in training; empty: `img_scale` alone.",
        unit="pixels",
        example=(480, 640, 800),
    )
    crop_scales: tuple[Side, ...] = field(
        (400, 500, 600),
        "With `multiscale`, half of the images are first rescaled to one of these short sides and cropped.",
        unit="pixels",
        min_length=1,
    )
    crop_range: SidesFromTo = field((384, 600), "Sides of that crop, from and to.", unit="pixels")
    hflip: Fraction = field(0.5, "Probability of a horizontal flip.")
    min_side: int = field(32, "Smaller training images are left out.", unit="pixels", ge=0, le=16_384)


class DetectionEvaluation(EvaluationPart):
    """COCO AP of boxes and masks."""

    backend: Literal["faster-coco-eval", "pycocotools"] = field(
        "faster-coco-eval", "Library that scores.", fingerprint="never"
    )
    img_scale: Sides | None = field(
        None,
        "Long and short side that an image is rescaled to fit; null: as in training.",
        unit="pixels",
        example=(1333, 800),
        fingerprint="changed",
    )


LAYOUT = "train2017/, val2017/ and annotations/instances_{train,val}2017.json"


def find_split(root: Path, split: str) -> tuple[Path, list[Path]]:
    """The annotation file of a split ("train" or "val") and the folders its images may be in, most likely first.

    Known layouts: COCO's (annotations/instances_train2017.json, train2017/), the same with another suffix or images/
    in between, and exports with _annotations.coco.json next to the images.
    """
    if not root.is_dir():
        raise UserError(f"There is no folder {root}.")
    found = sorted(root.glob(f"annotations/instances_{split}*.json")) or sorted(root.glob(f"annotations/{split}*.json"))
    if len(found) > 1:
        found = [f for f in found if f.stem == f"instances_{split}2017"] or found
    if len(found) > 1:
        raise UserError(f"{root}/annotations has several files for {split}: {', '.join(f.name for f in found)}.")
    if found:
        folder = found[0].stem.removeprefix("instances_")
        return found[0], [root / name for name in (folder, f"images/{folder}", split, f"images/{split}", "images", "")]
    for name in (split, "valid" if split == "val" else split):
        if (root / name / "_annotations.coco.json").is_file():
            return root / name / "_annotations.coco.json", [root / name]
    present = sorted(file.name for file in root.glob("annotations/*.json"))
    raise UserError(
        f"There is no annotation file {root / 'annotations' / f'instances_{split}2017.json'}.",
        hint=f"A COCO folder has {LAYOUT}."
        + (f" There is {', '.join(present[:3])}{', ...' if len(present) > 3 else ''}." if present else ""),
    )


def is_coco(root: Path) -> bool:
    return any(root.glob("annotations/*.json")) or any(root.glob("*/_annotations.coco.json"))


def is_validation_only(root: Path) -> bool:
    """Annotations for validation, and none for training or no folder of training images: COCO's annotation files come
    together, and its images one part at a time.
    """
    parts = {}
    for split in ("train", "val"):
        try:
            _, folders = find_split(root, split)
        except UserError:
            parts[split] = False
        else:
            parts[split] = any(folder.is_dir() for folder in folders if folder != root)
    return parts["val"] and not parts["train"]


SPEC = Spec(
    name="finetune-det",
    help="""Fine-tune Mask R-CNN for detection and masks: COCO, any COCO-format folder, or the embedded digit-scenes.

    Starts from the finished pretrain run of the same model on the most images unless --init says otherwise.
    """,
    module=f"{FOLDER}.task",
    heads={"mask-rcnn": MaskRCNN},
    formats={
        "coco": Format(
            config=Coco,
            module=f"{FOLDER}.coco",
            layout=LAYOUT,
            recognise=is_coco,
            require=lambda root: find_split(root, "val"),
            validation_only=is_validation_only,
        ),
    },
    evaluation=DetectionEvaluation,
    evaluations={"val": {"when": "training"}},
    options=(
        Option("schedule", ("--schedule",), str, "On COCO: 1x, 1x-single-scale or 3x.", recipe="coco-{}"),
        Option("with_masks", ("--masks/--no-masks",), bool, "Without masks: Faster R-CNN.", key="head.with_masks"),
        Option(
            "eval_backend", ("--eval-backend",), str, "faster-coco-eval or pycocotools.", key="evaluation.val.backend"
        ),
    ),
    starts_from="pretrain",
    renamed={"data.eval_backend": "evaluation.val.backend"},
    embedded="digit-scenes",
    embedded_note="scenes of handwritten digits with boxes and masks, 128 x 128",
    default_recipe="coco-1x",
    size_keys=("data.img_scale",),
    small_recipe="small",
    small_sides=(96, 320),
    data_variable="HCNET_COCO",
    table="coco",
    subject="detection and instance segmentation, Mask R-CNN",
    hub_tags=("object-detection",),
    metrics=(
        Metric("box_AP", "box AP"),
        Metric("box_AP50", "box 50"),
        Metric("box_AP75", "box 75"),
        Metric("mask_AP", "mask AP", in_studies=True),
        Metric("mask_AP50", "mask 50"),
        Metric("mask_AP75", "mask 75"),
    ),
    columns=(
        Column("model", "backbone"),
        Column("schedule", "schedule", secondary=True),
        Column("box_AP", "box AP", "percent", best=True),
        Column("box_AP50", "box 50", "percent", best=True, secondary=True),
        Column("box_AP75", "box 75", "percent", best=True, secondary=True),
        Column("mask_AP", "mask AP", "percent", best=True),
        Column("mask_AP50", "mask 50", "percent", best=True, secondary=True),
        Column("mask_AP75", "mask 75", "percent", best=True, secondary=True),
        Column("params_m", "#params (M)", "number"),
        Column("macs_g", "MACs (G)", "number"),
    ),
    benchmark="coco",
    benchmark_title="COCO val2017, ",
    protocols={
        "finetune-det/coco-1x": "Mask R-CNN 1x (multi-scale)",
        "finetune-det/coco-1x-single-scale": "Mask R-CNN 1x (single scale)",
        "finetune-det/coco-3x": "Mask R-CNN 3x",
        "": "Mask R-CNN 1x",  # no recipe: the source does not say which
        "PVT": "Mask R-CNN 1x (PVT recipe)",
    },
    protocol_notes={
        "Mask R-CNN 1x": "Trained at a single scale or at several: the sources at hand do not say which.",
        "Mask R-CNN 1x (single scale)": "12 epochs, images resized to 1333 x 800 (mmdetection's 1x).",
        "Mask R-CNN 1x (multi-scale)": "12 epochs, shorter side 480 to 800 with random crops (Swin's own 1x).",
        "Mask R-CNN 1x (PVT recipe)": "12 epochs, single scale, AdamW with lr 2e-4 and weight decay 1e-4.",
        "Mask R-CNN 3x": "36 epochs, multi-scale.",
    },
    in_parts="Mask R-CNN chooses boxes between its parts, which a single graph does not hold",
    macs_note=", at 1280 x 800 with 1000 box and 100 mask RoIs",
    schedule_column=True,
)
