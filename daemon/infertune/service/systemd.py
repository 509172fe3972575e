# SPDX-License-Identifier: Apache-2.0
"""What systemd is asked to do with units, over the bus."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from dbus_fast import Message, MessageType
from dbus_fast.aio import MessageBus

from infertune.errors import Failed
from infertune.service.wire import from_bus

_TIMEOUT_S = 30.0
_JOB_S = 60.0
"""Longest start or stop of a unit; TimeoutStopSec= of a server is half of it."""

_JOB_REMOVED = (
    "type='signal',sender='org.freedesktop.systemd1',"
    "interface='org.freedesktop.systemd1.Manager',member='JobRemoved'"
)


class Systemd:
    """The service manager, over the bus."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus
        self._listeners = 0
        self._ended: dict[str, str] = {}
        """Result by path, of the jobs that ended while somebody waited for one."""
        self._job_ended = asyncio.Event()
        bus.add_message_handler(self._hear)

    async def reload(self) -> None:
        await self._call("Reload")

    async def start(self, unit: str) -> None:
        """Start a unit and wait until it has started.  Raises Failed where it does not."""
        result = await self._job("StartUnit", unit)
        if result != "done":
            raise Failed(f"{unit} did not start ({result})")

    async def stop(self, unit: str) -> None:
        """Stop a unit and wait until it is gone.  Raises Failed where it does not go."""
        result = await self._job("StopUnit", unit)
        await self._call("ResetFailedUnit", "s", unit, may_fail=True)
        if result != "done":
            raise Failed(f"{unit} did not stop ({result})")

    async def states(self, unit: str) -> dict[str, str]:
        """ActiveState by unit, for the units that match a pattern."""
        found = await self._call("ListUnitsByPatterns", "asas", [], [unit])
        return {row[0]: row[3] for row in found}

    async def _job(self, member: str, unit: str) -> str:
        """Have a job done; its result: done, failed, canceled, timeout, dependency..."""
        async with self._listening():
            path = await self._call(member, "ss", unit, "replace")
            try:
                async with asyncio.timeout(_JOB_S):
                    while path not in self._ended:
                        self._job_ended.clear()
                        await self._job_ended.wait()
            except TimeoutError:
                raise Failed(f"{unit}: systemd is not done with it after {_JOB_S:.0f} s") from None
            return self._ended.pop(path)

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        """Be told of ended jobs; only meanwhile, since other people's jobs would wake us too."""
        if not self._listeners:
            await self._call("Subscribe", may_fail=True)
            await self._match("AddMatch")
        self._listeners += 1
        try:
            yield
        finally:
            self._listeners -= 1
            if not self._listeners:
                self._ended.clear()
                await self._match("RemoveMatch")
                await self._call("Unsubscribe", may_fail=True)

    def _hear(self, message: Message) -> None:
        if (
            self._listeners
            and message.message_type is MessageType.SIGNAL
            and message.member == "JobRemoved"
            and message.interface == "org.freedesktop.systemd1.Manager"
            and message.signature == "uoss"
        ):
            _, path, _, result = message.body
            self._ended[path] = result
            self._job_ended.set()

    async def _match(self, member: str) -> None:
        await self._bus.call(
            Message(
                destination="org.freedesktop.DBus",
                path="/org/freedesktop/DBus",
                interface="org.freedesktop.DBus",
                member=member,
                signature="s",
                body=[_JOB_REMOVED],
            )
        )

    async def _call(
        self, member: str, signature: str = "", *body: Any, may_fail: bool = False
    ) -> Any:
        message = Message(
            destination="org.freedesktop.systemd1",
            path="/org/freedesktop/systemd1",
            interface="org.freedesktop.systemd1.Manager",
            member=member,
            signature=signature,
            body=list(body),
        )
        try:
            reply = await asyncio.wait_for(self._bus.call(message), _TIMEOUT_S)
        except TimeoutError:
            raise Failed(f"systemd did not answer {member}") from None
        if reply is None or reply.message_type is not MessageType.METHOD_RETURN:
            if may_fail:
                return None
            why = reply.body[0] if reply and reply.body else "no answer"
            raise Failed(f"systemd: {member}: {why}")
        return from_bus(reply.body[0]) if reply.body else None
