"""The comparison of arms equals hand calculation, scipy and counting out, and claims nothing without a spread."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import special, stats

from hcnet_cli.statistics import (
    Comparison,
    Estimate,
    bootstrap_interval,
    compare,
    compare_images,
    equivalence,
    estimate,
    fewest_seeds,
    holm,
    interquartile_mean,
    mean_interval,
    pooled_deviation,
    seeds_for,
    seeds_until,
    sign_flip,
    smallest_difference,
    t_interval,
    t_power,
    t_test,
    two_stage,
)


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
    assert c.p_sign_flip == 2 / 2**3
    assert (c.median, c.iqm, c.bootstrap) == (None, None, None)


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
    c = compare({seed: value + shift for seed, value in full.items()}, full, margin=0.5)
    assert c is not None
    assert c.difference == pytest.approx(shift)
    assert (c.low, c.high, c.p, c.p_equivalence, c.effect, c.spread, c.bootstrap) == (None,) * 7
    assert c.p_sign_flip == (1.0 if shift == 0 else 2 / 2**3)  # it needs no spread


# --- sign-flip test ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0, 2.0, 3.0], 2 / 8),  # only all plus and all minus are as far from zero
        ([1.0, 2.0, -3.0], 8 / 8),  # their sum is zero
        ([1.0, 1.0, 1.0, -1.0], 10 / 16),  # |sum| >= 2: all but the six patterns of two plus and two minus
        ([3.0, -1.0], 4 / 4),  # |sum| is 4 or 2, and 2 is observed
        ([0.5] * 6, 2 / 64),  # equal differences: no spread, and still a test
        ([0.0] * 6, 1.0),
        ([0.1, 0.2, -0.3, 0.0], 1.0),  # 0.1 + 0.2 - 0.3 is not 0 in floating point
    ],
)
def test_sign_flip_by_hand(differences: list[float], p: float) -> None:
    assert sign_flip(differences) == p


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=9))
@settings(max_examples=40, deadline=None)
def test_sign_flip_is_counted_out(steps: list[int]) -> None:
    """Against every pattern of signs in exact fractions; the differences are those of accuracies, in 359ths."""
    exact = [Fraction(100 * step, 359) for step in steps]
    sums = [
        sum(s * d for s, d in zip(signs, exact, strict=True)) for signs in itertools.product((1, -1), repeat=len(exact))
    ]
    p = sum(abs(one) >= abs(sum(exact)) for one in sums) / len(sums)
    assert sign_flip([float(d) for d in exact]) == pytest.approx(p)


def test_sign_flip_is_scipys_permutation_test() -> None:
    d = [0.31, -0.12, 0.47, 0.55, 0.08, -0.02, 0.29, 0.6]
    done = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(d) == pytest.approx(done.pvalue)


def test_sign_flip_has_limits() -> None:
    assert sign_flip([]) is None
    assert sign_flip([1.0]) == 1.0
    assert sign_flip([math.nan, 1.0]) is None
    assert sign_flip([1.0] * 20) == 2 / 2**20
    assert sign_flip([1.0] * 21) is None


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 2, 0.05 / 5, 0.001])
def test_the_fewest_seeds_of_the_sign_flip_test(alpha: float) -> None:
    """No outcome is more extreme than differences of one sign."""
    n = fewest_seeds(alpha)
    smallest = [sign_flip([1.0 + 0.01 * i for i in range(k)]) for k in (n - 1, n)]
    assert smallest[1] is not None
    assert smallest[0] is not None
    assert smallest[1] < alpha <= smallest[0]


def test_six_seeds_for_one_arm_and_eight_for_five() -> None:
    assert [fewest_seeds(0.05 / arms) for arms in (1, 2, 5)] == [6, 7, 8]


# --- equivalence ------------------------------------------------------------------------------------------------------


def test_equivalence_by_hand() -> None:
    """Mean 0, error 0.1, 3 degrees of freedom, margin 0.3: t = 3 on both sides; P(t3 > 3) = 0.02883."""
    assert equivalence(Estimate(0.0, 0.1, 3), 0.3) == pytest.approx(0.028834, abs=1e-6)
    assert equivalence(Estimate(0.3, 0.1, 3), 0.3) == pytest.approx(0.5)
    assert equivalence(Estimate(5.0, 0.1, 3), 0.3) > 0.99


@given(st.lists(st.floats(-3, 3).map(lambda x: round(x, 3)), min_size=2, max_size=10), st.floats(0.05, 2))
def test_equivalence_is_scipys_two_tests_and_the_90_percent_interval(d: list[float], margin: float) -> None:
    e = estimate(d)
    if e is None:
        assert len(set(d)) == 1
        return
    p = equivalence(e, margin)
    above = stats.ttest_1samp(d, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(d, margin, alternative="less").pvalue
    assert p == pytest.approx(max(above, below))
    low, high = t_interval(e, 0.10)
    if abs(p - 0.05) > 1e-6:
        assert (p < 0.05) == (-margin < low and high < margin)


# --- bootstrap and robust means ---------------------------------------------------------------------------------------


def test_what_rounding_leaves_of_zero_is_zero() -> None:
    values = (0.1, 0.2, -0.3, 0.0, 5.0, -5.0)
    assert math.fsum(values) != 0
    c = compare(by_seed(*values), by_seed(*[0.0] * 6))
    assert c is not None
    assert (c.difference, c.iqm, c.effect) == (0, 0, 0)


def test_the_bootstrap_interval_is_efrons() -> None:
    """Against BCa as Efron writes it, with its own resamples: z0 and the acceleration of the jackknife."""
    d = np.array([0.1, 0.5, -0.2, 0.9, 0.3, 2.0, 0.4, 0.0, 0.7, 0.2])
    means = np.random.default_rng(5).choice(d, (200_000, len(d))).mean(1)
    z0 = stats.norm.ppf((means < d.mean()).mean() + (means == d.mean()).mean() / 2)
    jackknife = np.array([np.delete(d, i).mean() for i in range(len(d))])
    centred = jackknife.mean() - jackknife
    a = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5)
    levels = [stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))) for z in stats.norm.ppf([0.025, 0.975])]
    assert bootstrap_interval(d.tolist()) == pytest.approx(np.quantile(means, levels), abs=0.03)


def test_the_bootstrap_is_repeatable_and_needs_eight_values_with_a_spread() -> None:
    d = [0.1, 0.5, -0.2, 0.9, 0.3, 2.0, 0.4, 0.0]
    assert bootstrap_interval(d) == bootstrap_interval(d)
    assert bootstrap_interval(d[:-1]) is None
    assert bootstrap_interval([0.5] * 12) is None
    assert bootstrap_interval([*d, math.nan]) is None


@given(st.lists(st.floats(-9, 9), min_size=4, max_size=15))
def test_the_interquartile_mean_is_scipys(values: list[float]) -> None:
    assert interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25))


def test_median_and_interquartile_mean_from_four_seeds_on() -> None:
    four = compare(by_seed(1, 2, 4, 90), dict.fromkeys(range(4), 0.0))
    assert four is not None
    assert (four.median, four.iqm) == (3.0, 3.0)
    three = compare(by_seed(1, 2, 4), dict.fromkeys(range(3), 0.0))
    assert three is not None
    assert (three.median, three.iqm) == (None, None)


# --- planning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("effect", "alpha", "n", "power"),
    [(0.5, 0.05, 34, 0.807778), (0.8, 0.05, 15, 0.821310), (1.0, 0.05, 10, 0.803097), (1.0, 0.01, 16, 0.841)],
)
def test_power_is_that_of_the_published_tables(effect: float, alpha: float, n: int, power: float) -> None:
    """Seeds for 80 % as in Cohen's tables and G*Power (paired t, two-sided, 0.05)."""
    if alpha == 0.05:
        assert seeds_for(3 * effect, 3.0, alpha) == n
        assert t_power(effect, 1.0, n, alpha) == pytest.approx(power, abs=1e-5)
    assert t_power(effect, 1.0, n, alpha) == pytest.approx(
        1 - special.nctdtr(n - 1, effect * math.sqrt(n), special.stdtrit(n - 1, 1 - alpha / 2))
    )


