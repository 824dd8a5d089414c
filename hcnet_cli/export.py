"""`hcnet export`: a trained model as a file for other programs, left only if it computes what the run computed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.export import Dim

from hcnet_cli import build, checkpoint, engine
from hcnet_cli.console import UserError, notice, status_line, warn
from hcnet_cli.data.images import Size
from hcnet_cli.files import replacing, write_text, writing
from hcnet_cli.header import read_metadata
from hcnet_cli.models import backbone as backbones
from hcnet_cli.recipe import Recipe
from hcnet_cli.report.card import run_card
from hcnet_cli.runs import RunFolder, RunInfo

SIZES: tuple[Size, ...] = ((256, 320), (224, 224), (160, 352))  # height, width; tried where a file is for any size
TOLERANCE = 1e-4  # of logits
OPSET = 20
KEY = "hcnet"  # of the metadata, in every format
LOCAL = "local-dir:FOLDER"
EXTRA = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
Run = Callable[[Tensor], Tensor]


def check_extra(fmt: str) -> None:
    """UserError unless the packages that a format takes are installed. Loads none."""
    if missing := [name for name in EXTRA.get(fmt, ()) if importlib.util.find_spec(name) is None]:
        raise UserError(f"{fmt} needs {', '.join(missing)}.", hint="pip install 'hcnet[export]'")


def export(folder: RunFolder, info: RunInfo, recipe: Recipe, fmt: str, output: Path) -> None:
    """Writes the best weights of a run to `output` in one of FORMATS.

    The file is compared with the model on images of several sizes, then by the run's score on its validation data; it
    replaces `output` only after that. UserError where the model cannot be written so, or the file computes otherwise.
    """
    about = read_metadata(folder.best)
    model = _model(folder, recipe, about)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    own, fixed = _sizes(recipe)
    with status_line() as tell, writing(output), replacing(output) as temporary:
        tell(f"Writing the model as {fmt} (this can take minutes)")
        try:
            size = own if fixed else None
            file, largest = _written(model, fmt, temporary, size, own, about)
        except UserError:
            if fixed or own is None:
                raise
            size = own  # a graph for every size may leave out small images, whose last map is a single pixel
            file, largest = _written(model, fmt, temporary, size, own, about)
        tell("Scoring the file on the validation data")
        score = _score(folder, info, recipe, file)
    sizes = "images of any size" if size is None else f"images of {size[0]} x {size[1]}"
    notice(f"Wrote {output} for {sizes}. Largest difference to PyTorch: {largest:.1e}. {score}")


def export_folder(folder: RunFolder, info: RunInfo, recipe: Recipe, output: Path, load: str = LOCAL) -> str:
    """Writes a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads: weights, config, card.

    Returns sentences that say how it compares with the run. `load`: what the card says that timm takes.
    """
    about = read_metadata(folder.best)
    model = _model(folder, recipe, about)
    try:
        with writing(output):
            output.mkdir(parents=True)
        checkpoint.save_tensors(output / "model.safetensors", model.state_dict())
        write_text(output / "config.json", json.dumps(timm_config(model, about), indent=2) + "\n")
        write_text(output / "README.md", run_card(folder, info, about, load))
        loaded = timm.create_model(f"local-dir:{output}", pretrained=True).eval()
        largest = _compare(model, loaded, [(about["img_size"], about["img_size"])], "timm")
        score = _score(folder, info, recipe, loaded)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    return f"Largest difference to the run's model: {largest:.1e}. {score}"


def _model(folder: RunFolder, recipe: Recipe, about: dict[str, Any]) -> Any:
    predictor = build.build_predictor(recipe, [str(name) for name in about["classes"]])
    build.load_own(predictor.task, folder.path)
    return predictor.task.model.eval().requires_grad_(False)


def _sizes(recipe: Recipe) -> tuple[Size | None, bool]:
    """The size of a classifier's images (None for other tasks), and whether its model takes no other."""
    size = getattr(recipe.data, "img_size", None)
    fixed = bool(recipe.model.name and backbones.size_argument(recipe.model.name, size))
    return (size, size) if size else None, fixed


