"""The statistics of repeated runs: numbers in, numbers out. SciPy is imported where it is used; it is slow to load."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SIGNIFICANT = 0.05
WILCOXON_FROM = 6  # pairs; with fewer the two-sided p of the signed-rank test cannot fall below SIGNIFICANT


@dataclass(frozen=True)
class Comparison:
    """Arm minus baseline over their `n` common seeds. None: `n` or the spread does not allow the figure.

    low, high: 95 % t-interval. p: two-sided paired t-test. p_wilcoxon: two-sided signed-rank test without the zeros.
    effect: Hedges' g_z, the mean difference in standard deviations of the differences, corrected for small n.
    """

    n: int
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_wilcoxon: float | None = None
    effect: float | None = None


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of its 95 % t-interval (None for one value)."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    from scipy.special import stdtrit

    return mean, float(stdtrit(n - 1, 0.975)) * _deviation(values, mean) / math.sqrt(n)


def compare(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Comparison | None:
    """Scores by seed, paired by seed; None without a common seed.

    Where every seed gives the same difference, no error can be estimated: no interval and no p.
    """
    seeds = sorted(arm.keys() & baseline.keys())
    if not seeds:
        return None
    ours, theirs = [arm[seed] for seed in seeds], [baseline[seed] for seed in seeds]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    n, mean = len(seeds), math.fsum(differences) / len(seeds)
    rounding = 1e-9 * max(1.0, *map(abs, (*ours, *theirs)))
    if n == 1 or max(differences) - min(differences) <= rounding:
        return Comparison(n, mean)
    from scipy import stats

    test = stats.ttest_rel(ours, theirs)
    low, high = test.confidence_interval(0.95)
    return Comparison(
        n=n,
        difference=mean,
        low=float(low),
        high=float(high),
        p=float(test.pvalue),
        p_wilcoxon=wilcoxon(differences),
        effect=_hedges(mean / _deviation(differences, mean), n - 1),
    )


def wilcoxon(differences: Sequence[float]) -> float | None:
    """Two-sided p of the signed-rank test, without the zeros. Exact without ties, and with ties up to 13 pairs."""
    from scipy import stats

    nonzero = [round(d, 9) for d in differences if abs(d) > 1e-9]  # differences equal but for rounding are ties
    return float(stats.wilcoxon(nonzero).pvalue) if len(nonzero) >= WILCOXON_FROM else None


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction over the p values that are not None."""
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        corrected[i] = highest
    return corrected


def _deviation(values: Sequence[float], mean: float) -> float:
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _hedges(d: float, freedom: int) -> float | None:
    """Cohen's d without its bias for small samples; None for one degree of freedom."""
    if freedom < 2:
        return None
    return d * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)) / math.sqrt(freedom / 2)
