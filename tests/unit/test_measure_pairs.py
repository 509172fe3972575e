# SPDX-License-Identifier: Apache-2.0
"""Pairs: the coin, what is thrown away blindly, when it ends, and going on after a kill."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping

import pytest

from infertune.base.records import replace
from infertune.measure import pairs
from infertune.measure.conditions import Between
from infertune.measure.pairs import (
    PRIMARY,
    Comparison,
    Found,
    Runner,
    Sample,
    Taken,
    given_up,
    line_of,
    order,
    sample_of,
)
from infertune.measure.statistics import HARMS, HELPS, LOOKS, NO_EFFECT, UNDECIDED

SEED = 20261129
CALM = Between(
    foreign_cpu=0.01, stolen=0.0, stalled={"cpu": 0.02}, major_faults=0, cpu_khz=4e6, gpu_hz=None,
    throttled=False, others_on_gpu=0, others_in_server=0, busiest=(),
)  # fmt: skip
BUSY = replace(CALM, foreign_cpu=0.4, busiest=("make 0.80",))
KNOB = Comparison("knob", ("without", "with"))

Noise = Iterator[tuple[float, bool]]
"""Factors on the speed of one sample after the other, and whether the machine was seen busy."""


def quiet(rng: random.Random) -> Noise:
    while True:
        yield math.exp(rng.gauss(0, 0.02)), False


def drift(rng: random.Random) -> Noise:
    """Each pair begins on a machine that has cooled down, and its second half is 5 % slower."""
    for at, (factor, _) in enumerate(quiet(rng)):
        yield factor * (0.95 if at % 2 else 1), False


def bursts(rng: random.Random, seen: float = 0.95) -> Noise:
    """A fifth of the samples is 1.2 to 8 times slower, in runs; nearly all are noticed."""
    busy = False
    for factor, _ in quiet(rng):
        busy = rng.random() < (0.7 if busy else 0.075)
        slow = math.exp(rng.uniform(math.log(1.2), math.log(8))) if busy else 1
        yield factor / slow, busy and rng.random() < seen


def machine(noise: Noise, effect: float = 1.0) -> pairs.Take:
    """Samples of a machine on which the last arm is ``effect`` times as fast as the first."""

    def take(_: Comparison, __: int, arm: int) -> Taken:
        factor, busy = next(noise)
        speed = 50 * factor * (effect if arm else 1)
        return Taken({PRIMARY: speed, "ttft_s": 1 / speed}, BUSY if busy else CALM, 2.0)

    return take


def compare(take: pairs.Take, seed: str = "1", comparison: Comparison = KNOB) -> Found:
    return Runner(seed, take, lambda _: None).run(comparison, lambda: True)


def share(
    runs: int,
    words: set[str],
    noise: Callable[[random.Random], Noise],
    effect: float = 1.0,
) -> float:
    """In which share of runs the verdict is one of these."""
    rng = random.Random(SEED)
    found = (compare(machine(noise(rng), effect), str(at)) for at in range(runs))
    return sum(one.verdict.word in words for one in found) / runs


# -- truth and power -----------------------------------------------------------------------


@pytest.mark.parametrize("noise", [quiet, drift, bursts])
def test_nothing_is_seldom_called_something(noise: Callable[[random.Random], Noise]) -> None:
    assert share(2000, {HELPS, HARMS}, noise) <= 0.05


def test_ten_percent_are_found() -> None:
    for noise in (quiet, bursts):
        assert share(400, {HARMS}, noise, 0.9) >= 0.95


def test_without_the_coin_drift_is_an_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "order", lambda *_: [0, 1])
    assert share(100, {HELPS, HARMS}, drift) > 0.9


def test_without_rejection_there_is_no_power(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "contamination", lambda *_, **__: [])
    assert share(200, {HARMS}, bursts, 0.9) < 0.8


def test_a_coin_can_be_thrown_again() -> None:
    orders = [order("7", "knob", block, 2) for block in range(1000)]
    assert orders == [order("7", "knob", block, 2) for block in range(1000)]
    assert 440 < sum(first == [0, 1] for first in orders) < 560
    assert orders != [order("8", "knob", block, 2) for block in range(1000)]
    assert {tuple(order("7", "knob", block, 3)) for block in range(100)} == {
        (0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0),
    }  # fmt: skip


# -- rejection -------------------------------------------------------------------------------


class Watched(Mapping[str, float]):
    """Figures that note when somebody looks at them."""

    def __init__(self, seen: list[str]) -> None:
        self._seen = seen

    def __getitem__(self, name: str) -> float:
        self._seen.append("looked at a figure")
        return {PRIMARY: 50.0}[name]

    def __iter__(self) -> Iterator[str]:
        return iter([PRIMARY])

    def __len__(self) -> int:
        return 1


def test_it_is_decided_before_a_figure_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def decide(found: object, *_: object, **__: object) -> list[str]:
        assert isinstance(found, Between)
        seen.append("decided")
        return ["for once"] if seen.count("decided") == 1 else []

    monkeypatch.setattr(pairs, "contamination", decide)
    found = compare(lambda *_: Taken(Watched(seen), CALM, 1.0))
    assert found.discarded == 1
    assert seen[: 2 * 9] == ["decided"] * 2 * 9  # 8 pairs that count, and the one that does not


def test_one_half_takes_its_pair_with_it() -> None:
    halves = iter([(1.0, False), (8.0, True)] + [(1.0, False)] * 100)
    found = compare(machine(halves))
    assert found.discarded == 1
    assert found.verdict.word == NO_EFFECT
    assert found.verdict.pairs == len(found.blocks) == 8
    assert found.seconds == 2.0 * 18


def test_an_answer_that_is_none_does_not_count() -> None:
    cut = iter([("3 tokens came",)])
    found = compare(
        lambda *_: Taken({} if (why := next(cut, ())) else {PRIMARY: 50.0}, CALM, 1.0, why)
    )
    assert (found.discarded, found.verdict.pairs) == (1, 8)


def test_a_busy_machine_is_not_measured_for_ever() -> None:
    taken = []
    found = Runner("1", machine(iter([(1.0, True)] * 999)), taken.append).run(KNOB, lambda: True)
    assert found.verdict.word == UNDECIDED
    assert found.reason == "the machine was too busy: others took 40% of the CPUs (make 0.80)"
    assert len(taken) == 2 * LOOKS[-1]
    assert all(each.why_not for each in taken)


def test_usual_is_what_the_baseline_showed() -> None:
    runner = Runner("1", machine(quiet(random.Random(1))), lambda _: None)
    runner.learn(runner.run(replace(KNOB, most=8), lambda: True))
    slow = replace(CALM, cpu_khz=3e6)
    runner.take = lambda *_: Taken({PRIMARY: 50}, slow, 1)
    found = runner.run(replace(KNOB, name="next"), lambda: True)
    assert found.reason == "the machine was too busy: the CPU's clock was at 75% of the usual"


# -- the end ---------------------------------------------------------------------------------


def test_no_time_is_no_verdict() -> None:
    left = iter([True] * 9 + [False])
    found = Runner("1", machine(quiet(random.Random(1)), 0.5), lambda _: None).run(
        replace(KNOB, name="x"), lambda: next(left)
    )
    assert found.verdict.word == HARMS  # there was time for the first look
    left = iter([True] * 7 + [False])
    found = Runner("1", machine(quiet(random.Random(1)), 0.5), lambda _: None).run(
        KNOB, lambda: next(left)
    )
    assert (found.verdict.word, found.verdict.pairs) == (UNDECIDED, 7)
    assert found.reason == "no time was left for more pairs"
    assert found.verdict.estimate == pytest.approx(-0.5, abs=0.05)


def test_the_end_of_the_time_is_no_look() -> None:
    """After 9 pairs the interval would say so; to look then, too, is one look more than counted."""
    blocks = iter([0.98, *[2.0] * 8])  # after 8 of them one that is odd still decides nothing

    def take(_: Comparison, __: int, arm: int) -> Taken:
        return Taken({PRIMARY: 50.0 * (factors[-1] if arm else 1)}, CALM, 1.0)

    factors: list[float] = []

    def time_left() -> bool:
        factors.append(next(blocks, 0.0))
        return factors[-1] > 0

    found = Runner("1", take, lambda _: None).run(KNOB, time_left)
    assert (found.verdict.word, found.verdict.pairs) == (UNDECIDED, 9)
    assert (found.verdict.low or 0) > 0
    assert found.reason == "no time was left for more pairs"


def test_the_baseline_against_itself_has_one_look() -> None:
    found = compare(machine(iter([(1.0, False), (1.4, False)] * 8)), "1", replace(KNOB, most=8))
    assert (found.verdict.word, found.verdict.pairs) == (UNDECIDED, 8)


def test_three_arms_are_compared_two_by_two() -> None:
    speeds = (50.0, 10.0, 45.0)
    stress = Comparison("stress", ("quiet", "bare", "profile"), 1, on_purpose=frozenset({"cpu"}))
    found = compare(lambda _, __, arm: Taken({PRIMARY: speeds[arm]}, CALM, 1), "1", stress)
    assert found.verdict.estimate == pytest.approx(3.5)
    assert pairs.gains(found.blocks, arm=2) == [pytest.approx(math.log(0.9))] * 8


# -- after a kill ------------------------------------------------------------------------------


class Killed(BaseException):
    """What no code of ours catches, as a SIGKILL."""


def test_a_killed_run_goes_on_as_if_nothing_had_been() -> None:
    """Wherever it is killed; what a sample says depends on what is measured only."""

    def take(comparison: Comparison, block: int, arm: int) -> Taken:
        rng = random.Random(f"{comparison.name}/{block}/{arm}")
        busy = rng.random() < 0.2
        return Taken({PRIMARY: rng.gauss(50, 4)}, BUSY if busy else CALM, 1.0)

    log: list[str] = []
    whole = Runner("5", take, lambda each: log.append(json.dumps(line_of(each)))).run(
        KNOB, lambda: True
    )
    assert whole.discarded
    for cut in range(len(log) + 1):
        kept = [one for line in log[:cut] if (one := sample_of(json.loads(line)))]
        assert len(kept) == cut
        asked: list[tuple[int, int]] = []

        def again(comparison: Comparison, block: int, arm: int) -> Taken:
            asked.append((block, arm))  # noqa: B023 - called within this turn only
            return take(comparison, block, arm)

        assert Runner("5", again, lambda _: None, kept).run(KNOB, lambda: True) == whole
        # Half a pair is no pair: both halves are of one moment.
        assert len(asked) == len(log) - cut + cut % 2


def test_a_line_of_somebody_else_is_left_out() -> None:
    sample = Sample("knob", 0, 1, Taken({PRIMARY: 5.0}, CALM, 1.0), ("busy",))
    line = json.loads(json.dumps(line_of(sample)))
    assert sample_of(line) == sample
    for broken in ({}, {**line, "taken": 3}, {**line, "block": "x"}, {**line, "why_not": None}):
        assert sample_of(broken) is None
    line["taken"]["between"]["speed"] = 3
    assert sample_of(line) is None


def test_what_cannot_go_on_says_why() -> None:
    samples = [
        Sample("knob", block, arm, Taken({PRIMARY: 50.0}, CALM, 1.0))
        for block in range(3)
        for arm in range(2)
    ]
    found = given_up(KNOB, samples, "the server did not start")
    assert (found.verdict.word, found.verdict.pairs) == (UNDECIDED, 3)
    assert found.reason == "the server did not start"
