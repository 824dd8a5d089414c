"""How often the statistics of studies are wrong, and how often they show a difference that is there.

    python tests/simulations/error_rates.py          # 2,000 studies a row, about two minutes: results/simulations/

Each case draws studies from a known distribution and counts a conclusion of `hcnet_cli.statistics`. The suite runs a
few hundred studies of each case (tests/test_error_rates.py).
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from hcnet_cli import statistics as st

STUDIES = 2000
SPREAD = 0.5  # points, standard deviation of the paired differences
SEED_SPREAD = 0.8  # points, what a seed gives to all arms
ARMS = 5
RESULTS = Path(__file__).parents[2] / "results" / "simulations"
Differences = list[float]


class Case(NamedTuple):
    """`study` draws a study and says whether the event happened; `expected`: its share in per cent, from and to."""

    what: str
    study: Callable[[Generator], bool]
    expected: tuple[float, float] = (4, 6)
    remark: str = ""


def draw(rng: Generator, n: int, *effects: float, step: float = 0.0) -> list[Differences]:
    """The differences from a common baseline of an arm for each effect; scores are multiples of `step`, if given.

    A score is its seed's part, which all arms share, and its own, so that differences have the deviation SPREAD.
    """
    seeds = rng.normal(90, SEED_SPREAD, n)
    scores = [seeds + effect + rng.normal(0, SPREAD / np.sqrt(2), n) for effect in (0.0, *effects)]
    if step:
        scores = [np.round(one / step) * step for one in scores]
    by_seed = [dict(enumerate(one.tolist())) for one in scores]
    return [list(st.paired_differences(one, by_seed[0]).values()) for one in by_seed[1:]]


def t_p(differences: Differences) -> float | None:
    e = st.estimate(differences)
    return st.t_test(e) if e else None


def significant(p: float | None) -> bool:
    return p is not None and p < st.SIGNIFICANT


# --- events -----------------------------------------------------------------------------------------------------------


Test = Callable[[Differences], "float | None"]


def one_arm(test: Test, n: int, effect: float, rng: Generator, step: float = 0.0) -> bool:
    return significant(test(*draw(rng, n, effect, step=step)))


def first_arm(test: Test, n: int, effect: float, rng: Generator) -> bool:
    """With Holm over ARMS arms, of which the first alone has an effect."""
    return significant(st.holm([test(d) for d in draw(rng, n, effect, *[0.0] * (ARMS - 1))])[0])


def any_arm(test: Test, n: int, rng: Generator) -> bool:
    """With Holm over ARMS arms without an effect."""
    return any(significant(p) for p in st.holm([test(d) for d in draw(rng, n, *[0.0] * ARMS)]))


def equivalent(n: int, effect: float, margin: float, rng: Generator) -> bool:
    e = st.estimate(*draw(rng, n, effect))
    return e is not None and significant(st.equivalence(e, margin))


def t_misses(n: int, rng: Generator) -> bool:
    e = st.estimate(*draw(rng, n, 0.3))
    return e is not None and outside(st.t_interval(e), 0.3)


def bootstrap_misses(n: int, rng: Generator) -> bool:
    return outside(st.bootstrap_interval(*draw(rng, n, 0.3)), 0.3)


def outside(interval: tuple[float, float] | None, truth: float) -> bool:
    return interval is not None and not interval[0] <= truth <= interval[1]


def image_pairs(rng: Generator) -> st.ImagePairs:
    """Two classifiers of equal accuracy, 90 %, that agree on all but 10 % of 2,000 images."""
    hard = rng.random(2000) < 0.2
    first, second = (~hard | (rng.random(2000) < 0.5) for _ in range(2))
    found = st.compare_images(first.tolist(), second.tolist())
    assert found is not None
    return found


def image_bootstrap_misses(rng: Generator) -> bool:
    found = image_pairs(rng)
    return found.low is not None and found.high is not None and outside((found.low, found.high), 0.0)


# --- rules for the number of seeds ------------------------------------------------------------------------------------


def until(half: float, first: int, most: int, rng: Generator, effects: tuple[float, ...] = (0.0,)) -> list[Differences]:
    """The differences of each arm when --until `half` --max-seeds `most` has ended; the widest arm decides."""
    arms = draw(rng, most, *effects)
    needed = [st.seeds_until(d[:first], half) or first for d in arms]
    return [d[: min(most, max(needed))] for d in arms]


def until_p(first: int, differences: Differences) -> float | None:
    e = st.two_stage(differences[:first], differences[first:])
    return st.t_test(e) if e else None


def until_any(half: float, first: int, most: int, arms: int, rng: Generator) -> bool:
    ended = until(half, first, most, rng, (0.0,) * arms)
    return any(significant(p) for p in st.holm([until_p(first, d) for d in ended]))


def narrow_enough(half: float, first: int, most: int, rng: Generator) -> bool:
    """The ordinary t-test, when seeds are added one by one until the ordinary interval is narrow."""
    (d,) = draw(rng, most, 0.0)
    for n in range(first, most + 1):
        e = st.estimate(d[:n])
        if e and (st.t_interval(e)[1] - e.mean <= half or n == most):
            return significant(st.t_test(e))
    return False


def peeking(first: int, most: int, rng: Generator) -> bool:
    """The ordinary t-test, when seeds are added one by one until p < 0.05."""
    (d,) = draw(rng, most, 0.0)
    return any(significant(t_p(d[:n])) for n in range(first, most + 1))


# --- cases ------------------------------------------------------------------------------------------------------------


def attainable(n: int) -> float:
    """The exact false-positive rate in per cent of the sign-flip test on n differences without ties."""
    return 100 * max(k for k in range(0, 2**n, 2) if k / 2**n < st.SIGNIFICANT) / 2**n


def flips(n: int) -> Case:
    exact = attainable(n)
    expected = (max(0.0, exact - 1), exact + 1 if exact else 0.0)
    return Case(
        f"sign-flip, {n} seeds", partial(one_arm, st.sign_flip, n, 0.0), expected, f"exact: {exact:.2f} (discrete)"
    )


def promised(n: int, alpha: float = st.SIGNIFICANT) -> float:
    difference = st.smallest_difference(SPREAD, n, alpha)
    assert difference is not None
    return difference


IMAGE = 100 / 359  # points, one image of the first version of the digits
N_FOR_04 = st.seeds_for(0.4, SPREAD) or 0
POWER_AT_04 = 100 * st.t_power(0.4, SPREAD, N_FOR_04)
CASES = {
    "False positives": [
        *(Case(f"paired t, {n} seeds", partial(one_arm, t_p, n, 0.0)) for n in (3, 5, 10)),
        Case("paired t, 5 seeds, scores in steps of 0.28", partial(one_arm, t_p, 5, 0.0, step=IMAGE), (0, 6)),
        *map(flips, (5, 6, 8, 10, 14)),
        *(Case(f"equivalence at its margin, {n} seeds", partial(equivalent, n, 1.0, 1.0)) for n in (5, 10)),
        Case(
            "equivalence at a margin of 0.2, 5 seeds", partial(equivalent, 5, 0.2, 0.2), (0, 6), "too few seeds for it"
        ),
        *(Case(f"any of {ARMS} arms, paired t, Holm, {n} seeds", partial(any_arm, t_p, n), (0, 6)) for n in (5, 10)),
        Case(f"any of {ARMS} arms, sign-flip, Holm, 10 seeds", partial(any_arm, st.sign_flip, 10), (0, 6)),
        Case("McNemar, 2,000 images", lambda rng: significant(image_pairs(rng).p), (2, 6), "discrete: at most 5"),
    ],
    "False positives of --until": [
        *(
            Case(f"±{half:g}, first {first} seeds, at most {most}", partial(until_any, half, first, most, 1))
            for half, first, most in (
                (1.0, 5, 40),
                (0.5, 5, 40),
                (0.3, 5, 40),
                (0.3, 5, 10),
                (0.5, 3, 40),
                (0.3, 10, 40),
            )
        ),
        Case(f"±0.5, first 5 seeds, at most 40, any of {ARMS} arms", partial(until_any, 0.5, 5, 40, ARMS), (0, 6)),
    ],
    "False positives of what --until avoids": [
        Case("seeds added until the t-interval is ±0.5", partial(narrow_enough, 0.5, 3, 40), (6, 100)),
        Case("seeds added until p < 0.05, from 3 to 15", partial(peeking, 3, 15), (10, 100)),
    ],
    "Power": [
        *(
            Case(f"paired t, {n} seeds, difference {promised(n):.2f}", partial(one_arm, t_p, n, promised(n)), (75, 85))
            for n in (3, 5, 10, 20)
        ),
        Case(
            f"paired t, {N_FOR_04} seeds for 0.40",
            partial(one_arm, t_p, N_FOR_04, 0.4),
            (POWER_AT_04 - 5, POWER_AT_04 + 5),
        ),
        Case(
            f"paired t, Holm, 8 seeds, one of {ARMS} arms with {promised(8, 0.05 / ARMS):.2f}",
            partial(first_arm, t_p, 8, promised(8, st.SIGNIFICANT / ARMS)),
            (75, 85),
        ),
        *(
            Case(
                f"sign-flip, {n} seeds, difference {promised(n):.2f}",
                partial(one_arm, st.sign_flip, n, promised(n)),
                (50, 85),
                "the plan states the power of t",
            )
            for n in (6, 8, 10, 14)
        ),
    ],
    "95 % intervals that miss": [
        *(Case(f"t, {n} seeds", partial(t_misses, n)) for n in (5, 10)),
        *(Case(f"BCa, {n} seeds", partial(bootstrap_misses, n), (4, 14), "too narrow") for n in (8, 12, 20)),
        Case("bootstrap over 2,000 images", image_bootstrap_misses),
    ],
}


def rates(studies: int, cases: list[Case]) -> list[float]:
    """The share of each case's event in per cent; every case has random numbers of its own."""
    made = []
    for case in cases:
        rng = np.random.default_rng([*case.what.encode()])
        made.append(100 * sum(case.study(rng) for _ in range(studies)) / studies)
    return made


