# SPDX-License-Identifier: Apache-2.0
"""Ask every rule; one that fails is unknown, and stops no other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from infertune.base.records import dataclass, replace
from infertune.doctor.base import SEVERITIES, Advice, Finding, Missing, Rule, Severity, Unknown
from infertune.doctor.facts import Facts

Outcome = Literal["finding", "covered", "advice", "fine", "unknown", "not applicable"]
"""``covered``: a finding that another one tells already, with the same cause."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one rule came to."""

    rule: Rule
    outcome: Outcome
    answer: Finding | Advice | Unknown | None
    covers: tuple[str, ...] = ()
    """Ids of the findings that this one tells, too."""

    @property
    def severity(self) -> Severity | None:
        """None unless this is a finding of its own."""
        if isinstance(self.answer, Finding) and self.outcome == "finding":
            return self.answer.severity or self.rule.severity
        return None


def diagnose(facts: Facts, rules: Iterable[Rule]) -> tuple[Result, ...]:
    """One result per rule, in their order.  Never raises."""
    return _fold([_ask(facts, rule) for rule in rules])


def _fold(results: list[Result]) -> tuple[Result, ...]:
    """One cause, one finding: the first that covers another takes it, and its severity if worse."""
    at = {result.rule.id: number for number, result in enumerate(results)}
    for number in range(len(results)):
        for id_ in results[number].rule.covers:
            other = at.get(id_)
            if other is not None and _same_cause(results[number], results[other]):
                results[number] = _taking(results[number], results[other])
                results[other] = replace(results[other], outcome="covered", covers=())
    return tuple(results)


def _same_cause(first: Result, second: Result) -> bool:
    if first.outcome != "finding" or second.outcome != "finding":
        return False
    subjects = {
        answer.about
        for answer in (first.answer, second.answer)
        if isinstance(answer, Finding) and answer.about
    }
    return len(subjects) < 2


def _taking(first: Result, second: Result) -> Result:
    answer = first.answer
    worst = min((first.severity or "info", second.severity or "info"), key=SEVERITIES.index)
    if isinstance(answer, Finding):
        answer = replace(answer, severity=worst)
    return replace(first, answer=answer, covers=(*first.covers, second.rule.id, *second.covers))


def _ask(facts: Facts, rule: Rule) -> Result:
    try:
        if not rule.when.test(facts):
            return Result(rule, "not applicable", None)
        answer = rule.check(facts)
    except Missing as missing:
        answer = missing.unknown
    except Exception as error:  # a rule that fails must not take the others with it
        answer = Unknown(f"the rule failed, please report: {type(error).__name__}: {error}")
    if answer is None:
        return Result(rule, "fine", None)
    if isinstance(answer, Unknown):
        return Result(rule, "unknown", answer)
    return Result(rule, "finding" if isinstance(answer, Finding) else "advice", answer)
