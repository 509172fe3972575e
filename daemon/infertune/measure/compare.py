# SPDX-License-Identifier: Apache-2.0
"""Asks two servers, as far as their verdict needs it (gate.py), one after the other.

The reference is asked without its prompt cache; the other server without and with it, and at the
number of slots that it is to serve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from infertune.base.errors import InfertuneError
from infertune.base.records import dataclass, replace
from infertune.measure import gate
from infertune.measure.answers import Followed, Reference, follow, refer, solve
from infertune.measure.arm import Arm, Serve
from infertune.measure.gate import Drift, Verdict
from infertune.measure.questions import PREFIXES

AGAIN = 2
"""Times that the reference is asked again, each in a new process."""
_CACHED = 8
"""Prompts that are asked with the prompt cache, too."""
_OTHER_UBATCH = ("32", "64")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Ground:
    """What other servers are judged by."""

    arm: Arm
    reference: Reference
    again: tuple[Followed, ...]
    harmless: Drift | None = None
    """How far what is harmless moves log-probabilities here; None where that was not asked yet."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one server."""

    verdicts: tuple[Verdict, ...]
    ground: Ground
    """As before, with what had to be asked for this one."""
    followed: tuple[Followed, ...] = ()
    solved: tuple[bool, ...] = ()

    @property
    def accepted(self) -> bool:
        return gate.accepted(self.verdicts)

    @property
    def decided(self) -> bool:
        """Whether it was accepted or refused; else the gates could not judge it."""
        return self.accepted or any(each.word == "refused" for each in self.verdicts)


def lay(
    serve: Serve,
    arm: Arm,
    say: Say,
    prefixes: Sequence[str] | None = None,
    again: int = AGAIN,
) -> Ground:
    """Ask the reference (PREFIXES, where none are given), and ask it again in new processes.

    Raises Failed and UsageError.
    """
    prefixes = prefixes or PREFIXES
    say(f"asking the reference: {len(prefixes)} prompts")
    with serve(arm) as ask:
        reference = refer(ask, prefixes, items=False)
    found = []
    for number in range(again):
        say(f"asking it again in a new process: {number + 1} of {again}")
        with serve(arm) as ask:
            found.append(follow(ask, reference, enough=gate.far))
    return Ground(arm, reference, tuple(found))


def judge(serve: Serve, ground: Ground, arm: Arm, *, numbers: bool, say: Say) -> Outcome:
    """Whether a server gives the reference's answers.

    ``numbers``: it computes something else on purpose.  Raises Failed and UsageError where it does
    not start or breaks off.
    """
    itself = gate.itself(ground.reference, ground.again)
    if itself.word != "pass":
        return Outcome((itself,), ground)
    say(f"asking the other server: {len(ground.reference.answers)} prompts")
    with serve(arm) as ask:
        followed = [follow(ask, ground.reference, enough=gate.far)]
        if not _refused(ground.reference, followed):
            few = replace(ground.reference, answers=ground.reference.answers[:_CACHED])
            followed.append(follow(ask, few, cache=True, enough=gate.far))
        slots = int(arm.settings.get("parallel", "1"))
        if slots > 1 and not _refused(ground.reference, followed):
            say(f"asking it {slots} prompts at a time")
            followed.append(follow(ask, ground.reference, at_once=slots, enough=gate.far))
        verdicts = [itself, *_by_answers(ground.reference, followed)]
        asked = numbers and verdicts[-1].gate.startswith("G2") and verdicts[-1].word == "pass"
        if asked:
            say("asking it closed items")
        solved = solve(ask) if asked else ()
    if asked:
        ground = with_floor(serve, with_items(serve, ground, say), say)
        changed = gate.drift(ground.reference, followed)
        verdicts.append(gate.numbers(changed, ground.harmless))
        verdicts.append(gate.tasks(ground.reference.solved, solved))
    return Outcome(tuple(verdicts), ground, tuple(followed), solved)


def with_items(serve: Serve, ground: Ground, say: Say) -> Ground:
    """The same, with the closed items that the reference solves."""
    if ground.reference.solved:
        return ground
    say("asking the reference closed items")
    with serve(ground.arm) as ask:
        return replace(ground, reference=replace(ground.reference, solved=solve(ask)))


def with_floor(serve: Serve, ground: Ground, say: Say) -> Ground:
    """The same, with how far what is harmless moves log-probabilities here."""
    if ground.harmless is not None:
        return ground
    drifts = [gate.drift(ground.reference, ground.again)]
    for settings in harmless(ground.arm.settings):
        name, value = next(iter(settings.items()))
        say(f"asking what is harmless: {name}={value}")
        arm = Arm(ground.arm.model, {**ground.arm.settings, **settings})
        try:
            with serve(arm) as ask:
                drifts.append(gate.drift(ground.reference, [follow(ask, ground.reference)]))
        except InfertuneError as error:
            say(f"left out: {error.message}")
    return replace(ground, harmless=gate.floor([each for each in drifts if each]))


def harmless(settings: Mapping[str, str]) -> tuple[Mapping[str, str], ...]:
    """Changes that are known to be right and yet turn near ties, for a server with these settings.

    Flash attention makes the same sums in another order, as does another physical batch.
    """
    attention = "on" if settings.get("flash_attn") == "off" else "off"
    first, second = _OTHER_UBATCH
    batch = second if settings.get("ubatch_size") == first else first
    return ({"flash_attn": attention}, {"ubatch_size": batch})


def _refused(reference: Reference, followed: Sequence[Followed]) -> bool:
    return any(
        gate.far(answer, stretches)
        for each in followed
        for answer, stretches in zip(reference.answers, each, strict=False)
    )


def _by_answers(reference: Reference, followed: Sequence[Followed]) -> list[Verdict]:
    """G1, and G2 where that does not accept."""
    first = gate.identical(reference, followed)
    return [first] if first.word == "pass" else [first, gate.near(reference, followed)]
