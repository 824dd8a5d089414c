"""Processes: the same calls on one process and under torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as td
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    return rank() == 0


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins torchrun's group for the duration (nccl for tensors on GPUs, gloo beside it); nothing on one process."""
    if world_size() == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    td.init_process_group(backend, timeout=timedelta(hours=2))  # others wait while the main process scores
    try:
        yield
    finally:
        td.destroy_process_group()


def is_distributed() -> bool:
    return td.is_available() and td.is_initialized()


def processes() -> int:
    """Processes that work together right now."""
    return td.get_world_size() if is_distributed() else 1


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over processes (x itself on one process)."""
    if is_distributed():
        x = x.clone()
        td.all_reduce(x)
    return x


def gather(item: Any) -> list[Any]:
    """Every process's picklable item, in rank order, on all processes."""
    if not is_distributed():
        return [item]
    items: list[Any] = [None] * processes()
    td.all_gather_object(items, item)
    return items


def any_process(flag: bool) -> bool:
    """True everywhere when it is true anywhere."""
    return bool(all_reduce_sum(torch.tensor(int(flag))).item()) if is_distributed() else flag


def broadcast(item: Any) -> Any:
    """The main process's picklable item, on all processes."""
    if not is_distributed():
        return item
    box = [item]
    td.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    if is_distributed():
        all_reduce_sum(torch.zeros(1))  # on the CPU, hence gloo: no GPU is named, no device is blocked


def from_main(compute: Callable[[], T]) -> T:
    """The main process's result on all processes; what it raises, all raise."""
    value, raised = None, None
    if is_main() or not is_distributed():
        try:
            value = compute()
        except Exception as error:
            raised = error
    value, raised = broadcast((value, raised))
    if raised is not None:
        raise raised
    return value


@contextlib.contextmanager
def on_main(manager: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Enters a context on the main process only; what entering raises, all processes raise."""
    with contextlib.ExitStack() as stack:
        from_main(lambda: stack.enter_context(manager()) and None)
        yield
