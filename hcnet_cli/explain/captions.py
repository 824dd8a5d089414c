"""Captions of the pictures, from the numbers of `heat.measure`."""

from __future__ import annotations

from typing import Any

import numpy as np

ROUNDING = 1e-9  # a standard deviation below it is rounding


def percent(share: float) -> str:
    """12 %, 1.2 %, 0.1 %."""
    return f"{100 * share:.{0 if share >= 0.0995 or share == 0 else 1}f} %"


def captions(found: dict[str, Any]) -> dict[str, str]:
    """What each picture shows, with this run's numbers; by name of the picture."""
    spread = _about_spread(found)
    if not found["blocks"]:
        return {"4-spread": spread + " This model has no heat conduction: it is disabled."}
    held = ", ".join(str(stage["hot_pixel"]["after"][-1]["area"]["95"]) for stage in found["stages"])
    hot = (
        " Below, a hot pixel after all heat steps of a stage and nothing else: root mean square over the channels, "
        f"each counting the same. 95 % of its energy lies on {held} pixels of the stage's own grid."
    )
    return {
        "1-stencils": _about_stencils(found),
        "2-rates": _about_rates(found),
        "3-transfer": _about_gains(found),
        "4-spread": spread + hot,
    }


def _about_stencils(found: dict[str, Any]) -> str:
    if "anisotropy" in found["disabled"]:
        return "Anisotropy is disabled: every channel has the fixed 5-point Laplacian / 4. Nothing was learned here."
    energy = [
        f"stage {stage['stage']}: " + ", ".join(f"{k} {percent(v)}" for k, v in stage["stencils"]["energy"].items())
        for stage in found["stages"]
    ]
    balance = "Each stencil sums to zero: a constant field does not change. "
    if "conservation" in found["disabled"]:
        balance = "Conservation is disabled: the kernels need not sum to zero, a constant field changes. "
    return (
        "Left: the leading patterns of all stencils of a stage, as singular vectors with their share of the energy. "
        "Right: two channels of each kind, the purest among the stronger half. A stencil is the sum of an isotropic "
        "part (equal under all symmetries of the square), a directional part (the rest of what a half turn keeps) "
        f"and a transporting part (odd: it moves the field). {balance}Energy of the neighbours' taps by kind: "
        f"{'; '.join(energy)}."
    )


def _about_rates(found: dict[str, Any]) -> str:
    rates = [block["rate"] for block in found["blocks"]]
    low, high = min(rate["percentiles"]["0"] for rate in rates), max(rate["percentiles"]["100"] for rate in rates)
    channels, images = (float(np.mean([rate[f"std_over_{what}"] for rate in rates])) for what in ("channels", "images"))
    text = (
        "Distribution of the conduction rate r in each block; training starts at 0.5 (dashed). Here r goes from "
        f"{low:.2f} to {high:.2f} and differs by {channels:.3f} between the channels of a block (standard deviation, "
        "mean over the blocks)"
    )
    if "gate" in found["disabled"]:
        return f"{text}. The gate is disabled: a channel has one rate for all images."
    return text + (f", by {images:.3f} between images, which is the gate's part." if images > ROUNDING else ".")


def _about_gains(found: dict[str, Any]) -> str:
    gains = [block["gain"] for block in found["blocks"]]
    damped, amplified, stable = (
        percent(float(np.mean([gain[key] for gain in gains]))) for key in ("damped", "amplified", "stable_channels")
    )
    text = (
        "What one heat step multiplies each spatial frequency with. Over all blocks, channels and frequencies, "
        f"{damped} are damped and {amplified} amplified by more than 1 %; the largest factor is "
        f"{max(gain['max'] for gain in gains):.2f}. {stable} of the channels stay within the stability bound "
        "|1 + r S| <= 1 at every frequency, whatever rate an image gives them."
    )
    if stable != percent(1):
        text += " A step outside the bound is no error: norms and refinements follow each step, and some steps sharpen."
    return text


def _about_spread(found: dict[str, Any]) -> str:
    seen = [percent(stage["receptive_field"]["fraction_95"]) for stage in found["stages"]]
    rates = found["blocks"] and "gate" not in found["disabled"]
    return (
        "Effective receptive field: the root mean square gradient of each stage's centre feature (+) with respect to "
        f"each pixel. 95 % of its energy lies on {', '.join(seen)} of the picture in stages 1 to {len(seen)}. The even "
        f"floor comes through the norms{' and the conduction rates' if rates else ''}, which depend on the whole map. "
        "Features lie at multiples of the stride, so in a small image the + of a late stage can be off its middle."
    )
