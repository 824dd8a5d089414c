"""Batches: which samples, in which order, for which process, and the workers that fetch them.

Training is one stream of optimizer steps, a pure function of (seed, step): the number of workers, processes and
micro-batches and the step at which a run goes on cannot change it. Evaluation shows each sample once.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, default_collate

from hcnet_cli import rng
from hcnet_cli.console import UserError, warn

Request = tuple[int, int, int]  # dataset index, the sample's key, the step's key
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


class RequestDataset(Protocol):
    """What the loaders ask of a data set. An item is a dict with at least `sample` and `key`."""

    def __len__(self) -> int: ...

    def __getitem__(self, request: Request, /) -> dict[str, Any]: ...


class TrainDataset(RequestDataset, Protocol):
    """A data set to train on: it knows the files behind its samples."""

    def describe(self, index: int) -> str: ...


def collate_items(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tensors are stacked, integers become an int64 tensor [B], everything else stays a list of length B."""
    batch: dict[str, Any] = {}
    for name, first in items[0].items():
        values = [item[name] for item in items]
        if isinstance(first, torch.Tensor):
            batch[name] = default_collate(values)  # stacked; in a worker straight into shared memory
        elif isinstance(first, (int, np.integer)):
            batch[name] = torch.tensor(values, dtype=torch.int64)
        else:
            batch[name] = values
    return batch


