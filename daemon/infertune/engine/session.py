# SPDX-License-Identifier: Apache-2.0
"""The verbs: plan, apply, verify, status, revert, recover.

One applier at a time: a :func:`session` holds the machine's lock, and first
puts right what a killed predecessor left behind.  Reading verbs need no lock
and no privilege.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import partial

from infertune.base.errors import Busy, Failed, InfertuneError, NotPermitted, describe
from infertune.base.records import dataclass, replace
from infertune.base.root import Held, Root
from infertune.catalogue.knobs import KNOBS, Reading, Target, read_live, targets
from infertune.catalogue.knobs.live import read_target
from infertune.engine.journal import (
    LOCK,
    PERSISTENT,
    Journal,
    Journals,
    Loaded,
    Record,
    in_force,
    left_unclean,
    state_of,
)
from infertune.engine.plan import Item, Outcome, plan
from infertune.engine.transaction import Done, apply, restore
from infertune.host.machine import Machine, read_machine
from infertune.host.system import boot_id
from infertune.host.tuners import tuner_by_id
from infertune.profiles.resolve import Desired, Setting


@dataclass(frozen=True, slots=True)
class Report:
    """What a verb found or did."""

    profile: str | None
    backend: str | None
    items: tuple[Item, ...]
    notes: tuple[str, ...] = ()
    """Things that are not about one knob, in sentences."""

    def count(self, *outcomes: Outcome) -> int:
        return sum(item.outcome in outcomes for item in self.items)

    @property
    def differs(self) -> bool:
        """Whether the machine is not what the profile says."""
        return any(item.differs for item in self.items)


@dataclass(frozen=True, slots=True)
class Status:
    """What the journals say, and whether the machine still agrees."""

    state: str
    """One of journal.STATES; running is while a session holds it."""
    journal: Journal | None
    items: tuple[Item, ...]
    notes: tuple[str, ...]
    damaged: tuple[str, ...]
    """Damaged journals that were set aside."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One file that is not what the applied profile made it."""

    knob: str
    path: str
    value: str | None
    """What it holds now; None where the file is gone (a CPU offline, a driver unloaded)."""
    want: str | None
    """None for a file that only moved along with another: nobody asked for its value."""


