# SPDX-License-Identifier: Apache-2.0
"""Brings what the daemon wants of users' managers there, and the answers back."""

from __future__ import annotations

import os
from collections.abc import Mapping

from infertune.base.errors import Failed
from infertune.base.names import manager_unit, user_unit
from infertune.base.root import Root
from infertune.servers.of_users import (
    Answer,
    One,
    Request,
    forget_requests,
    parse_answer,
    write_request,
)
from infertune.service.systemd import Systemd

_TRIES = 3


class Users:
    """Users' managers, asked by a unit that has their rights."""

    def __init__(self, root: Root, systemd: Systemd) -> None:
        self._root = root
        self._systemd = systemd

    async def ask(
        self, uid: int, units: Mapping[str, One], about: str = "", plan: One | None = None
    ) -> Answer:
        """Have a user's manager do its part; where it does not run it will when it starts.

        Raises Failed where it gives no answer.
        """
        request = Request(os.urandom(8).hex(), units, about, plan)
        write_request(self._root, uid, request)
        try:
            return await self._answer(uid, request)
        finally:
            # What stays is read again when the manager starts, and is no plan.
            if not units:
                write_request(self._root, uid, None)
            elif plan:
                write_request(self._root, uid, Request(request.serial, units))

    def forget(self) -> None:
        """Leave no request behind: a daemon killed while it planned left one.  Raises Failed."""
        forget_requests(self._root)

    async def _answer(self, uid: int, request: Request) -> Answer:
        manager = manager_unit(uid)
        state = (await self._systemd.states(manager)).get(manager)
        if state == "activating":
            # It has begun to start without ours: after it, and nobody waits here for that.
            await self._systemd.begin(user_unit(uid))
        if state != "active":
            return Answer(request.serial)
        # The manager may just have started it: that run has read what was asked before.
        for _ in range(_TRIES):
            told = await self._systemd.hear(user_unit(uid))
            if not told:
                break  # it hung, and was ended
            if answer := parse_answer(told, request.serial):
                return answer
        raise Failed(
            f"the manager of user {uid} did not do it", hint=f"journalctl -u {user_unit(uid)}"
        )
