# SPDX-License-Identifier: Apache-2.0
"""Knobs: what each holds now, what the applied profile asks for, and who set it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from infertune.exporter.base import Collector, Metric, Sample
from infertune.exporter.collectors.journal import of_this_boot
from infertune.journal import Record
from infertune.knobs import KNOBS, Reading, read_live, targets
from infertune.machine import read_machine
from infertune.plan import is_foreign
from infertune.root import Root

OWNERS = ("system", "infertune", "other", "unreadable", "gone")

METRICS = (
    Metric(
        name="infertune_knob_files",
        unit="items",
        help="Files of a knob that hold this value now (a governor has one per CPU policy).",
        labels=("knob", "value"),
        source="docs/knobs.md",
        series=f"{len(KNOBS)} knobs times the values they hold at once (1, rarely 2)",
    ),
    Metric(
        name="infertune_knob_value",
        unit="the knob's own",
        help="Value of a knob that is a number, where all its files agree.",
        labels=("knob",),
        source="docs/knobs.md",
        series=f"at most {len(KNOBS)}",
    ),
    Metric(
        name="infertune_knob_wanted_info",
        unit="1",
        help="What the applied profile asks for.",
        labels=("knob", "value"),
        source="/run/infertune/journal",
        series="one per knob of the applied profile",
    ),
    Metric(
        name="infertune_knob_owner",
        unit="items",
        help="Files of a knob by who set them: the system, infertune, or somebody else after it; "
        "unreadable and gone are those nothing is known of.",
        labels=("knob", "owner"),
        source="/run/infertune/journal",
        series=f"at most {len(KNOBS)} knobs times the owners that occur (1, rarely 2)",
    ),
    Metric(
        name="infertune_knob_drifted",
        unit="items",
        help="Files that somebody changed after infertune set them. 0 for all that still hold.",
        labels=("knob",),
        source="/run/infertune/journal",
        series="one per knob of the applied profile",
    ),
)


def read(root: Root) -> Iterable[Sample]:
    """Every knob that this machine has."""
    machine = read_machine(root)
    journal = of_this_boot(root)
    records = journal.by_path() if journal else {}
    for knob in KNOBS.values():
        readings = read_live(root, targets(root, machine, knob))
        values = Counter(r.value for r in readings.values() if r.value is not None)
        for value, files in sorted(values.items()):
            yield Sample("infertune_knob_files", (knob.id, value), files)
        if len(values) == 1 and (number := next(iter(values))).lstrip("-").isdecimal():
            yield Sample("infertune_knob_value", (knob.id,), int(number))
        owners = Counter(_owner(records.get(path), r) for path, r in readings.items())
        for owner in OWNERS:
            if owners[owner]:
                yield Sample("infertune_knob_owner", (knob.id, owner), owners[owner])
        ours = [record for record in records.values() if record.knob == knob.id]
        for want in sorted({record.want for record in ours if record.want is not None}):
            yield Sample("infertune_knob_wanted_info", (knob.id, want), 1)
        if ours:
            yield Sample("infertune_knob_drifted", (knob.id,), owners["other"])


def _owner(record: Record | None, reading: Reading) -> str:
    """Who set what a file holds."""
    if reading.value is None:
        return "gone" if reading.gone else "unreadable"
    if record is None or (record.settled and reading.value == record.original != record.ours):
        return "system"
    return "other" if is_foreign(record, reading.value) else "infertune"


KNOBS_COLLECTOR = Collector(
    id="knobs",
    summary="What each knob holds, what the profile asks for, who set it.",
    metrics=METRICS,
    read=read,
    timeout_s=2.0,
)
