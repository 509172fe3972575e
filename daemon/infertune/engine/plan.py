# SPDX-License-Identifier: Apache-2.0
"""The plan: what has to change so that the machine is what a profile says.  Pure.

``plan`` compares three things: what is wanted (settings), what is (readings)
and what infertune did before (journal records).  Applying is doing the plan,
verifying is planning again, and drift is a plan that is not empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from infertune.base.records import dataclass
from infertune.catalogue.knobs import KNOBS, Knob, Reading, Target
from infertune.catalogue.knobs.guards import refusal
from infertune.catalogue.knobs.live import is_file_of
from infertune.engine.journal import Record
from infertune.host.machine import Machine
from infertune.profiles.resolve import Setting

Outcome = Literal[
    "set",
    "restore",
    "applied",
    "restored",
    "already",
    "held",
    "clamped",
    "absent",
    "refused",
    "rejected",
    "conflict",
    "pending-reboot",
    "rolled-back",
]
"""``set`` and ``restore`` are a plan's; everything else is a result.

``held``: another service sets it, and keeps it for us.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One file (or one absent knob): what it is, what it should be, and what came of it."""

    knob: str
    path: str | None
    """None where the knob is absent as a whole."""
    before: str | None
    want: str | None
    original: str | None
    """What ``revert`` goes back to."""
    outcome: Outcome
    got: str | None = None
    """What the kernel said after the write."""
    reason: str | None = None
    note: str | None = None
    required: bool = False
    source: str | None = None
    """``file:line`` of the profile that asks for it."""
    evidence: str | None = None

    @property
    def pending(self) -> bool:
        """Whether something is still to be written."""
        return self.outcome in ("set", "restore")

    @property
    def differs(self) -> bool:
        """Whether the machine is not what the profile says, or cannot be."""
        return self.pending or self.outcome in ("pending-reboot", "rejected") or self.blocks

    @property
    def blocks(self) -> bool:
        """Whether the profile must not be applied without it."""
        return self.required and self.outcome in ("absent", "refused", "rejected")


def plan(
    machine: Machine,
    settings: Sequence[Setting],
    targets: Mapping[str, Sequence[Target]],
    readings: Mapping[str, Reading],
    records: Mapping[str, Record],
    *,
    may_keep: bool,
) -> tuple[Item, ...]:
    """What to do, in the order in which to do it.

    ``targets`` maps a knob id to its files, ``readings`` and ``records`` are
    keyed by path.  Records of knobs the settings no longer name are restored.
    ``may_keep``: whether a process stays that can keep a file open.
    """
    locks = _locks(settings, readings, targets, records)
    wanted: list[Item] = []
    for setting in settings:
        knob = KNOBS[setting.id]
        found = targets.get(setting.id, ())
        if not found:
            wanted.append(_item(knob, setting, machine, None, None, "absent", knob.absent))
        for target in found:
            reading, record = readings[target.path], records.get(target.path)
            item = _plan_file(machine, setting, target, reading, record, may_keep, locks)
            wanted.append(item)

    leaving = [
        _plan_restore(record, readings.get(record.path, Reading(None, gone=True)))
        for record in _leaving(settings, wanted, records.values(), locks)
    ]
    # What leaves goes first, but for what a wanted knob may still lock.
    named = {setting.id for setting in settings}
    late = [item for item in leaving if _locker(item.knob) in named]
    early = [item for item in leaving if item not in late]
    last = [*late, *wanted]
    return (
        *_in_order(early, restore_order(item.knob for item in early)),
        *_in_order(last, set_order(item.knob for item in last)),
    )


def _locker(knob: str) -> str | None:
    lock = KNOBS[knob].locked_by if knob in KNOBS else None
    return lock[0] if lock else None


def _locks(
    settings: Sequence[Setting],
    readings: Mapping[str, Reading],
    targets: Mapping[str, Sequence[Target]],
    records: Mapping[str, Record],
) -> dict[str, bool]:
    """Knobs that another one will lock when the plan is done, and whether the settings say so."""
    wanted = {setting.id: setting.canonical for setting in settings if targets.get(setting.id)}
    locked = {}
    for knob in KNOBS.values():
        if knob.locked_by is None:
            continue
        other, value = knob.locked_by
        left = {
            _left_at(records.get(path), reading)
            for path, reading in readings.items()
            if is_file_of(KNOBS[other], path)
        }
        if wanted.get(other) == value or (other not in wanted and value in left):
            locked[knob.id] = other in wanted
    return locked


def _left_at(record: Record | None, reading: Reading) -> str | None:
    """What a file that the settings do not name holds when the plan is done."""
    if record is None:
        return reading.value
    item = _plan_restore(record, reading)
    return item.want if item.outcome == "restore" else reading.value


def _leaving(
    settings: Sequence[Setting],
    wanted: Sequence[Item],
    records: Iterable[Record],
    locks: Mapping[str, bool],
) -> list[Record]:
    """Records whose files the plan gives back.

    A file that the settings want stays, and so does one that is not there at
    the moment.  A refused file keeps nothing of an earlier profile.  But one
    that only moves along with a wanted knob goes back when that knob does, and
    so does one that the wanted knobs lock.
    """
    named = {setting.id for setting in settings}
    along = {touched for knob in named for touched in KNOBS[knob].touches}
    refused = {item.path for item in wanted if item.outcome == "refused"}
    return [
        record
        for record in records
        if (record.path in refused or record.knob not in named)
        and not (record.knob in along and (record.want is None or record.knob in locks))
    ]


def _plan_file(
    machine: Machine,
    setting: Setting,
    target: Target,
    reading: Reading,
    record: Record | None,
    may_keep: bool,
    locks: Mapping[str, bool],
) -> Item:
    knob, want, live = target.knob, setting.canonical, reading.value

    def item(outcome: Outcome, reason: str | None = None, original: str | None = None) -> Item:
        return _item(knob, setting, machine, target.path, reading, outcome, reason, original)

    if knob.while_open and not may_keep:
        return item("refused", "lasts only as long as a process holds it: use 'infertune run'")
    if live is None:
        if reading.gone:
            return item("absent", knob.absent)
        return item("rejected", f"{reading.error}: it cannot be read, so it could not be put back")
    original = original_of(record, live)
    locked = bool(knob.id in locks and knob.locked_by and want != knob.locked_by[1])
    refused = f"{' '.join(knob.locked_by or ())} locks it"
    if locked and locks[knob.id]:
        # Though it may hold the value now: it does not when the other is written.
        return item("refused", refused)
    if knob.value.satisfied(live, want):
        if reason := knob.not_in_force(machine, want):
            return item("pending-reboot", reason)
        return item("already", original=original)
    if record is not None and record.settled and (record.ours, record.want) == (live, want):
        return item("already", f"the kernel makes {live} of {want}", original)
    if knob.time == "boot":
        return item("pending-reboot", "takes effect at the next boot: infertune boot plan")
    guard = refusal(knob.id, want, machine)
    if guard:
        return item("refused", f"{guard.reason} ({guard.source})")
    if locked:
        return item("refused", refused)
    if reading.choices is not None:
        if want not in reading.choices:
            return item("refused", f"this kernel offers only {', '.join(reading.choices)}")
        # amd-pstate takes a bare number as preference but does not list numbers.
        if live not in reading.choices and not live.isdigit():
            return item("refused", f"the present value '{live}' could not be written back")
    if record is not None and original == live != record.original:
        return item("set", "changed by someone else since; revert goes back to that", original)
    return item("set", original=original)


def original_of(record: Record | None, live: str) -> str:
    """The value to go back to: the last one that was not ours.

    A value that is neither ours nor the recorded original was set by somebody
    else after us, and is what the machine should return to.
    """
    if record is None:
        return live
    if not record.settled or live in (record.ours, record.original):
        return record.original
    return live


def _plan_restore(record: Record, reading: Reading) -> Item:
    """A file the profile no longer names: back to its original, unless somebody changed it."""
    live = reading.value
    outcome: Outcome = "restore"
    reason = "no longer part of the profile"
    if live is None:
        outcome, reason = ("absent" if reading.gone else "rejected"), reading.error or "gone"
    elif live == record.original:
        outcome = "already"
    elif is_foreign(record, live):
        outcome, reason = "conflict", "changed by someone else since; left as it is"
    return of_record(record, live, outcome, reason)


def of_record(
    record: Record, live: str | None, outcome: Outcome, reason: str | None = None
) -> Item:
    """What there is to say of a file that goes back; ``live`` is what it holds."""
    return Item(
        knob=record.knob,
        path=record.path,
        before=live,
        want=record.original,
        original=record.original,
        outcome=outcome,
        reason=reason,
    )


def is_foreign(record: Record, live: str) -> bool:
    """Whether somebody else set ``live`` after us.

    An unsettled record (a crash between write and read-back) cannot tell, and
    is taken as ours: its original goes back.
    """
    return record.settled and live not in (record.ours, record.original)


def _item(
    knob: Knob,
    setting: Setting,
    machine: Machine,
    path: str | None,
    reading: Reading | None,
    outcome: Outcome,
    reason: str | None = None,
    original: str | None = None,
) -> Item:
    return Item(
        knob=knob.id,
        path=path,
        before=reading.value if reading else None,
        want=setting.canonical,
        original=original,
        outcome=outcome,
        reason=reason,
        note=knob.note(machine),
        required=setting.required,
        source=f"{setting.source.file}:{setting.source.line}",
        evidence=knob.evidence.label,
    )


def set_order(ids: Iterable[str]) -> list[str]:
    """Distinct knob ids in the order in which they are written.

    A knob that changes another along with itself comes before it.
    """
    before = {knob: set(_entry(knob, "after")) for knob in ids}
    for knob in before:
        for touched in _entry(knob, "touches"):
            if touched in before:
                before[touched].add(knob)
    return _sorted(before)


def restore_order(ids: Iterable[str]) -> list[str]:
    """Distinct knob ids in the order in which they go back.

    The reverse of the order they were set in, except where a knob says that
    another has to go back first.  What a knob changes along with itself comes
    after it: only then is it known what is left to restore.
    """
    wanted = list(dict.fromkeys(reversed(list(ids))))
    before = {knob: set(_entry(knob, "restore_after")) for knob in wanted}
    for knob in wanted:
        for earlier in _entry(knob, "after"):
            if earlier in before and earlier not in before[knob]:
                before[earlier].add(knob)
        for touched in _entry(knob, "touches"):
            if touched in before:
                before[touched].add(knob)
    return _sorted(before)


def _entry(knob: str, field: Literal["after", "restore_after", "touches"]) -> tuple[str, ...]:
    # A journal of another version may name a knob this one does not have.
    return getattr(KNOBS[knob], field) if knob in KNOBS else ()


def _in_order(items: Sequence[Item], order: Sequence[str]) -> list[Item]:
    return sorted(items, key=lambda item: order.index(item.knob))


def _sorted(before: Mapping[str, set[str]]) -> list[str]:
    """Stable topological order; the catalogue has no cycles (tested)."""
    order = list(before)
    done: list[str] = []

    def visit(knob: str) -> None:
        if knob not in done:
            for earlier in sorted(before[knob] & before.keys(), key=order.index):
                visit(earlier)
            done.append(knob)

    for knob in order:
        visit(knob)
    return done
