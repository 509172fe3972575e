# SPDX-License-Identifier: Apache-2.0
"""Who may do what: polkit decides, about the sender's bus name, and any doubt is a no.

Never about a process id: between the look-up and the check it can be somebody
else's (CVE-2025-67859 in TLP, CVE-2013-4288 in polkit's own API).
"""

from __future__ import annotations

import asyncio

from dbus_fast import Message, MessageType, Variant
from dbus_fast.aio import MessageBus

from infertune.errors import NotPermitted

_ALLOW_INTERACTION = 1
_TIMEOUT_S = 5.0
_INTERACTION_TIMEOUT_S = 120.0
"""A person may have to type a password."""


class Authority:
    """Asks polkit on behalf of the callers of one bus."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus

    async def check(self, sender: str, action: str, *, interactive: bool = False) -> None:
        """Return if ``sender`` may do ``action``; raises NotPermitted otherwise.

        Root is allowed by its uid, as the bus vouches for it, so that a machine
        without polkit stays usable; everybody else needs polkit's yes.
        """
        try:
            if await self._uid(sender) == 0:
                return
            allowed = await self._ask_polkit(sender, action, interactive)
        except Exception as doubt:
            raise NotPermitted(f"{action}: not authorized (polkit gave no answer)") from doubt
        if not allowed:
            raise NotPermitted(f"{action}: not authorized")

    async def _uid(self, sender: str) -> int:
        reply = await self._call(
            "org.freedesktop.DBus",
            "/org/freedesktop/DBus",
            "org.freedesktop.DBus",
            "GetConnectionUnixUser",
            "s",
            [sender],
            _TIMEOUT_S,
        )
        uid = reply.body[0]
        if reply.signature != "u" or not isinstance(uid, int):
            raise ValueError("the bus gave no uid")
        return uid

    async def _ask_polkit(self, sender: str, action: str, interactive: bool) -> bool:
        reply = await self._call(
            "org.freedesktop.PolicyKit1",
            "/org/freedesktop/PolicyKit1/Authority",
            "org.freedesktop.PolicyKit1.Authority",
            "CheckAuthorization",
            "(sa{sv})sa{ss}us",
            [
                ("system-bus-name", {"name": Variant("s", sender)}),
                action,
                {},
                _ALLOW_INTERACTION if interactive else 0,
                "",
            ],
            _INTERACTION_TIMEOUT_S if interactive else _TIMEOUT_S,
        )
        if reply.signature != "(bba{ss})":
            raise ValueError("polkit gave an answer of another shape")
        # Exactly True: nothing that is merely true-like opens the door.
        return reply.body[0][0] is True

    async def _call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: list[object],
        timeout_s: float,
    ) -> Message:
        message = Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=body,
        )
        reply = await asyncio.wait_for(self._bus.call(message), timeout_s)
        if reply is None or reply.message_type is not MessageType.METHOD_RETURN:
            raise ConnectionError(f"{member} failed")
        return reply