class ApplyFailed(Failed):
    """A profile could not be applied; the machine is as it was before."""

    def __init__(self, message: str, report: Report, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.report = report


def make_plan(
    root: Root,
    machine: Machine,
    desired: Desired,
    *,
    without: Iterable[str] = (),
    may_hold: bool = True,
) -> Report:
    """What ``apply`` would do now.  Changes nothing."""
    journal = Journals(root).load().journal
    items = _plan(root, machine, desired, journal, without, may_hold)[0]
    return Report(desired.profile, desired.backend, items, _notes(root, machine, desired, items))


def drift(
    root: Root, machine: Machine, desired: Desired, *, without: Iterable[str] = ()
) -> tuple[Difference, ...]:
    """Where the machine is not any more what ``desired`` made it.  Changes nothing.

    A plan that is not empty, and the files that went away.  Empty where the
    journal says that something else is applied.  What is held open cannot drift.
    """
    journal = Journals(root).load().journal
    if journal is None or journal.profile != desired.profile or not journal.settled:
        return ()
    items = _plan(root, machine, desired, journal, without, may_hold=True)[0]
    differing = [
        Difference(item.knob, item.path, item.before, item.want)
        for item in items
        if item.outcome == "set" and item.path and not KNOBS[item.knob].held
    ]
    noted = [(record, _drift(root, record)) for record in journal.records]
    moved = [
        Difference(record.knob, record.path, item.before, None)
        for record, item in noted
        if item.outcome == "conflict" and record.want is None
    ]
    gone = [
        Difference(record.knob, record.path, None, record.want)
        for record, item in noted
        if item.outcome == "absent"
    ]
    seen = {each.path for each in differing}
    return (*differing, *(each for each in moved if each.path not in seen), *gone)


def status(root: Root) -> Status:
    """What is applied, by whom, and whether the files still hold it.  Changes nothing."""
    journals = Journals(root)
    notes: list[str] = []
    found, lasting, boot = journals.runtime.load(), journals.persistent.load(), boot_id(root)
    journal = in_force(found, lasting, boot).journal
    if found.journal and found.journal.boot_id != boot:
        notes.append("the runtime journal is of an earlier boot and means nothing now")
    if journal and not (found.journal or found.damage):
        notes.append(f"{journals.runtime.path} was lost; its copy in {PERSISTENT} is used")
    if unclean := left_unclean(lasting.journal, boot):
        risky = ", ".join(sorted({record.knob for record in unclean.records}))
        notes.append(
            f"an earlier boot ended while '{unclean.profile}' was applied, "
            f"with settings that can make a machine unstable: {risky}"
        )
    damaged = journals.quarantined()
    notes += [f"journal: {sentence}" for sentence in found.damage]
    notes += [f"{PERSISTENT}: {sentence}" for sentence in lasting.damage]
    holder = root.lock_owner(LOCK)
    items = tuple(_drift(root, record) for record in journal.records) if journal else ()
    state = state_of(
        journal,
        damaged=bool(found.damage or lasting.damage or damaged),
        busy=holder is not None,
    )
    if state == "running":
        notes.append(f"held by {holder}")
    elif state == "interrupted":
        notes.append("its process is gone; 'infertune recover' puts the original values back")
    return Status(state, journal, items, tuple(notes), damaged)


def after_unclean_shutdown(root: Root) -> str | None:
    """The profile with risky settings that was applied when an earlier boot ended, or None."""
    unclean = left_unclean(Journals(root).persistent.load().journal, boot_id(root))
    return unclean.profile if unclean else None


@contextlib.contextmanager
def session(
    root: Root, owner: str, machine: Callable[[], Machine] | None = None
) -> Iterator[Session]:
    """Hold the machine; ``owner`` tells others who does (``run long-context``).

    ``machine`` gives its facts when they are needed, to whoever knows them already.
    Raises NotPermitted where the caller may not write, Busy where somebody else
    holds it; nothing was touched then.  What an interrupted predecessor left is
    put back first (``Session.recovered``).
    """
    if root.live and os.geteuid() != 0:
        raise NotPermitted(
            "changing kernel settings needs root; nothing was touched",
            hint="use sudo, or 'infertune plan' to see what would change",
        )
    owner = f"{owner} (pid {os.getpid()})"
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(LOCK.rpartition("/")[0])
            holder = stack.enter_context(root.lock(LOCK, owner))
        except OSError as error:
            raise _not_writable(error) from error
        if holder is not None:
            raise Busy(
                f"busy: {holder} holds this machine; nothing was touched",
                hint="wait for it, or stop it: its values are put back when it ends",
            )
        one = Session(root, owner, machine or partial(read_machine, root))
        try:
            one.recover_interrupted()
            yield one
        finally:
            one.release()


class Session:
    """The machine, held."""

    def __init__(self, root: Root, owner: str, machine: Callable[[], Machine]) -> None:
        self.root = root
        self.owner = owner
        self._machine = machine
        self.recovered: Report | None = None
        """What was put right before anything else, if a predecessor was interrupted."""
        self.unrecovered: ApplyFailed | None = None
        """Set where not all of it could be put back; the machine can be used all the same."""
        self._journals = Journals(root)
        self._held: list[Held] = []
        self._held_here = False
        """Whether this session wrote a held journal, and will see to what was applied before."""

    @property
    def applied(self) -> Journal | None:
        """What is applied now by an earlier call; None where nothing is."""
        return self._load().journal

    def apply(
        self,
        desired: Desired,
        *,
        without: Sequence[str] = (),
        hold: bool = False,
        stays: bool = False,
        confirm_by: float | None = None,
    ) -> Report:
        """Make the machine what ``desired`` says; all of it or nothing.

        ``hold``: the values last as long as this session (``run``).  ``stays``:
        this process outlives the session and takes over what must be held open
        (``take_held``).  ``confirm_by``: see Journal.  Raises ApplyFailed; the
        machine is then as it was before the call.
        """
        old = self._load().journal
        machine = self._machine()
        may_hold = hold or stays
        items, touched = _plan(self.root, machine, desired, old, without, may_hold)
        blocking = [item for item in items if item.blocks]
        if blocking:
            first = blocking[0]
            raise ApplyFailed(
                f"{first.knob}: {first.outcome}, but {first.source} requires it: {first.reason}; "
                "nothing was touched",
                Report(desired.profile, desired.backend, items),
            )
        new = Journal(
            boot_id=boot_id(self.root),
            profile=desired.profile,
            backend=desired.backend,
            owner=self.owner,
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            held=hold,
            without=tuple(without),
            earlier=(old.earlier if old.held else old.profile) if hold and old else None,
            confirm_by=confirm_by,
            records=(),
        )
        try:
            aside = self._set_damage_aside(Loaded(old))
        except OSError as error:
            raise Failed(f"journal: {describe(error)}; nothing was touched") from error
        done = apply(self.root, self._journals, old, new, items, touched)
        notes = (*_notes(self.root, machine, desired, done.items), *aside)
        report = Report(desired.profile, desired.backend, done.items, notes)
        if done.failure:
            raise _apply_failed(done, report)
        self.release()
        self._held = done.held
        self._held_here = hold
        return report

    def reassert(
        self,
        desired: Desired,
        *,
        reset: Collection[str],
        leave: Collection[str],
        without: Sequence[str] = (),
    ) -> Report:
        """Set again what ``desired`` had set and does not hold any more; all of it or nothing.

        ``reset``: paths whose values nobody decided, because the kernel or the
        firmware started them anew; their originals stay.  ``leave``: paths that
        are somebody else's now; they and their records are not touched.  The
        value of any other path that differs is somebody's, and becomes the
        original.  Raises ApplyFailed; what was there before is then there again.
        """
        old = self._load().journal
        if old is None or old.profile != desired.profile:
            return Report(desired.profile, desired.backend, ())
        # PM-QoS requests live as long as their owner, and no reset reaches them.
        apart = {*leave, *(path for knob in KNOBS.values() if knob.held for path in knob.paths)}
        machine = self._machine()
        items, touched = _plan(
            self.root, machine, desired, old, without, True, reset=reset, leave=apart
        )
        new = old.with_records(())
        done = apply(self.root, self._journals, old, new, items, touched, reset)
        report = Report(desired.profile, desired.backend, done.items)
        if done.failure:
            raise _apply_failed(done, report)
        return report

    def confirm(self) -> bool:
        """Keep what is applied; False where nothing waits for a confirmation.  Raises Failed."""
        journal = self._load().journal
        if journal is None or journal.confirm_by is None:
            return False
        try:
            self._journals.save(replace(journal, confirm_by=None))
        except OSError as error:
            raise Failed(f"journal: {describe(error)}") from error
        return True

    def take_held(self) -> list[Held]:
        """What is held open, now the caller's to close."""
        held, self._held = self._held, []
        return held

    def revert(self) -> Report:
        """Put every original back.  Raises Failed where some could not be."""
        self.release()
        return self._put_back(self._load())

    def recover(self) -> Report:
        """``revert`` after a crash: also takes what is left of a damaged journal."""
        return self.revert()

    def recover_interrupted(self) -> None:
        """Put back what a predecessor that was killed left changed."""
        loaded = self._load()
        journal = loaded.journal
        if loaded.damage or (journal and (journal.held or not journal.settled)):
            try:
                self.recovered = self._put_back(loaded)
            except ApplyFailed as failed:
                self.recovered = failed.report
                self.unrecovered = failed
        elif journal:
            with contextlib.suppress(OSError):  # what has to write there says so
                self._journals.agree(journal)

    def release(self) -> None:
        """Let go of what is held open (PM-QoS)."""
        for held in self._held:
            held.close()
        self._held = []

    def _load(self) -> Loaded:
        """The journal of this boot; one of an earlier boot is forgotten."""
        try:
            return self._journals.load()
        except OSError as error:
            raise InfertuneError(f"journal: {describe(error)}") from error

    def _put_back(self, loaded: Loaded) -> Report:
        journal = loaded.journal
        try:
            notes = self._set_damage_aside(loaded)
            if journal is None:
                self._journals.remove()
                return Report(None, None, (), notes)
        except OSError as error:
            if journal is None or loaded.damage:
                raise Failed(f"journal: {describe(error)}") from error
            # Only the copy cannot be set aside: values matter more.
            notes = (f"journal: {describe(error)}",)
        if journal.held and journal.earlier and not self._held_here:
            notes += (f"'{journal.earlier}' was applied before it and is not any more",)
        done = restore(self.root, self._journals, journal)
        report = Report(journal.profile, journal.backend, done.items, notes)
        if done.failure:
            raise _revert_failed(done, report)
        return report

    def _set_damage_aside(self, loaded: Loaded) -> tuple[str, ...]:
        """Keep damaged files for a person to look at; what is in force is put in their place."""
        notes: list[str] = []
        stores = {"journal": self._journals.runtime, "lasting journal": self._journals.persistent}
        for name, store in stores.items():
            if damage := store.load().damage:
                aside = store.quarantine(loaded.journal)
                notes.append(f"the {name} was damaged ({damage[0]}); a copy is in {aside}")
        if loaded.damage and loaded.journal is None:
            notes.append("nothing in it could be trusted, so nothing was put back")
        return tuple(notes)


def _plan(
    root: Root,
    machine: Machine,
    desired: Desired,
    old: Journal | None,
    without: Iterable[str],
    may_hold: bool,
    *,
    reset: Collection[str] = (),
    leave: Collection[str] = (),
) -> tuple[tuple[Item, ...], list[Target]]:
    """The plan, and the files that may change along with what it writes.

    Paths to ``leave`` are as if neither profile nor journal named them; values of
    paths in ``reset`` are nobody's.
    """
    left_out = set(without)
    settings: list[Setting] = [s for s in (*desired.now, *desired.boot) if s.id not in left_out]
    found = {setting.id: targets(root, machine, KNOBS[setting.id]) for setting in settings}
    if leave:
        found = {
            knob: tuple(target for target in each if target.path not in leave)
            for knob, each in found.items()
        }
        settings = [setting for setting in settings if found[setting.id]]
    records = old.by_path() if old else {}
    records = {
        # An unsettled record takes whatever the file holds for ours: its original stays.
        path: replace(record, settled=False) if path in reset else record
        for path, record in records.items()
        if path not in leave
    }
    lockers = {lock[0] for setting in settings if (lock := KNOBS[setting.id].locked_by)}
    read = [t for each in found.values() for t in each]
    read += [t for knob in sorted(lockers) for t in targets(root, machine, KNOBS[knob])]
    readings = _readings(root, read, records.values())
    items = plan(machine, settings, found, readings, records, may_hold=may_hold)
    moved = {touched for s in settings for touched in KNOBS[s.id].touches}
    return items, [t for knob in sorted(moved) for t in targets(root, machine, KNOBS[knob])]


def _notes(
    root: Root, machine: Machine, desired: Desired, items: Sequence[Item]
) -> tuple[str, ...]:
    left_out = tuple(f"{each.id} is left out: {each.reason}" for each in desired.unresolved)
    knobs = dict.fromkeys(item.knob for item in items if item.path)
    return (*left_out, *owners(root, machine, knobs))


def owners(root: Root, machine: Machine, knobs: Iterable[str]) -> tuple[str, ...]:
    """One sentence for each other program that runs and may write some of ``knobs``."""
    wanted = tuple(knobs)
    found = []
    for tuner in machine.tuners:
        known = tuner_by_id(tuner.id)
        theirs = [knob for knob in wanted if any(fnmatchcase(knob, p) for p in known.writes)]
        if tuner.running and theirs:
            profile = root.get(known.profile_file) if known.profile_file else None
            # Another program's file: only a plain name of a profile is repeated.
            plain = profile and len(profile) <= 64 and profile.isprintable()
            name = f"{tuner.name} (profile {profile})" if plain else tuner.name
            found.append(f"{name} is running and may set {', '.join(theirs)} as well")
    return tuple(found)


def _readings(
    root: Root, wanted: Iterable[Target], records: Iterable[Record]
) -> dict[str, Reading]:
    noted = (Target(KNOBS[r.knob], r.path) for r in records if r.knob in KNOBS)
    return read_live(root, {target.path: target for target in (*wanted, *noted)}.values())


def _drift(root: Root, record: Record) -> Item:
    """Whether a file still holds what infertune left in it."""
    if record.knob in KNOBS:
        reading = read_target(root, Target(KNOBS[record.knob], record.path))
    else:
        reading = Reading(None, error="this version does not know the knob")
    outcome: Outcome = "already"
    reason = None
    if reading.value is None:
        outcome, reason = ("absent" if reading.gone else "rejected"), reading.error
    elif not record.settled:
        outcome, reason = "restore", "was being written when its process died"
    elif reading.value != record.ours:
        outcome, reason = "conflict", "changed by someone else since"
    return Item(
        knob=record.knob,
        path=record.path,
        before=reading.value,
        want=record.want or record.ours,
        original=record.original,
        outcome=outcome,
        reason=reason,
    )


def _not_writable(error: OSError) -> InfertuneError:
    if isinstance(error, PermissionError):
        return NotPermitted(f"{describe(error)}; nothing was touched")
    return Failed(f"lock: {describe(error)}; nothing was touched")


def _apply_failed(done: Done, report: Report) -> ApplyFailed:
    assert done.failure is not None
    knob = done.failure.partition(":")[0]
    hint = f"'--without {knob}' leaves it out" if knob in KNOBS else None
    if done.left:
        return ApplyFailed(
            f"{done.failure}; {done.left} files could not be rolled back",
            report,
            hint="'infertune recover' tries again",
        )
    undone = f"{done.undone} of {done.undone}" if done.undone else "nothing had been written"
    return ApplyFailed(f"{done.failure}; rolled back ({undone})", report, hint=hint)


def _revert_failed(done: Done, report: Report) -> ApplyFailed:
    assert done.failure is not None
    good = report.count("restored", "already")
    return ApplyFailed(
        f"{done.failure}; restored: {good} of {len(report.items)}",
        report,
        hint="'infertune recover' tries the rest again" if done.left else None,
    )
