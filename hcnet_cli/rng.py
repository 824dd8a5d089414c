"""Randomness as a pure function of (seed, epoch, sample), independent of what was drawn before.

A sample carries a `key`. Its augmentation, drop path, dropout and proposal sampling depend on that key alone, so the
number of workers, micro-batches and processes and the step at which a run was resumed cannot change a result.
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
    """A 63-bit key from its parts, the same on every machine and Python version."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


_prebuilt: dict[int, np.random.PCG64] = {}  # generators at the start of their stream; `seeded` takes each one once


def prebuild(keys: Iterable[int]) -> None:
    """Makes the numpy generators that `seeded` will need for these keys. It changes the speed only.

    Made one at a time, between two images that have filled the processor's cache, a generator takes ten times as long.
    """
    _prebuilt.clear()
    _prebuilt.update((key, np.random.PCG64(key)) for key in set(keys))  # in evaluation all keys are equal


@contextlib.contextmanager
def seeded(key: int) -> Iterator[None]:
    """Seeds Python's, numpy's and torch's (CPU) global generators with `key`; restores their state at the end."""
    python_state, numpy_generator, torch_state = random.getstate(), mtrand.get_bit_generator(), torch.get_rng_state()
    random.seed(key)
    # exchanging the generator takes a seventh of the time of seed, get_state and set_state
    mtrand.set_bit_generator(_prebuilt.pop(key) if key in _prebuilt else np.random.PCG64(key))
    torch.default_generator.manual_seed(key)
    try:
        yield
    finally:
        random.setstate(python_state)
        mtrand.set_bit_generator(numpy_generator)
        torch.set_rng_state(torch_state)


def keyed_uniform(keys: Tensor, n: int, stream: int = 0) -> Tensor:
    """`n` uniform numbers in [0, 1) for each key: keys [B] int64 -> [n, B] float32, on the keys' device.

    Column b depends only on keys[b] and `stream`. The mixing function is SplitMix64's, in counter mode. int64
    arithmetic wraps around; a mask turns the arithmetic shift `>>` into a logical one.
    """

    def shift(x: Tensor, by: int) -> Tensor:
        return (x >> by) & ((1 << (64 - by)) - 1)

    counter = torch.arange(1, n + 1, dtype=torch.int64, device=keys.device)[:, None] + stream * 1_000_003
    x = keys.to(torch.int64)[None, :] + counter * -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
    x = (x ^ shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    x = x ^ shift(x, 31)
    return shift(x, 40).to(torch.float32) * 2**-24
