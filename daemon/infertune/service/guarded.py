# SPDX-License-Identifier: Apache-2.0
"""A connection to the bus that looks at a message's size and types before it is unpacked.

dbus-fast unpacks whatever it is sent, of any type and up to the bus's 32 MiB, before a method or
polkit is asked: one call kept it busy for ten seconds and took 600 MiB.  Nobody who calls us has
that much to say.
"""

from __future__ import annotations

import errno
import logging
import re
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

MAX_OTHER = 512
"""Bytes in the body of a call or a signal of types that nobody here takes; it gets its error."""
SIGNATURES = (b"s", b"ss", b"sss", b"ssas", b"ssasu", b"ssss", b"sbs")
"""Types of our methods, of Properties, and of the signals that are heard.  A variant, of which four
bytes make an object, is not among them: small messages without an end would do as a long one."""

_FIXED = 16
"""Bytes at the beginning of a message, from which its length can be told."""
_SIGNATURE = re.compile(rb"\x08\x01g\0.([!-~]*)\0", re.DOTALL)
"""In the header: field 8.  No other field that the bus lets through can hold its first byte."""
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
    """A socket that leaves out messages that are too long, or long and of other types."""

    def __init__(self, sock: socket.socket) -> None:
        self._real = sock
        self._head = bytearray()
        """What came of the next message's header, as long as it is not judged."""
        self._wanted = _FIXED
        """Bytes of it that are needed for the next look."""
        self._rest = 0
        """Bytes to come of the message that was judged."""
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
        passed = self._filter(memoryview(data))
        if not passed:
            raise BlockingIOError(errno.EAGAIN, "nothing that may pass")
        return passed

    def _filter(self, data: memoryview) -> bytes:
        passed = bytearray()
        while data:
            if self._rest:
                part = data[: self._rest]
                self._rest -= len(part)
                if self._passes:
                    passed += part
            else:
                part = data[: self._wanted - len(self._head)]
                self._head += part
                if len(self._head) == self._wanted:
                    passed += self._judge(bytes(self._head))
            data = data[len(part) :]
        return bytes(passed)

    def _judge(self, head: bytes) -> bytes:
        """Look at what is there of a header; returns it where its message may pass."""
        body, fields = struct.unpack_from(">I4xI" if head[:1] == b"B" else "<I4xI", head, 4)
        end = _FIXED + fields + -fields % 8
        reply = head[1] in _REPLIES
        self._passes = end + body <= (MAX_REPLY if reply else MAX_MESSAGE)
        if self._passes and len(head) < end:
            self._wanted = end
            return b""
        if self._passes and not reply and body > MAX_OTHER:
            found = _SIGNATURE.findall(head, _FIXED)
            self._passes = len(found) == 1 and found[0] in SIGNATURES
        self._rest = end + body - len(head)
        self._head.clear()
        self._wanted = _FIXED
        self.messages += 1
        if self._passes:
            return head
        _log.warning("a message of %d bytes was dropped", end + body)
        return b""