def seeds_taken(studies: int) -> list[tuple[str, float, float]]:
    """For the cases of --until: how many seeds it takes on average, and how often --max-seeds ended it, in per cent."""
    made = []
    for half, first in ((1.0, 5), (0.5, 5), (0.3, 5), (0.3, 10)):
        rng = np.random.default_rng(0)
        counts = [len(until(half, first, 400, rng)[0]) for _ in range(studies)]
        made.append((f"±{half:g}, first {first} seeds", float(np.mean(counts)), float(np.quantile(counts, 0.9))))
    return made


def expectation(case: Case) -> str:
    low, high = (f"{bound:.3g}" for bound in case.expected)
    return f"above {low}" if high == "100" else f"{low} to {high}"


def main() -> int:
    found = {title: rates(STUDIES, cases) for title, cases in CASES.items()}
    lines = [
        f"Shares of {STUDIES:,} simulated studies in per cent, with a standard deviation of {SPREAD} points between "
        "paired differences (tests/simulations/error_rates.py; docs/statistics.md)."
    ]
    for title, cases in CASES.items():
        lines += ["", f"## {title}", "", "| | % | expected | |", "| --- | ---: | ---: | --- |"]
        lines += [
            f"| {case.what} | {rate:.2f} | {expectation(case)} | {case.remark} |"
            for case, rate in zip(cases, found[title], strict=True)
        ]
    lines += ["", "## Seeds that --until takes", "", "| | mean | nine of ten at most |", "| --- | ---: | ---: |"]
    lines += [f"| {what} | {mean:.1f} | {most:.0f} |" for what, mean, most in seeds_taken(STUDIES)]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "error_rates.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with (RESULTS / "error_rates.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["table", "case", "studies", "per_cent", "expected_from", "expected_to"])
        for title, cases in CASES.items():
            for case, rate in zip(cases, found[title], strict=True):
                writer.writerow([title, case.what, STUDIES, f"{rate:.2f}", *(f"{x:.2f}" for x in case.expected)])
    wrong = [
        f"{title}, {case.what}: {rate:.2f} %, expected {expectation(case)}"
        for title, cases in CASES.items()
        for case, rate in zip(cases, found[title], strict=True)
        if not case.expected[0] <= rate <= case.expected[1]
    ]
    print("\n".join(wrong) or "All as expected.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
