"""Batches: which samples, in which order, for which process, and the workers that fetch them.

Training is one stream of optimizer steps, a pure function of (seed, step). It does not depend on the number of
workers, processes and micro-batches or on the step at which a run resumes. Evaluation yields each sample once.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, default_collate

from hcnet_cli import rng
from hcnet_cli.console import RunFailed, UserError, warn
from hcnet_cli.data import decoding
from hcnet_cli.data.member import Source


class SampleRequest(NamedTuple):
    """One sample to load. All randomness in loading it comes from `key`, or from `step_key` if the batch shares it."""

    index: int  # type: ignore[assignment]  # of the sample in the data set; hides tuple.index, which nothing calls
    key: int
    step_key: int


Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


class RequestDataset(Protocol):
    """A data set the loaders can read. An item is a dict with at least `sample` (the index) and `key`.

    An item may have `unreadable`: the path of a file that could not be read and was replaced by another sample.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, request: SampleRequest, /) -> dict[str, Any]: ...


class TrainDataset(RequestDataset, Protocol):
    """A training set; it can also name the file of a sample, for the report of a non-finite loss."""

    def sample_path(self, index: int) -> Source: ...


def collate_items(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stacks tensors, turns integers into an int64 tensor [B] and leaves everything else a list of length B."""
    batch: dict[str, Any] = {}
    for name, first in items[0].items():
        values = [item[name] for item in items]
        if isinstance(first, torch.Tensor):
            batch[name] = default_collate(values)  # in a worker it stacks directly into shared memory
        elif isinstance(first, (int, np.integer)):
            batch[name] = torch.tensor(values, dtype=torch.int64)
        else:
            batch[name] = values
    return batch


class Shards(NamedTuple):
    """Files that hold many samples each, for storage that reads whole files faster than single samples.

    `samples`: of each shard, the data set indices in the order in which they lie; together each index once.
    `window`: samples that are shuffled among each other.
    """

    samples: Sequence[NDArray[np.int64]]
    window: int

    @property
    def digest(self) -> str:
        """8 hex digits over which samples lie together, and in which order: what `order` depends on but `window`."""
        made = hashlib.blake2b(digest_size=4)
        for one in self.samples:
            made.update(np.array([len(one), *one], dtype="<i8").tobytes())
        return made.hexdigest()

    def order(self, random: np.random.RandomState) -> NDArray[np.int64]:
        """A permutation of all indices: the shards in random order, then each window of it shuffled."""
        order = np.concatenate([self.samples[i] for i in random.permutation(len(self.samples))])
        for start in range(0, len(order), self.window):
            random.shuffle(order[start : start + self.window])
        return order


def steps_per_epoch(count: int, batch_size: int, groups: NDArray[np.integer] | None = None) -> int:
    """The number of full batches in an epoch; UserError if there is none."""
    if not count:  # validation images alone: nothing is trained
        return 0
    sizes = [count] if groups is None else np.unique(groups, return_counts=True)[1].tolist()
    steps = sum(size // batch_size for size in sizes)
    if not steps:
        whole = "The largest aspect-ratio group of the training set" if len(sizes) > 1 else "The training set"
        raise UserError(
            f"{whole} has {max(sizes)} image{'s' if max(sizes) != 1 else ''}, fewer than one batch of {batch_size}.",
            hint=f"Choose --batch-size {max(1, max(sizes) // 2 * 2)} or smaller.",  # even: for mixing images in pairs
        )
    return steps


def epoch_batches(
    count: int,
    batch_size: int,
    seed: int,
    epoch: int,
    groups: NDArray[np.integer] | None = None,
    shards: Shards | None = None,
) -> NDArray[np.int64]:
    """The global batches of an epoch, [steps, batch_size] dataset indices, each at most once. With `shards` in their
    order, else shuffled.

    With `groups`, all samples of a global batch come from one group. The batches and the number of steps of an epoch
    therefore do not depend on the split over processes and micro-batches. Samples that do not fill a batch (at most
    batch_size - 1 of each group) are left out of this epoch; the shuffle chooses different ones in each epoch.
    """
    # numpy guarantees that the stream of RandomState never changes; it gives no such guarantee for newer generators
    key = rng.derive(seed, "epoch", epoch)
    random = np.random.RandomState([key & 0xFFFFFFFF, key >> 32])
    order = random.permutation(count) if shards is None else shards.order(random)
    if groups is None:
        return order[: count // batch_size * batch_size].reshape(-1, batch_size)
    full = []
    for group in np.unique(groups):
        members = order[groups[order] == group]
        full.append(members[: len(members) // batch_size * batch_size].reshape(-1, batch_size))
    return random.permutation(np.concatenate(full))  # shuffles the rows, so that groups alternate at random


def micro_batch(batch: NDArray[np.int64], micro: int, rank: int, accumulate: int, world_size: int) -> NDArray[np.int64]:
    """The `micro`-th share of process `rank` in a global batch, [B] -> [B / (accumulate * world_size)].

    timm's mixup mixes a batch with its own `flip(0)`. For the mixing partners to be the same for any split, a global
    batch is a list of pairs (2j, 2j + 1); a share of even size holds whole pairs, ordered as a0 a1 .. b1 b0.
    """
    size = len(batch) // (accumulate * world_size)
    number = micro * world_size + rank
    share = batch[number * size : (number + 1) * size]
    return np.concatenate([share[0::2], share[1::2][::-1]])


Loaded = tuple[dict[str, Any], list[str], dict[str, float]]  # batch, unreadable files, seconds


class BatchDataset(Dataset[Any]):
    """A data set of batches: a list of requests -> (batch, unreadable files, seconds). Runs in a worker process.

    The seconds are those of "decode" and "augment".

    A UserError is returned, not raised: a raised one would reach the main process wrapped in the worker's traceback.
    """

    def __init__(self, dataset: RequestDataset, collate: Collate) -> None:
        self.dataset = dataset
        self.collate = collate

    def __getitem__(self, requests: list[SampleRequest]) -> Loaded | UserError:
        rng.prebuild(request.key for request in requests)
        begun, decoded = time.perf_counter(), decoding.seconds()
        try:
            items = [self.dataset[request] for request in requests]
            unreadable = [item.pop("unreadable") for item in items if "unreadable" in item]
            decode = decoding.seconds() - decoded
            seconds = {"decode": decode, "augment": time.perf_counter() - begun - decode}
            batch = self.collate(items)
        except UserError as error:
            return error
        batch["step_key"] = requests[0].step_key
        return batch, unreadable, seconds


def _unchanged(item: Any) -> Any:
    return item


def start_worker(_: int) -> None:
    """Ctrl-C and a scheduler's signals reach workers too. Workers ignore them: the main process finishes its step."""
    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # missing on macOS; SIGTERM ends a worker there
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _exit_with_parent() -> None:
    """Ends this worker on a SIGTERM sent by its parent process, which does so when it exits; ignores other senders."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


warnings.filterwarnings("ignore", message="This DataLoader will create")  # the user chose the number of workers


def _data_loader(
    batches: BatchDataset, requests: Iterable[list[SampleRequest]], workers: int, persistent: bool
) -> DataLoader[Any]:
    return DataLoader(
        batches,
        batch_size=None,  # an "index" is a whole list of requests
        sampler=requests,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker,
        persistent_workers=persistent and workers > 0,
        generator=torch.Generator(),  # its seeds are unused; without it the loader draws from the global generator
    )


@contextlib.contextmanager
def watching_workers() -> Iterator[None]:
    """Turns the death of a worker process, which a signal handler of PyTorch raises anywhere, into one sentence."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise _worker_died(" ".join(str(error).split()).rstrip(".")) from None


def _worker_died(reason: str) -> RunFailed:
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise again, wherever the program is
    return RunFailed(
        f"A data worker process died ({reason}).",
        hint="The usual cause is too little memory or shared memory (/dev/shm): try fewer --workers. A run goes on "
        "from the last checkpoint.",
    )


def _batches(loader: DataLoader[Any]) -> Iterator[Loaded]:
    try:
        with watching_workers():
            for result in loader:
                if isinstance(result, UserError):
                    raise result
                yield result
    except (ConnectionError, EOFError, FileNotFoundError) as error:  # a batch of a worker that is gone
        if not loader.num_workers:
            raise
        raise _worker_died(f"its last batch is lost: {type(error).__name__}") from None


class TrainLoader:
    """Micro-batches for steps 0 .. total_steps; workers keep running from one epoch to the next.

    `batch_size` counts the samples of one optimizer step over all processes and micro-batches. `groups`
    [len(dataset)] (by aspect ratio) are never mixed within a batch, see `epoch_batches`, also for `shards`. Each file
    that cannot be read gives one warning and is listed in `unreadable`; more than `max_unreadable` of them stop the
    run.
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
        shards: Shards | None = None,
        max_unreadable: int = 100,
    ) -> None:
        assert 0 <= rank < world_size
        assert groups is None or len(groups) == len(dataset)
        check_divides(batch_size, accumulate, world_size)
        self.steps_per_epoch = steps_per_epoch(len(dataset), batch_size, groups)
        if groups is not None:
            sizes = np.unique(groups, return_counts=True)[1]
            if never := int(sizes[sizes < batch_size].sum()):
                warn(
                    f"{never} training images are never used: too few have their shape to fill a batch of {batch_size}."
                )
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.total_steps = total_steps
        self.seed = seed
        self.workers = workers
        self.rank = rank
        self.world_size = world_size
        self.groups = groups
        self.shards = shards
        self.max_unreadable = max_unreadable
        self.unreadable: list[str] = []
        self.loading = {"decode": 0.0, "augment": 0.0}
        self._size = len(dataset)
        self._dataset = BatchDataset(dataset, collate or collate_items)

    def requests(self, start_step: int) -> Iterator[list[SampleRequest]]:
        """Lists of requests: one list for each micro-batch of this process, `accumulate` lists for each step."""
        epoch = -1
        batches = np.empty((0, 0), dtype=np.int64)
        for step in range(start_step, self.total_steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                batches = epoch_batches(self._size, self.batch_size, self.seed, epoch, self.groups, self.shards)
            step_key = rng.derive(self.seed, "step", step)
            for micro in range(self.accumulate):
                share = micro_batch(
                    batches[step % self.steps_per_epoch], micro, self.rank, self.accumulate, self.world_size
                )
                yield [
                    SampleRequest(index, rng.derive(self.seed, "sample", epoch, index), step_key)
                    for index in share.tolist()
                ]

    def first(self, count: int, most: int) -> Iterator[tuple[dict[str, Any], int]]:
        """A part of the first micro-batch of each of the first `count` steps, read in this process; and its whole size.

        Of at most `most` samples: those at the ends, which are mixed with each other (see `micro_batch`).
        """
        for requests in itertools.islice(self.requests(0), 0, count * self.accumulate, self.accumulate):
            half = most // 2
            result = self._dataset[requests if len(requests) <= most else [*requests[:half], *requests[-half:]]]
            if isinstance(result, UserError):
                raise result
            yield result[0], len(requests)

    def iterate(self, start_step: int) -> Iterator[dict[str, Any]]:
        """Micro-batches from `start_step` to `total_steps`; no file of an earlier step is read.

        Raises the UserError of a data set, and one of its own if too many files cannot be read.
        """
        loader = _data_loader(self._dataset, self.requests(start_step), self.workers, persistent=False)
        for batch, unreadable, seconds in _batches(loader):
            self.loading = {name: self.loading[name] + value for name, value in seconds.items()}
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
                hint="Is the disk mounted, and the data set unpacked completely? `hcnet check` names all such files.",
            )
        warn(f"{path} cannot be read; another image takes its place.")


def sample_batch(dataset: RequestDataset, indices: Sequence[int], seed: int, collate: Collate | None) -> dict[str, Any]:
    """One training batch of the samples `indices`, read in this process, for a trial before training."""
    step_key = rng.derive(seed, "step", 0)
    requests = [SampleRequest(index, rng.derive(seed, "sample", 0, index), step_key) for index in indices]
    return load_batch(dataset, requests, collate)


def load_batch(dataset: RequestDataset, requests: list[SampleRequest], collate: Collate | None) -> dict[str, Any]:
    """One training batch, read in this process."""
    result = BatchDataset(dataset, collate or collate_items)[requests]
    if isinstance(result, UserError):
        raise result
    return result[0]


class EvalLoader:
    """Every sample once: process `rank` takes rank, rank + world_size, ... in batches of `batch_size`.

    The last batch may be smaller, and a process may have one batch fewer than another. Workers are kept for the next
    evaluation.
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
        self._batches = BatchDataset(dataset, collate or collate_items)
        mine: list[SampleRequest] = [SampleRequest(index, 0, 0) for index in range(rank, len(dataset), world_size)]
        self._chunks = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
        self._loader = _data_loader(self._batches, self._chunks, workers, persistent=True)

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch, _, _ in _batches(self._loader):
            yield batch

    def head(self, count: int) -> EvalLoader:
        """The first `count` samples of the share, one by one and without workers."""
        made = copy.copy(self)
        made._chunks = [[request] for request in list(itertools.chain.from_iterable(self._chunks))[:count]]
        made._loader = _data_loader(self._batches, made._chunks, workers=0, persistent=False)
        return made


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