@given(st.floats(0.05, 5), st.integers(2, 60), st.sampled_from([0.05, 0.01]), st.sampled_from([0.5, 0.8, 0.95]))
@settings(max_examples=40, deadline=None)
def test_the_smallest_difference_and_the_seeds_for_it_are_inverse(
    sd: float, n: int, alpha: float, power: float
) -> None:
    difference = smallest_difference(sd, n, alpha, power)
    assert difference is not None
    assert t_power(difference, sd, n, alpha) == pytest.approx(power, abs=1e-6)
    assert seeds_for(difference * 1.0001, sd, alpha, power) == n
    fewer = seeds_for(difference * 0.999, sd, alpha, power)
    assert fewer is not None
    assert fewer > n


def test_planning_without_an_answer() -> None:
    assert smallest_difference(0.5, 1) is None
    assert smallest_difference(0.0, 5) is None
    assert smallest_difference(math.nan, 5) is None
    assert seeds_for(0.0, 0.5) is None
    assert seeds_for(0.001, 0.5) is None  # more than ten thousand
    assert seeds_for(1000.0, 0.5) == 2
    assert pooled_deviation([[1.0], []]) is None
    assert pooled_deviation([[1.0, 1.0]]) is None
    assert pooled_deviation([[1.0, 3.0], [5.0, 5.0], [7.0]]) == (1.0, 2)  # squares 2 and 0 over 1 + 1


