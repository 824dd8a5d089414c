"""Communication between processes. Every call also works on one process, without torchrun."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as td
from torch import Tensor

from hcnet_cli.console import LAUNCH_HINT, UserError, launch

T = TypeVar("T")
# A gloo process notices at once that another one has ended: its connection closes. A limit is for processes that hang.
EXCHANGE = timedelta(hours=2)  # of tensors, by nccl too, which notices nothing
MAIN_WORK = timedelta(days=7)  # of what the others wait for: a run of another study, a large data set to read, scoring
_waits = True  # False inside `without_waiting`
_main_work: td.ProcessGroup | None = None  # all processes, with the limit MAIN_WORK; None: the group of `EXCHANGE`


def rank() -> int:
    return launch().rank


def world_size() -> int:
    return launch().world_size


def local_rank() -> int:
    """The number of this process on its machine: that of its GPU. UserError where several processes have none."""
    found = launch()
    if found.local_rank is None and found.world_size > 1:
        raise UserError(
            f"WORLD_SIZE is {found.world_size}, but LOCAL_RANK is not set: every process would take the same GPU.",
            hint=LAUNCH_HINT,
        )
    return found.local_rank or 0


def is_main() -> bool:
    return rank() == 0


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins torchrun's process group inside: nccl for GPU tensors, gloo for CPU tensors. No-op on one process."""
    if world_size() == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        td.init_process_group(backend, timeout=EXCHANGE)
    except (ValueError, RuntimeError) as error:  # no MASTER_ADDR, no such host, a port that is taken
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"The {world_size()} processes cannot be joined: {reason}.", hint=LAUNCH_HINT) from None
    global _main_work
    _main_work = cast(td.ProcessGroup, td.new_group(backend="gloo", timeout=MAIN_WORK))
    try:
        yield
    finally:
        _main_work = None
        td.destroy_process_group()


def is_distributed() -> bool:
    return td.is_available() and td.is_initialized()


def processes() -> int:
    """The number of processes in the group; 1 without a group."""
    return td.get_world_size() if is_distributed() else 1


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """Inside, `all_reduce_sum` takes this process's values for those of every process and waits for none.

    For forward and backward passes that other processes do not make, or not as often.
    """
    global _waits
    _waits = False
    try:
        yield
    finally:
        _waits = True


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over processes (x itself on one process)."""
    if not _waits:
        return x * processes()
    if is_distributed():
        x = x.clone()
        td.all_reduce(x)
    return x


def all_reduce_max(*values: float) -> tuple[float, ...]:
    """The largest of each number over processes."""
    if is_distributed():
        x = torch.tensor(values, dtype=torch.float64)
        td.all_reduce(x, td.ReduceOp.MAX)
        return tuple(x.tolist())
    return values


def gather(item: Any) -> list[Any]:
    """The picklable items of all processes, in rank order, on every process."""
    if not is_distributed():
        return [item]
    items: list[Any] = [None] * processes()
    td.all_gather_object(items, item)
    return items


def any_process(flag: bool) -> bool:
    """True on every process if `flag` is true on at least one."""
    return bool(all_reduce_sum(torch.tensor(int(flag))).item()) if is_distributed() else flag


def broadcast(item: Any) -> Any:
    """The picklable item of the main process, on every process."""
    if not is_distributed():
        return item
    box = [item]
    td.broadcast_object_list(box, src=0, group=_main_work)
    return box[0]


def barrier() -> None:
    if is_distributed():
        all_reduce_sum(torch.zeros(1))  # a CPU tensor, so gloo: names no GPU and blocks no device


def from_main(compute: Callable[[], T]) -> T:
    """Computes on the main process; every process returns its result or raises its exception."""
    value, raised = None, None
    if is_main() or not is_distributed():
        try:
            value = compute()
        except Exception as error:
            raised = error
    value, raised = broadcast((value, raised))
    if raised is not None:
        raise raised
    return cast(T, value)


@contextlib.contextmanager
def on_main(manager: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Enters a context on the main process only; if entering it raises, every process raises."""
    with contextlib.ExitStack() as stack:
        from_main(lambda: stack.enter_context(manager()) and None)
        yield
