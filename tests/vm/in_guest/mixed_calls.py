# SPDX-License-Identifier: Apache-2.0
"""Runs in a guest, as somebody without privilege: mixed_calls.py COUNT

Calls that are denied, malformed, nearly too long, and a few that are allowed.  Prints the number
of answers by kind, as JSON.  (Longer ones get no answer: tests/host/test_hostile_bus.py.)
"""

import asyncio
import json
import random
import sys

from dbus_fast import BusType, Message, MessageType
from dbus_fast.aio import MessageBus

from infertune.service.names import BUS_NAME, INTERFACE, OBJECT_PATH

PROPERTIES = "org.freedesktop.DBus.Properties"
BAD = ("../../etc/passwd", "a\nb", "\x1b[2J", "x" * 60_000, "", "Größe", "/", "-x")
EMPTY: tuple[str, ...] = ()

CALLS = (
    *((INTERFACE, "Plan", "ssas", (bad, "auto", EMPTY)) for bad in BAD),
    *((INTERFACE, "Apply", "ssasu", (bad, "auto", EMPTY, 0)) for bad in BAD),
    (INTERFACE, "Apply", "ssasu", ("quiet", "auto", EMPTY, 0)),
    (INTERFACE, "Apply", "ssasu", ("quiet", "auto", EMPTY, 2**32 - 1)),
    (INTERFACE, "Apply", "s", ("quiet",)),
    (INTERFACE, "Revert", "", ()),
    (INTERFACE, "Confirm", "", ()),
    (INTERFACE, "Hold", "sss", ("quiet", "auto", "x")),
    (INTERFACE, "Release", "s", ("0" * 32,)),
    (INTERFACE, "Serve", "s", ("../x",)),
    (INTERFACE, "Stop", "s", ("chat",)),
    (INTERFACE, "Nothing", "", ()),
    (PROPERTIES, "Get", "ss", (INTERFACE, "State")),
    (PROPERTIES, "GetAll", "s", (INTERFACE,)),
    (PROPERTIES, "Set", "ssv", None),
)


async def main(count: int) -> None:
    chance = random.Random(count)
    answers: dict[str, int] = {}
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    for number in range(count):
        interface, member, signature, body = chance.choice(CALLS)
        if number % 100 == 0:
            interface, member, signature, body = INTERFACE, "Status", "", ()
        if number % 97 == 0:  # somebody new
            bus.disconnect()
            bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
        if body is None:
            from dbus_fast import Variant

            body = (INTERFACE, "State", Variant("s", "x"))
        reply = await bus.call(
            Message(
                destination=BUS_NAME,
                path=OBJECT_PATH,
                interface=interface,
                member=member,
                signature=signature,
                body=[list(each) if isinstance(each, tuple) else each for each in body],
            )
        )
        assert reply is not None
        kind = "answered"
        if reply.message_type is MessageType.ERROR:
            kind = str(reply.error_name).rpartition(".")[2]
            text = str(reply.body[0]) if reply.body else ""
            assert "Traceback" not in text, text
            assert len(text) < 500, text
        answers[kind] = answers.get(kind, 0) + 1
    bus.disconnect()
    print(json.dumps(answers))


asyncio.run(main(int(sys.argv[1])))
