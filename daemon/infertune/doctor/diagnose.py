# SPDX-License-Identifier: Apache-2.0
"""Ask every rule; one that fails is unknown, and stops no other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from infertune.doctor.base import Advice, Finding, Missing, Rule, Severity, Unknown
from infertune.doctor.facts import Facts

Outcome = Literal["finding", "advice", "fine", "unknown", "not applicable"]


@dataclass(frozen=True, slots=True)
class Result:
    """What one rule came to."""

    rule: Rule
    outcome: Outcome
    answer: Finding | Advice | Unknown | None

    @property
    def severity(self) -> Severity | None:
        """None unless this is a finding."""
        if isinstance(self.answer, Finding):
            return self.answer.severity or self.rule.severity
        return None


def diagnose(facts: Facts, rules: Iterable[Rule]) -> tuple[Result, ...]:
    """One result per rule, in their order.  Never raises."""
    return tuple(_ask(facts, rule) for rule in rules)


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
