# SPDX-License-Identifier: Apache-2.0
"""Other services on the bus: who has which name, and which of their signals are theirs."""

from __future__ import annotations

from dbus_fast import Message, MessageType
from dbus_fast.aio import MessageBus

from infertune.host.tuners import TUNERS
from infertune.service.calls import BUS, Refused, call

LOGIND = "org.freedesktop.login1"
TUNED = "com.redhat.tuned"

NAMES: dict[str, str] = {
    LOGIND: "logind",
    **{name: tuner.name for tuner in reversed(TUNERS) for name in tuner.bus_names},
}
"""Well-known names that matter here, and how people call their owners."""

_UPOWER = "org.freedesktop.UPower.PowerProfiles"
_HADESS = "net.hadess.PowerProfiles"

SIGNALS: tuple[tuple[str, str, str], ...] = (
    (LOGIND, "org.freedesktop.login1.Manager", "PrepareForSleep"),
    (TUNED, "com.redhat.tuned.control", "profile_changed"),
    # power-profiles-daemon sends it to the holder alone, tuned-ppd to everybody.
    (_UPOWER, _UPOWER, "ProfileReleased"),
    (_HADESS, _HADESS, "ProfileReleased"),
)
"""Sender, interface and member.  With a sender the bus keeps broadcasts of everybody else."""


_TIMEOUT_S = 2.0


class Peers:
    """Unique names of the services in NAMES; a signal counts only from the owner of its name."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus
        self._owners: dict[str, str] = {}

    async def start(self) -> None:
        """Ask for the signals, then who is there now; nobody is started by it."""
        await self._call("AddMatch", f"type='signal',sender='{BUS.name}',member='NameOwnerChanged'")
        for sender, interface, member in SIGNALS:
            rule = f"type='signal',sender='{sender}',interface='{interface}',member='{member}'"
            await self._call("AddMatch", rule)
        for name in NAMES:
            reply = await self._call("GetNameOwner", name)
            if reply is not None:
                self._owners[name] = str(reply.body[0])

    async def is_there(self, name: str) -> bool:
        """Whether somebody has a name on the bus, as of now; after it, ``moved`` tells.

        True also where the bus does not answer: for a full queue it drops its answers, and whoever
        asks may have everybody else wait.
        """
        try:
            reply = await self._call("NameHasOwner", name, timeout_s=_TIMEOUT_S)
        except TimeoutError:
            return True
        return reply is not None and reply.body[0] is True

    def owner(self, name: str) -> str | None:
        return self._owners.get(name)

    def names_of(self, sender: str | None) -> set[str]:
        """The names in NAMES that a sender has."""
        return {name for name, owner in self._owners.items() if owner == sender}

    def moved(self, message: Message) -> tuple[str, str] | None:
        """Name and new owner of a NameOwnerChanged of the bus itself, noted; None for others."""
        if message.message_type is not MessageType.SIGNAL or message.member != "NameOwnerChanged":
            return None
        if message.sender != BUS.name or message.signature != "sss":
            return None
        name, _, owner = message.body
        if name in NAMES:
            if owner:
                self._owners[name] = owner
            else:
                self._owners.pop(name, None)
        return name, owner

    async def _call(
        self, member: str, argument: str, timeout_s: float | None = None
    ) -> Message | None:
        try:
            return await call(self._bus, BUS, member, "s", argument, timeout_s=timeout_s)
        except Refused:
            return None
