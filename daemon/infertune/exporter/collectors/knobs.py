# SPDX-License-Identifier: Apache-2.0
"""Knobs: what each holds now, what the applied profile asks for, and who set it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from infertune.base.root import Root
from infertune.catalogue.knobs import KNOBS, Reading, Target, read_live, targets
from infertune.engine.journal import Record, load
from infertune.engine.plan import is_foreign
from infertune.exporter.base import Collector, Metric, Sample
from infertune.host.machine import read_machine

PLACES_S = 60.0
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
        help="What the applied profile asks for.",
        labels=("knob", "value"),
        source="/run/infertune/journal",
        series="one per knob of the applied profile",
    ),
    Metric(
        name="infertune_knob_owner",
        unit="items",
        help="Files of a knob by who set them: the system, infertune, or another program after it; "
        "unreadable and gone are those nothing is known of.",
        labels=("knob", "owner"),
        source="/run/infertune/journal",
        series=f"at most {len(KNOBS)} knobs times the owners that occur (1, rarely 2)",
    ),
    Metric(
        name="infertune_knob_drifted",
        unit="items",
        help="Files that another program changed after infertune did. 0 for all that still hold.",
        labels=("knob",),
        source="/run/infertune/journal",
        series="one per knob of the applied profile",
    ),
)


class _Places:
    """Which files the knobs are: looked for once a minute, for looking costs more than reading."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._root: Root | None = None
        self._until = 0.0
        self._found: dict[str, tuple[Target, ...]] = {}

    def of(self, root: Root) -> Mapping[str, tuple[Target, ...]]:
        """By knob."""
        now = self._clock()
        if root is not self._root or now > self._until:
            machine = read_machine(root)
            self._found = {knob.id: targets(root, machine, knob) for knob in KNOBS.values()}
            self._root, self._until = root, now + PLACES_S
        return self._found


_places = _Places()


def read(root: Root) -> Iterable[Sample]:
    """Every knob that this machine has."""
    journal = load(root).journal
    records = journal.by_path() if journal else {}
    ours: dict[str, list[Record]] = {}
    for record in records.values():
        ours.setdefault(record.knob, []).append(record)
    for knob, files in _places.of(root).items():
        readings = read_live(root, files, choices=False)
        values = Counter(r.value for r in readings.values() if r.value is not None)
        for value, number in sorted(values.items()):
            yield Sample("infertune_knob_files", (knob, value), number)
        if len(values) == 1 and (only := next(iter(values))).lstrip("-").isdecimal():
            yield Sample("infertune_knob_value", (knob,), int(only))
        owners = Counter(_owner(records.get(path), r) for path, r in readings.items())
        for owner in OWNERS:
            if owners[owner]:
                yield Sample("infertune_knob_owner", (knob, owner), owners[owner])
        wanted = {record.want for record in ours.get(knob, ()) if record.want is not None}
        for want in sorted(wanted):
            yield Sample("infertune_knob_wanted_info", (knob, want), 1)
        if knob in ours:
            yield Sample("infertune_knob_drifted", (knob,), owners["other"])


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