def _written(
    model: nn.Module, fmt: str, path: Path, size: Size | None, own: Size | None, about: dict[str, Any]
) -> tuple[Run, float]:
    """Writes a file for images of `size` (None: any), reads it back and compares; (the file, largest difference)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about themselves
        FORMATS[fmt](model, path, size, about)
        file = LOADERS[fmt](path)
        tried = [size] if size else [*([own] if own else []), *SIZES]
        return file, _compare(model, file, tried, fmt)


# --- formats ----------------------------------------------------------------------------------------------------------


def _program(model: nn.Module, size: Size | None) -> Any:
    """The exported program of [batch, 3, height, width], batch and (without `size`) height and width of any size."""
    dimensions = {0: Dim.DYNAMIC} | ({} if size else {2: Dim.DYNAMIC, 3: Dim.DYNAMIC})
    example = torch.zeros(2, 3, *(size or SIZES[0]))
    try:
        return torch.export.export(model, (example,), dynamic_shapes=(dimensions,))
    except Exception as error:  # the exporter raises almost anything
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"This model cannot be exported for images of any size: {reason}.") from None


def _write_pt2(model: nn.Module, path: Path, size: Size | None, about: dict[str, Any]) -> None:
    content = {KEY: json.dumps(about)}
    with path.open("wb") as file:
        torch.export.save(_program(model, size), file, extra_files=content)


def _load_pt2(path: Path) -> Run:
    with path.open("rb") as file:
        module: Run = torch.export.load(file).module()
    return module


def _write_onnx(model: nn.Module, path: Path, size: Size | None, about: dict[str, Any]) -> None:
    import onnx

    made: Any = torch.onnx.export(
        _program(model, size),
        dynamo=True,
        input_names=["image"],
        output_names=["logits"],
        opset_version=OPSET,
        verbose=False,
    )
    proto = made.model_proto
    onnx.helper.set_model_props(proto, {KEY: json.dumps(about)})
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"image": images.contiguous().numpy()})[0])


def _write_torchscript(model: nn.Module, path: Path, size: Size | None, about: dict[str, Any]) -> None:
    traced: Any = torch.jit.trace(model, torch.zeros(2, 3, *(size or SIZES[0])), check_trace=False)
    torch.jit.save(traced, str(path), _extra_files={KEY: json.dumps(about)})


def _load_torchscript(path: Path) -> Run:
    loaded: Run = torch.jit.load(str(path))
    return loaded


FORMATS: dict[str, Callable[[nn.Module, Path, Size | None, dict[str, Any]], None]] = {
    "onnx": _write_onnx,
    "pt2": _write_pt2,
    "torchscript": _write_torchscript,
}
LOADERS: dict[str, Callable[[Path], Run]] = {"onnx": _load_onnx, "pt2": _load_pt2, "torchscript": _load_torchscript}


def timm_config(model: Any, about: dict[str, Any]) -> dict[str, Any]:
    """What timm reads from the config.json of a model on the hub, with the run's preprocessing."""
    size = about["img_size"]
    return {
        "architecture": about["model"],
        "num_classes": len(about["classes"]),
        "num_features": model.num_features,
        "label_names": about["classes"],
        "model_args": about["model_args"],
        "pretrained_cfg": {
            **{key: about[key] for key in ("mean", "std", "interpolation", "crop_pct")},
            "input_size": [3, size, size],
            "num_classes": len(about["classes"]),
            "custom_load": False,
        },
    }


# --- whether it is the same model -------------------------------------------------------------------------------------


@torch.inference_mode()
def _compare(model: Run, file: Run, sizes: Sequence[Size], fmt: str) -> float:
    """The largest difference of the logits for 1, 2 and more images; UserError where it exceeds TOLERANCE."""
    largest, generator = 0.0, torch.Generator().manual_seed(0)
    for count, size in enumerate([*sizes, sizes[0]], 1):
        images = torch.randn(count, 3, *size, generator=generator)
        expected = model(images)
        try:
            found = file(images)
        except Exception as error:  # runtimes raise almost anything
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError(
                f"The {fmt} file fails on images of {tuple(images.shape[2:])}: {reason}", hint="Use --format pt2."
            ) from None
        same_shape = found.shape == expected.shape
        difference = float((found - expected).abs().max()) if same_shape else float("inf")
        if not difference <= TOLERANCE:
            raise UserError(
                f"The {fmt} file computes otherwise than the model on images of {tuple(images.shape[2:])} "
                f"(difference {difference:.1e}), so it was not kept.",
                hint="Use --format pt2.",
            )
        largest = max(largest, difference)
    return largest


class _InPlace(nn.Module):
    """The file where the task has its model."""

    def __init__(self, file: Run) -> None:
        super().__init__()
        self.file = [file]  # in a list, so that it is no submodule

    def forward(self, images: Tensor) -> Tensor:
        return self.file[0](images)


def _score(folder: RunFolder, info: RunInfo, recipe: Recipe, file: Run) -> str:
    """A sentence: the run's score, made again with the file. UserError where it differs in a digit that tables show."""
    try:
        data = build.open_data(recipe)
    except UserError as error:
        warn(f"The score was not compared: {error}")
        return "Its score was not compared."
    if data.info.digest != info.data.digest:
        warn(f"The score was not compared: {data.info.path} holds other data than the run was validated on.")
        return "Its score was not compared."
    where = torch.device("cpu")
    task = build.build_task(recipe, data)
    build.load_own(task, folder.path)
    job = dataclasses.replace(build.build_job(recipe, data, task, where), ema=None)
    first = job.evaluations[0]
    task.model = _InPlace(file)
    metrics, _ = engine.evaluate(job, first)
    found, recorded = f"{metrics[task.primary]:.2f}", f"{info.metrics[task.primary]:.2f}"
    if found != recorded:
        raise UserError(f"The file scores {task.primary} {found}, the run {recorded}: it was not kept.")
    return f"On the run's validation data: {task.primary} {found}, as the run."
