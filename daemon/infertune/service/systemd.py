# SPDX-License-Identifier: Apache-2.0
"""What systemd is asked to do with units, over the bus."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from dbus_fast import Variant
from dbus_fast.aio import MessageBus

from infertune.base.errors import Failed
from infertune.base.units import printable_line
from infertune.service.calls import Refused, Remote, call
from infertune.service.wire import from_bus

_TIMEOUT_S = 30.0
_JOB_S = 60.0
"""Longest start or stop of a unit; TimeoutStopSec= of a server is half of it."""

_POLL_S = 0.1

_PROPERTIES = "org.freedesktop.DBus.Properties"
_NO_UID = 2**32 - 1  # UID_INVALID of systemd
_STATUS_CHARACTERS = 1000


class Systemd:
    """The service manager, over the bus."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus

    async def reload(self) -> None:
        await self._call("Reload")

    async def start(self, unit: str) -> None:
        """Start a unit and wait until it has started.  Raises Failed where it does not."""
        # Also its start limit: that one is for restarts, not for who asks again.
        await self._call("ResetFailedUnit", "s", unit, may_fail=True)
        await self._call("StartUnit", "ss", unit, "replace")
        state = await self._settled(unit)
        if state != "active":
            raise Failed(f"{unit} did not start, it is {state}")

    async def run(self, unit: str) -> None:
        """Start a unit that does one thing and ends, and wait for that.  Raises Failed."""
        await self._call("ResetFailedUnit", "s", unit, may_fail=True)
        await self._call("StartUnit", "ss", unit, "replace")
        if await self._settled(unit) == "failed":
            raise Failed(f"{unit} failed", hint=f"journalctl -u {unit}")

    async def begin(self, unit: str) -> None:
        """Have a unit started, and do not wait for it."""
        await self._call("StartUnit", "ss", unit, "replace")

    async def hear(self, unit: str) -> str | None:
        """Run a unit that does one thing and ends, well or not; what it last said of itself."""
        await self._call("RefUnit", "s", unit)  # or it would be forgotten with what it said
        try:
            with contextlib.suppress(Failed):
                await self.run(unit)
            text = await self._of_service(unit, "StatusText")
            await self._call("ResetFailedUnit", "s", unit, may_fail=True)
            return text if isinstance(text, str) else None
        finally:
            await self._call("UnrefUnit", "s", unit, may_fail=True)

    async def stop(self, unit: str) -> None:
        """Stop a unit and wait until it is gone.  Raises Failed where it does not go."""
        await self._call("StopUnit", "ss", unit, "replace")
        state = await self._settled(unit)
        await self._call("ResetFailedUnit", "s", unit, may_fail=True)
        if state not in ("inactive", "failed"):
            raise Failed(f"{unit} did not stop, it is {state}")

    async def unit(self, unit: str) -> dict[str, Any] | None:
        """Properties of a unit and of its kind; None where systemd does not know it."""
        path = await self._call("LoadUnit", "s", unit)
        about = await self._all(path, "Unit")
        if about.get("LoadState") != "loaded":
            return None
        kind = str(about["Id"]).rpartition(".")[2]
        return {**about, **await self._all(path, kind.capitalize())}

    async def _all(self, path: str, interface: str) -> dict[str, Any]:
        asked = f"org.freedesktop.systemd1.{interface}"
        found = await self._call("GetAll", "s", asked, path=path, interface=_PROPERTIES)
        return dict(found)

    async def set_properties(self, unit: str, values: Mapping[str, int | tuple[int, ...]]) -> None:
        """Change resources of a unit now, until the next boot; systemd notes them in a file."""
        typed = [
            (name, Variant("t", value) if isinstance(value, int) else Variant("ay", bytes(value)))
            for name, value in values.items()
        ]
        await self._call("SetUnitProperties", "sba(sv)", unit, True, typed)

    async def states(self, unit: str) -> dict[str, str]:
        """State by unit, for the units that match a pattern.

        ActiveState, or "restarting" for one that ended and waits to be started again.
        """
        found = await self._call("ListUnitsByPatterns", "asas", [], [unit])
        return {row[0]: _state(row) for row in found}

    async def uid(self, unit: str) -> int | None:
        """User that a service runs as, also a dynamic one; None where it does not run."""
        uid = await self._of_service(unit, "UID")
        return uid if isinstance(uid, int) and uid != _NO_UID else None

    async def status_text(self, unit: str) -> str | None:
        """What a service has last said of itself (STATUS= of sd_notify(3)); None for nothing."""
        text = await self._of_service(unit, "StatusText")
        return printable_line(text, _STATUS_CHARACTERS) if isinstance(text, str) and text else None

    async def _of_service(self, unit: str, name: str) -> Any:
        """A property of a service; None where the unit is not loaded."""
        path = await self._call("GetUnit", "s", unit, may_fail=True)
        if path is None:
            return None
        asked = ("org.freedesktop.systemd1.Service", name)
        return await self._call(
            "Get", "ss", *asked, path=path, interface=_PROPERTIES, may_fail=True
        )

    async def _settled(self, unit: str) -> str:
        """ActiveState of a unit once no job of it is left.

        Asked again and again, not awaited as a JobRemoved signal: systemd 257
        sends none to whoever subscribes after a Reload (seen on 257.13).
        """
        try:
            async with asyncio.timeout(_JOB_S):
                while True:
                    found = await self._call("ListUnitsByPatterns", "asas", [], [unit])
                    row = next((row for row in found if row[0] == unit), None)
                    if row is None:
                        return "inactive"
                    state, job = _state(row), row[7]
                    if not job and state not in ("activating", "deactivating"):
                        return str(state)
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise Failed(f"{unit}: systemd is not done with it after {_JOB_S:.0f} s") from None

    async def _call(
        self,
        member: str,
        signature: str = "",
        *body: Any,
        path: str = "/org/freedesktop/systemd1",
        interface: str = "org.freedesktop.systemd1.Manager",
        may_fail: bool = False,
    ) -> Any:
        remote = Remote("org.freedesktop.systemd1", path, interface)
        try:
            reply = await call(self._bus, remote, member, signature, *body, timeout_s=_TIMEOUT_S)
        except TimeoutError:
            raise Failed(f"systemd did not answer {member}") from None
        except Refused as refused:
            if may_fail:
                return None
            raise Failed(f"systemd: {member}: {refused.text}") from None
        return from_bus(reply.body[0]) if reply.body else None


def _state(row: list[Any]) -> str:
    """Of a row of ListUnits: name, description, load, active, sub..."""
    active, sub = row[3], row[4]
    return "restarting" if sub == "auto-restart" else str(active)