# --- Stein's two stages -----------------------------------------------------------------------------------------------


def test_the_two_stage_rule_by_hand() -> None:
    """Stage one: 1, 2, 3 with s = 1, t(0.975, 2) = 4.302653. Half-width 2: ceil(4.628) = 5 seeds."""
    assert seeds_until([1.0, 2.0, 3.0], 2.0) == 5
    e = two_stage([1.0, 2.0, 3.0], [4.0, 0.0])
    assert e is not None
    assert (e.mean, e.error, e.freedom) == (2.0, pytest.approx(1 / math.sqrt(5)), 2)
    low, high = t_interval(e)
    assert (high - low) / 2 == pytest.approx(4.302653 / math.sqrt(5), abs=1e-5)


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=8), st.floats(0.5, 5))
def test_the_two_stage_rule_keeps_its_width_and_wastes_no_seed(first: list[float], half: float) -> None:
    n = seeds_until(first, half)
    e = estimate(first)
    if n is None:
        assert e is None
        return
    assert e is not None
    if n < 10_000:
        wide = [two_stage(first, [0.0] * (m - len(first))) for m in (n, max(n - 1, len(first)))]
        halves = [(t_interval(w)[1] - t_interval(w)[0]) / 2 for w in wide if w]
        assert halves[0] <= half * (1 + 1e-9)
        assert n == len(first) or halves[1] > half * (1 - 1e-9)


def test_a_first_stage_without_spread_plans_nothing() -> None:
    assert seeds_until([1.0, 1.0, 1.0], 0.5) is None
    assert seeds_until([1.0], 0.5) is None
    assert two_stage([1.0, 1.0], [2.0, 3.0]) is None
    assert two_stage([1.0, 2.0], [math.nan]) is None


def test_a_comparison_of_two_stages_leaves_out_what_the_rule_would_falsify() -> None:
    arm, baseline = by_seed(1, 2, 3, 4, 0), dict.fromkeys(range(5), 0.0)
    c = compare(arm, baseline, first_stage=(0, 1, 2), margin=1.0)
    e = two_stage([1.0, 2.0, 3.0], [4.0, 0.0])
    assert c is not None
    assert e is not None
    assert (c.low, c.high) == t_interval(e)
    assert (c.p, c.p_equivalence) == (t_test(e), equivalence(e, 1.0))
    assert (c.p_sign_flip, c.bootstrap) == (None, None)


# --- images -----------------------------------------------------------------------------------------------------------


def test_mcnemar_by_hand() -> None:
    """One against six of 20 images: 2 (1 + 7) / 2^7 = 0.125."""
    first = [True] * 1 + [False] * 6 + [True] * 10 + [False] * 3
    second = [False] * 1 + [True] * 6 + [True] * 10 + [False] * 3
    found = compare_images(first, second)
    assert found is not None
    assert found[:4] == (20, 1, 6, 25.0)
    assert found.p == pytest.approx(0.125)


def test_the_bootstrap_over_images_is_scipys() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.random(400) < 0.9, rng.random(400) < 0.93
    found = compare_images(first.tolist(), second.tolist())
    differences = 100.0 * (second.astype(float) - first)
    done = stats.bootstrap((differences,), np.mean, method="percentile", n_resamples=9999, rng=rng)
    assert found is not None
    assert (found.low, found.high) == pytest.approx(tuple(done.confidence_interval), abs=0.3)


def test_alike_classifiers_and_no_images() -> None:
    assert compare_images([True, False], [True, False]) == (2, 0, 0, 0.0, None, None, 1.0)
    assert compare_images([], []) is None


# --- several arms -----------------------------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02, None, 0.02]) == [0.04, None, 0.04]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    assert holm([0.01, None], planned=5) == [0.05, None]  # arms whose runs are still to come


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
    assume(max(values) - min(values) > 1e-6)
    mean, half = mean_interval(values)
    assert mean == pytest.approx(sum(values) / len(values), abs=1e-9)
    assert half == pytest.approx(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values), abs=1e-9)


def test_one_value_has_no_interval() -> None:
    assert mean_interval([3.0]) == (3.0, None)
    assert mean_interval([95.0, 95.0]) == (95.0, None)
