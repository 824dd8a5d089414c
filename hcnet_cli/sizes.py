"""The sizes of HcNet and its components that can be disabled: the only place, plain data, importable without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """One size of HcNet. `drop_path_rate`: for training from random weights on ImageNet (pico: on the digits).

    `published`: the model of the paper's tables that this size reproduces, "" where the size is this project's own.
    """

    timm_name: str
    title: str  # in tables
    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    drop_path_rate: float
    origin: str
    published: str = ""


SIZES = {  # what `--size` takes
    "pico": Size(
        "hcnet_pico",
        "HcNet-pico",
        depths=(2, 2, 4, 2),
        dims=(32, 64, 128, 160),
        drop_path_rate=0.05,
        origin="this project, for the embedded data sets",
    ),
    "t": Size(
        "hcnet_tiny",
        "HcNet-T",
        depths=(5, 5, 14, 5),
        dims=(64, 128, 320, 512),
        drop_path_rate=0.2,
        origin="the example of the authors' model file, the abstract's \"28M, 4.1G\"",
        published="HcNet-T",
    ),
    "t-release": Size(
        "hcnet_tiny_release",
        "HcNet-T-release",
        depths=(3, 8, 18, 3),
        dims=(64, 128, 320, 512),
        drop_path_rate=0.2,
        origin="the authors' training configuration HcNet-T.yaml",
        published="HcNet-T",
    ),
    "s": Size(
        "hcnet_small",
        "HcNet-S",
        depths=(5, 8, 36, 5),
        dims=(64, 128, 320, 512),
        drop_path_rate=0.3,
        origin="this project, to the budget of Swin-S",
    ),
    "b": Size(
        "hcnet_base",
        "HcNet-B",
        depths=(5, 8, 31, 5),
        dims=(96, 192, 448, 704),
        drop_path_rate=0.5,
        origin="this project, to the budget of Swin-B",
    ),
}

COMPONENTS = {  # what `--disable` takes, and what is left without it
    "conduction": "no heat conduction step: u' = u",
    "refinement": "no depthwise filters between the two 1x1 convolutions: a plain feed-forward network",
    "gate": "the rate does not see the image: r = sigmoid(a), one learned number per channel",
    "anisotropy": "the fixed 5-point Laplacian (1, 1, -4, 1, 1) / 4 for every channel",
    "conservation": "the raw kernel w instead of the zero-sum stencil: an ordinary depthwise convolution",
}
INCLUDES = {  # a component -> those that are left out with it, so disabling them too has no meaning
    "conduction": ("gate", "anisotropy", "conservation"),
    "anisotropy": ("conservation",),
}


def ordered_components(disable: Sequence[str]) -> tuple[str, ...]:
    """The disabled components once each, in the order of COMPONENTS.

    Raises:
        ValueError: an unknown component, or a combination without a meaning.
    """
    for name in disable:
        if name not in COMPONENTS:
            raise ValueError(f'unknown component "{name}" (known: {", ".join(COMPONENTS)})')
    for name, included in INCLUDES.items():
        gone = [other for other in included if other in disable]
        if name in disable and gone:
            raise ValueError(f"without {name} there is no {' or '.join(gone)} to disable; name {name} alone")
    return tuple(name for name in COMPONENTS if name in disable)
