# SPDX-License-Identifier: Apache-2.0
"""Carrying out a plan, all of it or nothing, and putting back what was changed.

Order of things: journal on disk, then the change it covers, then read-back.
Whatever fails, the values go back to what they were before the transaction,
and the journal on disk never claims less than what was touched.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence

from infertune.base.errors import describe
from infertune.base.records import dataclass, field, replace
from infertune.base.root import Held, Root
from infertune.catalogue.knobs import KNOBS, Reading, Target
from infertune.catalogue.knobs.live import is_file_of, read_target
from infertune.catalogue.values import HeldMicroseconds, Table
from infertune.engine.journal import Journal, Journals, Record
from infertune.engine.plan import Item, Outcome, is_foreign, restore_order


@dataclass
class Done:
    """What a transaction did."""

    items: tuple[Item, ...]
    held: list[Held] = field(default_factory=list)
    failure: str | None = None
    """What failed, in one line; None when everything that was planned was done."""
    undone: int = 0
    """Files that a failed apply had written and put back."""
    left: int = 0
    """Files that could not be put back (their records stay in the journal)."""


def apply(
    root: Root,
    journals: Journals,
    old: Journal | None,
    new: Journal,
    items: Sequence[Item],
    touched: Sequence[Target],
    reset: Collection[str] = (),
) -> Done:
    """Do what ``items`` plan.

    ``old`` is the journal on disk, ``new`` the header of the one to write.
    ``touched`` are files the kernel may change along with what is written.
    ``reset`` are paths whose values nobody decided: their originals stay.
    Nothing is raised for what a kernel or a disk says: ``Done.failure`` says it,
    and the machine is then as it was before.
    """
    with undisturbed():
        return _Apply(root, journals, old, new, items, touched, reset).run()


class _Apply:
    def __init__(
        self,
        root: Root,
        journals: Journals,
        old: Journal | None,
        new: Journal,
        items: Sequence[Item],
        touched: Sequence[Target],
        reset: Collection[str],
    ) -> None:
        self._root = root
        self._journals = journals
        self._old = old
        self._new = new
        self._items = list(items)
        # The state to go back to if anything fails: not the originals, but what was there.
        self._before = {t.path: (t.knob.id, read_target(root, t).value) for t in touched}
        self._records = _records(old, items, touched, self._before, reset)
        self._held: list[Held] = []
        self._written: list[str] = []

    def run(self) -> Done:
        doing = "journal"
        try:
            self._save()
            for index, item in enumerate(self._items):
                if item.pending or self._was_moved(item):
                    doing = item.knob
                    self._items[index] = self._write(item)
            doing = "journal"
            self._settle()
        except OSError as error:
            return self._roll_back(f"{doing}: {describe(error)}", doing)
        return Done(tuple(self._items), self._held)

    def _save(self) -> None:
        self._journals.save(self._new.with_records(self._records.values()))

    def _was_moved(self, item: Item) -> bool:
        """Whether an earlier write of this transaction took a file away from its wanted value."""
        if item.outcome != "already" or item.path not in self._before or not self._written:
            return False
        return read_target(self._root, Target(KNOBS[item.knob], item.path)).value != item.before

    def _write(self, item: Item) -> Item:
        assert item.path is not None
        assert item.want is not None
        knob = KNOBS[item.knob]
        if isinstance(knob.value, HeldMicroseconds):
            self._held.append(self._root.hold(item.path, knob.value.to_bytes(item.want)))
            return replace(item, outcome="applied", got=item.want)
        self._before.setdefault(item.path, (item.knob, item.before))
        self._written.append(item.path)
        got = write(self._root, Target(knob, item.path), item.want)
        if item.outcome == "restore":
            return replace(item, outcome="restored" if got == item.want else "clamped", got=got)
        if got != item.want:
            return replace(item, outcome="clamped", got=got, reason=f"the kernel made {got} of it")
        return replace(item, outcome="applied", got=got)

    def _settle(self) -> None:
        """Note what the files hold now; a file back at its original needs no record."""
        settled: dict[str, Record] = {}
        for path, record in self._records.items():
            if record.settled or record.knob not in KNOBS:
                settled[path] = record
                continue
            live = read_target(self._root, Target(KNOBS[record.knob], path)).value
            if record.want is None and live == record.original and not self._may_move(record):
                continue
            ours = live or record.want or record.original
            settled[path] = replace(record, ours=ours, settled=True)
        self._records = settled
        self._save()

    def _may_move(self, record: Record) -> bool:
        """Whether a file that nobody asked for may yet move, when what it goes along with does."""
        staying = {each.knob for each in self._records.values() if each.want is not None}
        return any(record.knob in KNOBS[knob].touches for knob in staying if knob in KNOBS)

    def _roll_back(self, failure: str, doing: str) -> Done:
        for held in self._held:
            held.close()
        touched = set(self._before) - set(self._written)
        order = restore_order(
            [self._before[path][0] for path in self._written]
            + [self._before[path][0] for path in sorted(touched)]
        )
        paths = sorted(
            self._before if self._written else (),
            key=lambda path: order.index(self._before[path][0]),
        )
        stuck: dict[str, str] = {}
        for path in paths:
            knob, value = self._before[path]
            if value is not None:
                problem = put_back(self._root, Target(KNOBS[knob], path), value)
                if problem:
                    stuck[path] = problem
        if not stuck:
            # If even this fails, the journal on disk still names every original.
            with contextlib.suppress(OSError):
                if self._old is None:
                    self._journals.remove()
                else:
                    self._journals.save(self._old)
        items = tuple(_undone(item, doing, failure, stuck) for item in self._items)
        undone = len(self._written) - len(stuck)
        return Done(items, failure=failure, undone=undone, left=len(stuck))


def _records(
    old: Journal | None,
    items: Sequence[Item],
    touched: Sequence[Target],
    before: Mapping[str, tuple[str, str | None]],
    reset: Collection[str],
) -> dict[str, Record]:
    """The records that must be on disk before the first write of ``items``."""
    earlier = old.by_path() if old else {}
    records: dict[str, Record] = {}
    writing = False
    for item in items:
        path = item.path
        if path is None or (item.knob in KNOBS and KNOBS[item.knob].held):
            continue
        record = earlier.get(path)
        if item.pending:
            writing = True
            assert item.original is not None
            ours = record.ours if record else None
            want = item.want if item.outcome == "set" else None
            records[path] = Record(item.knob, path, item.original, ours, want, settled=False)
        elif item.outcome == "already" and record and item.original != item.before:
            assert item.original is not None
            records[path] = replace(
                record, original=item.original, ours=item.before, want=item.want, settled=True
            )
        elif item.outcome in ("absent", "rejected") and record:
            records[path] = record
    for target in touched:
        if not writing or (target.path in records and records[target.path].want is not None):
            continue
        value = before[target.path][1]
        record = earlier.get(target.path)
        if record and value is not None and (target.path in reset or not is_foreign(record, value)):
            records[target.path] = replace(record, want=None, settled=False)
        elif value is not None:
            records[target.path] = Record(target.knob.id, target.path, value, None, None, False)
    # A record leaves the journal only with its file: restored, or taken over by somebody else.
    covered = {item.path for item in items}
    for path, record in earlier.items():
        if path not in records and path not in covered:
            # A file that only moves along and was reset gets its value of now noted.
            moved = path in reset and record.want is None
            records[path] = replace(record, settled=False) if moved else record
    return records


def restore(root: Root, journals: Journals, journal: Journal) -> Done:
    """Put back every original in ``journal``, whatever state it is in.

    A value somebody else set since is left and reported as a conflict.  A file
    that has gone, or that refuses, keeps its record for a later try; the rest
    goes back all the same.
    """
    with undisturbed():
        return _restore(root, journals, journal)


def _restore(root: Root, journals: Journals, journal: Journal) -> Done:
    order = restore_order(record.knob for record in journal.records)
    records = sorted(journal.records, key=lambda record: order.index(record.knob))
    known = [r for r in records if r.knob in KNOBS and is_file_of(KNOBS[r.knob], r.path)]
    keep = [record for record in records if record not in known]
    reason = "this version knows no such knob with this file"
    items: list[Item] = [_restored(record, None, "rejected", reason) for record in keep]
    failure = f"{keep[0].knob}: {reason}" if keep else None

    # Who changed what is decided before the first write: restoring one knob may move another.
    readings = {r.path: read_target(root, Target(KNOBS[r.knob], r.path)) for r in known}
    ours: list[Record] = []
    foreign: list[Record] = []
    for record in known:
        live = readings[record.path].value
        if live is not None and is_foreign(record, live):
            reason = "changed by someone else since; left as it is"
            items.append(_restored(record, live, "conflict", reason))
            foreign.append(replace(record, original=live))
        else:
            ours.append(record)
    bookkeeping = None
    if any(readings[r.path].value != r.original for r in ours):
        # From here on a crash leaves files that may hold anything of ours.
        unsettled = [replace(record, settled=False) for record in (*ours, *foreign)]
        under_way = journal.with_records([*keep, *unsettled])
        try:
            journals.save(under_way)
        except OSError as error:
            # Values matter more than bookkeeping: say it and go on, noted in one place at least.
            bookkeeping = f"journal: {describe(error)}"
            with contextlib.suppress(OSError):
                journals.runtime.save(under_way)
    for record in ours:
        item = _restore_one(root, record, readings[record.path])
        items.append(item)
        if item.outcome in ("absent", "rejected"):
            keep.append(replace(record, settled=False))
            if item.outcome == "rejected":
                failure = failure or f"{record.knob}: {item.reason}"
    for record in foreign:
        # Somebody's value, which one of the writes above may have moved along with itself.
        put_back(root, Target(KNOBS[record.knob], record.path), record.original)
    try:
        if keep:
            journals.save(journal.with_records(keep))
        else:
            # With nothing left to undo it no longer matters what could not be written before.
            journals.remove()
            bookkeeping = None
    except OSError as error:
        bookkeeping = f"journal: {describe(error)}"
    return Done(tuple(items), failure=failure or bookkeeping, left=len(keep))


def _restore_one(root: Root, record: Record, reading: Reading) -> Item:
    if reading.value is None and reading.gone:
        reason = "the file is gone; its original is kept for when it comes back"
        return _restored(record, None, "absent", reason)
    problem = put_back(root, Target(KNOBS[record.knob], record.path), record.original)
    if problem:
        return _restored(record, reading.value, "rejected", problem)
    outcome: Outcome = "already" if reading.value == record.original else "restored"
    return _restored(record, reading.value, outcome)


def write(root: Root, target: Target, canonical: str) -> str | None:
    """Write one value and read it back.  Raises OSError as the kernel gave it."""
    value = target.knob.value
    # A table such as pp_power_profile_mode is written by row number: the text says which.
    raw = root.read_value(target.path, 4096) if isinstance(value, Table) else b""
    root.write_value(target.path, value.encode(canonical, raw))
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
        except (OSError, ValueError) as error:
            problem = describe(error) if isinstance(error, OSError) else str(error)
            continue
        if got == canonical:
            return None
        problem = f"the kernel made {got} of {canonical}"
    return problem


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put off Ctrl-C and termination until the block is done; it lasts milliseconds."""
    waiting = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waiting)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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


def _restored(
    record: Record, live: str | None, outcome: Outcome, reason: str | None = None
) -> Item:
    return Item(
        knob=record.knob,
        path=record.path,
        before=live,
        want=record.original,
        original=record.original,
        outcome=outcome,
        got=record.original if outcome in ("restored", "already") else live,
        reason=reason,
    )
