# SPDX-License-Identifier: Apache-2.0
"""Staged boot settings: how far they are.

What the kernel made of each option takes reading what every boot loader has: that is ``infertune
boot status``.  Here is only what the record says.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from infertune.base.errors import InfertuneError
from infertune.base.root import Root
from infertune.boot import record
from infertune.exporter.base import Collector, Metric, Sample, one_of

STATES = ("none", "pending-reboot", "trying", "confirmed", "failed", "interrupted", "unknown")
_OF_PHASE = {
    "staged": "pending-reboot",
    "staging": "interrupted",
    "undoing": "interrupted",
    "undone": "none",
}

METRICS = (
    Metric(
        name="infertune_boot_state",
        help="1 for how far staged boot settings are. failed: no start with them was confirmed, "
        "and they were put back; interrupted: staging or undoing was cut short; unknown: their "
        "record is damaged, or for root alone.",
        labels=("state",),
        source=record.PATH,
        series=str(len(STATES)),
    ),
    Metric(
        name="infertune_boot_staged_timestamp_seconds",
        unit="seconds",
        help="When the boot settings were staged, in Unix time.",
        source=record.PATH,
        series="1",
    ),
)


def read(root: Root) -> Iterable[Sample]:
    """What the record says; a machine without one has staged nothing."""
    try:
        stage = record.load(root)
    except InfertuneError:
        yield from one_of("infertune_boot_state", (), STATES, "unknown")
        return
    phase = stage.phase if stage else "undone"
    yield from one_of("infertune_boot_state", (), STATES, _OF_PHASE.get(phase, phase))
    if stage and stage.in_force:
        since = datetime.fromisoformat(stage.since).timestamp()
        yield Sample("infertune_boot_staged_timestamp_seconds", (), since)


BOOT = Collector(
    id="boot",
    summary="Staged boot settings: how far they are.",
    metrics=METRICS,
    read=read,
)
