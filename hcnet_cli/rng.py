"""Randomness as a pure function of who asks for it: (seed, epoch, sample), never of what was drawn before.

A sample carries a `key`. Its augmentation, drop path, dropout and proposal sampling depend on that key alone, so
worker count, accumulation, process count and the step at which a run was resumed cannot change a result.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.random import mtrand
from torch import Tensor


def derive(*parts: int | str) -> int:
    """A 63-bit key from its parts; the same on every machine and Python."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


_prepared: dict[int, np.random.PCG64] = {}  # fresh, each is taken once


def prepare(keys: Iterable[int]) -> None:
    """Makes numpy's generators for blocks that `seeded` will begin with these keys. It changes nothing but their speed:
    one alone, between two images that swept the processor's cache, takes ten times as long.
    """
    _prepared.clear()
    _prepared.update((key, np.random.PCG64(key)) for key in set(keys))  # in evaluation all are alike


@contextlib.contextmanager
def seeded(key: int) -> Iterator[None]:
    """Python's, numpy's and torch's (CPU) global generators start at `key` inside, and are as before outside."""
    python_state, numpy_generator, torch_state = random.getstate(), mtrand.get_bit_generator(), torch.get_rng_state()
    random.seed(key)
    # a seventh of the time of seed, get_state and set_state
    mtrand.set_bit_generator(_prepared.pop(key) if key in _prepared else np.random.PCG64(key))
    torch.default_generator.manual_seed(key)
    try:
        yield
    finally:
        random.setstate(python_state)
        mtrand.set_bit_generator(numpy_generator)
        torch.set_rng_state(torch_state)


def keyed_uniform(keys: Tensor, n: int, stream: int = 0) -> Tensor:
    """`n` uniform numbers in [0, 1) for each key: keys [B] int64 -> [n, B] float32, on the keys' device.

    Column b depends on keys[b] (and `stream`) alone. SplitMix64's mixing function, counter mode; int64 arithmetic
    wraps around, and `>>` is made logical with a mask.
    """

    def shift(x: Tensor, by: int) -> Tensor:
        return (x >> by) & ((1 << (64 - by)) - 1)

    counter = torch.arange(1, n + 1, dtype=torch.int64, device=keys.device)[:, None] + stream * 1_000_003
    x = keys.to(torch.int64)[None, :] + counter * -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
    x = (x ^ shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    x = x ^ shift(x, 31)
    return shift(x, 40).to(torch.float32) * 2**-24
