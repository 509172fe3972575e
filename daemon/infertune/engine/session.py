# SPDX-License-Identifier: Apache-2.0
"""Changing the machine: apply, confirm, revert, recover.

One applier at a time: a :func:`session` holds the machine's lock, and first
puts right what a killed predecessor left behind.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial

from infertune.base.errors import Busy, Failed, InfertuneError, NotPermitted, describe
from infertune.base.records import replace
from infertune.base.root import KeptOpen, Root
from infertune.catalogue.knobs import KNOBS
from infertune.engine.journal import LOCK, Journal, Loaded
from infertune.engine.state import Report, notes_of, plan_for
from infertune.engine.store import Journals
from infertune.engine.transaction import Done, apply, restore
from infertune.host.machine import Machine, read_machine
from infertune.host.system import boot_id
from infertune.profiles.resolve import Desired


class ApplyFailed(Failed):
    """A profile could not be applied; the machine is as it was before."""

    def __init__(self, message: str, report: Report, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.report = report


@contextlib.contextmanager
def session(
    root: Root, owner: str, machine: Callable[[], Machine] | None = None
) -> Iterator[Session]:
    """Have the machine for oneself; ``owner`` tells others who does (``run long-context``).

    ``machine`` gives its facts when they are needed, to whoever knows them already.
    Raises NotPermitted where the caller may not write, Busy where somebody else
    has it; nothing was touched then.  What an interrupted predecessor left is
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
                f"busy: {holder} has this machine; nothing was touched",
                hint="wait for it; a 'run' that is stopped puts its values back",
            )
        one = Session(root, owner, machine or partial(read_machine, root))
        try:
            one.recover_interrupted()
            yield one
        finally:
            one.release()


class Session:
    """The machine, ours until the block ends."""

    def __init__(self, root: Root, owner: str, machine: Callable[[], Machine]) -> None:
        self.root = root
        self.owner = owner
        self._machine = machine
        self.recovered: Report | None = None
        """What was put right before anything else, if a predecessor was interrupted."""
        self.unrecovered: ApplyFailed | None = None
        """Set where not all of it could be put back; the machine can be used all the same."""
        self._journals = Journals(root)
        self._kept: list[KeptOpen] = []
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
        this process outlives the session and takes over what must be kept open
        (``take_kept``).  ``confirm_by``: see Journal.  Raises ApplyFailed; the
        machine is then as it was before the call.
        """
        old = self._load().journal
        machine = self._machine()
        may_keep = hold or stays
        items, touched = plan_for(self.root, machine, desired, old, without, may_keep)
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
        notes = (*notes_of(self.root, machine, desired, done.items), *aside)
        report = Report(desired.profile, desired.backend, done.items, notes)
        if done.failure:
            raise _apply_failed(done, report)
        self.release()
        self._kept = done.kept
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
        apart = {
            *leave,
            *(path for knob in KNOBS.values() if knob.while_open for path in knob.paths),
        }
        machine = self._machine()
        items, touched = plan_for(
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

    def take_kept(self) -> list[KeptOpen]:
        """What is kept open, now the caller's to close."""
        kept, self._kept = self._kept, []
        return kept

    def revert(self) -> Report:
        """Put every original back.  Raises Failed where some could not be."""
        self.release()
        return self._put_back(self._load())

    def recover_interrupted(self) -> None:
        """Put back what a predecessor that was killed left changed."""
        loaded = self._load()
        journal = loaded.journal
        if loaded.damage or (journal and journal.interrupted):
            try:
                self.recovered = self._put_back(loaded)
            except ApplyFailed as failed:
                self.recovered = failed.report
                self.unrecovered = failed
        elif journal:
            with contextlib.suppress(OSError):  # what has to write there says so
                self._journals.agree(journal)

    def release(self) -> None:
        """Close what is kept open (PM-QoS)."""
        for kept in self._kept:
            kept.close()
        self._kept = []

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
