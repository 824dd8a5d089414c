"""Image classification, declared: recipe sections, metrics, table, published protocols, embedded data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hcnet_cli.schema import DataPart, EvaluationPart, Fraction, Part, PositiveFloat, PositiveInt, field
from hcnet_cli.tasks.spec import Column, Format, Metric, Spec

FOLDER = "hcnet_cli.tasks.classification"


class Classes(Part):
    """A linear layer on the pooled features."""

    kind: Literal["linear"] = "linear"


class ImageFolder(DataPart):
    """Folders of images by class, with timm's augmentation (names as in timm.data.create_transform and Mixup)."""

    format: Literal["image-folder"]
    img_size: PositiveInt = field(224, "Height and width of the images.", unit="pixels")
    scale: tuple[float, float] = field((0.08, 1.0), "Random resized crop: part of the area, from and to.")
    ratio: tuple[float, float] = field((3 / 4, 4 / 3), "Random resized crop: width over height, from and to.")
    hflip: Fraction = field(0.5, "Probability of a horizontal flip.")
    vflip: Fraction = field(0.0, "Probability of a vertical flip.")
    color_jitter: float | None = field(0.4, "Colour jitter; timm leaves it out beside `auto_augment`.")
    auto_augment: str | None = field("rand-m9-mstd0.5-inc1", "timm's name of an automatic augmentation; null: none.")
    interpolation: Literal["bicubic", "bilinear"] = field("bicubic", "How images are resized.")
    re_prob: Fraction = field(0.25, "Probability of random erasing.")
    re_mode: Literal["pixel", "const", "rand"] = field("pixel", "What random erasing fills in.")
    re_count: PositiveInt = field(1, "Regions that random erasing erases.")
    mixup: float = field(0.8, "Mixup's alpha; 0: none.")
    cutmix: float = field(1.0, "CutMix's alpha; 0: none.")
    mixup_prob: Fraction = field(1.0, "Probability that a batch is mixed.")
    mixup_switch_prob: Fraction = field(0.5, "Probability of CutMix where both are on.")
    smoothing: Fraction = field(0.1, "Label smoothing.")
    crop_pct: Annotated[float, Field(gt=0)] = field(0.875, "Evaluation: side of the centre crop over the resized side.")


class ClassificationEvaluation(EvaluationPart):
    """Top-1 and top-5 of whole images, resized and cropped."""

    img_size: PositiveInt | None = field(
        None, "Height and width of the images; null: as in training.", unit="pixels", fingerprint="changed"
    )
    crop_pct: PositiveFloat | None = field(
        None, "Side of the centre crop over the resized side; null: the data's.", fingerprint="changed"
    )


def is_image_folder(root: Path) -> bool:
    return (root / "train").is_dir()


SPEC = Spec(
    name="pretrain",
    help="""Train a classifier from scratch: ImageNet-1K, any folder of images by class, or the embedded digits.

    The same command again goes on where the run stopped. Under torchrun it is the same run on more processes.
    """,
    module=f"{FOLDER}.task",
    heads={"linear": Classes},
    formats={
        "image-folder": Format(
            config=ImageFolder,
            module=f"{FOLDER}.image_folder",
            layout="train/<class>/ and val/<class>/ with the images inside",
            recognise=is_image_folder,
        ),
    },
    evaluation=ClassificationEvaluation,
    evaluations={"val": {"when": "training"}},
    options=(),
    length_flag="epochs",
    embedded="digits",
    embedded_note="1,797 real handwritten digits, 32 x 32; each training digit is there with three augmented copies",
    default_recipe="imagenet",
    small_recipe="small",
    data_variable="HCNET_IMAGENET",
    ablation_length=3,
    table="imagenet",
    subject="image classification",
    metrics=(Metric("top1", "top-1"), Metric("top5", "top-5")),
    columns=(
        Column("model", "model"),
        Column("img_size", "image", "integer"),
        Column("params_m", "#params (M)", "number"),
        Column("macs_g", "MACs (G)", "number"),
        Column("images_per_second", "images/s", "short"),
        Column("top1", "top-1", "percent", best=True),
        Column("top5", "top-5", "percent", best=True, secondary=True),
    ),
    benchmark="imagenet-1k",
    protocols={
        "pretrain/imagenet": "ImageNet-1K val, from scratch",
        "pretrain/imagenet-release": "ImageNet-1K val, from scratch",
    },
    compare_by_image_size=True,
    times_inference=True,
)
