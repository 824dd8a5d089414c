"""`hcnet bench roofline`: what a pass costs on paper, by kind of layer: operations, bytes, and the time they need.

Williams, Waterman and Patterson, "Roofline", CACM 2009. Nothing is computed or measured: the model runs on meta
tensors, and every operator of PyTorch is counted as a kernel of its own that reads its inputs and writes its outputs
once, as in eager mode. A kernel takes at least bytes / bandwidth and at least operations / rate; their larger one is
its time on paper. So the sum is a lower limit for eager mode; fused kernels (torch.compile) move fewer bytes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from hcnet_cli import profile
from hcnet_cli.bench.choices import PLAIN
from hcnet_cli.bench.models import create
from hcnet_cli.report import render
from hcnet_cli.report.escape import to_json
from hcnet_cli.table import Column, Row, Table

KINDS = {  # of operators, by the beginning of their names in aten; "linear": matrix products of two dimensions
    "attention": ("bmm", "baddbmm", "_softmax", "_scaled_dot_product", "_safe_softmax"),
    "linear": ("mm", "addmm"),
    "norm": ("native_layer_norm", "native_group_norm", "native_batch_norm"),
    "activation": ("gelu", "silu", "relu", "sigmoid"),
    "layout": ("clone", "copy", "_to_copy", "cat", "roll", "index", "_unsafe_index", "constant_pad"),
    "pooling": ("mean", "sum"),
}
FREE = ("empty", "new_empty", "detach", "_unsafe_view", "_reshape_alias")  # operators that move nothing


@dataclass
class Cost:
    """Of the kernels of one kind. `seconds`: the sum of each kernel's larger limit."""

    kernels: int = 0
    operations: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Machine:
    """Bytes a second from memory, and operations a second of dense matrix products in `precision`."""

    bandwidth: float
    rate: float
    precision: str


@dataclass
class Counter(TorchDispatchMode):
    """Counts the operators that run inside, on tensors of any device."""

    machine: Machine
    costs: dict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(FREE):
            read, written = list(_tensors((args, kwargs))), list(_tensors(out))
            moved = sum(_bytes(tensor) for tensor in (*read, *written))
            done = operations(name, read, written, args)
            cost = self.costs[kind(name, args)]
            cost.kernels += 1
            cost.operations += done
            cost.bytes += moved
            cost.seconds += max(moved / self.machine.bandwidth, done / self.machine.rate)
        return out


def _tensors(values: Any) -> Iterator[Tensor]:
    return (one for one in tree_iter(values) if isinstance(one, Tensor))


def _bytes(tensor: Tensor) -> int:
    """What is in memory of a tensor: of one that is expanded, the elements that it repeats once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(sizes) * tensor.element_size()


def kind(name: str, args: Any) -> str:
    """The kind of layer that an operator belongs to."""
    if name.startswith("convolution"):
        backward = name == "convolution_backward"
        weight, groups = (args[2], args[9]) if backward else (args[1], args[8])
        return "depthwise convolution" if groups == weight.shape[0] > 1 else "convolution"
    for known, names in KINDS.items():
        if any(name == one or name.startswith((f"{one}_", f"{one}.")) for one in names):
            return known
    return "element-wise"


def operations(name: str, read: list[Tensor], written: list[Tensor], args: Any) -> int:
    """Two for each multiply-accumulate of convolutions and products; one for each element written by all others."""
    if name == "convolution":
        return 2 * written[0].numel() * int(args[1][0].numel())
    if name == "convolution_backward":  # of the input and of the weight: each the work of the forward pass
        return 2 * int(args[0].numel() * args[2][0].numel() * sum(args[10][:2]))
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        return 2 * written[0].numel() * read[-1].shape[-2]
    return sum(tensor.numel() for tensor in written)


def count(model: str, mode: str, batch_size: int, img_size: int, machine: Machine) -> dict[str, Cost]:
    """Costs of one pass or training step (without the optimizer) of a batch, by kind of layer, dearest first.

    Weights and activations have the machine's precision. Attention is counted as products and a softmax.
    """
    set_fused_attn(False)
    try:
        made = create(model.removesuffix(PLAIN), img_size, "").to("meta", profile.DTYPES[machine.precision])
    finally:
        set_fused_attn(True)
    made.to(memory_format=torch.channels_last).train(mode == "train")
    images = torch.empty(batch_size, 3, img_size, img_size, device="meta", dtype=profile.DTYPES[machine.precision])
    targets = torch.empty(batch_size, device="meta", dtype=torch.int64)
    with torch.set_grad_enabled(mode == "train"), Counter(machine) as counter:
        logits = made(images)
        if mode == "train":
            F.cross_entropy(logits, targets).backward()
    return dict(sorted(counter.costs.items(), key=lambda item: -item[1].seconds))


COLUMNS = (
    Column("model", "model"),
    Column("kind", "kind of layer"),
    Column("kernels", "kernels", "integer"),
    Column("gflop", "GFLOP/image", "number"),
    Column("mb", "MB/image", "short"),
    Column("intensity", "FLOP/byte", "short"),
    Column("microseconds", "µs/image", "short"),
    Column("share", "share (%)", "short", secondary=True),
    Column("bound", "bound by", secondary=True),
    Column("images_per_second", "images/s at most", "integer"),
)


def table(models: list[str], mode: str, batch_size: int, img_size: int, machine: Machine) -> Table:
    """A row for each kind of layer of each model, then one for the whole model."""
    rows = []
    ridge = machine.rate / machine.bandwidth
    for model in models:
        costs = count(model, mode, batch_size, img_size, machine)
        whole = Cost(*(sum(getattr(c, name) for c in costs.values()) for name in vars(Cost())))
        for name, cost in [*costs.items(), ("all", whole)]:
            values: dict[str, Any] = {"model": model, "kind": name, "kernels": cost.kernels}
            values |= {"gflop": cost.operations / batch_size / 1e9, "mb": cost.bytes / batch_size / 1e6}
            values |= {"microseconds": 1e6 * cost.seconds / batch_size, "share": 100 * cost.seconds / whole.seconds}
            values["intensity"] = cost.operations / cost.bytes
            if cost is whole:
                values["images_per_second"] = round(batch_size / whole.seconds)
            else:
                values["bound"] = "products" if values["intensity"] > ridge else "memory"
            rows.append(Row("measured", values))
    notes = [
        f"On paper, nothing measured: {machine.bandwidth / 1e12:g} TB/s, {machine.rate / 1e12:g} TFLOP/s dense in "
        f"{machine.precision}; above {ridge:.0f} FLOP/byte the products bind, below it memory.",
        "Each operator is a kernel that reads its inputs and writes its outputs once; two operations for a "
        "multiply-accumulate, one for each element that another operator writes. Caches, launches and the optimizer "
        "are left out.",
    ]
    title = (
        f"Roofline, {'training step' if mode == 'train' else 'inference'}: batch {batch_size}, {img_size} x {img_size}"
    )
    return Table("bench", title, list(COLUMNS), rows, notes, whole="--output FILE.md")


def page(made: list[Table]) -> str:
    return render(made, "markdown")


def json_text(made: list[Table]) -> str:
    """The figures of all rows."""
    return to_json([{"title": one.title, "rows": [dict(row.values) for row in one.rows]} for one in made]) + "\n"
