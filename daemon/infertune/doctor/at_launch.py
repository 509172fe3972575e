# SPDX-License-Identifier: Apache-2.0
"""What the doctor knows of the very server that is about to start: builds with wrong results."""

from __future__ import annotations

from collections.abc import Sequence

from infertune.base.root import Root
from infertune.doctor.base import Finding
from infertune.doctor.diagnose import diagnose
from infertune.doctor.facts import read_facts
from infertune.doctor.rules import RULES
from infertune.doctor.surroundings import LlamaServer, Surroundings
from infertune.host.unknown import Unknown
from infertune.launch.binary import Backend

_NOT_ASKED = Unknown("it is not asked at a start")


def warnings(root: Root, version: str | None, backends: Sequence[Backend]) -> tuple[str, ...]:
    """A sentence for each rule that is said at a start and finds something.  Never raises."""
    rules = [rule for rule in RULES.values() if rule.at_launch]
    if version is None or not rules:
        return ()
    around = Surroundings(_NOT_ASKED, LlamaServer(version, tuple(backends)), _NOT_ASKED)
    return tuple(
        f"{each.severity}: {each.answer.text}; {each.answer.fix or each.rule.fix} "
        f"(infertune doctor --rule {each.rule.id})"
        for each in diagnose(read_facts(root, around), rules)
        if isinstance(each.answer, Finding)
    )