def steps_per_epoch(count: int, batch_size: int, groups: NDArray[np.integer] | None = None) -> int:
    """How many full batches an epoch has; UserError if there is none."""
    sizes = [count] if groups is None else np.unique(groups, return_counts=True)[1].tolist()
    steps = sum(size // batch_size for size in sizes)
    if not steps:
        whole = "The largest aspect-ratio group of the training set" if len(sizes) > 1 else "The training set"
        raise UserError(
            f"{whole} has {max(sizes)} image{'s' if max(sizes) != 1 else ''}, fewer than one batch of {batch_size}.",
            hint=f"Choose --batch-size {max(sizes)} or smaller.",
        )
    return steps


def epoch_batches(
    count: int, batch_size: int, seed: int, epoch: int, groups: NDArray[np.integer] | None = None
) -> NDArray[np.int64]:
    """The global batches of an epoch, [steps, batch_size] dataset indices, each at most once.

    With `groups` a whole global batch comes from one group, rather than each micro-batch separately: so the
    batches, and the number of steps of an epoch, do not depend on the split over processes and micro-batches.
    What fills no batch sits this epoch out, other samples in each (at most batch_size - 1 of every group).
    """
    # numpy promises never to change the stream of RandomState; that of its newer generators may change
    key = rng.derive(seed, "epoch", epoch)
    random = np.random.RandomState([key & 0xFFFFFFFF, key >> 32])
    order = random.permutation(count)
    if groups is None:
        return order[: count // batch_size * batch_size].reshape(-1, batch_size)
    full = []
    for group in np.unique(groups):
        members = order[groups[order] == group]
        full.append(members[: len(members) // batch_size * batch_size].reshape(-1, batch_size))
    return random.permutation(np.concatenate(full))  # shuffles rows: groups take turns at random


def micro_batch(batch: NDArray[np.int64], micro: int, rank: int, accumulate: int, world_size: int) -> NDArray[np.int64]:
    """The `micro`-th share of process `rank` in a global batch, [B] -> [B / (accumulate * world_size)].

    A batch is a list of pairs (2j, 2j + 1) and a share takes whole pairs (if its size is even), laid out as
    a0 a1 .. b1 b0 for timm's mixup, whose partner is `flip(0)`: who mixes with whom is the same for any split.
    """
    size = len(batch) // (accumulate * world_size)
    number = micro * world_size + rank
    share = batch[number * size : (number + 1) * size]
    return np.concatenate([share[0::2], share[1::2][::-1]])


class _Fetch(Dataset[Any]):
    """Runs in the worker: a list of requests -> (batch, unreadable files), or the UserError met on the way.

    An exception raised in a worker would reach the main process wrapped in the worker's traceback.
    """

    def __init__(self, dataset: RequestDataset, collate: Collate) -> None:
        self.dataset = dataset
        self.collate = collate

    def __getitem__(self, requests: list[Request]) -> tuple[dict[str, Any], list[str]] | UserError:
        rng.prepare(key for _, key, _ in requests)
        try:
            items = [self.dataset[request] for request in requests]
            unreadable = [item.pop("unreadable") for item in items if "unreadable" in item]
            batch = self.collate(items)
        except UserError as error:
            return error
        batch["step_key"] = requests[0][2]
        return batch, unreadable


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    """Ctrl-C and a scheduler's signals reach workers too; the main process needs them to finish its step."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where SIGTERM ends a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()
    torch.set_num_threads(1)


def _obey_parent() -> None:
    """Ends this worker on a SIGTERM of its parent, which sends it on its own exit and then waits; no one else's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


warnings.filterwarnings("ignore", message="This DataLoader will create")  # the recipe's number is the user's choice


def _data_loader(fetch: _Fetch, requests: Iterable[list[Request]], workers: int, persistent: bool) -> DataLoader[Any]:
    return DataLoader(
        fetch,
        batch_size=None,  # an "index" is a whole list of requests
        sampler=requests,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        persistent_workers=persistent and workers > 0,
        generator=torch.Generator(),  # its seeds are not used; without it the global generator would move
    )


def _batches(loader: DataLoader[Any]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    try:
        for result in loader:
            if isinstance(result, UserError):
                raise result
            yield result
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"A data worker process died ({str(error).rstrip('. ')}).",
            hint="Mostly this is a lack of memory or of shared memory (/dev/shm): try fewer --workers.",
        ) from None


class TrainLoader:
    """Micro-batches for steps 0 .. total_steps, epoch after epoch without a pause.

    `batch_size` counts the samples of one optimizer step over all processes and micro-batches. `groups`
    [len(dataset)] (by aspect ratio) are never mixed within a batch, see `epoch_batches`. A file that cannot be
    read is warned of once and listed in `unreadable`; more than `max_unreadable` of them stop the run.
    """

    def __init__(
        self,
        dataset: RequestDataset,
        *,
        batch_size: int,
        accumulate: int,
        total_steps: int,
        seed: int,
        workers: int,
        rank: int = 0,
        world_size: int = 1,
        collate: Collate | None = None,
        groups: NDArray[np.integer] | None = None,
        max_unreadable: int = 100,
    ) -> None:
        assert 0 <= rank < world_size
        assert len(dataset) > 0
        assert groups is None or len(groups) == len(dataset)
        check_divides(batch_size, accumulate, world_size)
        self.steps_per_epoch = steps_per_epoch(len(dataset), batch_size, groups)
        if groups is not None:
            sizes = np.unique(groups, return_counts=True)[1]
            if never := int(sizes[sizes < batch_size].sum()):
                warn(f"{never} training images are never used: too few of their shape for a batch of {batch_size}.")
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.total_steps = total_steps
        self.seed = seed
        self.workers = workers
        self.rank = rank
        self.world_size = world_size
        self.groups = groups
        self.max_unreadable = max_unreadable
        self.unreadable: list[str] = []
        self._size = len(dataset)
        self._fetch = _Fetch(dataset, collate or collate_items)

    def requests(self, start_step: int) -> Iterator[list[Request]]:
        """Lists of requests, one for each micro-batch of this process, `accumulate` for each step."""
        epoch = -1
        batches = np.empty((0, 0), dtype=np.int64)
        for step in range(start_step, self.total_steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                batches = epoch_batches(self._size, self.batch_size, self.seed, epoch, self.groups)
            step_key = rng.derive(self.seed, "step", step)
            for micro in range(self.accumulate):
                share = micro_batch(
                    batches[step % self.steps_per_epoch], micro, self.rank, self.accumulate, self.world_size
                )
                yield [(index, rng.derive(self.seed, "sample", epoch, index), step_key) for index in share.tolist()]

    def iterate(self, start_step: int) -> Iterator[dict[str, Any]]:
        """Micro-batches from `start_step` to `total_steps`; what lies before is skipped, no file of it read.

        Raises UserError for what a data set refuses, and when too many files cannot be read.
        """
        loader = _data_loader(self._fetch, self.requests(start_step), self.workers, persistent=False)
        for batch, unreadable in _batches(loader):
            for path in unreadable:
                self._count_unreadable(path)
            yield batch

    def _count_unreadable(self, path: str) -> None:
        if path in self.unreadable:
            return
        self.unreadable.append(path)
        if len(self.unreadable) > self.max_unreadable:
            some = ", ".join(self.unreadable[:5])
            raise UserError(
                f"{len(self.unreadable)} training images cannot be read (limit {self.max_unreadable}): "
                f"{some}{', ...' if len(self.unreadable) > 5 else ''}.",
                hint="Is the disk mounted, the data set unpacked completely? `hcnet check` names all such files.",
            )
        warn(f"cannot read {path}; another image takes its place.")


class EvalLoader:
    """Every sample once: process `rank` takes rank, rank + world_size, ... in batches of `batch_size`.

    The last batch may be smaller, and a process may have one batch fewer than another. Workers live from one
    evaluation to the next.
    """

    def __init__(
        self,
        dataset: RequestDataset,
        *,
        batch_size: int,
        workers: int,
        rank: int = 0,
        world_size: int = 1,
        collate: Collate | None = None,
    ) -> None:
        assert 0 <= rank < world_size
        if batch_size < 1:
            raise UserError(f"The evaluation batch size must be at least 1, not {batch_size}.")
        mine: list[Request] = [(index, 0, 0) for index in range(rank, len(dataset), world_size)]
        chunks = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
        self._chunks: Sized = chunks
        self._loader = _data_loader(_Fetch(dataset, collate or collate_items), chunks, workers, persistent=True)

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch, _ in _batches(self._loader):
            yield batch


def check_divides(batch_size: int, accumulate: int, world_size: int) -> None:
    """Raises UserError unless `batch_size` splits evenly over micro-batches and processes."""
    for name, value in (("batch size", batch_size), ("number of micro-batches", accumulate)):
        if value < 1:
            raise UserError(f"The {name} must be at least 1, not {value}.")
    parts = accumulate * world_size
    if batch_size % parts:
        below, above = batch_size // parts * parts, math.ceil(batch_size / parts) * parts
        nearest = f"the nearest that do are {below} and {above}" if below else f"the smallest is {above}"
        processes = f"{world_size} process{'es' if world_size > 1 else ''}"
        micro_batches = f"{accumulate} micro-batch{'es' if accumulate > 1 else ''}"
        raise UserError(
            f"A batch of {batch_size} does not divide evenly by {processes} x {micro_batches}.",
            hint=f"Choose another --batch-size: {nearest}.",
        )
