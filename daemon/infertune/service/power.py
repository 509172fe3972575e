# SPDX-License-Identifier: Apache-2.0
"""The request for ``performance`` at a power profiles service, instead of writing against it.

power-profiles-daemon, tuned-ppd and tlp-pd share one API.  A request ends when it
is released, when we leave the bus, and when a person picks another profile:
the service then says ProfileReleased, and the person is right.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from dbus_fast.aio import MessageBus

from infertune.base.errors import Failed, InfertuneError
from infertune.base.records import dataclass
from infertune.host.tuners import tuner_by_id
from infertune.service.calls import Remote, call
from infertune.service.keeper import Choice, Keeper
from infertune.service.log import debug
from infertune.service.names import BUS_NAME
from infertune.service.peers import Peers

_TIMEOUT_S = 15.0
"""tuned-ppd answers when TuneD has switched its profile, which takes it more than a second."""

PROVIDERS: tuple[tuple[str, str], ...] = (
    # Name and interface are the same.  power-profiles-daemon >= 0.20 has both.
    ("org.freedesktop.UPower.PowerProfiles", "/org/freedesktop/UPower/PowerProfiles"),
    ("net.hadess.PowerProfiles", "/net/hadess/PowerProfiles"),
)


@dataclass(frozen=True, slots=True)
class _Request:
    name: str
    path: str
    cookie: int
    """0 is a cookie like any other (tuned-ppd begins with it)."""


class Power:
    """Keeps the request in step with what the keeper has in force; one change at a time."""

    def __init__(self, bus: MessageBus, peers: Peers, keeper: Keeper) -> None:
        self._bus = bus
        self._peers = peers
        self._keeper = keeper
        self._one = asyncio.Lock()
        self._request: _Request | None = None
        self._closed = False
        self._overruled = False
        """A person picked another profile: no new request until the next apply."""
        self.problem: str | None = None
        """What went wrong in a turn beside its work: a service did not take our request."""

    @contextlib.asynccontextmanager
    async def turn(self, choice: Choice | None = None) -> AsyncIterator[None]:
        """The right to change the machine.  ``choice``: what is about to be applied.

        A request it wants is made first, so that what the service sets is found
        set; one it does not want is let go first, so that the values found are
        those of the machine.  Afterwards request and keeper agree again.  Raises
        Failed for whoever waited until after ``close``.
        """
        async with self._one:
            await self._end_holds_of_who_left()
            if choice is not None:
                self._overruled = False
                await self._be(self._keeper.wants_power(choice))
            if self._closed:
                raise Failed("infertuned is ending; nothing was touched")
            try:
                yield
            finally:
                await self._settle()
                debug(self._described)

    def _described(self) -> str:
        keeper = self._keeper
        about = f": {keeper.choice.profile} ({keeper.choice.backend})" if keeper.choice else ""
        held = f", held by {', '.join(sorted(keeper.owners()))}" if keeper.owners() else ""
        power = f", {self._request.name} keeps 'performance'" if self._request else ""
        return f"turn done, {keeper.state}{about}{held}{power}"

    async def _end_holds_of_who_left(self) -> None:
        """The bus drops signals for a full queue, so it may not have told us."""
        try:
            owners = sorted(self._keeper.owners())
            there = await asyncio.gather(*map(self._peers.is_there, owners))
            for owner, is_there in zip(owners, there, strict=True):
                if not is_there:
                    self._keeper.owner_left(owner)
        except InfertuneError as error:
            self.problem = error.message
        except (OSError, EOFError):
            return  # the bus itself has gone, which ends the daemon

    def close(self) -> None:
        """The turn that is taken now is the last."""
        self._closed = True

    async def _settle(self) -> None:
        wanted = self._keeper.wants_power(self._keeper.choice)
        if not wanted:
            self._overruled = False
        await self._be(wanted and not self._overruled)

    async def _be(self, wanted: bool) -> None:
        if wanted and self._request is None:
            await self._take()
        elif not wanted and self._request is not None:
            await self._let_go()

    async def _take(self) -> None:
        self.problem = None
        for name, path in PROVIDERS:
            if self._peers.owner(name) is None:
                continue
            provider = self.provider()
            reason = "a server of a language model"
            try:
                reply = await call(
                    self._bus,
                    Remote(name, path, name),
                    "HoldProfile",
                    "sss",
                    "performance",
                    reason,
                    BUS_NAME,
                    timeout_s=_TIMEOUT_S,
                )
                cookie = reply.body[0]
                if reply.signature != "u" or not isinstance(cookie, int):
                    raise ConnectionError("an answer of another shape")
            except (OSError, EOFError, TimeoutError) as error:
                self.problem = f"{provider} did not keep 'performance': {error}"
                return
            self._request = _Request(name, path, cookie)
            self._keeper.note_delegate(provider)
            return

    async def _let_go(self) -> None:
        request, self._request = self._request, None
        self._keeper.note_delegate(None)
        assert request is not None
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            service = Remote(request.name, request.path, request.name)
            await call(
                self._bus, service, "ReleaseProfile", "u", request.cookie, timeout_s=_TIMEOUT_S
            )

    def provider_gone(self, name: str) -> None:
        """A service left the bus, and our request with it."""
        if self._request and self._request.name == name:
            self._request = None
            self._keeper.note_delegate(None)

    def released(self, name: str, cookie: int) -> bool:
        """A service says that a request ended; True if it was ours, so somebody overruled it."""
        if self._request is None or (self._request.name, self._request.cookie) != (name, cookie):
            return False
        self._request = None
        self._overruled = True
        self._keeper.note_delegate(None)
        return True

    def provider(self) -> str:
        """How people call the service that has the API now."""
        running = [tuner for tuner in self._keeper.facts.machine().tuners if tuner.running]
        names = {name for name, _ in PROVIDERS}
        return next(
            (tuner.name for tuner in running if names & set(tuner_by_id(tuner.id).bus_names)),
            "the power profiles service",
        )
