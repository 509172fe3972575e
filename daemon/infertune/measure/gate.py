# SPDX-License-Identifier: Apache-2.0
"""Whether another server still gives the answers of a reference: pure judgement (answers.py asks).

That two servers say the same, token by token, accepts; that they do not refuses nothing: sums made
in another order turn a near tie round (flash attention off, another batch size).  So there are
gates, each asked only where those before it do not decide:

    G0  the reference says the same again, in a new process
    G1  the other server says the same: accepted
    G2  wherever it first differs, each token is among the TOP of the other server
    G3  the log-probabilities moved no more than what is harmless moves them here, twice over
    G4  it does not solve fewer closed items

G3 and G4 are for what changes numbers on purpose: another type of KV cache, a drafter, another
file.  G2 is vLLM's ``check_logprobs_close`` (tests/models/utils.py), asked at later places, too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from statistics import fmean
from typing import Literal

from infertune.base.records import dataclass
from infertune.measure.answers import TOP, Answer, Followed, Reference, Step, Stretch, difference

Word = Literal["pass", "refused", "cannot judge", "not asked"]

FACTOR = 2.0
"""How much more than what is harmless moves them a change may move log-probabilities."""
LEAST_FLOOR = (0.01, 0.1)
"""Mean and 99th percentile, in nats, below which no floor is taken: where a batch of another size
changes nothing, twice nothing would refuse everything."""
SAME_TOP = 0.95
"""Least share of places with the same best token."""
LEAST_SOLVED = 10
"""Closed items a model must solve for their number to say anything."""
WORSE = 0.05
"""Level of McNemar's one-sided exact test (McNemar 1947)."""
MOST_LOST = 2
"""Closed items that may be lost, less those that are won."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one gate says."""

    gate: str
    word: Word
    why: str
    """For people: what was found."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a server first leaves the reference's text."""

    prefix: int
    """Of the reference's answers, from 0."""
    at: int
    """Token of the answer, from 0."""
    wanted: str
    said: str
    wanted_rank: int | None
    """Of the reference's token among the other server's best, from 1; None: not among them."""
    said_rank: int | None
    """Of the other server's token among the reference's best."""

    @property
    def close(self) -> bool:
        """Whether each server had the other's token among its best."""
        return self.wanted_rank is not None and self.said_rank is not None


@dataclass(frozen=True, slots=True)
class Drift:
    """How far log-probabilities of the reference's tokens moved, in nats."""

    places: int
    """Where they could be compared: the text before was the same."""
    mean: float
    p99: float
    same_top: float
    """Share of places with the same best token."""


# -- what was found -----------------------------------------------------------------------


def differences(reference: Reference, followed: Followed) -> list[Difference]:
    """Every place where a stretch first leaves the reference's text."""
    pairs = zip(reference.answers, followed, strict=False)
    return [
        found
        for prefix, (answer, stretches) in enumerate(pairs)
        for found in differences_of(answer, stretches, prefix)
    ]


def differences_of(
    answer: Answer, stretches: Sequence[Stretch], prefix: int = 0
) -> list[Difference]:
    """The same of one answer."""
    found = []
    for stretch in stretches:
        at = difference(answer, stretch)
        if at is None:
            continue
        wanted, said = answer.steps[at], stretch.steps[at - stretch.at]
        # The token of a draft comes without a list: the same place was asked again without one.
        listed = said if said.top else _asked_again(stretches, at) or said
        found.append(
            Difference(
                prefix,
                at,
                wanted.text,
                said.text,
                _rank(listed, wanted.token),
                _rank(wanted, said.token),
            )
        )
    return found


def far(answer: Answer, stretches: Sequence[Stretch]) -> bool:
    """Whether one answer already refuses a server."""
    return not all(each.close for each in differences_of(answer, stretches))


def drift(reference: Reference, followeds: Collection[Followed]) -> Drift | None:
    """How far the reference's tokens moved in all of these; None where nothing could be compared.

    Behind a difference the texts are no longer the same, and nothing is compared.
    """
    moved, same, places = [], 0, 0
    for followed in followeds:
        for ours, theirs in _places(reference, followed):
            places += 1
            same += ours.token == theirs.token
            if (found := _moved(ours, theirs)) is not None:
                moved.append(found)
    if not moved:
        return None
    moved.sort()
    p99 = moved[min(len(moved) - 1, math.ceil(0.99 * len(moved)) - 1)]
    return Drift(places, fmean(moved), p99, same / places)


def floor(drifts: Collection[Drift]) -> Drift:
    """The most that harmless changes moved, and not less than LEAST_FLOOR."""
    return Drift(
        max((each.places for each in drifts), default=0),
        max((each.mean for each in drifts), default=0.0),
        max((each.p99 for each in drifts), default=0.0),
        min((each.same_top for each in drifts), default=1.0),
    )


def _places(reference: Reference, followed: Followed) -> Iterator[tuple[Step, Step]]:
    """The reference's and the server's step wherever the text before them is the same."""
    for answer, stretches in zip(reference.answers, followed, strict=False):
        for stretch in stretches:
            end = difference(answer, stretch)
            last = stretch.at + len(stretch.steps) - 1 if end is None else end
            for at in range(stretch.at, last + 1):
                yield answer.steps[at], stretch.steps[at - stretch.at]


def _moved(ours: Step, theirs: Step) -> float | None:
    """How far the log-probability of the reference's token moved; None where one does not tell."""
    before = ours.logprob(ours.token)
    if before is None or not theirs.top:
        return None
    after = theirs.logprob(ours.token)
    if after is None:
        # Below the last of the list: at least so far.
        after = min(before, theirs.top[-1][1])
    return abs(after - before)


