# SPDX-License-Identifier: Apache-2.0
"""What pairs of measurements allow to say: rule S.

A pair is one measurement of each of two arms, in random order.  Under no effect each difference is
then as likely to be turned round, whatever the noise is, and the signed-rank test is exact
(Wilcoxon 1945; interval from Walsh averages: Hollander, Wolfe, Chicken, Nonparametric Statistical
Methods, 3.1-3.3).  It is looked at LOOKS times, each at a quarter of 5 %, so that looking often
does not make an effect (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from infertune.base.records import dataclass

LOOKS = (8, 12, 16, 24)
"""Numbers of pairs at which a verdict is asked for.  With fewer than 8 no interval exists at ALPHA:
even if all differences have one sign, that happens by chance in 1 of 64 cases at 7."""
ALPHA = 0.05 / len(LOOKS)
MINIMUM_EFFECT = 0.03
"""Smallest relative change worth a verdict."""

HELPS = "helps"
HARMS = "harms"
NO_EFFECT = "no effect shown"
UNDECIDED = "cannot decide"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found at one look; changes are relative, and positive is better."""

    word: str
    """One of HELPS, HARMS, NO_EFFECT, UNDECIDED."""
    pairs: int
    estimate: float | None = None
    """Hodges-Lehmann estimate; None without a pair."""
    low: float | None = None
    high: float | None = None
    """Ends of the exact interval; None where there are too few pairs for one."""


def gain(baseline: float, other: float, *, lower_is_better: bool) -> float:
    """Log of the ratio of two measurements, positive where the other is better."""
    ratio = math.log(other / baseline)
    return -ratio if lower_is_better else ratio


def walsh_averages(values: Sequence[float]) -> list[float]:
    """The mean of every two values, and of each with itself, in order."""
    return sorted((first + second) / 2 for at, first in enumerate(values) for second in values[at:])


def signed_rank_counts(pairs: int) -> list[int]:
    """By rank sum: how many of the 2**pairs sign patterns give it."""
    counts = [1]
    for rank in range(1, pairs + 1):
        longer = counts + [0] * rank
        for total, count in enumerate(counts):
            longer[total + rank] += count
        counts = longer
    return counts


def interval_rank(pairs: int, alpha: float) -> int | None:
    """Which Walsh average from either end bounds the interval (1 is the outermost).

    None where no interval reaches the level: too few pairs.
    """
    bound, seen, rank = alpha / 2 * 2**pairs, 0, 0
    for count in signed_rank_counts(pairs):
        seen += count
        if seen > bound:
            break
        rank += 1
    return rank or None


def judge(gains: Sequence[float], alpha: float = ALPHA) -> Verdict:
    """The verdict on these pairs (logs of ratios, see ``gain``), at one look."""
    if not gains:
        return Verdict(UNDECIDED, 0)
    averages = walsh_averages(gains)
    middle = len(averages) // 2
    estimate = math.expm1((averages[middle] + averages[-middle - 1]) / 2)
    rank = interval_rank(len(gains), alpha)
    if rank is None:
        return Verdict(UNDECIDED, len(gains), estimate)
    low, high = math.expm1(averages[rank - 1]), math.expm1(averages[-rank])
    word = UNDECIDED
    if low > 0 and estimate >= MINIMUM_EFFECT:
        word = HELPS
    elif high < 0 and estimate <= -MINIMUM_EFFECT:
        word = HARMS
    elif low >= -MINIMUM_EFFECT and high <= MINIMUM_EFFECT:
        word = NO_EFFECT
    return Verdict(word, len(gains), estimate, low, high)


def look(gains: Sequence[float]) -> Verdict | None:
    """The verdict where one is due now; None where more pairs are to be measured first.

    At the last look it may be UNDECIDED, and stays so.
    """
    if len(gains) not in LOOKS:
        return None
    found = judge(gains)
    return found if found.word != UNDECIDED or len(gains) == LOOKS[-1] else None


def smallest_effect(gains: Sequence[float]) -> float | None:
    """The change that pairs as noisy as these can tell from none; None where too few.

    Twice the half width of their interval: an effect of that size is found about always.
    """
    found = judge(gains)
    if found.low is None or found.high is None:
        return None
    return max(MINIMUM_EFFECT, found.high - found.low)
