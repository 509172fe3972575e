# SPDX-License-Identifier: Apache-2.0
"""Who calls, and how many calls are answered at a time: root must not wait for a crowd.

The bus lets a connection wait for 128 answers, and a user have 256 connections.  What is over the
bounds here is answered with Busy at once.  To read the machine takes up to 50 ms of the daemon's
one loop, so that is done for one of the others at a time, and between two it is everybody's turn.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import TypeVar

from dbus_fast.aio import MessageBus

from infertune.base.errors import Busy, NotPermitted
from infertune.service.calls import BUS, call

MAX_CALLS_OF_ONE = 8
MAX_CALLS = 32
"""Calls that are being answered, of one user and of all; root's are not counted.  More than the
prompts that may wait (authority.py): whoever is asked for a password can still read."""

MAX_UNKNOWN = 16
"""Calls of one connection that wait to learn whose it is."""
MAX_KNOWN = 512
"""Connections whose user is remembered.  The bus gives no unique name twice."""

_TIMEOUTS_S = (2.0, 4.0, 8.0)
"""Of each try to learn whose a connection is: for a full queue the bus drops its answers, too."""
_Who = TypeVar("_Who", bound=Hashable)


class Callers:
    """The calls that are being answered; each is a task, and counts until that ends."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus
        self._unknown: Counter[str] = Counter()
        self._calls: Counter[int] = Counter()
        self._users: dict[str, asyncio.Future[int]] = {}
        self._reading = asyncio.Lock()

    async def begin(self, sender: str) -> int:
        """Let this task answer ``sender``; the uid, as the bus vouches for it.

        Raises Busy for one call too many, NotPermitted where the bus does not say whose it is.
        """
        with _counted(self._unknown, sender, MAX_UNKNOWN):
            uid = await self._user(sender)
        if uid != 0:
            if self._calls.total() >= MAX_CALLS:
                raise Busy("too many calls are being answered; try again")
            until_its_end = contextlib.ExitStack()
            until_its_end.enter_context(_counted(self._calls, uid, MAX_CALLS_OF_ONE))
            _task().add_done_callback(lambda _: until_its_end.close())
        return uid

    async def read(self) -> None:
        """Wait until this task is the one that may read the machine for others than root."""
        await self._reading.acquire()
        _task().add_done_callback(lambda _: self._reading.release())

    async def _user(self, sender: str) -> int:
        """The user of a connection, asked for once."""
        asked = self._users.get(sender)
        if asked is None:
            asked = self._users[sender] = asyncio.ensure_future(self._ask(sender))
            for old in list(self._users)[:-MAX_KNOWN]:
                del self._users[old]
        try:
            return await asyncio.shield(asked)
        except Exception as doubt:
            self._users.pop(sender, None)
            raise NotPermitted("not authorized (the bus does not say who asks)") from doubt

    async def _ask(self, sender: str) -> int:
        for timeout_s in _TIMEOUTS_S:
            try:
                reply = await call(
                    self._bus, BUS, "GetConnectionUnixUser", "s", sender, timeout_s=timeout_s
                )
            except TimeoutError:
                continue
            uid = reply.body[0]
            if reply.signature != "u" or not isinstance(uid, int):
                raise ValueError("the bus gave no uid")
            return uid
        raise TimeoutError


def _task() -> asyncio.Task[object]:
    task = asyncio.current_task()
    assert task is not None
    return task


@contextlib.contextmanager
def _counted(calls: Counter[_Who], who: _Who, most: int) -> Iterator[None]:
    if calls[who] >= most:
        raise Busy(f"{most} calls of yours are being answered; wait for those")
    calls[who] += 1
    try:
        yield
    finally:
        calls[who] -= 1
        if not calls[who]:
            del calls[who]  # forgets whoever has none left
