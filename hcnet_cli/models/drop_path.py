"""timm's drop path, drawn for each sample by its key as HcNet's is: micro-batches and processes change nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn


class Draws:
    """What the drop paths of a model draw from: `noise` [rows, B], uniform in [0, 1); None: torch's generator."""

    def __init__(self) -> None:
        self.rows = 0
        self.noise: Tensor | None = None


class KeyedDropPath(nn.Module):
    """x [B, ...] without the samples b where noise[row, b] < rate; the others are scaled as timm does."""

    def __init__(self, path: DropPath, draws: Draws) -> None:
        super().__init__()
        self.path, self.draws, self.row = path, draws, draws.rows
        draws.rows += 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.draws.noise is None:
            return self.path(x)
        keep = (self.draws.noise[self.row] >= self.path.drop_prob).to(x.dtype)
        if self.path.scale_by_keep:
            keep = keep / (1 - self.path.drop_prob)
        return x * keep.view(-1, *(1,) * (x.ndim - 1))


@contextlib.contextmanager
def keyed_drop_path(model: nn.Module) -> Iterator[Draws]:
    """Around a trial with one image: after it the model's drop paths draw from the result.

    They stay as they are, with no rows, where a model calls one twice, or on other batches than that of its images.
    """
    draws = Draws()
    paths = {name: path for name, path in model.named_modules() if isinstance(path, DropPath) and path.drop_prob}
    sizes: dict[str, list[int]] = {name: [] for name in paths}

    def watch(name: str) -> Any:
        return paths[name].register_forward_pre_hook(lambda _, given: sizes[name].append(len(given[0])))

    hooks = [watch(name) for name in paths]
    try:
        yield draws
    finally:
        for hook in hooks:
            hook.remove()
    called = {name: found for name, found in sizes.items() if found}
    if all(found == [1] for found in called.values()):
        for name in called:
            model.set_submodule(name, KeyedDropPath(paths[name], draws))
