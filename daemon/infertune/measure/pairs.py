# SPDX-License-Identifier: Apache-2.0
"""One comparison: blocks of samples, each arm once in a block, in an order that a coin decides.

Nothing here starts a server or reads a clock: how a sample is taken and what time is left are
handed in.  What was taken is the whole state, so that a run that was killed goes on from its log,
and the same seed gives the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from infertune.base.records import asdict, dataclass, replace
from infertune.measure.conditions import Baseline, Between, contamination, usual
from infertune.measure.kept import made_of
from infertune.measure.statistics import LOOKS, UNDECIDED, Verdict, gain, judge, look

FIGURES: Mapping[str, bool] = {
    "decode_tps": False,
    "ttft_s": True,
    "start_s": True,
    "answer_s": True,
}
"""What a sample has: tokens per second after the first, seconds to the first token, to a server
that is ready, and to the whole answer; and whether less of it is better."""
PRIMARY = "decode_tps"
"""The figure that gets the verdict, where nothing else is said.  A verdict on each would be wrong
more often than is said."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is compared."""

    name: str
    """Unique within a run."""
    arms: tuple[str, ...]
    """The last is the one in question; one that is not held against it is measured beside it."""
    against: int = 0
    """Place of the arm that the last is held against."""
    most: int = LOOKS[-1]
    """Blocks after which it ends; as many may be thrown away."""
    figure: str = PRIMARY
    """What gets the verdict."""
    on_purpose: frozenset[str] = frozenset()
    """What this program makes scarce itself, in some arm: ``cpu``, ``memory``."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What came of measuring once."""

    figures: Mapping[str, float]
    between: Between
    seconds: float
    """That it took, with everything around it."""
    faults: tuple[str, ...] = ()
    """Why the answer is not what was asked for; not for its times."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of the log."""

    comparison: str
    block: int
    arm: int
    """Place in the comparison's arms."""
    taken: Taken
    why_not: tuple[str, ...] = ()
    """Why it does not count; empty where it does."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a comparison came to."""

    comparison: Comparison
    verdict: Verdict
    """Of the last arm against another (Comparison.against), by PRIMARY."""
    others: Mapping[str, Verdict]
    """The other figures: estimates and intervals, whose words are no verdicts."""
    blocks: Sequence[tuple[Taken, ...]]
    """Those that count."""
    discarded: int
    seconds: float
    """That all of it took, what was thrown away too."""
    reason: str | None = None
    """Why it cannot be decided, where there is more to say than that the interval is wide."""


Take = Callable[[Comparison, int, int], Taken]
"""Measures an arm (its place) of a block.  Raises Failed."""


def order(seed: str, comparison: str, block: int, arms: int) -> list[int]:
    """In which order the arms of a block are measured: a coin that can be thrown again."""

    def coin(arm: int) -> bytes:
        return hashlib.sha256(f"{seed}/{comparison}/{block}/{arm}".encode()).digest()

    return sorted(range(arms), key=coin)


@dataclass(slots=True)
class Runner:
    """Takes the samples of one run, comparison by comparison."""

    seed: str
    take: Take
    keep: Callable[[Sample], None]
    """Puts a sample into the log, before the next is taken."""
    earlier: Sequence[Sample] = ()
    """Samples of the same run from before it was killed."""
    busy: bool = False
    """Whether others may use the CPUs."""
    usual: Baseline | None = None
    """What is usual in this run: known after the baseline was measured against itself."""

    def run(self, comparison: Comparison, time_left: Callable[[], bool]) -> Found:
        """Measure until there is a verdict, or it is known that there will be none."""
        blocks = _whole_blocks(comparison, self.earlier)
        while (found := self._decided(comparison, blocks)) is None:
            if not time_left():
                return _undecided(comparison, blocks, "no time was left for more pairs")
            blocks.append(self._block(comparison, len(blocks)))
        return found

    def learn(self, found: Found) -> None:
        """Take what was usual in these samples as usual for the run."""
        self.usual = usual([each.between for block in found.blocks for each in block])

    def _decided(
        self, comparison: Comparison, blocks: Sequence[tuple[Sample, ...]]
    ) -> Found | None:
        good = _good(blocks)
        if len(blocks) - len(good) >= comparison.most:
            who = _who(blocks)
            return _undecided(comparison, blocks, f"the machine was too busy{who}")
        if len(good) not in (*LOOKS, comparison.most):
            return None
        seen = gains(good, comparison.figure, against=comparison.against)
        verdict = look(seen) if len(good) < comparison.most else judge(seen)
        return _found(comparison, blocks, verdict) if verdict else None

    def _block(self, comparison: Comparison, block: int) -> tuple[Sample, ...]:
        samples = {}
        for arm in order(self.seed, comparison.name, block, len(comparison.arms)):
            taken = self.take(comparison, block, arm)
            # Decided before anybody has looked at a figure, and by what cannot see one.
            why = contamination(
                taken.between, self.usual, busy=self.busy, on_purpose=comparison.on_purpose
            )
            samples[arm] = Sample(comparison.name, block, arm, taken, (*why, *taken.faults))
            self.keep(samples[arm])
        return tuple(samples[arm] for arm in sorted(samples))


