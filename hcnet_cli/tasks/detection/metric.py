"""COCO AP of boxes and masks: predictions kept as RLE, gathered over processes, scored against the annotation file."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hcnet_cli import dist, pictures
from hcnet_cli.console import UserError
from hcnet_cli.data.audit import distinct
from hcnet_cli.engine.strip import IMAGES
from hcnet_cli.files import optional, write_text
from hcnet_cli.tasks.detection import errors
from hcnet_cli.tasks.detection import masks as mask_bytes
from hcnet_cli.tasks.detection.annotations import Annotations

Backend = Literal["faster-coco-eval", "pycocotools"]
# COCO's twelve numbers in the order of COCOeval.stats
NUMBERS = ("AP", "AP50", "AP75", "AP_s", "AP_m", "AP_l", "AR_1", "AR_10", "AR_100", "AR_s", "AR_m", "AR_l")
IOU_TYPES = {"box": "bbox", "mask": "segm"}
CONFIDENT = 0.5  # detections from this score on are drawn
AT_LEAST = 3  # and as many of the others, so that a picture is not empty
CURVES = {"0.5": 0, "0.75": 5}  # IoU -> its place among COCO's ten


class Detections(NamedTuple):
    """The detections in one image, small enough to keep for every image of a set."""

    boxes: NDArray[np.float32]  # [N, 4] x, y, width, height
    scores: NDArray[np.float32]  # [N]
    labels: NDArray[np.int32]  # [N]
    size: tuple[int, int]  # of the masks: height, width
    counts: list[str]  # RLE of the masks, [N] or empty


class CocoAP:
    """Box and mask AP against a COCO annotation file.

    `update` takes, for each image of a batch, a dict of boxes [N, 4] (x1, y1, x2, y2 in the original image), scores
    [N], labels [N] (l stands for category_ids[l - 1]) and, with masks, `masks`: N compressed RLEs of the original
    image; and a batch whose `target` names each image's `image_id`.

    `compute` gives box_AP, box_AP50, ..., mask_AR_l in per cent, the same on every process and for any number of them:
    predictions are gathered, put in the order of image ids and scored once. A number without ground truth (AP_l without
    a large object) is left out.

    Args:
        truth: the annotations of the validation images, read for scoring.
        load_image: image id -> image as the annotations see it, for the pictures.
        num_pictures: images that `save` draws, the first of the file.
    """

    def __init__(
        self,
        truth: Annotations,
        *,
        masks: bool = True,
        backend: Backend = "faster-coco-eval",
        load_image: Callable[[int], Image.Image] | None = None,
        num_pictures: int = 8,
    ) -> None:
        self.truth = truth
        self.partial = False
        self.category_ids, self.class_names = truth.category_ids, distinct(truth.class_names)
        self.kinds = ["box", "mask"] if masks else ["box"]
        self.backend = backend
        self.load_image, self.num_pictures = load_image, num_pictures
        self.found: dict[int, Detections] = {}  # by image id; of this process, after `compute` of all of them
        self.per_class: dict[str, dict[str, float]] = {}
        self.curves: dict[str, list[float]] = {}  # see `precision_curves`; of the main process

    def update(self, predictions: Sequence[dict[str, Any]], batch: dict[str, Any]) -> None:
        for prediction, target in zip(predictions, batch["target"], strict=True):
            image_id = int(target["image_id"])
            assert image_id not in self.found, f"image {image_id} was predicted twice"
            boxes, scores = (prediction[key].detach().float().cpu().numpy() for key in ("boxes", "scores"))
            masks = [_as_text(code) for code in prediction["masks"]] if "mask" in self.kinds else []
            self.found[image_id] = Detections(
                np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1),
                scores,
                prediction["labels"].cpu().numpy().astype(np.int32),
                tuple(masks[0]["size"]) if masks else (0, 0),
                [code["counts"] for code in masks],
            )

    def compute(self) -> dict[str, float]:
        together: dict[int, Detections] = {}
        for part in dist.gather(self.found):
            twice = together.keys() & part.keys()
            assert not twice, f"images predicted by two processes: {sorted(twice)[:5]}"
            together |= part
        self.found = dict(sorted(together.items()))
        numbers: dict[str, float]
        numbers, self.per_class = dist.from_main(self._score)
        return numbers

    def _score(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        truth = self.truth.coco(self.found if self.partial else None)
        numbers: dict[str, float] = {}
        per_class: dict[str, dict[str, float]] = {name: {} for name in self.class_names}
        for kind in self.kinds:
            evaluation = evaluate(truth, self.results_of(kind), kind, self.backend)
            for name, value in zip(NUMBERS, evaluation.stats, strict=False):
                if value > -1:
                    numbers[f"{kind}_{name}"] = 100 * float(value)
            precision = np.asarray(evaluation.eval["precision"])  # IoU, recall, class, area, detections
            if kind == "box":
                self.curves = precision_curves(precision[:, :, :, 0, -1])
            for k, class_name in enumerate(self.class_names):
                own = per_class[class_name]
                for name, values in (("AP", precision[:, :, k, 0, -1]), ("AP50", precision[0, :, k, 0, -1])):
                    if (values > -1).any():
                        own[f"{kind}_{name}"] = 100 * float(values[values > -1].mean())
        return numbers, per_class

    def results_of(self, kind: str) -> list[dict[str, Any]]:
        """Results in COCO's format with boxes or with masks, never both.

        Given both, COCO takes the size of a mask (for AP_s, AP_m, AP_l) from its box.
        """
        other = "segmentation" if kind == "box" else "bbox"
        return [
            {key: value for key, value in result.items() if key != other}
            for image_id in self.found
            for result in self._results(image_id)
        ]

    def _results(self, image_id: int) -> list[dict[str, Any]]:
        found = self.found[image_id]
        results: list[dict[str, Any]] = [
            {"image_id": image_id, "category_id": self.category_ids[label - 1], "bbox": box, "score": score}
            for label, box, score in zip(
                found.labels.tolist(), _shortest(found.boxes).tolist(), _shortest(found.scores).tolist(), strict=True
            )
        ]
        for result, counts in zip(results, found.counts, strict=False):  # none without masks
            result["segmentation"] = {"size": list(found.size), "counts": counts}
        return results

    def save(self, folder: Path) -> None:
        """Writes predictions_bbox.json and predictions_segm.json (COCO results, each for the scoring in its name),
        per_class.json, errors.json with errors.png (see errors.py) and pictures/.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for kind in self.kinds:
            file = folder / f"predictions_{IOU_TYPES[kind]}.json"
            with optional(file):
                write_text(file, json.dumps(self.results_of(kind)))
        with optional(folder / "per_class.json"):
            write_text(folder / "per_class.json", json.dumps(self.per_class, indent=1, ensure_ascii=False))
        with optional(folder / "errors.png"):
            self._save_errors(folder)
        if self.load_image is not None and self.num_pictures:
            with optional(folder / "pictures"):
                self._save_pictures(folder / "pictures")

    def _save_errors(self, folder: Path) -> None:
        truth = self.truth.coco(self.found if self.partial else None)
        ap50, kinds = errors.by_kind(truth, self.results_of("box"))
        found = {name: {"count": kind.number, "AP50_lost": kind.lost} for name, kind in kinds.items()}
        content = {"box_AP50": ap50, "errors": found, "precision": self.curves}
        write_text(folder / "errors.json", json.dumps(content) + "\n")
        (folder / "errors.png").write_bytes(errors.draw(self.curves, ap50, kinds))

    def strip(self) -> list[tuple[Image.Image, Image.Image]]:
        """See engine.strip: the objects, and the best detections."""
        if self.load_image is None:
            return []
        truth = self.truth.coco(self.truth.image_ids[:IMAGES].tolist())
        pairs = []
        for entry in truth["images"]:
            image = self.load_image(entry["id"])
            objects = [one for one in truth["annotations"] if one["image_id"] == entry["id"]]
            found, _ = worth_drawing(self._results(entry["id"]) if entry["id"] in self.found else [])
            tiles = []
            for items in (objects, found):
                drawn = [replace(self._drawn(item, image), text=self._name(item)) for item in items]
                canvas = pictures.draw_objects(image, drawn, pictures.SMALL, size=10)
                tiles.append(pictures.tile(canvas, [], pictures.SMALL))
            pairs.append((tiles[0], tiles[1]))
        return pairs

    def _name(self, item: dict[str, Any]) -> str:
        return self.class_names[self.category_ids.index(item["category_id"])]

    def _save_pictures(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        first = [number for number in self.truth.image_ids.tolist() if not self.partial or number in self.found]
        truth = self.truth.coco(first[: 1 if self.partial else self.num_pictures])
        objects: dict[int, list[dict[str, Any]]] = {entry["id"]: [] for entry in truth["images"]}
        for annotation in truth["annotations"]:
            objects[annotation["image_id"]].append(annotation)
        names = pictures.file_names([entry["file_name"] for entry in truth["images"]])
        for entry, name in zip(truth["images"], names, strict=True):
            with optional(folder / name):
                self._draw(entry, objects[entry["id"]]).save(folder / name, compress_level=1)  # as in segmentation

    def _draw(self, entry: dict[str, Any], objects: Sequence[dict[str, Any]]) -> Image.Image:
        """The ground truth and the confident detections of an image, side by side."""
        assert self.load_image is not None
        image = self.load_image(entry["id"])
        found = self._results(entry["id"]) if entry["id"] in self.found else []
        shown, note = worth_drawing(found)
        count = f"{len(objects)} object{'' if len(objects) == 1 else 's'}"
        panels = []
        for items, title, beside in ((objects, "ground truth", count), (shown, "prediction", note)):
            canvas = pictures.draw_objects(image, [self._drawn(item, image) for item in items])
            panels.append(pictures.panel(canvas, title, beside))
        return pictures.sheet(panels, entry["file_name"])

    def _drawn(self, item: dict[str, Any], image: Image.Image) -> pictures.DrawnObject:
        """A result or an annotation in COCO's format, to be drawn."""
        label = self.category_ids.index(item["category_id"])
        text = self._name(item)
        red, green, blue = pictures.palette(len(self.class_names))[label].tolist()
        colour = red, green, blue
        if item.get("iscrowd"):
            text, colour = f"{text} (crowd)", pictures.GREY
        if "score" in item:
            text += f"  {100 * item['score']:.0f}%"
        mask = mask_bytes.decode(item["segmentation"], image.height, image.width) if "segmentation" in item else None
        return pictures.DrawnObject(text, colour, item["bbox"], mask)


def precision_curves(precision: NDArray[np.float64]) -> dict[str, list[float]]:
    """Precision at 101 recalls, the mean of the classes that have objects, by IoU: {} where there is no object.

    precision: [10 IoUs, 101 recalls, classes], -1 for a class without objects.
    """
    known = precision[:, :, (precision > -1).all(axis=(0, 1))]
    if not known.size:
        return {}
    mean = known.mean(axis=2)  # [10, 101]
    curves = {name: mean[place].tolist() for name, place in CURVES.items()}
    return {**curves, "0.5:0.95": mean.mean(axis=0).tolist()}


def worth_drawing(found: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The detections of an image that a picture shows, best first, and in words which these are."""
    ordered = sorted(found, key=lambda one: -one["score"])
    confident = sum(one["score"] >= CONFIDENT for one in ordered)
    shown = ordered[: max(confident, AT_LEAST)]
    note = f"{confident} of score {CONFIDENT} and up"
    if len(shown) > confident:
        note += f", and the best {len(shown) - confident} below"
    return shown, note


# --- scoring ----------------------------------------------------------------------------------------------------------


def evaluate(truth: dict[str, Any], results: list[dict[str, Any]], kind: str, backend: Backend) -> Any:
    """A summarised COCOeval of `results` against the ground truth; kind: "box" or "mask".

    Images and categories are numbered from 1 in the order of their ids: faster-coco-eval takes ids for floating-point
    numbers, of which two are one from 2^53 on.
    """
    coco: Any
    if backend == "faster-coco-eval":
        from faster_coco_eval import COCO, COCOeval_faster

        coco, cocoeval = COCO, COCOeval_faster
    elif backend == "pycocotools":
        from pycocotools import coco as reference
        from pycocotools.cocoeval import COCOeval

        coco, cocoeval = reference.COCO, COCOeval
    else:
        raise UserError(f'Unknown evaluation backend "{backend}".', hint="Known: faster-coco-eval, pycocotools.")
    with contextlib.redirect_stdout(io.StringIO()):  # COCOeval prints

        def index(dataset: dict[str, Any]) -> Any:
            indexed = coco()
            indexed.dataset = dataset
            indexed.createIndex()
            return indexed

        images, categories = (_numbered(truth[name]) for name in ("images", "categories"))

        def with_numbers(entry: dict[str, Any]) -> dict[str, Any]:  # a copy, since COCOeval writes into entries
            own = {"image_id": images[entry["image_id"]], "category_id": categories[entry["category_id"]]}
            return {**entry, **own}

        annotations = [with_numbers(one) for one in truth["annotations"] if kind == "box" or "segmentation" in one]
        lists: dict[str, Any] = {
            "images": [{**one, "id": images[one["id"]]} for one in truth["images"]],
            "categories": [{**one, "id": categories[one["id"]]} for one in truth["categories"]],
        }
        ground_truth = index({**lists, "annotations": annotations})
        numbered = [with_numbers(one) for one in results]
        found = ground_truth.loadRes(numbered) if numbered else index({**lists, "annotations": []})
        evaluation = cocoeval(ground_truth, found, IOU_TYPES[kind])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _numbered(entries: Sequence[dict[str, Any]]) -> dict[int, int]:
    """The number of each id, from 1 on in the order of the ids."""
    return {one: n for n, one in enumerate(sorted(entry["id"] for entry in entries), start=1)}


def _as_text(code: dict[str, Any]) -> dict[str, Any]:
    """A compressed RLE that JSON can hold."""
    counts = code["counts"]
    return {"size": list(code["size"]), "counts": counts if isinstance(counts, str) else counts.decode()}


def _shortest(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The shortest decimals of these float32, so that the files are small and hold exactly what is scored."""
    return np.asarray(values).astype(np.str_).astype(np.float64)
