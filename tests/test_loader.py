"""The stream of batches: exact for any number of workers, processes and micro-batches, and any point of resuming."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hcnet_cli import rng
from hcnet_cli.console import RunFailed, UserError
from hcnet_cli.data.loader import EvalLoader, Shards, TrainLoader, collate_items, epoch_batches, micro_batch

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Numbers:
    """A data set whose items tell who was asked for, with augmentation noise drawn as real data sets draw it."""

    def __init__(self, size: int, unreadable: tuple[int, ...] = (), broken: int = -1) -> None:
        self.size = size
        self.unreadable = unreadable
        self.broken = broken
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, request: tuple[int, int, int]) -> dict[str, Any]:
        index, key, _ = request
        self.asked.append(index)
        if index == self.broken:
            raise UserError(f"cannot read image {index}", hint="buy a new disk")
        with rng.seeded(key):
            noise = torch.rand(3) + np.random.rand()
        item: dict[str, Any] = {"sample": index, "key": key, "image": noise, "name": f"image {index}"}
        if index in self.unreadable:
            item["unreadable"] = f"image {index}"
        return item


class WorkerFacts(Numbers):
    def __getitem__(self, request: tuple[int, int, int]) -> dict[str, Any]:
        ignored = [signal.getsignal(s) is signal.SIG_IGN for s in (signal.SIGINT, signal.SIGUSR1)]
        return {"sample": request[0], "facts": (os.getpid(), torch.get_num_threads(), ignored)}


def loader(dataset: Any = None, **changes: Any) -> TrainLoader:
    arguments: dict[str, Any] = {"batch_size": 8, "accumulate": 1, "total_steps": 7, "seed": 3, "workers": 0}
    return TrainLoader(dataset or Numbers(21), **(arguments | changes))


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


# the order of an epoch


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 200), batch_size=st.integers(1, 40), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_an_epoch_shows_each_sample_at_most_once_and_drops_less_than_a_batch(
    count: int, batch_size: int, seed: int, epoch: int
) -> None:
    batches = epoch_batches(count, batch_size, seed, epoch)
    assert batches.shape == (count // batch_size, batch_size)
    assert len(np.unique(batches)) == batches.size
    assert not batches.size or (batches.min() >= 0 and batches.max() < count)


@settings(deadline=None, max_examples=60)
@given(groups=st.lists(st.integers(0, 3), min_size=1, max_size=120), batch_size=st.integers(1, 12))
def test_groups_never_share_a_batch_and_each_loses_less_than_a_batch(groups: list[int], batch_size: int) -> None:
    group = np.array(groups)
    batches = epoch_batches(len(group), batch_size, 0, 1, group)
    assert all(len(set(group[batch])) == 1 for batch in batches)
    assert len(np.unique(batches)) == batches.size
    for g in np.unique(group):
        assert (group[batches] == g).all(axis=1).sum() == (group == g).sum() // batch_size


def test_epochs_and_seeds_have_orders_of_their_own_and_the_order_is_pinned() -> None:
    orders = [epoch_batches(40, 40, seed, epoch)[0].tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(map(tuple, orders))) == 4
    # a resumed run must meet the same order on another machine and in a later release
    assert epoch_batches(10, 10, 0, 0)[0].tolist() == PINNED_ORDER


PINNED_ORDER = [1, 4, 0, 9, 3, 8, 5, 2, 6, 7]


def test_over_epochs_the_samples_left_out_change() -> None:
    seen = set().union(*(epoch_batches(10, 4, 0, epoch).ravel().tolist() for epoch in range(8)))
    assert seen == set(range(10))


def shards_of(owner: list[int], window: int) -> Shards:
    """Sample i lies in the shard owner[i]."""
    numbers = np.array(owner)
    return Shards([np.flatnonzero(numbers == one) for one in np.unique(numbers)], window)


@settings(deadline=None, max_examples=60)
@given(
    owner=st.lists(st.integers(0, 5), min_size=1, max_size=120),
    window=st.integers(2, 50),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
def test_the_order_of_shards_is_a_permutation_that_needs_the_shards_of_a_window_at_a_time(
    owner: list[int], window: int, seed: int, epoch: int
) -> None:
    """The windows of a shard follow each other, and those between its first and its last hold nothing else."""
    order = epoch_batches(len(owner), len(owner), seed, epoch, shards=shards_of(owner, window))[0]
    assert sorted(order.tolist()) == list(range(len(owner)))
    for one in set(owner):
        places = [i // window for i, n in enumerate(order) if owner[n] == one]
        assert set(places) == set(range(min(places), max(places) + 1))  # contiguous windows
        between = [n for i, n in enumerate(order) if min(places) < i // window < max(places)]
        assert all(owner[n] == one for n in between)  # a shard that fills whole windows has them alone


def test_orders_of_shards_differ_by_epoch_and_seed_and_the_order_is_pinned() -> None:
    shards = shards_of([0, 0, 0, 1, 1, 1, 2, 2, 2, 2], 5)
    orders = [epoch_batches(10, 10, seed, epoch, shards=shards)[0].tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(map(tuple, orders))) == 4
    assert orders[0] == PINNED_SHARDS
    assert shards.digest != shards_of([0, 0, 1, 1, 1, 1, 2, 2, 2, 2], 5).digest


PINNED_SHARDS = [4, 1, 3, 5, 0, 8, 7, 6, 2, 9]


@pytest.mark.parametrize(("accumulate", "world_size", "workers"), [(1, 1, 0), (2, 1, 0), (1, 2, 0), (2, 2, 2)])
@pytest.mark.parametrize("start", [0, 3])
def test_shards_give_the_same_steps_divided_and_resumed(
    accumulate: int, world_size: int, workers: int, start: int
) -> None:
    """21 samples in 4 shards, 2 steps an epoch: the samples of each step, from any start, on several processes."""
    shards = shards_of([i % 4 for i in range(21)], 6)
    expected = [sorted(batch["sample"].tolist()) for batch in loader(shards=shards).iterate(0)][start:]
    steps: list[list[int]] = [[] for _ in expected]
    for rank in range(world_size):
        made = loader(shards=shards, accumulate=accumulate, rank=rank, world_size=world_size, workers=workers)
        for number, batch in enumerate(made.iterate(start)):
            steps[number // accumulate] += batch["sample"].tolist()
    assert [sorted(step) for step in steps] == expected


# the split of a batch


@settings(deadline=None, max_examples=60)
@given(half=st.integers(1, 6), parts=st.sampled_from([1, 2, 3, 4, 6, 8]))
def test_any_split_of_a_batch_gives_the_same_micro_batches_and_the_same_mixup_partners(half: int, parts: int) -> None:
    batch = np.random.RandomState(0).permutation(2 * half * parts)
    partner = {int(a): int(b) for j in range(0, len(batch), 2) for a, b in [batch[j : j + 2], batch[j : j + 2][::-1]]}
    splits = []
    for world_size in (n for n in range(1, parts + 1) if parts % n == 0):
        accumulate = parts // world_size
        shares = [
            micro_batch(batch, micro, rank, accumulate, world_size)
            for micro, rank in itertools.product(range(accumulate), range(world_size))
        ]
        for share in shares:
            # timm's mixup mixes x with x.flip(0)
            assert [partner[int(i)] for i in share] == share[::-1].tolist()
        assert sorted(np.concatenate(shares).tolist()) == sorted(batch.tolist())
        splits.append(sorted(share.tolist() for share in shares))
    assert all(split == splits[0] for split in splits)


def test_odd_micro_batches_hold_every_sample_once() -> None:
    shares = [micro_batch(np.arange(9), micro, 0, 3, 1) for micro in range(3)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(9))


# the stream


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_do_not_change_the_stream_even_across_epochs(workers: int) -> None:
    expected = list(loader().iterate(0))
    assert len(expected) == 7
    assert same(expected, list(loader(workers=workers).iterate(0)))


@pytest.mark.parametrize(("workers", "start"), [(0, 1), (0, 4), (0, 7), (2, 5)])
def test_resuming_at_any_step_continues_the_stream_bit_for_bit(workers: int, start: int) -> None:
    expected = list(loader(accumulate=2).iterate(0))
    assert same(expected[2 * start :], list(loader(accumulate=2, workers=workers).iterate(start)))


def test_resuming_reads_nothing_of_what_it_skips() -> None:
    dataset = Numbers(21)
    list(loader(dataset).iterate(6))
    assert len(dataset.asked) == 8


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 4), (2, 2), (4, 1)])
def test_processes_and_accumulation_do_not_change_samples_keys_or_partners(world_size: int, accumulate: int) -> None:
    whole = list(loader().iterate(0))
    split = [
        list(loader(accumulate=accumulate, rank=rank, world_size=world_size).iterate(0)) for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        image_of = dict(zip(batch["sample"].tolist(), batch["image"], strict=True))
        partner_of = dict(zip(batch["sample"].tolist(), batch["sample"].flip(0).tolist(), strict=True))
        parts = [share for shares in split for share in shares[step * accumulate : (step + 1) * accumulate]]
        assert sorted(torch.cat([part["sample"] for part in parts]).tolist()) == sorted(image_of)
        for part in parts:
            assert part["step_key"] == batch["step_key"] == rng.derive(3, "step", step)
            assert [partner_of[i] for i in part["sample"].tolist()] == part["sample"].flip(0).tolist()
            assert all(torch.equal(image_of[i], x) for i, x in zip(part["sample"].tolist(), part["image"], strict=True))


def test_a_sample_has_one_key_per_epoch_and_a_new_one_in_the_next() -> None:
    keys: dict[int, set[int]] = {}
    for batch in loader(Numbers(8)).iterate(0):
        for sample, key in zip(batch["sample"].tolist(), batch["key"].tolist(), strict=True):
            keys.setdefault(sample, set()).add(key)
    assert all(len(values) == 7 for values in keys.values())
    assert keys[5] == {rng.derive(3, "sample", epoch, 5) for epoch in range(7)}


def test_the_global_generators_do_not_move() -> None:
    before = torch.get_rng_state()
    list(loader(workers=2).iterate(0))
    list(EvalLoader(Numbers(5), batch_size=2, workers=0))
    assert torch.equal(before, torch.get_rng_state())


def test_groups_are_kept_apart_in_the_stream() -> None:
    groups = np.array([0] * 13 + [1] * 20)
    batches = list(loader(Numbers(33), batch_size=4, accumulate=2, groups=groups, total_steps=16).iterate(0))
    assert all(len(set(groups[batch["sample"].numpy()])) == 1 for batch in batches)
    assert loader(Numbers(33), batch_size=4, groups=groups).steps_per_epoch == 3 + 5


# workers


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs to know who sent a signal")
def test_workers_survive_signals_sent_to_all_processes() -> None:
    batches = loader(WorkerFacts(8), batch_size=4, workers=2, total_steps=40).iterate(0)
    pids = {facts[0] for _ in range(4) for facts in next(batches)["facts"]}
    for name in ("INT", "TERM", "USR1"):
        subprocess.run(["kill", f"-{name}", *map(str, pids)], check=True)
    assert {facts[0] for batch in batches for facts in batch["facts"]} == pids


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_a_process_with_live_workers_can_exit(kind: str) -> None:
    """Python ends what is left of its children with SIGTERM, then waits: workers deaf to it would hang it for good."""
    code = f"""
