"""The statistics of repeated runs, and of two classifiers on the same images: numbers in, numbers out.

A function returns None where its numbers do not allow the figure: too few, without a spread, or not finite.
docs/statistics.md explains the choices and gives the sources. SciPy and NumPy are imported where they are used; they
are slow to load.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

SIGNIFICANT = 0.05
POWER = 0.8
MOST_SEEDS = 10_000  # where the search for a number of seeds ends
MOST_SIGN_FLIPS = 20  # differences; the exact test enumerates 2^n sign patterns
BOOTSTRAP_FROM = 8  # values; with fewer the interval is far too narrow (docs/statistics.md)
ROBUST_FROM = 4  # values of which the quarter that an interquartile mean cuts off is at least one
RESAMPLES = 9999
ROUNDING = 1e-12  # of figures that come from differences, which have 9 decimals


# --- means and t ------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean, its standard error, and the degrees of freedom of that error."""

    mean: float
    error: float
    freedom: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and s / sqrt(n), with n - 1 degrees of freedom. None for fewer than two values or equal values."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    mean = math.fsum(values) / len(values)
    if max(values) - min(values) <= 1e-9 * max(1.0, *map(abs, values)):  # equal but for rounding
        return None
    return Estimate(mean, _deviation(values, mean) / math.sqrt(len(values)), len(values) - 1)


def t_interval(e: Estimate, alpha: float = SIGNIFICANT) -> tuple[float, float]:
    """Mean -/+ t(1 - alpha/2, freedom) times the error."""
    from scipy.special import stdtrit

    half = float(stdtrit(e.freedom, 1 - alpha / 2)) * e.error
    return e.mean - half, e.mean + half


def t_test(e: Estimate) -> float:
    """Two-sided p of a mean of zero. Of paired differences it is the paired t-test."""
    from scipy.special import stdtr

    return float(2 * stdtr(e.freedom, -abs(e.mean) / e.error))


