"""Where in a task the first value that is not finite arises, forward or backward; and because of which samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hcnet_cli.engine.job import Task

T = TypeVar("T")
Node = Any  # torch.autograd.graph.Node, of which torch has no public type to look into


@dataclass(frozen=True)
class Origin:
    """The first value that is not finite.

    Args:
        module: Its name in the model; "" for the task around the model, which computes the losses.
        kind: The class of the module.
        what: What of it is not finite, in words.
        parameter: The parameter concerned, as best.safetensors names it; "" for none.
    """

    module: str
    kind: str
    what: str
    parameter: str = ""

    def __str__(self) -> str:
        of = f"of {self.module} ({self.kind})" if self.module else f"of the losses ({self.kind})"
        return f"{self.what} {of} is not finite" + (f"; parameter {self.parameter}" if self.parameter else "")


class Watch:
    """Hooks on every module of a task: inside, a forward and backward pass leaves `origin`.

    A value that a module computes between two of its submodules belongs to the module itself. Each node of autograd's
    graph belongs to the innermost module that made it: the first node that gets finite gradients and returns others is
    where they arise.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.names = {module: _in_model(name) for name, module in task.named_modules()}
        self.parameters: dict[Any, str] = {p: _in_model(name) for name, p in task.named_parameters()}
        self.origin: Origin | None = None
        self.stack: list[nn.Module] = []
        self.owners: dict[Node, nn.Module] = {}
        self.forward = True  # layers that are recomputed in the backward pass are not watched again

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The task's losses; sets `origin` if something on the way is not finite."""
        handles = []
        for module in self.names:
            handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(module.register_forward_hook(self._after, with_kwargs=True))
        try:
            found: dict[str, Tensor] = self.task(batch)
        finally:
            self.forward = False
            for handle in handles:
                handle.remove()
        return found

    def backward(self, total: Tensor) -> None:
        """The backward pass of finite losses; sets `origin` if a gradient is not finite."""
        for node in _graph(total.grad_fn):
            node.register_hook(lambda grads, given, node=node: self._returned(node, grads, given))
        total.backward()

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.forward:
            return
        tensors = list(_tensors((args, kwargs)))
        if self.origin is None and not _finite(tensors):
            if self.stack:
                made, then = self.stack[-1], self.names[module]
                self.origin = self._of(made, f"What is computed before {then} in the forward pass")
            else:
                self.origin = Origin("", type(module).__name__, "The batch, as the data set gives it,")
        if self.stack:
            self._own(tensors, self.stack[-1])
        self.stack.append(module)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self.forward:
            return
        self.stack.pop()
        tensors = list(_tensors(output))
        self._own(tensors, module)
        if self.origin is None and not _finite(tensors):
            self.origin = self._of(module, "The output")

    def _of(self, module: nn.Module, what: str) -> Origin:
        """With the module's parameter that is not finite, else the one with the largest value."""
        own = [(name, p.detach().float().abs().max().item()) for name, p in module.named_parameters(recurse=False)]
        worst = max(own, key=lambda one: (one[1] != one[1], one[1]), default=None)
        prefix = f"{self.names[module]}." if self.names[module] else ""
        parameter = f"{prefix}{worst[0]}, of magnitudes up to {worst[1]:.3g}" if worst else ""
        return Origin(self.names[module], type(module).__name__, what, parameter)

    def _own(self, tensors: Sequence[Tensor], module: nn.Module) -> None:
        for tensor in tensors:
            for node in _graph(tensor.grad_fn, self.owners):
                self.owners[node] = module

    def _returned(self, node: Node, grads: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
        if self.origin is not None or not _finite(given) or _finite(grads):
            return
        module = self.owners.get(node, self.task)
        following = [next_one for (next_one, _), grad in zip(node.next_functions, grads, strict=False)
                     if not _finite([grad])]  # fmt: skip
        parameter = next(filter(None, map(self._parameter, following)), "")
        what = "The gradient of a parameter" if parameter else "The gradient of the input"
        operation = node.name().removesuffix("0").removesuffix("Backward")
        self.origin = Origin(self.names[module], type(module).__name__, f"{what} (operation {operation})", parameter)

    def _parameter(self, node: Node) -> str:
        """The parameter that a gradient belongs to, through casts and views; "" for another tensor."""
        while node is not None and not hasattr(node, "variable") and len(node.next_functions) == 1:
            node = node.next_functions[0][0]
        return self.parameters.get(getattr(node, "variable", None), "")


def largest_gradient(task: Task) -> Origin:
    """For finite gradients whose common norm is not: the parameter with the largest."""
    norms = {name: p.grad.float().norm().item() for name, p in task.named_parameters() if p.grad is not None}
    name = max(norms, key=lambda one: norms[one])
    module, _, _ = name.rpartition(".")
    what = f"The norm of all gradients (the largest is {norms[name]:.3g}, of a parameter)"
    return Origin(_in_model(module), type(task.get_submodule(module)).__name__, what, _in_model(name))


def culprits(items: Sequence[T], fails: Callable[[Sequence[T]], bool], most: int = 8) -> list[T]:
    """The items that make `fails` true, by halving; at most `most`. `fails(items)` is known to be true.

    Where neither half fails alone, all items of it: they fail only together.
    """
    if len(items) == 1:
        return list(items)
    middle = len(items) // 2
    found: list[T] = []
    for half in (items[:middle], items[middle:]):
        if len(found) < most and fails(half):
            found += culprits(half, fails, most - len(found))
    return found or list(items)


def _in_model(name: str) -> str:
    return name.removeprefix("model.")


def _finite(values: Sequence[Tensor | None]) -> bool:
    return all(bool(v.isfinite().all()) for v in values if v is not None and v.is_floating_point())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _graph(start: Node | None, known: dict[Node, nn.Module] | None = None) -> list[Node]:
    """The nodes of autograd's graph from `start` down, without those that are known and what is below them."""
    seen: dict[Node, None] = {}
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen and node not in (known or {}):
            seen[node] = None
            waiting += [following for following, _ in node.next_functions]
    return list(seen)


def norm_is_finite(task: Task) -> bool:
    """Whether the norm of all gradients is finite, as training asks before it clips and updates."""
    return bool(torch.nn.utils.get_total_norm([p.grad for p in task.parameters() if p.grad is not None]).isfinite())