if __name__ == "__main__":
    from tests.test_loader import EvalLoader, Numbers, loader
    if "{kind}" == "evaluation":
        batches = EvalLoader(Numbers(30), batch_size=2, workers=2)
        list(batches)
    else:
        batches = loader(workers=2).iterate(0)
        next(batches)
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], timeout=100, check=True)


def test_an_abandoned_stream_leaves_no_process_behind() -> None:
    batches = loader(WorkerFacts(8), batch_size=4, workers=2).iterate(0)
    pids = {facts[0] for _ in range(2) for facts in next(batches)["facts"]}
    batches.close()
    assert pids.isdisjoint({process.pid for process in multiprocessing.active_children()})


def test_workers_leave_signals_to_the_main_process_and_use_one_thread() -> None:
    facts = [f for b in loader(WorkerFacts(8), batch_size=4, workers=2).iterate(0) for f in b["facts"]]
    assert {pid for pid, _, _ in facts}.isdisjoint({os.getpid()})
    assert len({pid for pid, _, _ in facts}) == 2  # over several epochs: workers were never restarted
    assert all(threads == 1 and ignored == [True] * 2 for _, threads, ignored in facts)


def test_what_workers_need_survives_pickling_for_systems_that_cannot_fork() -> None:
    fetch = pickle.loads(pickle.dumps(loader()._dataset))
    batch, _, _ = fetch[next(loader().requests(2))]
    assert same([batch], [next(loader().iterate(2))])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_for_the_user_comes_out_of_a_worker_as_it_went_in(workers: int) -> None:
    with pytest.raises(UserError, match=r"^cannot read image 4$") as caught:
        list(loader(Numbers(8, broken=4), workers=workers).iterate(0))
    assert caught.value.hint == "buy a new disk"


