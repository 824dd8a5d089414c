"""What the heat steps of an HcNet do, in numbers.

Dimension letters: N images, C channels, K stencil size, H x W image, M frequencies per axis, D side of a heat field.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn

from hcnet_cli.models import HcNet
from hcnet_cli.models.hcnet import HeatConduction

WINDOW = 384  # pixels: larger images are cropped to their centre for receptive fields
PROBES = 16  # gradients per receptive field, over all images, at least
FREQUENCIES = 48  # M
RATE_BINS = 200  # of the interval (0, 1)
KINDS = ("isotropic", "directional", "transport")
TOLERANCE = 1e-6  # a gain within it of 1 is 1
NOTABLE = 0.01  # a gain farther than this from 1 damps or amplifies; a smaller share is not shown
TINY = float(np.finfo(np.float64).tiny)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class HeatStep:
    """One heat conduction layer: u' = u + r . (S * u). Stage and block count from 1."""

    stage: int
    block: int
    stencil: Floats  # S [C, K, K]
    rate: Floats  # r(u) [N, C]


def heat_steps(backbone: HcNet, images: Sequence[Tensor]) -> list[HeatStep]:
    """The model's heat steps in the order of depth, with their rates on each image [3, H, W]."""
    places = {
        block.conduction: (s, b)
        for s, stage in enumerate(backbone.stages, 1)
        for b, block in enumerate(stage.blocks, 1)
        if isinstance(block.conduction, HeatConduction)
    }
    rates: dict[nn.Module, list[Tensor]] = {layer: [] for layer in places}

    def note(layer: Any, inputs: tuple[Tensor]) -> None:
        rates[layer].append(layer.conduction_rate(*inputs)[0, :, 0, 0])  # [1, C, 1, 1] -> [C]

    hooks = [layer.register_forward_pre_hook(note) for layer in places]
    with torch.no_grad():
        for image in images if places else ():
            backbone.forward_features(image[None])
        for hook in hooks:
            hook.remove()
        return [
            HeatStep(s, b, layer.stencil()[:, 0].double().numpy(), torch.stack(rates[layer]).double().numpy())
            for layer, (s, b) in places.items()
        ]


def windows(images: Sequence[Tensor]) -> list[Tensor]:
    """The centres of images [3, H, W], all of the smallest one's size and at most WINDOW a side."""
    height, width = (min(WINDOW, *(image.shape[axis] for image in images)) for axis in (1, 2))
    cut = []
    for image in images:
        top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
        cut.append(image[:, top : top + height, left : left + width])
    return cut


