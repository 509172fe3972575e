# SPDX-License-Identifier: Apache-2.0
"""What the daemon keeps: the applied profile, holds, a deadline.  Knows nothing of the bus.

Calls take milliseconds and are made one at a time by the daemon's one loop.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from infertune.base.errors import Failed, InfertuneError, UsageError
from infertune.base.records import dataclass, replace
from infertune.base.root import KeptOpen, Root
from infertune.catalogue.knobs import KNOBS, targets
from infertune.engine.documents import report_document, status_document
from infertune.engine.journal import LOCK
from infertune.engine.session import Session, session
from infertune.engine.state import (
    Difference,
    Report,
    after_unclean_shutdown,
    drift,
    make_plan,
    status,
)
from infertune.host.machine import Machine
from infertune.profiles.resolve import Desired, resolve
from infertune.service.demand import Choice as Choice
from infertune.service.demand import Demand, read_demand, write_demand
from infertune.service.facts import Facts
from infertune.service.ownership import Ownership

MAX_HOLDS = 16
"""power-profiles-daemon has no limit, and a distribution had to patch one in."""


POWER_KNOBS = ("platform_profile", "cpufreq.energy_performance_preference")
"""What a power profiles service sets; infertune can ask it to keep ``performance``."""


@dataclass(frozen=True, slots=True)
class Hold:
    """A profile that lasts as long as its owner stays on the bus."""

    cookie: str
    owner: str
    choice: Choice
    reason: str


OURS = "infertuned"
"""Owner of the hold that lasts while servers work; no name of the bus looks like it."""


class Keeper:
    """The engine with a memory."""

    def __init__(
        self,
        root: Root,
        *,
        owner: str = "infertuned",
        now: Callable[[], float] | None = None,
        facts: Facts | None = None,
    ) -> None:
        self.root = root
        self.facts = facts or Facts(root)
        self._owner = owner
        self._base: Choice | None = None
        self._holds: list[Hold] = []
        self._kept_open: list[KeptOpen] = []
        self._deadline: float | None = None
        self.demand: Demand | None = None
        """What is to be in force while servers work."""
        self._kept = contextlib.ExitStack()
        self._session: Session | None = None
        self._unclean: str | None = None
        self._desired: Desired | None = None
        """What is in force, as it was resolved when it was applied."""
        self.ownership = Ownership(enforce=False, now=now or boottime)
        self._asleep = False
        self.delegate: str | None = None
        """Service that keeps ``performance`` for us; None while none does."""
        self._delegated: tuple[str | None, frozenset[str]] = (None, frozenset())
        """Service, and the knobs of what is in force that it sets for us."""
        self.refused_at_start: str | None = None
        """Why the default profile was not applied at start; None if it was, or there is none."""
        self._lost: deque[str] = deque(maxlen=MAX_HOLDS)
        """What is not in force again after a hold, and why, in sentences; until the next apply."""

    # -- life ----------------------------------------------------------------

    def start(self, default: Choice | None) -> Report | None:
        """Put right what a predecessor left, then become the default profile.

        A profile that was applied and settled stays: a restart of the daemon
        does not touch the machine.  Returns what was recovered, if anything.
        """
        recovered = self.take_over()
        if default and self._base is None:
            self.become_default(default)
        return recovered

    def take_over(self) -> Report | None:
        """Put right what a predecessor left; returns what was recovered, if anything."""
        self._unclean = after_unclean_shutdown(self.root)
        self.demand = read_demand(self.root)
        with self._machine() as ours:
            recovered = ours.recovered
            applied = ours.applied
        if applied:
            self._base = Choice(applied.profile, applied.backend, applied.without)
            self._deadline = applied.confirm_by
            with contextlib.suppress(InfertuneError):
                # A profile that has gone since can be reverted, but not watched.
                self._desired = self._resolve(self._base)[1]
            self.expire()
        return recovered

    def become_default(self, default: Choice) -> None:
        """Apply the default profile of a start; why it was not is kept for the status."""
        if self._refused_after(default.profile):
            return
        try:
            self.apply(default)
        except InfertuneError as error:
            self.refused_at_start = error.message

    def demand_default(self, demand: Demand) -> None:
        """The default profile of a start is for when servers work, unless another is."""
        if self.demand is None and not self._refused_after(demand.choice.profile):
            self.demand = demand

    def _refused_after(self, profile: str) -> bool:
        """Whether a profile may be why the machine stopped: it is not applied by itself."""
        if self._unclean != profile:
            return False
        self.refused_at_start = (
            f"the machine stopped without warning while '{profile}' was applied, which has "
            "settings that can cause that; apply it by hand when you know why"
        )
        return True

    def end_holds(self) -> None:
        """The daemon is replaced: what was applied before all holds is in force again.

        Who holds something knows us by a name on the bus, and that goes.
        """
        if self._holds:
            self._holds.clear()
            self._settle_holds()

    def stop(self) -> None:
        """The service is stopped: everything goes back."""
        self._holds.clear()
        self.revert()

    def leave(self) -> None:
        """Let go of the lock and of what is kept open; the machine stays as it is."""
        self._session = None
        self._kept.close()
        self._release_open()

    # -- verbs ---------------------------------------------------------------

    def plan(self, choice: Choice) -> dict[str, Any]:
        machine, desired = self._resolve(choice)
        return report_document(make_plan(self.root, machine, desired, without=choice.without))

    def verify(self, choice: Choice) -> dict[str, Any]:
        self.look()
        return self.plan(choice)

    def status(self) -> dict[str, Any]:
        self.look()
        document = status_document(status(self.root))
        document["drift"] = self.ownership.document()
        document["demand"] = self._demand_document()
        if self.delegate and self._delegated[1]:
            knobs = ", ".join(sorted(self._delegated[1]))
            document["notes"].append(f"{self.delegate} keeps 'performance' for us: {knobs}")
        if self.refused_at_start:
            document["notes"].append(f"default profile not applied: {self.refused_at_start}")
        document["notes"] += self._lost
        document["notes"] += [
            f"held by {hold.owner}: {hold.choice.profile} ({hold.reason})"
            for hold in self._holds
            if hold.owner != OURS
        ]
        return document

    def apply(self, choice: Choice, *, confirm_within_s: float | None = None) -> dict[str, Any]:
        """Become ``choice`` until told otherwise; raises the engine's errors.

        Whoever decides that wants no other profile by itself: a demand is over.
        """
        self._refuse_during_a_hold()
        if self.demand:
            self._resolve(choice)
            self.end_demand()
        deadline = boottime() + confirm_within_s if confirm_within_s else None
        report = self._become(choice, confirm_by=deadline)
        self._base = choice
        self._deadline = deadline
        self._lost.clear()
        self.refused_at_start = None
        return report_document(report)

    def revert(self) -> dict[str, Any]:
        """Put every original back and forget what was applied.  Raises Failed during a hold."""
        self._refuse_during_a_hold()
        self._lost.clear()
        self._forget_demand()
        self._holds.clear()
        try:
            with self._machine() as ours:
                self._release_open()
                report = ours.revert()
        finally:
            self._session = None
            self._kept.close()
        self._base = None
        self._deadline = None
        self._forget()
        return report_document(report)

    def _refuse_during_a_hold(self) -> None:
        others = [hold for hold in self._holds if hold.owner != OURS]
        if others:
            raise Failed(
                f"busy: '{others[-1].choice.profile}' is held by {others[-1].owner}; "
                "nothing was touched"
            )

    def confirm(self) -> bool:
        """Keep what waits for a confirmation; False where nothing does."""
        with self._machine() as ours:
            # During a hold the journal is the hold's; what waits is the profile before it.
            confirmed = ours.confirm() or self._deadline is not None
        self._deadline = None
        return confirmed

    @property
    def choice(self) -> Choice | None:
        """The profile that is in force, by a hold or by an apply."""
        return self._holds[-1].choice if self._holds else self._base

    @property
    def state(self) -> str:
        """idle, applied, unconfirmed or held."""
        if self._holds:
            return "held"
        if self._base is None:
            return "idle"
        return "applied" if self._deadline is None else "unconfirmed"

    # -- a deadline ----------------------------------------------------------

    @property
    def deadline(self) -> float | None:
        """CLOCK_BOOTTIME in seconds at which what is applied goes back."""
        return self._deadline

    def expire(self) -> dict[str, Any] | None:
        """Revert if the deadline has passed; returns what was put back."""
        if self._deadline is None or boottime() < self._deadline:
            return None
        if self._holds:
            # A hold is in force; what nobody confirmed does not come back after it.
            self._base = self._deadline = None
            return None
        return self.revert()

    # -- holds ---------------------------------------------------------------

    def hold(self, owner: str, choice: Choice, reason: str) -> str:
        """Become ``choice`` for as long as ``owner`` stays; returns the cookie that ends it."""
        if len(self._holds) >= MAX_HOLDS:
            raise Failed(f"there are {MAX_HOLDS} holds already; nothing was touched")
        # 128 random bits, and it works only for its owner: a cookie that leaks opens nothing.
        one = Hold(os.urandom(16).hex(), owner, choice, reason)
        self._take(one)
        return one.cookie

    def _take(self, one: Hold) -> None:
        if self._session is None:
            # KeptOpen values must not outlive us, so the machine is ours as long as they last.
            self._session = self._kept.enter_context(self._machine())
        try:
            self._become(one.choice, hold=True)
        except InfertuneError:
            self._settle_holds()
            raise
        self._holds.append(one)

    def release(self, owner: str, cookie: str) -> None:
        """End a hold.  Raises UsageError for a cookie that is not the owner's."""
        left = [h for h in self._holds if not (h.owner == owner and h.cookie == cookie)]
        if len(left) == len(self._holds):
            raise UsageError("there is no such hold of yours")
        self._holds = left
        self._settle_holds()

    def owner_left(self, owner: str) -> bool:
        """End all holds of somebody who left the bus; True if there were any."""
        left = [hold for hold in self._holds if hold.owner != owner]
        if len(left) == len(self._holds):
            return False
        self._holds = left
        self._settle_holds()
        return True

    def owners(self) -> set[str]:
        """Names on the bus of those who hold something."""
        return {hold.owner for hold in self._holds} - {OURS}

    # -- while servers work --------------------------------------------------

    def while_serving(self, demand: Demand) -> dict[str, Any]:
        """Be ``demand`` from now on while servers work; returns what that will change."""
        machine, desired = self._resolve(demand.choice)
        plan = make_plan(self.root, machine, desired, without=demand.choice.without)
        for item in plan.items:
            if item.blocks:
                raise Failed(
                    f"{item.knob}: {item.outcome}, but {item.source} requires it: {item.reason}; "
                    "nothing was touched"
                )
        self.end_demand()
        write_demand(self.root, demand)
        self.demand = demand
        self.refused_at_start = None
        return report_document(plan)

    @property
    def is_met(self) -> bool:
        """Whether the profile of the demand is in force, or will be after the holds of others."""
        return any(hold.owner == OURS for hold in self._holds)

    def meet(self, working: bool) -> None:
        """Put the profile of the demand in force, or take it back.  Raises the engine's errors."""
        if working == self.is_met or (working and self.demand is None):
            return
        if not working:
            self.owner_left(OURS)
            return
        assert self.demand is not None
        one = Hold("", OURS, self.demand.choice, "servers work")
        if self._holds:
            # Whoever asked for a profile of their own keeps it.
            self._holds.insert(0, one)
        else:
            self._take(one)

    def end_demand(self) -> None:
        """Be nothing by itself any more.  Raises the engine's errors."""
        self._forget_demand()
        self.owner_left(OURS)

    def _forget_demand(self) -> None:
        if self.demand is None:
            return
        self.demand = None
        try:
            write_demand(self.root, None)
        except Failed as error:
            # A /run that takes no writes must not keep a value from going back.
            self._lost.append(f"the next infertuned applies it on demand again: {error.message}")

    def _demand_document(self) -> dict[str, Any] | None:
        if self.demand is None:
            return None
        return {
            "profile": self.demand.choice.profile,
            "backend": self.demand.choice.backend,
            "idle_seconds": self.demand.idle_s,
            "in_force": self.is_met,
        }

    def _settle_holds(self) -> None:
        """After a hold ended: the newest of the rest, else what was applied before all holds.

        One that cannot be applied any more is over: values of the one that ended must not stay.
        """
        while self._holds:
            try:
                self._become(self._holds[-1].choice, hold=True)
            except InfertuneError as error:
                over = self._holds.pop()
                self._lost.append(f"not held any more: {over.choice.profile}: {error.message}")
            else:
                return
        assert self._session is not None
        try:
            if self._base:
                try:
                    self._become(self._base, confirm_by=self._deadline)
                except InfertuneError as error:
                    # Its profile has gone meanwhile: held values must not stay for that.
                    self._lost.append(f"not applied again: {self._base.profile}: {error.message}")
                    self._base = self._deadline = None
                    self._put_all_back(self._session)
                    raise
            else:
                self._put_all_back(self._session)
        finally:
            self._session = None
            self._kept.close()

    def _put_all_back(self, ours: Session) -> None:
        self._release_open()
        ours.revert()
        self._forget()

    # -- the machine ---------------------------------------------------------

    def _become(
        self, choice: Choice, *, hold: bool = False, confirm_by: float | None = None
    ) -> Report:
        _, desired = self._resolve(choice)
        with self._machine() as ours:
            report = ours.apply(
                desired, without=choice.without, hold=hold, stays=True, confirm_by=confirm_by
            )
            # A request of ours that is already as strict as wanted was not made again.
            kept = {item.path for item in report.items if item.outcome == "already"}
            stay = [each for each in self._kept_open if each.path in kept]
            self._kept_open = [each for each in self._kept_open if each not in stay]
            self._release_open()
            self._kept_open = [*stay, *ours.take_kept()]
        self._forget()
        self._desired = desired
        return self._say_what_is_delegated(report)

    def _forget(self) -> None:
        self._desired = None
        self._delegated = (None, frozenset())
        self.ownership.forget()

    def _say_what_is_delegated(self, report: Report) -> Report:
        """The report with what the power profiles service set for us named as that."""
        if self.delegate is None:
            return report
        reason = f"{self.delegate} keeps its profile 'performance' for us"
        items = tuple(
            replace(item, outcome="held", reason=reason)
            if item.knob in POWER_KNOBS
            and item.outcome == "already"
            and item.want == "performance"
            # With another original it is in the journal: it was written, not delegated.
            and item.original == item.before
            else item
            for item in report.items
        )
        theirs = {item.knob for item in items if item.outcome == "held"}
        written = {item.knob for item in items if item.outcome != "held"}
        self._delegated = (self.delegate, frozenset(theirs - written))
        return replace(report, items=items)

    # -- what others do to it -------------------------------------------------

    def wants_power(self, choice: Choice | None) -> bool:
        """Whether ``choice`` asks for what a power profiles service can keep.  Never raises."""
        if choice is None:
            return False
        try:
            machine, desired = self._resolve(choice)
        except InfertuneError:
            return False
        return any(
            setting.id in POWER_KNOBS
            and setting.canonical == "performance"
            and setting.id not in choice.without
            and targets(self.root, machine, KNOBS[setting.id])
            for setting in desired.now
        )

    def note_delegate(self, delegate: str | None) -> None:
        """A power profiles service began to keep ``performance`` for us, or does not any more."""
        self.delegate = delegate
        choice = self.choice
        if delegate and choice and self._desired:
            machine = self.facts.machine()
            self._say_what_is_delegated(
                make_plan(self.root, machine, self._desired, without=choice.without)
            )

    def sleeps(self) -> None:
        """The machine is about to sleep: what differs by now was somebody's decision."""
        self.look()
        self._asleep = True

    def woke(self) -> bool:
        """The machine woke up: what differs only since then was reset; see ``look``."""
        self._asleep = False
        return self.look(was_reset=lambda _: True, why="resume")

    def look(
        self,
        *,
        was_reset: Callable[[str], bool] | None = None,
        by: str | None = None,
        why: str | None = None,
    ) -> bool:
        """Plan again after an event; True if anything is another's than before.

        ``was_reset`` and ``by``: see Ownership.decide.  Without ``why``, a word for
        the event, nothing is written: somebody only asked.  Raises the engine's
        errors where something could not be set again.
        """
        choice, desired = self.choice, self._desired
        if choice is None or desired is None or self._asleep or self._somebody_else_works():
            return False
        before = self.ownership.knobs
        decision = self.ownership.decide(
            self._differences(choice, desired),
            was_reset=was_reset or (lambda _: False),
            by=by,
            delegated=self._delegated[0],
            to=self._delegated[1].__contains__,
        )
        if why and (decision.reset or decision.retake):
            with self._machine() as ours:
                report = ours.reassert(
                    desired, reset=decision.reset, leave=decision.leave, without=choice.without
                )
            written = {
                item.path: item.knob
                for item in report.items
                if item.path and item.outcome in ("applied", "clamped")
            }
            self.ownership.set_again(decision, written, why)
        return self.ownership.knobs != before

    def _differences(self, choice: Choice, desired: Desired) -> list[Difference]:
        return list(drift(self.root, self.facts.machine(), desired, without=choice.without))

    def _somebody_else_works(self) -> bool:
        return self._session is None and self.root.lock_owner(LOCK) is not None

    @contextlib.contextmanager
    def _machine(self) -> Iterator[Session]:
        if self._session is not None:
            yield self._session
            return
        with session(self.root, self._owner, self.facts.machine) as ours:
            yield ours

    def _resolve(self, choice: Choice) -> tuple[Machine, Desired]:
        for knob in choice.without:
            if knob not in KNOBS:
                raise UsageError("there is no such knob to leave out")
        machine = self.facts.machine()
        return machine, resolve(self.facts.profile(choice.profile), machine, choice.backend)

    def _release_open(self) -> None:
        for each in self._kept_open:
            each.close()
        self._kept_open = []


def boottime() -> float:
    """CLOCK_BOOTTIME: goes on during suspend, and no clock setting moves it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
