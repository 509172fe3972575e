# SPDX-License-Identifier: Apache-2.0
"""Units of model servers: their drop-ins, and what systemd is asked to do with them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from dbus_fast import Message, MessageType
from dbus_fast.aio import MessageBus

from infertune.errors import Failed
from infertune.root import Root
from infertune.service.wire import from_bus

_UNITS = "/run/systemd/system"
_DROP_IN = "50-infertune.conf"
_TIMEOUT_S = 30.0


def drop_in_path(unit: str) -> str:
    """Where the drop-in of a unit is; below /run, so it goes with the boot."""
    return f"{_UNITS}/{unit}.d/{_DROP_IN}"


def write_drop_ins(root: Root, texts: Mapping[str, str]) -> None:
    """Write the drop-in of each unit.  Raises Failed."""
    for unit, text in texts.items():
        path = drop_in_path(unit)
        try:
            root.mkdir(path.rpartition("/")[0])
            root.replace(path, text.encode())
        except OSError as error:
            raise Failed(f"{path}: {error.strerror}") from error


def remove_drop_in(root: Root, unit: str) -> None:
    """Remove the drop-in of a unit and its directory.  Raises Failed."""
    path = drop_in_path(unit)
    try:
        root.unlink(path)
        root.rmdir(path.rpartition("/")[0])
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from error


def units_with_drop_in(root: Root) -> list[str]:
    """Server units that have a drop-in of ours."""
    paths = root.glob(f"{_UNITS}/infertune-server@*.service.d/{_DROP_IN}")
    return [path.split("/")[-2].removesuffix(".d") for path in paths]


class Systemd:
    """The service manager, over the bus."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus

    async def reload(self) -> None:
        await self._call("Reload")

    async def start(self, unit: str) -> None:
        await self._call("StartUnit", "ss", unit, "replace")

    async def stop(self, unit: str) -> None:
        await self._call("StopUnit", "ss", unit, "replace")
        await self._call("ResetFailedUnit", "s", unit, may_fail=True)

    async def states(self, unit: str) -> dict[str, str]:
        """ActiveState by unit, for the units that match a pattern."""
        found = await self._call("ListUnitsByPatterns", "asas", [], [unit])
        return {row[0]: row[3] for row in found}

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