def equivalence(e: Estimate, margin: float) -> float:
    """Two one-sided t-tests (Schuirmann 1987): a small p shows that the mean lies between -margin and +margin.

    The p is the larger one of the hypotheses mean <= -margin and mean >= +margin. p < 0.05 holds exactly if the 90 %
    t-interval lies inside the margins.
    """
    from scipy.special import stdtr

    above, below = (margin + e.mean) / e.error, (margin - e.mean) / e.error
    return float(stdtr(e.freedom, -min(above, below)))


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of its 95 % t-interval (None for one value, and for equal ones, which show no spread)."""
    mean, e = math.fsum(values) / len(values), estimate(values)
    if e is None:
        return mean, None
    low, high = t_interval(e)
    return mean, (high - low) / 2


def interquartile_mean(values: Sequence[float]) -> float | None:
    """Mean without the lowest and the highest quarter (each rounded down to whole values), as rliable computes it."""
    if len(values) < ROBUST_FROM or not all(map(math.isfinite, values)):
        return None
    cut = len(values) // 4
    kept = sorted(values)[cut : len(values) - cut]
    return _without_rounding(math.fsum(kept) / len(kept))


def hedges(values: Sequence[float]) -> float | None:
    """Hedges' g_z: mean over standard deviation, times J(f) = Γ(f/2) / (√(f/2) Γ((f-1)/2)) with f = n - 1.

    J removes the bias for small n (Hedges 1981). None for fewer than three values.
    """
    e = estimate(values)
    if e is None or e.freedom < 2:
        return None
    f = e.freedom
    correction = math.exp(math.lgamma(f / 2) - math.lgamma((f - 1) / 2)) / math.sqrt(f / 2)
    return _without_rounding(correction * e.mean / (e.error * math.sqrt(len(values))))


def _without_rounding(value: float) -> float:
    """0 for what rounding has left of it."""
    return 0.0 if abs(value) < ROUNDING else value


def _deviation(values: Sequence[float], mean: float) -> float:
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


# --- without a normal distribution ------------------------------------------------------------------------------------


def sign_flip(differences: Sequence[float]) -> float | None:
    """Exact two-sided p of the sign-flip test: that the differences are symmetric about zero (Fisher 1935, §21).

    The share of all 2^n patterns of signs with which |sum| is at least as large as observed. Sums that are equal but
    for rounding (1e-9 of the sum of absolute differences) count as equal. Each pattern and its opposite have the same
    |sum|, so the smallest p is 2 / 2^n. None for no difference and for more than MOST_SIGN_FLIPS.
    """
    if not 1 <= len(differences) <= MOST_SIGN_FLIPS or not all(map(math.isfinite, differences)):
        return None
    import numpy as np

    sums = np.array([differences[0]], dtype=np.float64)  # the opposite patterns would be counted twice
    for difference in differences[1:]:
        sums = np.concatenate([sums + difference, sums - difference])
    rounding = 1e-9 * math.fsum(map(abs, differences))
    return float(np.mean(np.abs(sums) >= abs(math.fsum(differences)) - rounding))


def bootstrap_interval(values: Sequence[float], alpha: float = SIGNIFICANT) -> tuple[float, float] | None:
    """BCa bootstrap interval of the mean (Efron 1987), by scipy with a fixed seed. None below BOOTSTRAP_FROM values."""
    if len(values) < BOOTSTRAP_FROM or estimate(values) is None:
        return None
    import numpy as np
    from scipy import stats

    found = stats.bootstrap(
        (np.asarray(values),), np.mean, confidence_level=1 - alpha, n_resamples=RESAMPLES, method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    low, high = float(found.low), float(found.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


# --- several arms -----------------------------------------------------------------------------------------------------


def holm(ps: Sequence[float | None], planned: int = 0) -> list[float | None]:
    """Holm's step-down correction (1979) over the p values that are not None, or over `planned` ones, if more: those
    that are still to come count as 1.
    """
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (max(planned, len(order)) - rank) * p))
        corrected[i] = highest
    return corrected


# --- planning ---------------------------------------------------------------------------------------------------------


def t_power(difference: float, sd: float, n: int, alpha: float = SIGNIFICANT) -> float:
    """Probability that the two-sided paired t-test on n seeds has p < alpha, with the sign of the true difference.

    By the noncentral t distribution. `sd`: standard deviation of the paired differences.
    """
    return _power_at(abs(difference) / sd * math.sqrt(n), n - 1, alpha)


def _power_at(noncentrality: float, freedom: int, alpha: float) -> float:
    from scipy import stats

    return float(stats.nct.sf(stats.t.ppf(1 - alpha / 2, freedom), freedom, noncentrality))


def smallest_difference(sd: float, n: int, alpha: float = SIGNIFICANT, power: float = POWER) -> float | None:
    """The difference that n seeds show with this power (see `t_power`). None for fewer than two seeds."""
    if n < 2 or not 0 < sd < math.inf:
        return None
    from scipy.optimize import brentq
    from scipy.special import stdtrit

    above = 10 + 5 * float(stdtrit(n - 1, 1 - alpha / 2))
    noncentrality = float(brentq(lambda x: _power_at(x, n - 1, alpha) - power, 0.0, above, xtol=1e-10))
    return noncentrality * sd / math.sqrt(n)


def seeds_for(difference: float, sd: float, alpha: float = SIGNIFICANT, power: float = POWER) -> int | None:
    """The fewest seeds that show a difference with this power (see `t_power`). None above MOST_SEEDS."""
    if not difference or not 0 < sd < math.inf or t_power(difference, sd, MOST_SEEDS, alpha) < power:
        return None
    low, high = 1, MOST_SEEDS  # too few, enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if t_power(difference, sd, middle, alpha) >= power else (middle, high)
    return high


def fewest_seeds(alpha: float = SIGNIFICANT) -> int:
    """The fewest seeds with which the sign-flip test can have p < alpha: 2 / 2^n < alpha. Six for 0.05."""
    return math.floor(math.log2(2 / alpha)) + 1


def pooled_deviation(groups: Sequence[Sequence[float]]) -> tuple[float, int] | None:
    """Standard deviation within groups, sqrt(Σ squares / Σ (n - 1)), and its degrees of freedom; None without any."""
    squares = [math.fsum((v - math.fsum(g) / len(g)) ** 2 for v in g) for g in groups if len(g) > 1]
    freedom = sum(len(group) - 1 for group in groups if len(group) > 1)
    if not freedom or math.fsum(squares) <= 1e-18:
        return None
    return math.sqrt(math.fsum(squares) / freedom), freedom


# --- as many seeds as an interval needs -------------------------------------------------------------------------------


def seeds_until(first: Sequence[float], half_width: float, alpha: float = SIGNIFICANT) -> int | None:
    """Stein's two-stage rule (1945): the seeds in all that make half of the interval at most `half_width`.

    max(n0, ceil((t s / half_width)^2)) with n0, s and t(1 - alpha/2, n0 - 1) of the first stage alone.
    """
    e = estimate(first)
    if e is None:
        return None
    low, high = t_interval(e, alpha)
    ratio = (high - low) / 2 / half_width
    return max(len(first), math.ceil(len(first) * ratio**2 - 1e-9))


def two_stage(first: Sequence[float], later: Sequence[float]) -> Estimate | None:
    """The estimate that belongs to `seeds_until`: the mean of all values, the spread of the first stage alone.

    Then (mean - truth) / error has exactly the t distribution with n0 - 1 degrees of freedom for normal differences,
    whatever the first stage's spread was: the number of seeds depends on that spread, which the mean does not depend
    on. The usual estimate over all values would be too sure of itself, since the rule stops where s happens to be low.
    """
    e = estimate(first)
    if e is None or not all(map(math.isfinite, later)):
        return None
    n = len(first) + len(later)
    return Estimate(math.fsum([*first, *later]) / n, e.error * math.sqrt(len(first) / n), e.freedom)


# --- an arm and the baseline ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Arm minus baseline over their `n` common seeds. None: the numbers do not allow the figure.

    Args:
        difference: Mean of the differences; `median` and `iqm` (interquartile mean) from ROBUST_FROM seeds on.
        spread: Standard deviation of the differences.
        low: Lower end of the t-interval; `high` the upper.
        p: Two-sided paired t-test.
        p_sign_flip: Exact sign-flip test.
        p_equivalence: Two one-sided t-tests with the margin.
        bootstrap: BCa interval.
        effect: Hedges' g_z.
    """

    n: int
    difference: float
    median: float | None = None
    iqm: float | None = None
    spread: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_sign_flip: float | None = None
    p_equivalence: float | None = None
    bootstrap: tuple[float, float] | None = None
    effect: float | None = None