def _whole_blocks(comparison: Comparison, samples: Iterable[Sample]) -> list[tuple[Sample, ...]]:
    """The blocks of a log, in order; one that was cut off is measured again, all of it."""
    found: dict[int, dict[int, Sample]] = {}
    for each in samples:
        if each.comparison == comparison.name and 0 <= each.arm < len(comparison.arms):
            found.setdefault(each.block, {})[each.arm] = each
    blocks: list[tuple[Sample, ...]] = []
    while len(arms := found.get(len(blocks), {})) == len(comparison.arms):
        blocks.append(tuple(arms[arm] for arm in sorted(arms)))
    return blocks


def _good(blocks: Sequence[tuple[Sample, ...]]) -> list[tuple[Taken, ...]]:
    """One sample that does not count takes its block with it."""
    return [
        tuple(each.taken for each in block)
        for block in blocks
        if not any(each.why_not for each in block)
    ]


def gains(
    blocks: Sequence[tuple[Taken, ...]], figure: str = PRIMARY, *, arm: int = -1, against: int = 0
) -> list[float]:
    """Of each block, how much better one arm was than another (see ``gain``)."""
    lower = FIGURES[figure]
    return [
        gain(block[against].figures[figure], block[arm].figures[figure], lower_is_better=lower)
        for block in blocks
        if figure in block[against].figures and figure in block[arm].figures
    ]


def _found(
    comparison: Comparison,
    blocks: Sequence[tuple[Sample, ...]],
    verdict: Verdict,
    reason: str | None = None,
) -> Found:
    good = _good(blocks)
    others = {
        name: gains(good, name, against=comparison.against)
        for name in FIGURES
        if name != comparison.figure
    }
    return Found(
        comparison=comparison,
        verdict=verdict,
        others={name: judge(values) for name, values in others.items() if values},
        blocks=good,
        discarded=len(blocks) - len(good),
        seconds=sum(each.taken.seconds for block in blocks for each in block),
        reason=reason,
    )


def _undecided(comparison: Comparison, blocks: Sequence[tuple[Sample, ...]], reason: str) -> Found:
    # At no look: whatever the pairs so far say, a verdict now would be one look more.
    so_far = judge(gains(_good(blocks), comparison.figure, against=comparison.against))
    return _found(comparison, blocks, replace(so_far, word=UNDECIDED), reason)


def given_up(comparison: Comparison, samples: Iterable[Sample], reason: str) -> Found:
    """A comparison that cannot go on, with what there is of it."""
    return _undecided(comparison, _whole_blocks(comparison, samples), reason)


def _who(blocks: Sequence[tuple[Sample, ...]]) -> str:
    """Why most samples were thrown away, in the words of the last one."""
    why = [each.why_not[0] for block in blocks for each in block if each.why_not]
    return f": {why[-1]}" if why else ""


# -- the log -----------------------------------------------------------------------------


def line_of(sample: Sample) -> dict[str, Any]:
    """A sample as it stands in the log."""
    return {**asdict(sample), "why_not": list(sample.why_not)}


def sample_of(line: Mapping[str, Any]) -> Sample | None:
    """A sample of the log; None for a line that is none of this version."""
    try:
        found = made_of(Sample, line)
    except ValueError:
        return None
    # Gains are logarithms of ratios.
    return found if all(each > 0 for each in found.taken.figures.values()) else None
