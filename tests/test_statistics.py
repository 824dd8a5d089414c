"""The comparison of arms equals hand calculation, scipy and counting out, and claims nothing without a spread."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hcnet_cli.statistics import Comparison, compare, holm, mean_interval


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_a_comparison_worked_out_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, deviation 1, t = 2 sqrt(3) with 2 degrees of freedom, t(0.975) = 4.30265."""
    c = compare(by_seed(91, 93, 92), by_seed(90, 91, 89))
    assert c is not None
    assert c.n == 3
    assert c.difference == pytest.approx(2)
    assert (c.low, c.high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    assert c.p == pytest.approx(0.0741799, abs=1e-6)
    assert c.effect == pytest.approx(2 * math.sqrt(1 / math.pi), abs=1e-9)  # J(2) = Gamma(1) / Gamma(1/2)
    assert c.p_wilcoxon is None


def test_a_comparison_is_scipys() -> None:
    a, b = [97.2, 96.4, 98.1, 97.5, 96.9], [97.9, 96.2, 98.8, 98.6, 97.0]
    c = compare(by_seed(*a), by_seed(*b))
    assert c is not None
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(0.95)
    assert (c.p, c.low, c.high) == pytest.approx((test.pvalue, low, high))


def test_pairs_are_of_one_seed_whatever_the_order() -> None:
    """Seeds differ by far more than arms: only pairing by seed finds the difference, any other pairing loses it."""
    full = {3: 80.0, 0: 50.0, 4: 90.0, 1: 60.0, 2: 70.0}
    arm = {0: 50.9, 1: 61.1, 2: 71.0, 3: 80.8, 4: 91.2}
    c = compare(arm, full)
    assert c is not None
    assert c.p is not None
    assert c.p < 0.001
    assert c.difference == pytest.approx(1.0)
    in_file_order = stats.ttest_rel(list(arm.values()), list(full.values())).pvalue
    unpaired = stats.ttest_ind(list(arm.values()), list(full.values())).pvalue
    assert in_file_order > 0.5
    assert unpaired > 0.5
    for order in itertools.permutations(range(5)):
        wrong = compare({seed: arm[order[seed]] for seed in range(5)}, full)
        assert wrong is not None
        if order != (0, 1, 2, 3, 4):
            assert wrong.p is None or wrong.p > 0.05


def test_only_seeds_that_both_have_are_compared() -> None:
    c = compare({0: 1.0, 2: 5.0, 7: 100.0}, {0: 0.0, 2: 3.0, 5: -100.0})
    assert c is not None
    assert (c.n, c.difference) == (2, 1.5)
    assert compare({0: 1.0}, {1: 1.0}) is None


def test_one_seed_is_a_number_without_a_claim() -> None:
    assert compare(by_seed(97.0), by_seed(98.0)) == Comparison(1, -1.0)


@pytest.mark.parametrize("shift", [0.0, -0.2785515])
def test_equal_differences_give_no_false_certainty(shift: float) -> None:
    """Every seed differs alike, but for rounding: t would be infinite (or 0 / 0), so nothing is claimed."""
    full = by_seed(97.21448467966574, 96.65738161559888, 98.05013927576601)
    c = compare({seed: value + shift for seed, value in full.items()}, full)
    assert c is not None
    assert c.difference == pytest.approx(shift)
    assert (c.low, c.high, c.p, c.p_wilcoxon, c.effect) == (None,) * 5


def signed_rank_p(differences: list[float]) -> float:
    """Two-sided p by counting out every pattern of signs."""
    d = [round(x, 9) for x in differences if x]
    sizes = sorted(abs(x) for x in d)
    rank = {size: (2 * sizes.index(size) + 1 + sizes.count(size)) / 2 for size in sizes}

    def statistic(signs: tuple[int, ...]) -> float:
        return sum(sign * rank[abs(x)] for sign, x in zip(signs, d, strict=True))

    seen = statistic(tuple(1 if x > 0 else -1 for x in d))
    every = [statistic(signs) for signs in itertools.product((-1, 1), repeat=len(d))]
    more = sum(value >= seen - 1e-9 for value in every) / len(every)
    less = sum(value <= seen + 1e-9 for value in every) / len(every)
    return min(1.0, 2 * min(more, less))


@pytest.mark.parametrize(
    "differences",
    [
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.5],
        [-1.0, 2.0, 3.0, -4.0, 5.0, 6.0, 7.0],
        [0.28, 0.28, 0.56, -0.28, 0.84, 0.0, 0.28, 1.12],  # ties and a zero, as on digits
    ],
)
def test_wilcoxon_is_counted_out(differences: list[float]) -> None:
    c = compare({s: 90 + d for s, d in enumerate(differences)}, dict.fromkeys(range(len(differences)), 90.0))
    assert c is not None
    assert c.p_wilcoxon == pytest.approx(signed_rank_p(differences))
    if 0.0 not in differences:
        assert c.p_wilcoxon == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue)


def test_wilcoxon_needs_six_differences_and_manages_many() -> None:
    five = compare(by_seed(1, 2, 3, 4, 5, 0), dict.fromkeys(range(6), 0.0))  # the sixth is none
    assert five is not None
    assert five.p_wilcoxon is None
    many = {s: math.sin(s) + 0.3 for s in range(20)}
    c = compare(many, dict.fromkeys(many, 0.0))
    assert c is not None
    assert c.p_wilcoxon == pytest.approx(stats.wilcoxon(list(many.values())).pvalue)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02, None, 0.02]) == [0.04, None, 0.04]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_rejects_what_the_step_down_procedure_rejects(ps: list[float]) -> None:
    """From the smallest p: rejected while p <= 0.05 / (arms left)."""
    rejected = set()
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        if ps[i] * (len(ps) - rank) > 0.05:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(ps)) if p is not None and p <= 0.05} == rejected


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_the_interval_of_a_mean_is_scipys(values: list[float]) -> None:
    mean, half = mean_interval(values)
    assert mean == pytest.approx(sum(values) / len(values), abs=1e-9)
    assert half == pytest.approx(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values), abs=1e-9)


def test_one_value_has_no_interval() -> None:
    assert mean_interval([3.0]) == (3.0, None)
