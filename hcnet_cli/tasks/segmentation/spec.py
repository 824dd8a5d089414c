"""Semantic segmentation, declared: recipe sections, metrics, table, published protocols, embedded data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hcnet_cli.schema import (
    Channels,
    ClassWeights,
    DataPart,
    EvaluationPart,
    Factor,
    Fraction,
    FromTo,
    Part,
    Side,
    Sides,
    field,
)
from hcnet_cli.tasks.spec import Column, Format, Metric, Option, Spec

FOLDER = "hcnet_cli.tasks.segmentation"


class UPerNet(Part):
    """UPerHead and auxiliary FCN head; the defaults are the reference's (Swin segmentation, mmsegmentation)."""

    kind: Literal["upernet"] = "upernet"
    channels: Channels = field(512, "Channels of the decoder.")
    aux_channels: Channels = field(256, "Channels of the auxiliary head, which training alone uses.")
    pool_scales: tuple[Annotated[int, Field(ge=1, le=64)], ...] = field(
        (1, 2, 3, 6), "Sides of the maps of the pyramid pooling.", min_length=1
    )
    dropout: float = field(0.1, "Dropout of channels before the classifiers.", ge=0, lt=1)
    aux_weight: float = field(0.4, "Weight of the auxiliary loss.", ge=0, le=10)
    class_weights: ClassWeights = field(
        "none",
        "Weights of the classes in the loss: `balanced`: inverse to their pixels in the training labels; or a list.",
        example="balanced",
        fingerprint="changed",
    )
    init_std: float = field(
        0.01, "Standard deviation of the classifiers' first weights; narrow heads want more.", gt=0, le=10
    )


class SceneParsing(DataPart):
    """ADE20K's SceneParsing layout: images/ and annotations/, each with training/ and validation/."""

    format: Literal["scene-parsing"]
    num_classes: Annotated[int, Field(ge=1, le=256)] | None = field(
        None, "Number of classes; null: as many as the folder names.", example=150
    )
    reduce_zero_label: bool = field(True, "Pixel value 0 is ignored and 1 .. K are the classes, as in ADE20K.")
    ignore_index: int = field(255, "Label of pixels that do not count.", ge=0, le=255)
    img_scale: Sides = field((2048, 512), "Long and short side that an image is rescaled to fit.", unit="pixels")
    ratio_range: FromTo = field((0.5, 2.0), "Training: factor on `img_scale`, from and to.")
    crop_size: Side = field(512, "Side of the training crop and of sliding windows.", unit="pixels")
    cat_max_ratio: float = field(
        0.75, "A crop is drawn again, up to ten times, while one class covers this share of it.", gt=0, le=1
    )
    hflip: Fraction = field(0.5, "Probability of a horizontal flip.")
    photometric: bool = field(True, "Random brightness, contrast, saturation and hue.")


class SceneEvaluation(EvaluationPart):
    """Mean intersection over union at the size of the original images."""

    mode: Literal["whole", "slide"] | None = field(
        None,
        "The network sees whole images, or windows that slide over them; null: as the first evaluation.",
        example="whole",
    )
    stride: Side | None = field(
        None, "`slide`: distance of two windows; null: as the first evaluation.", unit="pixels", example=341
    )
    scales: tuple[Factor, ...] = field(
        (1.0,),
        "Factors on `data.img_scale`; the probabilities of all are averaged.",
        fingerprint="changed",
        min_length=1,
    )
    flip: bool | None = field(
        False, "Average with the mirrored image; null: if training mirrors.", fingerprint="changed"
    )


def is_scene_parsing(root: Path) -> bool:
    return any((root / kind / "training").is_dir() for kind in ("images", "annotations"))


def is_validation_only(root: Path) -> bool:
    return not is_scene_parsing(root) and all(
        (root / kind / "validation").is_dir() for kind in ("images", "annotations")
    )


SPEC = Spec(
    name="finetune-seg",
    help="""Fine-tune UperNet for semantic segmentation: ADE20K, any folder in its layout, or the embedded digit-stuff.

    Starts from the finished pretrain run of the same model on the most images unless --init says otherwise.
    """,
    module=f"{FOLDER}.task",
    heads={"upernet": UPerNet},
    formats={
        "scene-parsing": Format(
            config=SceneParsing,
            module=f"{FOLDER}.scene_parsing",
            layout="images/{training,validation} and annotations/{training,validation}",
            recognise=is_scene_parsing,
            validation_only=is_validation_only,
        ),
    },
    evaluation=SceneEvaluation,
    evaluations={
        "ss": {"when": "training", "mode": "whole", "stride": 341},
        "ms": {"scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75), "flip": None},
    },
    options=(
        Option(
            "multi_scale",
            ("--multi-scale/--single-scale",),
            bool,
            "Score the best weights at six scales too.",
            key="evaluation.ms.when",
            values={True: "end", False: "asked"},
        ),
        Option(
            "eval_mode", ("--eval-mode",), str, "whole images, or slide a window over them.", key="evaluation.ss.mode"
        ),
    ),
    starts_from="pretrain",
    renamed={
        "data.eval_mode": "evaluation.ss.mode",
        "data.eval_stride": "evaluation.ss.stride",
        "data.multi_scale": ("evaluation.ms.when", {True: "end", False: "asked"}),
    },
    embedded="digit-stuff",
    embedded_note="the same scenes with a class for every pixel, 128 x 128",
    default_recipe="ade20k-160k",
    size_keys=("data.img_scale", "data.crop_size"),
    small_recipe="small",
    small_sides=(64, 256),
    data_variable="HCNET_ADE20K",
    table="ade20k",
    subject="semantic segmentation, UperNet",
    hub_tags=("image-segmentation",),
    metrics=(
        Metric("mIoU", "mIoU", published="mIoU_ss"),
        Metric("mIoU_ms", "mIoU MS"),  # mIoU of the evaluation `ms` (scores.suffixed)
        Metric("mAcc", "mAcc"),
        Metric("aAcc", "aAcc"),
    ),
    columns=(
        Column("model", "backbone"),
        Column("params_m", "#params (M)", "number"),
        Column("macs_g", "MACs (G)", "number"),
        Column("mIoU", "mIoU SS", "percent", best=True),
        Column("mIoU_ms", "mIoU MS", "percent", best=True),
    ),
    benchmark="ade20k",
    benchmark_title="ADE20K val, ",
    protocols={"finetune-seg/ade20k-160k": "UperNet 160k, 512x512"},
    protocol_notes={
        "UperNet 160k, 512x512": (
            "SS: single scale; MS: multi-scale with flips. vHeat: sliding window; Swin: whole image."
        ),
    },
    macs_note=", at 512 x 2048, without the auxiliary head (which counts in the parameters)",
    schedule_column=False,
)
