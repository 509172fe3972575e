# SPDX-License-Identifier: Apache-2.0
"""The daemon as seen from the command line."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from dbus_fast import BusType, Message, MessageFlag, MessageType
from dbus_fast.aio import MessageBus

from infertune.errors import InfertuneError, Unreachable
from infertune.service.names import BUS_NAME, ERROR, ERRORS, INTERFACE, OBJECT_PATH
from infertune.service.wire import from_bus

_TIMEOUT_S = 150.0
"""A person may have to type a password for polkit first."""


def call(member: str, signature: str = "", arguments: Sequence[Any] = ()) -> Any:
    """One call to the daemon; raises its error, or Unreachable where there is none."""
    return asyncio.run(_call(member, signature, list(arguments)))


async def _call(member: str, signature: str, arguments: list[Any]) -> Any:
    try:
        bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    except (OSError, ValueError) as error:
        raise Unreachable("there is no system bus") from error
    try:
        message = Message(
            destination=BUS_NAME,
            path=OBJECT_PATH,
            interface=INTERFACE,
            member=member,
            signature=signature,
            body=arguments,
            flags=MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION | MessageFlag.NO_AUTOSTART,
        )
        reply = await asyncio.wait_for(bus.call(message), _TIMEOUT_S)
    except (OSError, EOFError, TimeoutError) as error:
        raise Unreachable("the daemon does not answer") from error
    finally:
        bus.disconnect()
    if reply is None:
        raise Unreachable("the daemon does not answer")
    if reply.message_type is MessageType.ERROR:
        raise _error(reply)
    return from_bus(reply.body[0]) if reply.body else None


def _error(reply: Message) -> InfertuneError:
    name = reply.error_name or ""
    text = str(reply.body[0]) if reply.body else name
    if not name.startswith(f"{ERROR}."):
        return Unreachable(f"the daemon does not answer: {text}")
    message, _, hint = text.partition("\n")
    error = InfertuneError(message, hint=hint or None)
    kind = ERRORS.get(name.removeprefix(f"{ERROR}."), InfertuneError)
    error.exit_code = kind.exit_code
    return error
