# SPDX-License-Identifier: Apache-2.0
"""What one user can do to the daemon over the bus, and to those who need it meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

dbus_fast = pytest.importorskip("dbus_fast", reason="extra 'daemon' is not installed")

from dbus_fast import Message, MessageType  # noqa: E402
from dbus_fast.aio import MessageBus  # noqa: E402

from infertune.errors import Busy, InfertuneError, NotPermitted  # noqa: E402
from infertune.service import authority  # noqa: E402
from infertune.service.authority import Authority  # noqa: E402
from infertune.service.names import ACTION_APPLY, ACTION_READ  # noqa: E402
from unit.test_service import bus_address, close  # noqa: E402, F401


class SilentPolkit:
    """Reading is allowed; whoever wants more is asked for a password, and never types one."""

    def __init__(self) -> None:
        self.open: dict[str, Message] = {}

    def hear(self, message: Message) -> Message | bool | None:
        if message.message_type is not MessageType.METHOD_CALL:
            return None
        if message.member == "CancelCheckAuthorization":
            asked = self.open.pop(message.body[0])
            self.bus.send(Message.new_error(asked, "org.freedesktop.PolicyKit1.Error.Cancelled"))
            return Message.new_method_return(message)
        if message.member != "CheckAuthorization":
            return None
        _, action, _, flags, name = message.body
        if flags & 1:
            self.open[name] = message
            return True
        allowed = action == ACTION_READ
        return Message.new_method_return(message, "(bba{ss})", [(allowed, not allowed, {})])

    def answer_all(self, allowed: bool) -> None:
        for asked in self.open.values():
            self.bus.send(Message.new_method_return(asked, "(bba{ss})", [(allowed, False, {})]))
        self.open.clear()

    async def start(self, bus: MessageBus) -> None:
        self.bus = bus
        bus.add_message_handler(self.hear)
        await bus.request_name("org.freedesktop.PolicyKit1")


def test_prompts_that_nobody_answers_are_few(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene() -> None:
        service = await MessageBus(bus_address=bus_address).connect()
        client = await MessageBus(bus_address=bus_address).connect()
        polkit = SilentPolkit()
        await polkit.start(service)
        asker = Authority(client)

        async def uid(sender: str) -> int:
            return int(sender.rpartition(".")[2]) // 100

        asker._uid = uid  # type: ignore[method-assign]

        async def outcome(sender: str, action: str = ACTION_APPLY) -> type[InfertuneError] | None:
            try:
                await asker.check(sender, action, interactive=True)
            except InfertuneError as error:
                return type(error)
            return None

        # Users 10 to 14, each from ten connections of its own.
        senders = [f":1.{user}{number:02}" for user in range(10, 15) for number in range(10)]
        waiting = [asyncio.create_task(outcome(sender)) for sender in senders]
        while sum(task.done() for task in waiting) < len(waiting) - 16:
            await asyncio.sleep(0.02)
        for user in range(4):
            of_one = waiting[user * 10 : user * 10 + 10]
            assert [task.done() for task in of_one] == [False] * 4 + [True] * 6
        assert all(task.done() for task in waiting[40:]), "the fifth user has no room left"
        assert {task.result() for task in waiting if task.done()} == {Busy}
        # Meanwhile, what needs no password is answered.
        assert await outcome(":1.2000", ACTION_READ) is None
        polkit.answer_all(False)
        assert {await task for task in waiting} == {Busy, NotPermitted}
        # There is room again, and what waited too long is over in polkit too.
        with monkeypatch.context() as patch:
            patch.setattr(authority, "_INTERACTION_TIMEOUT_S", 0.3)
            assert await outcome(":1.1000") is NotPermitted
        assert not polkit.open
        again = asyncio.create_task(outcome(":1.1000"))
        while not polkit.open:
            assert not again.done()
            await asyncio.sleep(0.02)
        polkit.answer_all(True)
        assert await again is None
        await close(client)
        await close(service)

    asyncio.run(asyncio.wait_for(scene(), 60))
