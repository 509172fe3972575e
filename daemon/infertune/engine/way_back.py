# SPDX-License-Identifier: Apache-2.0
"""The way back: what is noted of each file before it is written, and what undoing takes.  Pure.

``transaction.py`` does what is decided here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

from infertune.base.records import dataclass, replace
from infertune.catalogue.knobs import KNOBS, Reading
from infertune.catalogue.knobs.live import is_file_of
from infertune.engine.journal import Journal, Record
from infertune.engine.plan import Item, is_foreign, restore_order

Values = Mapping[str, tuple[str, str | None]]
"""Files by path: their knob, and what they hold (None where they are gone)."""


def to_note(
    old: Journal | None, items: Sequence[Item], touched: Values, reset: Collection[str]
) -> list[Record]:
    """The records that must be on disk before the first write of ``items``.

    ``touched`` are files the kernel may change along with what is written, as they are now.
    ``reset`` are paths whose values nobody decided: their originals stay.
    """
    earlier = old.by_path() if old else {}
    files = [item for item in items if item.path is not None and not _is_kept_open(item.knob)]
    records: dict[str, Record] = {}
    for item in files:
        if record := _of_item(item, earlier.get(item.path or "")):
            records[record.path] = record
    if any(item.pending for item in files):
        for path, (knob, value) in touched.items():
            if path in records and records[path].want is not None:
                continue
            if record := _of_touched(knob, path, value, earlier.get(path), path in reset):
                records[path] = record
    # A record leaves the journal only with its file: restored, or taken over by another program.
    covered = {item.path for item in items}
    for path, record in earlier.items():
        if path not in records and path not in covered:
            # A file that only moves along and was reset gets its value of now noted.
            moved = path in reset and record.want is None
            records[path] = replace(record, settled=False) if moved else record
    return list(records.values())


def _is_kept_open(knob: str) -> bool:
    return knob in KNOBS and KNOBS[knob].while_open


def _of_item(item: Item, record: Record | None) -> Record | None:
    """What is noted of a file that the plan names; ``record`` is what was noted so far."""
    assert item.path is not None
    if item.pending:
        assert item.original is not None
        ours = record.ours if record else None
        want = item.want if item.outcome == "set" else None
        return Record(item.knob, item.path, item.original, ours, want, settled=False)
    if item.outcome == "already" and record and item.original != item.before:
        assert item.original is not None
        return replace(
            record, original=item.original, ours=item.before, want=item.want, settled=True
        )
    return record if item.outcome in ("absent", "rejected") else None


def _of_touched(
    knob: str, path: str, value: str | None, record: Record | None, is_reset: bool
) -> Record | None:
    """What is noted of a file that may move along."""
    if value is None:
        return None
    if record and (is_reset or not is_foreign(record, value)):
        return replace(record, want=None, settled=False)
    return Record(knob, path, value, None, None, settled=False)


def unsettled(records: Iterable[Record]) -> list[Record]:
    """Those whose files are read for ``settle``."""
    return [each for each in records if not each.settled and each.knob in KNOBS]


def settle(records: Sequence[Record], live: Mapping[str, str | None]) -> list[Record]:
    """The records when all is written; a file back at its original needs none.

    ``live`` is what the ``unsettled`` ones hold now.
    """
    staying = {each.knob for each in records if each.want is not None and each.knob in KNOBS}
    movable = {touched for knob in staying for touched in KNOBS[knob].touches}
    after = []
    for record in records:
        if record.path not in live:
            after.append(record)
            continue
        value = live[record.path]
        # A file that nobody asked for may yet move, when what it goes along with does.
        if record.want is not None or value != record.original or record.knob in movable:
            ours = value or record.want or record.original
            after.append(replace(record, ours=ours, settled=True))
    return after


def roll_back(before: Values, written: Sequence[str]) -> list[str]:
    """Files that go back to what they held ``before``, in order; none where none was written."""
    if not written:
        return []
    knobs = [before[path][0] for path in (*written, *sorted(before.keys() - set(written)))]
    order = restore_order(knobs)
    return sorted(before, key=lambda path: order.index(before[path][0]))


@dataclass(frozen=True, slots=True)
class Step:
    """What becomes of one record when everything goes back."""

    do: Literal["keep", "leave", "restore"]
    """``keep``: this version knows no such file, so the record stays for one that does.
    ``leave``: the value is somebody else's."""
    record: Record
    reading: Reading
    value: str
    """What the file must hold in the end."""

    @property
    def writes(self) -> bool:
        """Whether something is written, unless the file is gone."""
        return self.do == "restore" and self.reading.value != self.value

    @property
    def under_way(self) -> Record:
        """The record while the steps are taken: what goes back after a crash, whatever is found."""
        if self.do == "keep":
            return self.record
        return replace(self.record, original=self.value, settled=False)


def is_known(record: Record) -> bool:
    """Whether this version has such a knob with such a file."""
    return record.knob in KNOBS and is_file_of(KNOBS[record.knob], record.path)


def undo(records: Sequence[Record], readings: Mapping[str, Reading]) -> list[Step]:
    """What putting everything back takes, in order: what needs no write comes first.

    ``readings`` has every file that is known, by path.  Who changed what is decided before the
    first write: restoring one knob may move another.
    """
    order = restore_order(record.knob for record in records)
    keep, leave, restore = [], [], []
    for record in sorted(records, key=lambda each: order.index(each.knob)):
        if not is_known(record):
            keep.append(Step("keep", record, Reading(None), record.original))
            continue
        reading = readings[record.path]
        if reading.value is not None and is_foreign(record, reading.value):
            leave.append(Step("leave", record, reading, reading.value))
        else:
            restore.append(Step("restore", record, reading, record.original))
    return [*keep, *leave, *restore]
