# SPDX-License-Identifier: Apache-2.0
"""A call to somebody else on the bus, and what can become of it."""

from __future__ import annotations

import asyncio
from typing import Any

from dbus_fast import Message, MessageFlag, MessageType
from dbus_fast.aio import MessageBus

from infertune.base.records import dataclass


@dataclass(frozen=True, slots=True)
class Remote:
    """Somebody's object."""

    name: str
    path: str
    interface: str


BUS = Remote("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")


class Refused(ConnectionError):
    """The answer is an error; as a string its name on the bus."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(name)
        self.text = text


async def call(
    bus: MessageBus,
    remote: Remote,
    member: str,
    signature: str = "",
    *body: Any,
    timeout_s: float | None,
    flags: MessageFlag = MessageFlag.NONE,
) -> Message:
    """The answer to a call.  Raises Refused; TimeoutError; EOFError or OSError without a bus.

    ``timeout_s`` may be None for the bus itself: without its answers nothing goes on.
    """
    message = Message(
        destination=remote.name,
        path=remote.path,
        interface=remote.interface,
        member=member,
        signature=signature,
        body=list(body),
        flags=flags,
    )
    reply = await asyncio.wait_for(bus.call(message), timeout_s)
    if reply is None:
        raise Refused("", "no answer")
    if reply.message_type is not MessageType.METHOD_RETURN:
        name = reply.error_name or ""
        raise Refused(name, str(reply.body[0]) if reply.body else name)
    return reply
