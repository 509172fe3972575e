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

    ``timeout_s`` may be None for the bus itself: without its answers nothing goes on.  A call is
    open on the bus until its answer comes, whoever waits for that (Questions).
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


class Questions:
    """Calls to one service, so many at the most, each counted until it is answered.

    Also after nobody waits for it any more.  The bus does that, too: a connection has 128 calls
    that are not answered, and a service that hangs would take them all from the others.
    """

    def __init__(self, bus: MessageBus, remote: Remote, most: int) -> None:
        self._bus = bus
        self._remote = remote
        self._most = most
        self._open: set[asyncio.Future[Message]] = set()

    async def call(self, member: str, signature: str, *body: Any, timeout_s: float) -> Message:
        """As ``call``.  Raises Refused, too, where too many are open."""
        if len(self._open) >= self._most:
            raise Refused("", f"{self._remote.name} left {self._most} calls without an answer")
        question = asyncio.ensure_future(
            call(self._bus, self._remote, member, signature, *body, timeout_s=None)
        )
        self._open.add(question)
        question.add_done_callback(self._answered)
        return await asyncio.wait_for(asyncio.shield(question), timeout_s)

    def _answered(self, question: asyncio.Future[Message]) -> None:
        self._open.remove(question)
        if not question.cancelled():
            question.exception()  # is nobody's any more, where nobody waits
