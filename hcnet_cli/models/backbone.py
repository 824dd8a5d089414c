"""Any model as a backbone: HcNet by its size, a model of timm by its name, or a function of the user's own.

What the heads of detection and segmentation need is `forward_intermediates` and `feature_info` as timm has them, with
four maps [B, C, H / stride, W / stride] at strides 4, 8, 16 and 32. HcNet offers that itself; `FeatureMaps` gives it to
other models.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hcnet_cli import model_names, own_model
from hcnet_cli.console import UserError, did_you_mean, notice, warn
from hcnet_cli.models import own
from hcnet_cli.models.drop_path import Draws, keyed_drop_path
from hcnet_cli.models.simple_pyramid import SimplePyramid
from hcnet_cli.models.swin import pad_before_shifting

STRIDES = [4, 8, 16, 32]
SUITABLE = (
    "Those that can: hcnet's sizes, convnext, swin, pvt_v2, focalnet, davit, twins, mambaout, resnet, efficientnet, "
    "vit and others. `pretrain` takes any."
)
OWN_MAPS = 'docs/extending.md, under "A backbone", has a file whose model offers maps. `pretrain` takes any model.'
SIZE_HINT = "Choose a size that its patches and windows divide: --set data.img_size=N"
# Images of any size; Swin's windows shift in every stage, whatever size it is built for, as in Swin's own code.
ANY_SIZE = {"dynamic_img_size": True, "always_partition": True}
BATCH_ROUNDING = 0.01  # of the largest output: what other images in the batch may change by rounding
TRIED = (64, 96)  # height and width of the image on which the maps are tried: its sides differ and need no padding


class FeatureMaps(nn.Module):
    """The maps of a model at strides 4 to 32, with nothing behind the last one; the model itself is `model`.

    A model whose maps all have one stride, such as a vision transformer, gets a SimplePyramid. Images are padded with
    zeros at the right and bottom to multiples of 32, which windows and patches need, and the maps are cropped.
    Of a classifier trained on images of `side` x `side` the maps of such images are its own: neither they nor its
    windows are padded otherwise than in training.
    """

    def __init__(self, name: str, model: Any, side: int | None = None) -> None:
        super().__init__()
        info = list(getattr(model, "feature_info", None) or [])
        strides = [level["reduction"] for level in info]
        last = len(strides) - 1
        self.pyramid: SimplePyramid | None = None
        if not hasattr(model, "forward_intermediates") or not strides:
            raise _refused(name, "offers no feature maps")
        if set(STRIDES) <= set(strides):
            self.kept = [last - strides[::-1].index(stride) for stride in STRIDES]  # the last map of each stride
            self.feature_info = [dict(info[i]) for i in self.kept]
        elif len(set(strides)) == 1 and strides[0] in STRIDES:
            self.kept = [last]
            self.pyramid = SimplePyramid(info[last]["num_chs"], strides[0], STRIDES)
            self.feature_info = [
                {"num_chs": width, "reduction": stride}
                for width, stride in zip(self.pyramid.channels, STRIDES, strict=True)
            ]
        else:
            at = ", ".join(map(str, sorted(set(strides))))
            raise _refused(name, f"has maps at stride{'s' * (len(set(strides)) > 1)} {at}")
        if hasattr(model, "prune_intermediate_layers"):
            model.prune_intermediate_layers(self.kept, prune_norm=True, prune_head=True)
        if side is None:
            pad_before_shifting(model)
        self.side = side
        takes = inspect.signature(model.forward_intermediates).parameters
        self.format = {"output_fmt": "NCHW"} if "output_fmt" in takes else {}
        self.model = model
        self.draws = Draws()

    @property
    def num_blocks(self) -> int:
        """Rows of `noise`."""
        return self.draws.rows

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Sequence[int] | None = None,
        intermediates_only: bool = True,
        noise: Tensor | None = None,
    ) -> list[Tensor]:
        """Image [B, 3, H, W] -> the maps [B, C, H / stride, W / stride], sizes rounded up.

        noise: [num_blocks, B] uniform in [0, 1), the draws of drop path.
        """
        assert intermediates_only
        self.draws.noise = noise
        height, width = x.shape[2:]
        own_size = height == width == self.side
        padded = x if own_size else F.pad(x, (0, -width % STRIDES[-1], 0, -height % STRIDES[-1]))
        maps = self.model.forward_intermediates(padded, indices=self.kept, intermediates_only=True, **self.format)
        if self.pyramid is not None:
            maps = self.pyramid(maps[-1])
        if padded.shape != x.shape:
            maps = [
                found[..., : math.ceil(height / stride), : math.ceil(width / stride)]
                for found, stride in zip(maps, STRIDES, strict=True)
            ]
        return maps if indices is None else [maps[i] for i in indices]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if hasattr(self.model, "set_grad_checkpointing"):
            self.model.set_grad_checkpointing(enable)


def _refused(name: str, reason: str) -> UserError:
    return UserError(
        f"The model {name} {reason}; detection and segmentation need 4, 8, 16 and 32.", hint=_what_can(name)
    )


def _what_can(name: str) -> str:
    """For a model whose maps do not do: where to read what a file is to offer, or which models of timm do."""
    return OWN_MAPS if own_model.is_own(name) else SUITABLE


def create(
    name: str,
    num_classes: int,
    args: Mapping[str, Any],
    *,
    drop_path_rate: float | None = None,
    img_size: int | None = None,
    digest: str = "",
) -> nn.Module:
    """A model of timm by name, or the result of `FUNCTION(num_classes=..., **args)` in FILE.py for "FILE.py:FUNCTION".

    Args:
        name: Of timm, or FILE.py:FUNCTION.
        num_classes: 0 for feature maps of images of any size, as detection and segmentation need them.
        args: Arguments of the model.
        drop_path_rate: Goes to models that take it.
        img_size: Height and width of the images of a classifier; goes to models that are built for one size. With
            num_classes=0 the maps are that classifier's.
        digest: Of the file of the user's own, where a recipe has it.

    UserError for an unknown name, for arguments that the model does not take, and where a trial image of zeros shows
    that the model does not return what is needed.
    """
    optional: dict[str, Any] = {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}
    file = own_model.split(name)[0] if own_model.is_own(name) else None
    make: Callable[..., Any]
    defined: Callable[..., Any]  # where the names of its arguments are looked up
    if file:
        make = defined = own.load_function(name, digest)
    elif timm.is_model(name):
        make, defined = functools.partial(timm.create_model, name), timm.model_entrypoint(name)
        sized = size_argument(name, img_size)
        optional |= sized if num_classes else {**ANY_SIZE, "always_partition": not sized, **sized}
    else:
        raise model_names.unknown_model(name)
    try:
        model = _call(make, {"num_classes": num_classes, **args}, optional)
    except (Exception, SystemExit) as error:
        reason, meant = own.describe_error(error, file), _meant_argument(error, defined)
        size = f" for images of {img_size} x {img_size}" if "img_size" in optional else ""
        raise UserError(
            f"The model {name} cannot be built{f' with {dict(args)}' if args else ''}{size}: {reason}.{meant}",
            hint=SIZE_HINT if size and not meant else "",
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} returned {type(model).__name__}, not a torch.nn.Module.")
    if num_classes:
        if img_size:
            _try_classifier(name, model, num_classes, img_size)
            with _evaluating(model):
                _warn_of_unseen(name, model, img_size)
                if file:
                    _check_each_alone(name, model, (img_size, img_size))
        return model
    maker: Any = getattr(model, "forward_intermediates", None)
    if maker is not None and takes_noise(maker):
        return model  # HcNet, and what is made of it
    maps = FeatureMaps(name, model, img_size)
    _try_maps(name, maps, freeze_unused=file is None)
    if file:
        with _evaluating(maps):
            _check_each_alone(
                name, lambda x: torch.cat([m.flatten(1) for m in maps.forward_intermediates(x)], 1), TRIED
            )
    return maps


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode inside, without gradients."""
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        model.train(training)


