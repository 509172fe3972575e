# SPDX-License-Identifier: Apache-2.0
"""A connection to the bus that looks at the size of a message before anything of it is unpacked.

dbus-fast unpacks whatever it is sent, of any type and up to the bus's 32 MiB, before a method or
polkit is asked: one call kept it busy for ten seconds and took 600 MiB.  Nobody who calls us has
that much to say.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
from typing import Any

from dbus_fast import MessageType
from dbus_fast.aio import MessageBus

from infertune.errors import Failed

MAX_MESSAGE = 64 * 1024
"""Bytes of a call or a signal: whoever sends one was not asked."""
MAX_REPLY = 1024 * 1024
"""Bytes of an answer.  The bus lets through only those to a question of ours."""

_FIXED = 16
"""Bytes at the beginning of a message, from which its length can be told."""
_REPLIES = (MessageType.METHOD_RETURN.value, MessageType.ERROR.value)

_log = logging.getLogger(__name__)


class GuardedBus(MessageBus):
    """A MessageBus that never sees a message over the bounds."""

    _guard: Guard | None = None

    async def connect(self) -> GuardedBus:
        await super().connect()
        # The answer to Hello came through the guard, if dbus-fast is still built as we know it.
        if self._guard is None or not self._guard.messages:
            self.disconnect()
            raise Failed("this version of dbus-fast reads past the guard of its connection")
        return self

    async def _authenticate(self) -> None:
        await super()._authenticate()
        assert self._sock is not None
        # From here on there are messages, read by whoever takes the socket now.
        self._guard = Guard(self._sock)
        self._sock = self._guard  # type: ignore[assignment]


class Guard:
    """A socket that leaves out messages that are too long."""

    def __init__(self, sock: socket.socket) -> None:
        self._real = sock
        self._fixed = bytearray()
        """What came of the next message's fixed bytes, as long as they are not all there."""
        self._rest = 0
        """Bytes to come of the message that is being read."""
        self._passes = True
        self._turn = MAX_MESSAGE
        self.messages = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def recv(self, _size: int) -> bytes:
        """What is there, without what is too long.  Raises BlockingIOError where that is nothing.

        Also after some bytes: dbus-fast reads for as long as there is something, and whoever kept
        it supplied would keep timers and signals from the loop.
        """
        if self._turn <= 0:
            self._turn = MAX_MESSAGE
            raise BlockingIOError(errno.EAGAIN, "it is the turn of others")
        data = self._real.recv(MAX_MESSAGE)
        if not data:
            return data
        self._turn -= len(data)
        passed = self._filter(data)
        if not passed:
            raise BlockingIOError(errno.EAGAIN, "nothing that may pass")
        return passed

    def _filter(self, data: bytes) -> bytes:
        passed = bytearray()
        at = 0
        while at < len(data):
            if not self._rest:
                part = data[at : at + _FIXED - len(self._fixed)]
                self._fixed += part
                at += len(part)
                if len(self._fixed) < _FIXED:
                    break
                self._begin(bytes(self._fixed))
                if self._passes:
                    passed += self._fixed
                self._fixed.clear()
            part = data[at : at + self._rest]
            self._rest -= len(part)
            at += len(part)
            if self._passes:
                passed += part
        return bytes(passed)

    def _begin(self, fixed: bytes) -> None:
        """Judge the next message by its fixed bytes."""
        body, fields = struct.unpack_from(">I4xI" if fixed[:1] == b"B" else "<I4xI", fixed, 4)
        self._rest = fields + -fields % 8 + body
        length = _FIXED + self._rest
        self._passes = length <= (MAX_REPLY if fixed[1] in _REPLIES else MAX_MESSAGE)
        self.messages += 1
        if not self._passes:
            _log.warning("a message of %d bytes was dropped", length)