def test_a_killed_worker_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Any) -> Any:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", killed)
    with pytest.raises(UserError, match="is killed by signal: Killed") as caught:
        list(loader().iterate(0))
    assert "shared memory" in caught.value.hint


# unreadable files


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_listed_warned_of_once_and_not_part_of_the_batch(
    workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    train = loader(Numbers(8, unreadable=(2, 5)), workers=workers)
    batches = list(train.iterate(0))
    assert sorted(train.unreadable) == ["image 2", "image 5"]
    assert all("unreadable" not in batch for batch in batches)
    assert capsys.readouterr().err.count("image 2 cannot be read") == 1


def test_too_many_unreadable_files_stop_the_run_and_are_named() -> None:
    with pytest.raises(UserError, match=r"3 training images cannot be read \(limit 2\): image \d+, image \d+, image"):
        list(loader(Numbers(21, unreadable=tuple(range(21))), max_unreadable=2).iterate(0))


# refusals


def test_a_batch_that_does_not_divide_names_the_numbers_and_the_nearest_that_do() -> None:
    with pytest.raises(
        UserError, match="batch of 10 does not divide evenly by 2 processes x 3 micro-batches"
    ) as caught:
        loader(batch_size=10, world_size=2, accumulate=3)
    assert "6 and 12" in caught.value.hint
    with pytest.raises(UserError, match=r"batch of 2 .* by 1 process x 4 micro-batches") as caught:
        loader(batch_size=2, accumulate=4)
    assert "the smallest is 4" in caught.value.hint


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"accumulate": 0}])
def test_batch_and_accumulation_must_be_positive(changes: dict[str, int]) -> None:
    with pytest.raises(UserError, match="at least 1, not 0"):
        loader(**changes)


