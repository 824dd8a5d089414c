"""The mistakes of a classifier that it is surest of, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from hcnet_cli import pictures

MOST = 24  # that are kept and drawn
RED, GREEN = (180, 35, 24), (21, 115, 71)


class Mistake(NamedTuple):
    """A wrong answer: classes by number, and their probabilities."""

    sample: int
    label: int
    answer: int
    of_answer: float
    of_label: float


def mistakes(scores: Tensor, answers: Tensor, labels: Tensor, samples: Tensor) -> list[Mistake]:
    """The wrong answers of a batch: scores [B, num_classes], the rest [B]."""
    wrong = (answers != labels).nonzero()[:, 0]
    shares = scores[wrong].float().softmax(dim=1)  # [W, num_classes]
    columns = [samples[wrong], labels[wrong], answers[wrong]]
    columns += [shares.gather(1, index[wrong, None])[:, 0] for index in (answers, labels)]
    return [Mistake(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def worst(found: Sequence[Mistake]) -> list[Mistake]:
    """The MOST surest of the mistakes, in an order that does not depend on how they came."""
    return sorted(found, key=lambda one: (-one.of_answer, one.sample))[:MOST]


def draw_mistakes(
    found: Sequence[Mistake],
    class_names: Sequence[str],
    load_image: Callable[[int], Image.Image],
    sample_name: Callable[[int], str],
) -> Image.Image:
    """The images with the answer, the label below it, their probabilities, and the file with its folder."""
    tiles = []
    for one in found:
        lines = [
            (f"{class_names[one.answer]}: {100 * one.of_answer:.0f} %", RED),
            (f"is {class_names[one.label]}: {100 * one.of_label:.0f} %", pictures.INK),
            ("/".join(sample_name(one.sample).split("/")[-2:]), pictures.GREY),
        ]
        tiles.append(pictures.tile(load_image(one.sample), lines))
    caption = f"The {len(found)} mistakes with the highest probability: the answer in red, then what it is"
    return pictures.grid(
        tiles, 8, caption if len(found) > 1 else "The only mistake: the answer in red, then what it is"
    )