def paired_differences(arm: Mapping[int, float], baseline: Mapping[int, float]) -> dict[int, float]:
    """Arm minus baseline for each seed that both have, by seed. What differs by rounding is equal: 9 decimals."""
    return {seed: round(arm[seed] - baseline[seed], 9) for seed in sorted(arm.keys() & baseline.keys())}


def compare(
    arm: Mapping[int, float], baseline: Mapping[int, float], *, alpha: float = SIGNIFICANT,
    margin: float | None = None, first_stage: Collection[int] | None = None,
) -> Comparison | None:  # fmt: skip
    """Scores by seed, paired by seed; None without a common seed.

    Where every seed gives the same difference, there is no spread, and t has no value: no interval and no p of t. The
    sign-flip test needs no spread. With the seeds of a `first_stage` the estimate is that of `two_stage`, and there are
    no figures that such a number of seeds would make wrong: sign-flip test and bootstrap.
    """
    by_seed = paired_differences(arm, baseline)
    if not by_seed:
        return None
    differences = list(by_seed.values())
    if first_stage is None:
        e = estimate(differences)
    else:
        first = [d for seed, d in by_seed.items() if seed in first_stage]
        e = two_stage(first, [d for seed, d in by_seed.items() if seed not in first_stage])
    low, high = t_interval(e, alpha) if e else (None, None)
    several, fixed = len(differences) > 1, first_stage is None
    spread = pooled_deviation([differences])
    return Comparison(
        n=len(differences),
        difference=_without_rounding(math.fsum(differences) / len(differences)),
        median=_without_rounding(_median(differences)) if len(differences) >= ROBUST_FROM else None,
        iqm=interquartile_mean(differences),
        spread=spread[0] if spread else None,
        low=low,
        high=high,
        p=t_test(e) if e else None,
        p_sign_flip=sign_flip(differences) if several and fixed else None,
        p_equivalence=equivalence(e, margin) if e and margin else None,
        bootstrap=bootstrap_interval(differences, alpha) if fixed else None,
        effect=hedges(differences),
    )


def _median(values: Sequence[float]) -> float:
    ordered, n = sorted(values), len(values)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


# --- two classifiers on the same images -------------------------------------------------------------------------------


class ImagePairs(NamedTuple):
    """Top-1 of two classifiers on the same images, in points: `difference` is the second minus the first.

    low, high: 95 % bootstrap interval over images, None if no image tells them apart. p: exact McNemar test.
    """

    n: int
    only_first: int
    only_second: int
    difference: float
    low: float | None
    high: float | None
    p: float


def compare_images(first: Sequence[bool], second: Sequence[bool]) -> ImagePairs | None:
    """Compares which images each classifier has right; None without images.

    McNemar's test (1947) asks whether, of the images that exactly one has right, each had as good a chance:
    two-sided binomial, exact. The bootstrap redraws images; their differences are -1, 0 and 1, so that the three
    counts of a resample are multinomial.
    """
    import numpy as np
    from scipy import stats

    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    assert a.shape == b.shape
    n, only_first, only_second = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    if not n:
        return None
    difference = 100 * (only_second - only_first) / n
    if not only_first + only_second:
        return ImagePairs(n, 0, 0, 0.0, None, None, 1.0)
    shares = np.array([only_first, only_second, n - only_first - only_second]) / n
    drawn = np.random.default_rng(0).multinomial(n, shares, size=RESAMPLES)
    low, high = np.quantile(100 * (drawn[:, 1] - drawn[:, 0]) / n, [0.025, 0.975])
    p = float(stats.binomtest(only_first, only_first + only_second).pvalue)
    return ImagePairs(n, only_first, only_second, difference, float(low), float(high), p)