def receptive_field(features: Callable[[Tensor], Any], images: Sequence[Tensor]) -> list[Floats]:
    """How strongly the centre of each feature map depends on each pixel: [H, W] for each map.

    It is the squared gradient, summed over the channels of the feature and of the image, mean over the images.
    Gradients of sums over the channels with random signs replace one gradient per channel; their squares have the same
    mean (Hutchinson). Each image gets at least one, all together at least PROBES. The signs are the same in every run.

    features: image [1, 3, H, W] -> feature maps [1, C, h, w]. images: [3, H, W], all of one size.
    """
    signs = torch.Generator().manual_seed(0)
    probes = -(-PROBES // len(images))
    energies: list[Tensor] = []
    for image in images:
        x = image[None].clone().requires_grad_()
        maps = features(x)
        energies = energies or [torch.zeros(image.shape[1:], dtype=torch.float64) for _ in maps]
        for energy, feature in zip(energies, maps, strict=True):
            centre = feature[0, :, feature.shape[2] // 2, feature.shape[3] // 2]  # [C]
            for _ in range(probes):
                weights = torch.randint(0, 2, centre.shape, generator=signs).to(centre) * 2 - 1
                (gradient,) = torch.autograd.grad(centre, x, weights, retain_graph=True)
                energy += gradient[0].double().square().sum(0) / (probes * len(images))
    return [energy.numpy() for energy in energies]


def area(energy: Floats, share: float) -> int:
    """The smallest number of pixels that hold this share of the energy."""
    rising = np.cumsum(np.sort(energy, axis=None)[::-1])
    return int(np.searchsorted(rising, share * rising[-1] * (1 - 1e-12)) + 1)


def parts(stencil: Floats) -> Floats:
    """[C, K, K] -> [3, C, K, K], one part of each of KINDS. They are orthogonal and sum to the stencil.

    The isotropic part is equal under all symmetries of the square and conducts alike in all directions. The directional
    part is the rest of what a half turn keeps and conducts along some. The transport part changes its sign under a half
    turn and moves the field (its S(w) is imaginary).
    """
    turned = [np.rot90(stencil, quarter, axes=(1, 2)) for quarter in range(4)]
    isotropic = np.sum([t + np.flip(t, axis=2) for t in turned], axis=0) / 8
    even = (turned[0] + turned[2]) / 2
    return np.stack([isotropic, even - isotropic, stencil - even])


def frequencies() -> Floats:
    """Cycles per pixel, in [-1/2, 1/2): [M]."""
    return np.arange(FREQUENCIES) / FREQUENCIES - 0.5


def response(stencil: Floats) -> NDArray[np.complex128]:
    """S(w) [C, M, M], the factor by which a stencil [C, K, K] multiplies the wave exp(2 pi i (fy y + fx x))."""
    half = stencil.shape[-1] // 2
    waves = np.exp(2j * np.pi * np.outer(frequencies(), np.arange(-half, half + 1)))  # [M, K]
    return np.asarray(waves @ stencil @ waves.T)


def diffuse(steps: Sequence[HeatStep]) -> list[Floats]:
    """A hot pixel after each of these heat steps of one stage, with mean rates, no other layers and no border.

    Returns [C, D, D] for each step, D the reach of all.
    """
    reach, channels = sum(step.stencil.shape[-1] // 2 for step in steps), len(steps[0].stencil)
    u = torch.zeros(1, channels, 2 * reach + 1, 2 * reach + 1, dtype=torch.float64)
    u[:, :, reach, reach] = 1
    fields = []
    for step in steps:
        stencil, rate = torch.from_numpy(step.stencil)[:, None], torch.from_numpy(step.rate.mean(0))[:, None, None]
        u = u + rate * F.conv2d(u, stencil, padding=stencil.shape[-1] // 2, groups=channels)
        fields.append(u[0].numpy())
    return fields


# --- the numbers behind the pictures ----------------------------------------------------------------------------------


def measure(steps: Sequence[HeatStep], fields: Sequence[Floats]) -> dict[str, Any]:
    """`stages`: stencils, mean gain, hot pixel, receptive field (one of `fields` each). `blocks`: rates and gains."""
    blocks: list[dict[str, Any]] = [
        {"stage": step.stage, "block": step.block, "rate": _rates(step), "gain": _gains(step)} for step in steps
    ]
    stages = []
    for number, field in enumerate(fields, 1):
        stride = 2 ** (number + 1)
        centre = [-(-side // stride) // 2 * stride for side in field.shape]  # pixel [y, x] of the centre feature
        seen = {"image": list(field.shape), "centre": centre, **_extent(field), "field": _amplitude(field)}
        stage: dict[str, Any] = {"stage": number, "receptive_field": seen}
        if own := [step for step in steps if step.stage == number]:
            stage |= {"blocks": len(own), "channels": len(own[0].stencil), "stencils": _stencils(own)}
            stage["mean_gain"] = np.mean([b["gain"].pop("map") for b in blocks if b["stage"] == number], 0)  # [M, M]
            stage["hot_pixel"] = _hot_pixel(own)
        stages.append(stage)
    return {"frequencies": frequencies(), "stages": stages, "blocks": blocks}


def _stencils(steps: Sequence[HeatStep]) -> dict[str, Any]:
    """Leading patterns, energy by kind, and the two purest channels of each kind among the stronger half.

    Computed from the neighbours' taps, which determine the centre of a zero-sum stencil.
    """
    stencils = np.concatenate([step.stencil for step in steps])  # [blocks * C, K, K]
    half = stencils.shape[-1] // 2
    balanced = np.abs(stencils.sum((1, 2))).max() <= 1e-4 * np.abs(stencils).max()
    neighbours = stencils.copy()
    neighbours[:, half, half] = 0
    _, strength, patterns = np.linalg.svd(neighbours.reshape(len(stencils), -1), full_matrices=False)
    weight = np.square(strength) / max(np.square(strength).sum(), TINY)
    leading = []
    for share, pattern in zip(weight[:4], patterns.reshape(-1, *stencils.shape[1:]), strict=False):
        pattern[half, half] = -pattern.sum() if balanced else 0
        if share > NOTABLE:
            leading.append({"share": share, "stencil": _upright(pattern)})
    energy = np.square(parts(neighbours)).sum((2, 3))  # [3, blocks * C]
    total = energy.sum(0)
    shares = np.where(total >= np.median(total), energy / np.maximum(total, TINY), 0)
    channels: list[dict[str, Any]] = []
    for kind, share in zip(KINDS, shares, strict=True):
        picked: list[Floats] = []
        for i in np.argsort(-share, kind="stable"):
            if share[i] > NOTABLE and len(picked) < 2 and not any(np.allclose(stencils[i], s) for s in picked):
                picked.append(stencils[i])
                block, channel = divmod(int(i), len(steps[0].stencil))
                entry = {"kind": kind, "share": share[i], "block": block + 1, "channel": channel}
                channels.append({**entry, "stencil": stencils[i]})
    by_kind = dict(zip(KINDS, energy.sum(1) / max(total.sum(), TINY), strict=True))
    return {"energy": by_kind, "patterns": leading, "channels": channels}


def _upright(pattern: Floats) -> Floats:
    """Fixes the free sign of a pattern: a cold centre or, where the centre is small, a hot first extreme."""
    half = len(pattern) // 2
    flat = pattern.ravel()
    centre, extreme = pattern[half, half], flat[np.argmax(np.round(np.abs(flat), 9))]
    sign = -np.sign(centre) if abs(centre) > abs(extreme) / 2 else np.sign(extreme)
    return np.asarray(sign * pattern)


def _rates(step: HeatStep) -> dict[str, Any]:
    levels = (0, 10, 25, 50, 75, 90, 100)
    return {
        "mean": step.rate.mean(),
        "percentiles": dict(zip(map(str, levels), np.percentile(step.rate, levels), strict=True)),
        "std_over_channels": step.rate.mean(0).std(),
        "std_over_images": step.rate.std(0).mean(),
        "density": _density(step.rate),
    }


def _density(rate: Floats) -> Floats:
    """Density of rates in RATE_BINS bins of (0, 1): smoothed by Silverman's Gaussian, mirrored at 0 and 1."""
    counts = np.histogram(rate, RATE_BINS, (0, 1))[0] * RATE_BINS / rate.size
    quartiles = np.percentile(rate, (25, 75))
    width = RATE_BINS * 0.9 * min(rate.std(), np.ptp(quartiles) / 1.34) * rate.size**-0.2
    return np.asarray(gaussian_filter1d(counts, max(width, 1.0), mode="reflect", radius=RATE_BINS))


def _gains(step: HeatStep) -> dict[str, Any]:
    """Of |1 + r S(w)|: mean over channels, profile over |w|, shares above and below 1; r is the mean over the images.

    `stable_channels` is the share of channels that amplify no frequency at any image's rate: |1 + r S| is convex in r,
    so the smallest and the largest rate decide.
    """
    flow = response(step.stencil)  # [C, M, M]
    rates = step.rate.mean(0), step.rate.min(0), step.rate.max(0)
    gain, *extremes = (np.abs(1 + rate[:, None, None] * flow) for rate in rates)
    ring = np.rint(FREQUENCIES * np.hypot(*np.meshgrid(frequencies(), frequencies()))).astype(int)  # [M, M]
    rings = [gain[:, ring == i] for i in range(FREQUENCIES // 2 + 1)]  # at 0, 1/M .. 1/2 cycles a pixel
    return {
        "map": gain.mean(0),
        "radial_mean": [r.mean() for r in rings],
        "radial_p10": [np.percentile(r, 10) for r in rings],
        "radial_p90": [np.percentile(r, 90) for r in rings],
        "max": gain.max(),
        "above_1": (gain > 1 + TOLERANCE).mean(),
        "damped": (gain < 1 - NOTABLE).mean(),
        "amplified": (gain > 1 + NOTABLE).mean(),
        "stable_channels": (np.maximum(*extremes).max((1, 2)) <= 1 + TOLERANCE).mean(),
    }


def _hot_pixel(steps: Sequence[HeatStep]) -> dict[str, Any]:
    """After each step: where the energy of a hot pixel is, and how much energy and heat (1 at first) channels hold."""
    after, mean = [], np.ones((1, 1))
    for u in diffuse(steps):
        energy = np.square(u)
        mean = (energy / energy.sum((1, 2), keepdims=True)).mean(0)  # each channel has the same weight
        heat = u.sum((1, 2))
        after.append({**_extent(mean), "heat": [heat.min(), heat.max()], "energy": np.median(energy.sum((1, 2)))})
    return {"after": after, "field": _amplitude(mean)}


def _amplitude(energy: Floats) -> Floats:
    """Root of the energy, over its largest value."""
    return np.asarray(np.sqrt(energy / max(energy.max(), TINY)), dtype=np.float64)


def _extent(energy: Floats) -> dict[str, Any]:
    """The fewest pixels that hold 50, 80, 95, 99 % of the energy, and its root mean square distance from its centre."""
    p = energy / energy.sum()
    grid = np.indices(energy.shape)
    centre = (p * grid).sum((1, 2), keepdims=True)
    areas = {str(share): area(energy, share / 100) for share in (50, 80, 95, 99)}
    radius = np.sqrt((p * np.square(grid - centre)).sum())
    return {"area": areas, "fraction_95": areas["95"] / energy.size, "rms_radius": radius}