def _asked_again(stretches: Sequence[Stretch], at: int) -> Step | None:
    return next((each.steps[0] for each in stretches if each.at == at and each.steps[0].top), None)


def _rank(step: Step, token: int) -> int | None:
    return next((rank for rank, (each, _) in enumerate(step.top, 1) if each == token), None)


# -- the gates ----------------------------------------------------------------------------


def itself(reference: Reference, again: Sequence[Followed]) -> Verdict:
    """G0: whether the reference says the same in new processes."""
    same, asked = _same(reference, again)
    gaps = [each for followed in again for each in differences(reference, followed)]
    if not _whole(reference, again) and not gaps:
        return Verdict("G0 itself", "cannot judge", "it was not asked again")
    if any(not each.close for each in gaps):
        why = f"it does not agree with itself: {_described(gaps)}"
        return Verdict("G0 itself", "cannot judge", why)
    if same < asked:
        why = f"{same} of {asked} answers are the same in a new process; the rest are near ties"
        return Verdict("G0 itself", "pass", why)
    return Verdict("G0 itself", "pass", f"{asked} of {asked} answers are the same in a new process")


def identical(reference: Reference, followeds: Sequence[Followed]) -> Verdict:
    """G1: whether a server says the same, which accepts it."""
    same, asked = _same(reference, followeds)
    word: Word = "pass" if same == asked and _whole(reference, followeds) else "not asked"
    return Verdict("G1 identical", word, f"{same} of {asked} answers are the same, token by token")


def near(reference: Reference, followeds: Sequence[Followed]) -> Verdict:
    """G2: whether a server differs at near ties only."""
    found = [each for followed in followeds for each in differences(reference, followed)]
    outside = [each for each in found if not each.close]
    if outside:
        return Verdict("G2 near ties", "refused", _described(outside))
    if not _whole(reference, followeds):
        return Verdict("G2 near ties", "cannot judge", "not every answer was asked for")
    why = f"{len(found)} differences, each among the {TOP} best of both"
    return Verdict("G2 near ties", "pass", why)


def numbers(changed: Drift | None, harmless: Drift | None) -> Verdict:
    """G3: whether log-probabilities moved no more than what is harmless moves them, twice over."""
    gate = "G3 numbers"
    if changed is None or harmless is None:
        return Verdict(gate, "cannot judge", "the servers tell no log-probabilities to compare")
    mean = FACTOR * max(harmless.mean, LEAST_FLOOR[0])
    p99 = FACTOR * max(harmless.p99, LEAST_FLOOR[1])
    why = (
        f"log p moved {changed.mean:.3f} in the mean (at most {mean:.3f}), "
        f"p99 {changed.p99:.2f} ({p99:.2f}); same best token at {changed.same_top:.1%} "
        f"of {changed.places}"
    )
    good = changed.mean <= mean and changed.p99 <= p99 and changed.same_top >= SAME_TOP
    return Verdict(gate, "pass" if good else "refused", why)


def tasks(before: Sequence[bool], after: Sequence[bool]) -> Verdict:
    """G4: whether a server solves as many closed items.  Both were asked the same."""
    gate = "G4 items"
    if len(before) != len(after) or sum(before) < LEAST_SOLVED:
        why = f"the reference solves {sum(before)} of {len(before)}: fewer than {LEAST_SOLVED}"
        return Verdict(gate, "cannot judge", f"{why} say nothing")
    lost = sum(was and not now for was, now in zip(before, after, strict=True))
    won = sum(now and not was for was, now in zip(before, after, strict=True))
    chance = mcnemar(lost, won)
    why = (
        f"{sum(after)} of {len(after)} solved, {sum(before)} by the reference: {lost} lost, "
        f"{won} won (p = {chance:.2f})"
    )
    worse = chance <= WORSE or lost - won > MOST_LOST
    return Verdict(gate, "refused" if worse else "pass", why)


def mcnemar(lost: int, won: int) -> float:
    """Chance of at least so many losses among the items that changed, if nothing got worse."""
    changed = lost + won
    worse: int = sum(math.comb(changed, each) for each in range(lost, changed + 1))
    return worse / float(2**changed)


def accepted(verdicts: Sequence[Verdict]) -> bool:
    """Whether gates let a server through: G0, and G1 or all that were asked after it."""
    words = {each.gate[:2]: each.word for each in verdicts}
    if words.get("G0") != "pass":
        return False
    if words.get("G1") == "pass":
        return True
    rest = [word for gate, word in words.items() if gate not in ("G0", "G1")]
    return "G2" in words and all(word in ("pass", "not asked") for word in rest)


def _same(reference: Reference, followeds: Sequence[Followed]) -> tuple[int, int]:
    """How many answers are the same, and how many there are."""
    answers = [
        (answer, stretches)
        for followed in followeds
        for answer, stretches in zip(reference.answers, followed, strict=False)
    ]
    same = sum(not differences_of(answer, stretches) for answer, stretches in answers)
    return same, len(answers)


def _whole(reference: Reference, followeds: Sequence[Followed]) -> bool:
    """Whether every answer was asked for once at least, and each to its end."""
    return max(map(len, followeds), default=0) == len(reference.answers) and all(
        stretches and len(stretches[0].steps) == len(answer.steps)
        for followed in followeds
        for answer, stretches in zip(reference.answers, followed, strict=False)
    )


def _described(found: Sequence[Difference]) -> str:
    first = found[0]
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"prompt {first.prefix + 1}, token {first.at + 1}: {first.said!r} instead of "
        f"{first.wanted!r}, not among the {TOP} best of both{more}"
    )
