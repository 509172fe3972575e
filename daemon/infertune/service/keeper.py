# SPDX-License-Identifier: Apache-2.0
"""What the daemon keeps: the applied profile, holds, a deadline.  Knows nothing of the bus.

Calls take milliseconds and are made one at a time by the daemon's one loop.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from infertune.documents import report_document, status_document
from infertune.engine import (
    Report,
    Session,
    after_unclean_shutdown,
    make_plan,
    session,
    status,
)
from infertune.errors import Failed, InfertuneError, UsageError
from infertune.knobs import KNOBS
from infertune.machine import Machine, read_machine
from infertune.profile import load_profile
from infertune.resolve import Desired, resolve
from infertune.root import Held, Root

MAX_HOLDS = 16
"""power-profiles-daemon has no limit, and a distribution had to patch one in."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A profile somebody asked for."""

    profile: str
    backend: str
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Hold:
    """A profile that lasts as long as its owner stays on the bus."""

    cookie: str
    owner: str
    choice: Choice
    reason: str


class Keeper:
    """The engine with a memory."""

    def __init__(self, root: Root, *, owner: str = "infertuned") -> None:
        self.root = root
        self._owner = owner
        self._base: Choice | None = None
        self._holds: list[Hold] = []
        self._held_open: list[Held] = []
        self._deadline: float | None = None
        self._kept = contextlib.ExitStack()
        self._session: Session | None = None
        self.refused_at_start: str | None = None
        """Why the default profile was not applied at start; None if it was, or there is none."""

    # -- life ----------------------------------------------------------------

    def start(self, default: Choice | None) -> Report | None:
        """Put right what a predecessor left, then become the default profile.

        A profile that was applied and settled stays: a restart of the daemon
        does not touch the machine.  Returns what was recovered, if anything.
        """
        unclean = after_unclean_shutdown(self.root)
        with session(self.root, self._owner) as held:
            recovered = held.recovered
            applied = held.applied
        if applied:
            self._base = Choice(applied.profile, applied.backend, applied.without)
            self._deadline = applied.confirm_by
            self.expire()
        elif default and unclean == default.profile:
            self.refused_at_start = (
                f"the machine stopped without warning while '{unclean}' was applied, which has "
                "settings that can cause that; apply it by hand when you know why"
            )
        elif default:
            try:
                self.apply(default)
            except InfertuneError as error:
                self.refused_at_start = error.message
        return recovered

    def stop(self) -> None:
        """The service is stopped: everything goes back."""
        self._holds.clear()
        self.revert()

    def leave(self) -> None:
        """Let go of the lock and of what is held open; the machine stays as it is."""
        self._session = None
        self._kept.close()
        self._release_open()

    # -- verbs ---------------------------------------------------------------

    def plan(self, choice: Choice) -> dict[str, Any]:
        machine, desired = self._resolve(choice)
        return report_document(make_plan(self.root, machine, desired, without=choice.without))

    def verify(self, choice: Choice) -> dict[str, Any]:
        return self.plan(choice)

    def status(self) -> dict[str, Any]:
        document = status_document(status(self.root, read_machine(self.root)))
        if self.refused_at_start:
            document["notes"].append(f"default profile not applied: {self.refused_at_start}")
        document["notes"] += [
            f"held by {hold.owner}: {hold.choice.profile} ({hold.reason})" for hold in self._holds
        ]
        return document

    def apply(self, choice: Choice, *, confirm_within_s: float | None = None) -> dict[str, Any]:
        """Become ``choice`` until told otherwise; raises the engine's errors."""
        if self._holds:
            raise Failed(
                f"busy: '{self._holds[-1].choice.profile}' is held by {self._holds[-1].owner}; "
                "nothing was touched"
            )
        deadline = boottime() + confirm_within_s if confirm_within_s else None
        report = self._become(choice, confirm_by=deadline)
        self._base = choice
        self._deadline = deadline
        self.refused_at_start = None
        return report_document(report)

    def revert(self) -> dict[str, Any]:
        """Put every original back and forget what was applied."""
        with self._machine() as held:
            self._release_open()
            report = held.revert()
        self._base = None
        self._deadline = None
        return report_document(report)

    def confirm(self) -> bool:
        """Keep what waits for a confirmation; False where nothing does."""
        with self._machine() as held:
            confirmed = held.confirm()
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
        return self.revert()

    # -- holds ---------------------------------------------------------------

    def hold(self, owner: str, choice: Choice, reason: str) -> str:
        """Become ``choice`` for as long as ``owner`` stays; returns the cookie that ends it."""
        if len(self._holds) >= MAX_HOLDS:
            raise Failed(f"there are {MAX_HOLDS} holds already; nothing was touched")
        if self._session is None:
            # Held values must not outlive us, so the machine is ours as long as they last.
            self._session = self._kept.enter_context(session(self.root, self._owner))
        try:
            self._become(choice, hold=True)
        except InfertuneError:
            self._settle_holds()
            raise
        # 128 random bits, and it works only for its owner: a cookie that leaks opens nothing.
        one = Hold(secrets.token_hex(16), owner, choice, reason)
        self._holds.append(one)
        return one.cookie

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
        return {hold.owner for hold in self._holds}

    def _settle_holds(self) -> None:
        """After a hold ended: the newest of the rest, else what was applied before all holds."""
        if self._holds:
            self._become(self._holds[-1].choice, hold=True)
            return
        assert self._session is not None
        try:
            if self._base:
                self._become(self._base, confirm_by=self._deadline)
            else:
                self._release_open()
                self._session.revert()
        finally:
            self._session = None
            self._kept.close()

    # -- the machine ---------------------------------------------------------

    def _become(
        self, choice: Choice, *, hold: bool = False, confirm_by: float | None = None
    ) -> Report:
        _, desired = self._resolve(choice)
        with self._machine() as held:
            report = held.apply(
                desired, without=choice.without, hold=hold, stays=True, confirm_by=confirm_by
            )
            self._release_open()
            self._held_open = held.take_held()
        return report

    @contextlib.contextmanager
    def _machine(self) -> Iterator[Session]:
        if self._session is not None:
            yield self._session
            return
        with session(self.root, self._owner) as held:
            yield held

    def _resolve(self, choice: Choice) -> tuple[Machine, Desired]:
        for knob in choice.without:
            if knob not in KNOBS:
                raise UsageError("there is no such knob to leave out")
        machine = read_machine(self.root)
        return machine, resolve(load_profile(self.root, choice.profile), machine, choice.backend)

    def _release_open(self) -> None:
        for held in self._held_open:
            held.close()
        self._held_open = []


def boottime() -> float:
    """CLOCK_BOOTTIME: goes on during suspend, and no clock setting moves it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