def test_a_data_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match="training set has 7 images, fewer than one batch of 8") as caught:
        loader(Numbers(7))
    assert "--batch-size 6 or smaller" in caught.value.hint  # an even one, which can be mixed in pairs
    with pytest.raises(UserError, match="largest aspect-ratio group of the training set has 7 images"):
        loader(Numbers(13), groups=np.array([0] * 6 + [1] * 7))


def test_a_group_too_small_for_a_batch_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    loader(Numbers(21), groups=np.array([0] * 3 + [1] * 18))
    assert "3 training images are never used" in capsys.readouterr().err


# evaluation


@settings(deadline=None, max_examples=60)
@given(count=st.integers(0, 60), batch_size=st.integers(1, 20), world_size=st.integers(1, 5))
def test_evaluation_shows_every_sample_exactly_once(count: int, batch_size: int, world_size: int) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        part = EvalLoader(Numbers(count), batch_size=batch_size, workers=0, rank=rank, world_size=world_size)
        batches = list(part)
        assert len(part) == len(batches)
        assert all(len(batch["sample"]) <= batch_size for batch in batches)
        seen += [i for batch in batches for i in batch["sample"].tolist()]
    assert sorted(seen) == list(range(count))


def test_evaluation_can_be_repeated_with_workers_that_stay() -> None:
    evaluation = EvalLoader(WorkerFacts(10), batch_size=4, workers=2)
    first, second = list(evaluation), list(evaluation)
    assert [b["sample"].tolist() for b in first] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert same(first, second)  # the same processes, as their ids tell


def test_collation() -> None:
    batch = collate_items([{"x": torch.ones(2), "n": 1, "s": "a"}, {"x": torch.zeros(2), "n": 2, "s": "b"}])
    assert batch["x"].shape == (2, 2)
    assert batch["n"].dtype == torch.int64
    assert batch["s"] == ["a", "b"]


class DeadlyNumbers(Numbers):
    """A data set whose worker is killed at its third batch, as by the system when memory runs out."""

    def __getitem__(self, request: tuple[int, int, int]) -> dict[str, Any]:
        if request[0] == 5 and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(request)


def test_a_killed_worker_ends_the_run_with_one_sentence() -> None:
    with pytest.raises(RunFailed, match="A data worker process died") as error:
        list(EvalLoader(DeadlyNumbers(8), batch_size=2, workers=1))
    assert error.value.exit_code == 1
    assert "A run goes on from the last checkpoint" in error.value.hint
