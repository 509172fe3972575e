# SPDX-License-Identifier: Apache-2.0
"""The daemon as seen from the command line."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from dbus_fast import BusType, MessageFlag
from dbus_fast.aio import MessageBus

from infertune.errors import InfertuneError, Unreachable
from infertune.service import calls
from infertune.service.calls import Refused, Remote
from infertune.service.names import BUS_NAME, ERROR, ERRORS, INTERFACE, OBJECT_PATH
from infertune.service.wire import from_bus

_DAEMON = Remote(BUS_NAME, OBJECT_PATH, INTERFACE)
_FLAGS = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION | MessageFlag.NO_AUTOSTART
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
        reply = await calls.call(
            bus, _DAEMON, member, signature, *arguments, timeout_s=_TIMEOUT_S, flags=_FLAGS
        )
    except Refused as refused:
        raise _error(refused) from None
    except (OSError, EOFError, TimeoutError) as error:
        raise Unreachable("the daemon does not answer") from error
    finally:
        bus.disconnect()
    return from_bus(reply.body[0]) if reply.body else None


def _error(refused: Refused) -> InfertuneError:
    name, text = str(refused), refused.text
    if not name.startswith(f"{ERROR}."):
        return Unreachable(f"the daemon does not answer: {text}")
    message, _, hint = text.partition("\n")
    error = InfertuneError(message, hint=hint or None)
    kind = ERRORS.get(name.removeprefix(f"{ERROR}."), InfertuneError)
    error.exit_code = kind.exit_code
    return error
