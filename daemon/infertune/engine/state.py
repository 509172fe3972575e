# SPDX-License-Identifier: Apache-2.0
"""What is applied, what differs, what an apply would do.  Reads, takes no lock, changes nothing.

Anybody may import this; what changes the machine is in session.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from infertune.base.records import dataclass, replace
from infertune.base.root import Root
from infertune.catalogue.knobs import KNOBS, Reading, Target, read_live, targets
from infertune.catalogue.knobs.live import read_target
from infertune.engine.journal import (
    PERSISTENT,
    RUNTIME,
    Found,
    Journal,
    Record,
    find,
    left_unclean,
    load,
    read_file,
)
from infertune.engine.plan import Item, Outcome, of_record, plan
from infertune.host.machine import Machine
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


def make_plan(
    root: Root,
    machine: Machine,
    desired: Desired,
    *,
    without: Iterable[str] = (),
    may_keep: bool = True,
) -> Report:
    """What ``apply`` would do now.  Changes nothing."""
    journal = load(root).journal
    items = plan_for(root, machine, desired, journal, without, may_keep)[0]
    return Report(desired.profile, desired.backend, items, notes_of(root, machine, desired, items))


def drift(
    root: Root, machine: Machine, desired: Desired, *, without: Iterable[str] = ()
) -> tuple[Difference, ...]:
    """Where the machine is not any more what ``desired`` made it.  Changes nothing.

    A plan that is not empty, and the files that went away.  Empty where the
    journal says that something else is applied.  What is kept open cannot drift.
    """
    journal = load(root).journal
    if journal is None or journal.profile != desired.profile or not journal.settled:
        return ()
    items = plan_for(root, machine, desired, journal, without, may_keep=True)[0]
    differing = [
        Difference(item.knob, item.path, item.before, item.want)
        for item in items
        if item.outcome == "set" and item.path and not KNOBS[item.knob].while_open
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
    found = find(root)
    journal, state = found.journal, found.state
    items = tuple(_drift(root, record) for record in journal.records) if journal else ()
    return Status(state, journal, items, tuple(_sentences(found)), found.aside)


def _sentences(found: Found) -> Iterator[str]:
    """What is to be said of the journals."""
    if found.outdated:
        yield "the runtime journal is of an earlier boot and means nothing now"
    if found.journal and not (found.runtime.journal or found.runtime.damage):
        yield f"{RUNTIME} was lost; its copy in {PERSISTENT} is used"
    if unclean := found.unclean:
        risky = ", ".join(sorted({record.knob for record in unclean.records}))
        yield (
            f"an earlier boot ended while '{unclean.profile}' was applied, "
            f"with settings that can make a machine unstable: {risky}"
        )
    yield from (f"journal: {sentence}" for sentence in found.runtime.damage)
    yield from (f"{PERSISTENT}: {sentence}" for sentence in found.lasting.damage)
    if found.state == "running":
        yield f"held by {found.holder}"
    elif found.state == "interrupted":
        yield "its process is gone; 'infertune recover' puts the original values back"


def after_unclean_shutdown(root: Root) -> str | None:
    """The profile with risky settings that was applied when an earlier boot ended, or None."""
    unclean = left_unclean(read_file(root, PERSISTENT).journal, boot_id(root))
    return unclean.profile if unclean else None


def plan_for(
    root: Root,
    machine: Machine,
    desired: Desired,
    old: Journal | None,
    without: Iterable[str],
    may_keep: bool,
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
    items = plan(machine, settings, found, readings, records, may_keep=may_keep)
    moved = {touched for s in settings for touched in KNOBS[s.id].touches}
    return items, [t for knob in sorted(moved) for t in targets(root, machine, KNOBS[knob])]


def notes_of(
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
    item = of_record(record, reading.value, outcome, reason)
    return replace(item, want=record.want or record.ours)
