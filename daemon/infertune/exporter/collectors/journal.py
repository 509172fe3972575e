# SPDX-License-Identifier: Apache-2.0
"""The journals: which profile is applied, and whether what they say can be trusted."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from infertune.base.root import Root
from infertune.engine.journal import RUNTIME, STATES, find, load
from infertune.exporter.base import Collector, Metric, Sample, one_of

PROFILE_METRICS = (
    Metric(
        name="infertune_profile_info",
        help="The profile that is applied now, and the backend it was resolved for.",
        labels=("profile", "backend"),
        source=RUNTIME,
        series="1",
    ),
    Metric(
        name="infertune_profile_applied_timestamp_seconds",
        unit="seconds",
        help="When it was applied, in Unix time.",
        source=RUNTIME,
        series="1",
    ),
    Metric(
        name="infertune_profile_unconfirmed",
        help="1 while the profile goes back by itself unless it is confirmed.",
        source=RUNTIME,
        series="1",
    ),
)

JOURNAL_METRICS = (
    Metric(
        name="infertune_journal_state",
        help="1 for the state that 'infertune status' shows. degraded: a journal was damaged; "
        "interrupted: a process died in a change, 'infertune recover' puts it right.",
        labels=("state",),
        source="docs/architecture.md",
        series=str(len(STATES)),
    ),
    Metric(
        name="infertune_journal_records",
        unit="items",
        help="Files whose original value is kept.",
        source=RUNTIME,
        series="1",
    ),
    Metric(
        name="infertune_journal_damaged_files",
        unit="items",
        help="Journals that are damaged, or were and are set aside for a person to look at.",
        source="docs/architecture.md",
        series="1",
    ),
    Metric(
        name="infertune_journal_earlier_boot",
        help="1 where a journal is of an earlier boot. runtime: it means nothing now; lasting: "
        "that boot ended without warning under settings that can make a machine unstable.",
        labels=("journal",),
        source="docs/architecture.md",
        series="2",
    ),
)


def read_profile(root: Root) -> Iterable[Sample]:
    """The applied profile; no samples where none is."""
    journal = load(root).journal
    if journal is None:
        return
    yield Sample("infertune_profile_info", (journal.profile, journal.backend), 1)
    yield Sample("infertune_profile_unconfirmed", (), float(journal.confirm_by is not None))
    try:
        since = datetime.fromisoformat(journal.since)
    except ValueError:
        return  # a damaged header
    yield Sample("infertune_profile_applied_timestamp_seconds", (), since.timestamp())


def read_journal(root: Root) -> Iterable[Sample]:
    """Health of both journals.  Raises OSError where one cannot be read."""
    found = find(root)
    records = found.journal.records if found.journal else ()
    yield from one_of("infertune_journal_state", (), STATES, found.state)
    yield Sample("infertune_journal_records", (), len(records))
    yield Sample("infertune_journal_damaged_files", (), found.damaged)
    yield Sample("infertune_journal_earlier_boot", ("runtime",), float(found.outdated))
    yield Sample("infertune_journal_earlier_boot", ("lasting",), float(found.unclean is not None))


PROFILE = Collector(
    id="profile",
    summary="The profile that is applied.",
    metrics=PROFILE_METRICS,
    read=read_profile,
)

JOURNAL = Collector(
    id="journal",
    summary="Health of the journals of original values.",
    metrics=JOURNAL_METRICS,
    read=read_journal,
)
