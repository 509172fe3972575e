# SPDX-License-Identifier: Apache-2.0
"""Carrying out a plan, all of it or nothing, and putting back what was changed.

Order of things: journal on disk, then the change it covers, then read-back.
Whatever fails, the values go back to what they were before the transaction,
and the journal on disk never claims less than what was touched.
"""

from __future__ import annotations

import contextlib
import errno
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence

from infertune.base.errors import describe
from infertune.base.records import dataclass, field, replace
from infertune.base.root import KeptOpen, Root
from infertune.catalogue.knobs import KNOBS, Target
from infertune.catalogue.knobs.live import read_target
from infertune.catalogue.values import QosRequest, Table
from infertune.engine.journal import Journal, Record
from infertune.engine.plan import Item, Outcome, of_record
from infertune.engine.store import Journals
from infertune.engine.way_back import (
    Step,
    Values,
    is_known,
    roll_back,
    settle,
    to_note,
    undo,
    unsettled,
)


@dataclass
class Done:
    """What a transaction did."""

    items: tuple[Item, ...]
    kept: list[KeptOpen] = field(default_factory=list)
    failure: str | None = None
    """What failed, in one line; None when everything that was planned was done."""
    undone: int = 0
    """Files that a failed apply had written and put back."""
    left: int = 0
    """Files that could not be put back (their records stay in the journal)."""


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put off Ctrl-C and termination until the block is done; it lasts milliseconds."""
    waiting = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waiting)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@undisturbed()
def apply(
    root: Root,
    journals: Journals,
    old: Journal | None,
    new: Journal,
    plan: Sequence[Item],
    touched: Sequence[Target],
    reset: Collection[str] = (),
) -> Done:
    """Do what is planned.

    ``old`` is the journal on disk, ``new`` the header of the one to write.
    ``touched`` are files the kernel may change along with what is written.
    ``reset`` are paths whose values nobody decided: their originals stay.
    Nothing is raised for what a kernel or a disk says: ``Done.failure`` says it,
    and the machine is then as it was before.
    """
    # The state to go back to if anything fails: not the originals, but what was there.
    before = {t.path: (t.knob.id, read_target(root, t).value) for t in touched}
    records = to_note(old, plan, before, reset)
    items = list(plan)
    kept: list[KeptOpen] = []
    written: list[str] = []
    doing = "journal"
    try:
        journals.save(new.with_records(records))
        for index, item in enumerate(items):
            if item.path and (item.pending or (written and _was_moved(root, item, before))):
                doing = item.knob
                if not KNOBS[item.knob].while_open:
                    before.setdefault(item.path, (item.knob, item.before))
                    written.append(item.path)
                items[index] = _do(root, item, kept)
        doing = "journal"
        _settle(root, journals, new, records)
    except OSError as error:
        failure = f"{doing}: {describe(error)}"
    else:
        return Done(tuple(items), kept)
    for each in kept:
        each.close()
    stuck = _go_back(root, journals, old, before, written)
    undone = tuple(_undone(item, doing, failure, stuck) for item in items)
    return Done(undone, failure=failure, undone=len(written) - len(stuck), left=len(stuck))


def _was_moved(root: Root, item: Item, before: Values) -> bool:
    """Whether an earlier write of this transaction took a file away from its wanted value."""
    if item.outcome != "already" or item.path is None or item.path not in before:
        return False
    return read_target(root, Target(KNOBS[item.knob], item.path)).value != item.before


def _do(root: Root, item: Item, kept: list[KeptOpen]) -> Item:
    """Make one file hold what it should.  Raises OSError."""
    assert item.path is not None
    assert item.want is not None
    knob = KNOBS[item.knob]
    if isinstance(knob.value, QosRequest):
        kept.append(root.keep_open(item.path, knob.value.to_bytes(item.want)))
        return replace(item, outcome="applied", got=item.want)
    got = write(root, Target(knob, item.path), item.want)
    if item.outcome == "restore":
        return replace(item, outcome="restored" if got == item.want else "clamped", got=got)
    if got != item.want:
        return replace(item, outcome="clamped", got=got, reason=f"the kernel made {got} of it")
    return replace(item, outcome="applied", got=got)


def _settle(root: Root, journals: Journals, new: Journal, records: Sequence[Record]) -> None:
    """Note what the files hold now.  Raises OSError."""
    live = {each.path: read_target(root, _target(each)).value for each in unsettled(records)}
    if live:
        # Not durable: after a power cut what was saved before the first write does as well.  It
        # names every knob that may have been in force, and that is all that counts then.
        journals.save(new.with_records(settle(records, live)), durable=False)


def _go_back(
    root: Root, journals: Journals, old: Journal | None, before: Values, written: Sequence[str]
) -> dict[str, str]:
    """Put back what an apply that failed has written; what stands in the way, by path."""
    stuck: dict[str, str] = {}
    for path in roll_back(before, written):
        knob, value = before[path]
        if value is not None and (problem := put_back(root, Target(KNOBS[knob], path), value)):
            stuck[path] = problem
    if not stuck:
        # If even this fails, the journal on disk still names every original.
        with contextlib.suppress(OSError):
            if old is None:
                journals.remove()
            else:
                journals.save(old)
    return stuck


@undisturbed()
def restore(root: Root, journals: Journals, journal: Journal) -> Done:
    """Put back every original in ``journal``, whatever state it is in.

    A value somebody else set since is left and reported as a conflict.  A file
    that has gone, or that refuses, keeps its record for a later try; the rest
    goes back all the same.
    """
    known = [record for record in journal.records if is_known(record)]
    readings = {each.path: read_target(root, _target(each)) for each in known}
    steps = undo(journal.records, readings)
    bookkeeping = None
    if any(step.writes for step in steps):
        bookkeeping = _note_under_way(journals, journal, steps)
    items = [_take(root, step) for step in steps]
    for step in steps:
        if step.do == "leave":
            # Somebody's value, which one of the writes above may have moved along with itself.
            put_back(root, _target(step.record), step.value)
    left = [step for step, item in zip(steps, items, strict=True) if _is_left(item)]
    try:
        if left:
            journals.save(journal.with_records(step.under_way for step in left))
        else:
            # With nothing left to undo it no longer matters what could not be written before.
            journals.remove()
            bookkeeping = None
    except OSError as error:
        bookkeeping = f"journal: {describe(error)}"
    failed = [f"{item.knob}: {item.reason}" for item in items if item.outcome == "rejected"]
    return Done(tuple(items), failure=failed[0] if failed else bookkeeping, left=len(left))


def _note_under_way(journals: Journals, journal: Journal, steps: Sequence[Step]) -> str | None:
    """From here on a crash leaves files that may hold anything of ours; what failed is returned."""
    under_way = journal.with_records(step.under_way for step in steps)
    try:
        # Not durable: after a power cut nobody asks whether a record is settled.
        journals.save(under_way, durable=False)
    except OSError as error:
        # Values matter more than bookkeeping: say it and go on, noted in one place at least.
        with contextlib.suppress(OSError):
            journals.runtime.save(under_way, durable=False)
        return f"journal: {describe(error)}"
    return None


def _is_left(item: Item) -> bool:
    """Whether its record is kept for a later try."""
    return item.outcome in ("absent", "rejected")


def _take(root: Root, step: Step) -> Item:
    """Do one step."""
    record, live = step.record, step.reading.value
    outcome: Outcome = "already" if live == record.original else "restored"
    reason: str | None = None
    if step.do == "keep":
        outcome, reason = "rejected", "this version knows no such knob with this file"
    elif step.do == "leave":
        outcome, reason = "conflict", "changed by someone else since; left as it is"
    elif live is None and step.reading.gone:
        outcome, reason = "absent", "the file is gone; its original is kept for when it comes back"
    elif reason := put_back(root, _target(record), record.original):
        outcome = "rejected"
    got = record.original if outcome in ("restored", "already") else live
    return replace(of_record(record, live, outcome, reason), got=got)


def _target(record: Record) -> Target:
    return Target(KNOBS[record.knob], record.path)


def write(root: Root, target: Target, canonical: str) -> str | None:
    """Write one value and read it back.  Raises OSError as the kernel gave it."""
    value = target.knob.value
    # A table such as pp_power_profile_mode is written by row number: the text says which.
    raw = root.read_value(target.path, 4096) if isinstance(value, Table) else b""
    try:
        text = value.encode(canonical, raw)
    except ValueError as error:  # the table has lost the row since it was looked at
        raise OSError(errno.EINVAL, str(error), target.path) from None
    root.write_value(target.path, text)
    return read_target(root, target).value


def put_back(root: Root, target: Target, canonical: str) -> str | None:
    """Make one file hold ``canonical`` again; returns what stands in the way, or None.

    Tried twice: what is left undone here stays wrong on the machine, and EINTR
    or EBUSY may have passed.
    """
    problem = "no try was made"
    for _ in range(2):
        reading = read_target(root, target)
        if reading.value == canonical:
            return None
        try:
            got = write(root, target, canonical)
        except OSError as error:
            problem = describe(error)
            continue
        if got == canonical:
            return None
        problem = f"the kernel made {got} of {canonical}"
    return problem


def _undone(item: Item, doing: str, failure: str, stuck: Mapping[str, str]) -> Item:
    if item.path is not None and item.path in stuck:
        return replace(item, outcome="rejected", reason=f"not put back: {stuck[item.path]}")
    if item.knob == doing and item.pending:
        return replace(item, outcome="rejected", reason=failure.partition(": ")[2])
    if item.got is not None:
        return replace(item, outcome="rolled-back", got=None)
    if item.pending:
        return replace(item, reason="not reached")
    return item
