# SPDX-License-Identifier: Apache-2.0
"""Rule S: exact where tables are, rarely wrong where the machine is noisy."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import pytest

from infertune.measure.statistics import (
    HARMS,
    HELPS,
    LOOKS,
    NO_EFFECT,
    UNDECIDED,
    Verdict,
    gain,
    interval_rank,
    judge,
    look,
    smallest_effect,
)

SEED = 20261129


@pytest.mark.parametrize(
    ("pairs", "alpha", "critical"),
    [
        # Largest rank sum that rejects, two-sided: Wilcoxon and Wilcox 1964.
        (6, 0.05, 0), (7, 0.05, 2), (8, 0.05, 3), (10, 0.05, 8), (12, 0.05, 13), (16, 0.05, 29),
        (20, 0.05, 52), (24, 0.05, 81), (8, 0.01, 0), (12, 0.01, 7), (16, 0.01, 19),
        (20, 0.01, 37), (24, 0.01, 61), (8, 0.02, 1), (16, 0.02, 23), (24, 0.02, 69),
    ],
)  # fmt: skip
def test_rank_is_that_of_the_tables(pairs: int, alpha: float, critical: int) -> None:
    assert interval_rank(pairs, alpha) == critical + 1


def test_too_few_pairs_have_no_interval() -> None:
    assert interval_rank(7, 0.0125) is None
    assert interval_rank(8, 0.0125) == 1
    assert judge([0.5] * 7) == Verdict(UNDECIDED, 7, pytest.approx(math.expm1(0.5)))
    assert judge([]) == Verdict(UNDECIDED, 0)
    assert smallest_effect([0.1] * 7) is None


def test_words() -> None:
    assert judge([math.log(1.1)] * 8).word == HELPS
    assert judge([math.log(0.9)] * 8).word == HARMS
    assert judge([math.log(1.01)] * 8).word == NO_EFFECT
    # Surely there, and too small to matter; or large and not sure.
    assert judge([0.02, 0.021, 0.04, 0.02, 0.021, 0.02, 0.02, 0.021]).word == UNDECIDED
    assert judge([0.2, -0.2, 0.3, 0.1, 0.2, -0.1, 0.3, 0.2]).word == UNDECIDED


def test_better_is_positive() -> None:
    assert gain(100, 90, lower_is_better=True) > 0
    assert gain(100, 90, lower_is_better=False) < 0


def test_a_verdict_is_asked_for_at_the_looks_only() -> None:
    assert look([0.1] * 9) is None
    assert look([0.1] * 8) is not None
    wild = [0.5, -0.5] * 12
    assert look(wild[:16]) is None
    last = look(wild)
    assert last is not None
    assert last.word == UNDECIDED


# -- simulated machines ---------------------------------------------------------------

Noise = Callable[[random.Random], Iterator[tuple[float, bool]]]
"""Factors on the time of one sample after the other, and whether it is contaminated."""


def quiet(rng: random.Random) -> Iterator[tuple[float, bool]]:
    while True:
        yield math.exp(rng.gauss(0, 0.02)), False


def drift(rng: random.Random) -> Iterator[tuple[float, bool]]:
    """A machine that gets 10 % slower as it gets warm, over 32 samples."""
    for at, (factor, _) in enumerate(quiet(rng)):
        yield factor * (1 + 0.1 * min(at / 32, 1)), False


def bursts(rng: random.Random) -> Iterator[tuple[float, bool]]:
    """A fifth of the samples is 1.2 to 8 times slower, in runs."""
    busy = False
    for factor, _ in quiet(rng):
        busy = rng.random() < (0.7 if busy else 0.075)
        yield factor * (math.exp(rng.uniform(math.log(1.2), math.log(8))) if busy else 1), busy


def run(rng: random.Random, noise: Noise, effect: float = 1.0, *, seen: float = 0.0) -> Verdict:
    """One comparison by rule S; ``seen``: which share of contaminated samples is noticed."""
    samples = noise(rng)
    gains: list[float] = []
    for _ in range(2 * LOOKS[-1]):
        times, bad = {}, False
        for arm in rng.sample("ab", 2):
            factor, contaminated = next(samples)
            times[arm] = factor * (effect if arm == "b" else 1)
            bad = bad or (contaminated and rng.random() < seen)
        if bad:
            continue
        gains.append(gain(times["a"], times["b"], lower_is_better=True))
        if found := look(gains):
            return found
    return judge(gains)


def one_after_the_other(rng: random.Random, noise: Noise) -> Verdict:
    """What tuners do: all samples of one arm, then all of the other."""
    samples = noise(rng)
    first, second = ([next(samples)[0] for _ in range(16)] for _ in "ab")
    return judge([gain(a, b, lower_is_better=True) for a, b in zip(first, second, strict=True)])


def share(runs: int, word: set[str], one: Callable[[random.Random], Verdict]) -> float:
    rng = random.Random(SEED)
    return sum(one(rng).word in word for _ in range(runs)) / runs


@pytest.mark.parametrize("noise", [quiet, drift, bursts])
def test_the_same_against_itself_is_seldom_called_different(noise: Noise) -> None:
    assert share(2000, {HELPS, HARMS}, lambda rng: run(rng, noise)) <= 0.05
    assert share(2000, {HELPS, HARMS}, lambda rng: run(rng, noise, seen=0.9)) <= 0.05


def test_one_after_the_other_would_not_pass() -> None:
    assert share(500, {HELPS, HARMS}, lambda rng: one_after_the_other(rng, drift)) > 0.5


def test_ten_percent_are_found() -> None:
    assert share(500, {HARMS}, lambda rng: run(rng, quiet, 1.1)) >= 0.95
    assert share(500, {HARMS}, lambda rng: run(rng, bursts, 1.1, seen=0.95)) >= 0.95
    assert share(500, {HARMS}, lambda rng: run(rng, bursts, 1.1)) < 0.8  # rejection is the power


def test_pairs_of_one_start_are_not_independent() -> None:
    """Why the unit is a start: two pairs of each of four starts take chance for an effect."""

    def clustered(rng: random.Random) -> Verdict:
        starts = [rng.gauss(0, 0.05) for _ in range(4)]
        return judge([start + rng.gauss(0, 0.005) for start in starts for _ in range(2)])

    def fresh(rng: random.Random) -> Verdict:
        return judge([rng.gauss(0, 0.05) + rng.gauss(0, 0.005) for _ in range(8)])

    assert share(2000, {HELPS, HARMS}, clustered) > 0.05
    assert share(2000, {HELPS, HARMS}, fresh) <= 0.02