def size_argument(name: str, img_size: int | None) -> dict[str, int]:
    """The argument for the image size of a model of timm that is built for one size; {} for any other."""
    config = None if own_model.is_own(name) else timm.get_pretrained_cfg(name)
    return {"img_size": img_size} if img_size and config is not None and config.fixed_input_size else {}


def _call(make: Callable[..., Any], given: Mapping[str, Any], optional: Mapping[str, Any]) -> Any:
    """make(**given) with those of the optional arguments that it takes."""
    taken = {key: value for key, value in optional.items() if key not in given}
    while True:
        try:
            return make(**given, **taken)
        except TypeError as error:
            unknown = [key for key in taken if f"'{key}'" in str(error)]
            if not unknown:
                raise
            del taken[unknown[0]]
            if unknown[0] == "drop_path_rate":
                notice("The model has no drop path: model.drop_path_rate is not used.")


def _meant_argument(error: BaseException, function: Callable[..., Any]) -> str:
    """' Did you mean "x"?' for an argument that a class or function of the same module does not take, or ""."""
    found = re.match(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", str(error))
    taking = getattr(sys.modules.get(function.__module__), found[1], None) if found else None
    return did_you_mean(found[2], inspect.signature(taking).parameters) if found and callable(taking) else ""


def _try_classifier(name: str, model: nn.Module, num_classes: int, side: int) -> None:
    """UserError unless the model turns an image of the recipe's size into logits."""
    training = model.training
    try:
        with torch.no_grad(), keyed_drop_path(model) as draws:
            made = model.eval()(torch.zeros(1, 3, side, side))
    except Exception as error:
        raise UserError(
            f"The model {name} does not take images of {side} x {side}: {own.describe_error(error)}.",
            hint=SIZE_HINT,
        ) from error
    finally:
        model.train(training)
    shape = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
    if shape != [1, num_classes]:
        raise UserError(
            f"The model {name} returned {shape} for one image, not logits [1, {num_classes}].",
            hint="A function of your own takes num_classes and returns a module that maps images to logits.",
        )
    if draws.rows:
        model.drop_path_draws = draws  # type: ignore[assignment]


def _warn_of_unseen(name: str, model: nn.Module, side: int) -> None:
    """Says where the last rows and columns of an image change nothing in what the model makes of it."""
    answer: Any = getattr(model, "forward_features", model)  # a head may be all zeros
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    before = answer(image)

    def matter(count: int) -> bool:
        other = image.clone()
        other[..., side - count :, :] = 1 - image[..., side - count :, :]
        other[..., side - count :] = 1 - image[..., side - count :]
        return not torch.equal(answer(other), before)

    if not isinstance(before, Tensor) or matter(1) or not matter(side):
        return
    unseen = bisect.bisect_left(range(1, side), True, key=matter)
    warn(
        f"{name} does not see the whole image: the last {unseen} of {side} rows and columns change nothing, for its "
        "patches do not divide the side."
    )
    notice(f"A size that it sees whole: --set data.img_size={side - unseen}")


def _check_each_alone(name: str, answer: Callable[[Tensor], Tensor], size: Sequence[int]) -> None:
    """UserError for a model in evaluation whose answer for an image of size [H, W] is another when asked again, or with
    another image in the batch: its score would be one of many.
    """
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    alone, again, among = answer(images[:1]), answer(images[:1]), answer(images)[:1]
    if not alone.isfinite().all() or not among.isfinite().all():
        return
    if not torch.equal(alone, again):
        raise UserError(
            f"{name} answers otherwise when it is asked again: it draws random numbers in evaluation too.",
            hint="Draw them in training alone: if self.training.",
        )
    if (alone - among).abs().max() > BATCH_ROUNDING * max(alone.abs().max(), among.abs().max()):
        raise UserError(
            f"{name} answers otherwise for an image alone than for the same image in a batch: its score would depend "
            "on the batch size.",
            hint="Use what concerns the whole batch in training alone: if self.training.",
        )


def _try_maps(name: str, backbone: FeatureMaps, freeze_unused: bool) -> None:
    """UserError unless the maps have the promised sizes. `freeze_unused`: parameters behind the last map are not
    trained; several processes would wait for their gradients.
    """
    try:
        with keyed_drop_path(backbone) as draws:
            maps = backbone.eval().forward_intermediates(torch.zeros(1, 3, *TRIED))
        found = [tuple(one.shape[1:]) for one in maps]
        torch.stack([one.sum() for one in maps]).sum().backward()
    except Exception as error:
        raise UserError(
            f"The model {name} does not take images of any size, as detection and segmentation need "
            f"({own.describe_error(error)}).",
            hint=_what_can(name),
        ) from error
    finally:
        backbone.train()
    expected = [
        (level["num_chs"], math.ceil(TRIED[0] / stride), math.ceil(TRIED[1] / stride))
        for level, stride in zip(backbone.feature_info, STRIDES, strict=True)
    ]
    if found != expected:
        raise UserError(
            f"The model {name} returned maps of {found} for an image of {TRIED[0]} x {TRIED[1]}; its feature_info "
            f"promises {expected} (channels, height, width).",
            hint=_what_can(name),
        )
    backbone.draws = draws
    for parameter in backbone.parameters():
        if freeze_unused and parameter.grad is None:
            parameter.requires_grad_(False)
        parameter.grad = None


@dataclass(frozen=True)
class Pyramid:
    """Where the four maps come from in a backbone, their channels, and whether it takes the draws of drop path."""

    indices: list[int]
    channels: list[int]
    takes_noise: bool

    @staticmethod
    def of(backbone: Any) -> Pyramid:
        """Of a backbone, whose parts behind the last map are pruned: parameters without a gradient stall several
        processes. ValueError where it has no maps at strides 4, 8, 16 and 32.
        """
        info = list(getattr(backbone, "feature_info", None) or [])
        strides = [level["reduction"] for level in info]
        if strides[-4:] != STRIDES or not hasattr(backbone, "forward_intermediates"):
            raise ValueError(
                f"{type(backbone).__name__} cannot carry this head: the last four entries of its feature_info must "
                f"have strides 4, 8, 16, 32 (they have {strides}) and it must have forward_intermediates."
            )
        indices = list(range(len(info)))[-4:]
        if hasattr(backbone, "prune_intermediate_layers"):
            backbone.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
        return Pyramid(indices, [info[i]["num_chs"] for i in indices], takes_noise(backbone.forward_intermediates))

    def norms(self) -> nn.ModuleList:
        """A GroupNorm with one group for each map, whatever norm the backbone itself has."""
        return nn.ModuleList(nn.GroupNorm(1, width) for width in self.channels)

    def maps(self, backbone: Any, norms: nn.ModuleList, x: Tensor, noise: Tensor | None = None) -> list[Tensor]:
        """Image [B, 3, H, W] -> the four normalised maps. noise: [num_blocks, B] uniform, the draws of drop path."""
        given = {"noise": noise} if self.takes_noise else {}
        found = backbone.forward_intermediates(x, indices=self.indices, intermediates_only=True, **given)
        return [norm(feature) for norm, feature in zip(norms, found, strict=True)]


def takes_noise(function: Callable[..., Any]) -> bool:
    """Whether a model draws its drop path from an argument, as HcNet does, and not from torch's generator."""
    return "noise" in inspect.signature(function).parameters
