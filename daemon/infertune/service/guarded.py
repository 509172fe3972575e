# SPDX-License-Identifier: Apache-2.0
"""A connection to the bus that looks at a message's header before the message is unpacked.

dbus-fast unpacks whatever it is sent, of any type and up to the bus's 32 MiB, before a method or
polkit is asked: one call kept it busy for ten seconds and took 600 MiB.  Nobody who calls us has
that much to say.

A call that wants no answer is left out, too.  The bus lets one connection wait for 128 answers,
and that is all that bounds how much is sent: of calls without an answer there can be 200,000 in
five seconds, and a library that has nobody to tell of their errors logs them.
"""

from __future__ import annotations

import errno
import logging
import re
import socket
import struct
import time
from typing import Any

from dbus_fast import MessageFlag, MessageType
from dbus_fast.aio import MessageBus

from infertune.base.errors import Failed

MAX_MESSAGE = 64 * 1024
"""Bytes of a call or a signal: whoever sends one was not asked."""
MAX_REPLY = 1024 * 1024
"""Bytes of an answer.  The bus lets through only those to a question of ours."""

MAX_OTHER = 512
"""Bytes in the body of a call or a signal of types that nobody here takes; it gets its error."""
SIGNATURES = (b"s", b"ss", b"sss", b"ssas", b"ssasu", b"sssss", b"sssssusst", b"sbs")
"""Types of our methods, of Properties, and of the signals that are heard.  A variant, of which four
bytes make an object, is not among them: small messages without an end would do as a long one."""

_TURN = 4 * 1024
"""Bytes that are read before it is the turn of timers and answers: thirty small calls, which is
what root waits for again and again while a call of root's is answered."""
_TURN_DROPPED = 64 * 1024
"""The same of a message that does not pass; that costs next to nothing."""

_FIXED = 16
"""Bytes at the beginning of a message, from which its length can be told."""
_SIGNATURE = re.compile(rb"\x08\x01g\0.([!-~]*)\0", re.DOTALL)
"""In the header: field 8.  No other field that the bus lets through can hold its first byte."""
_CALL = MessageType.METHOD_CALL.value
_SIGNAL = MessageType.SIGNAL.value
_NO_REPLY = MessageFlag.NO_REPLY_EXPECTED.value
_REPLIES = (MessageType.METHOD_RETURN.value, MessageType.ERROR.value)

_BETWEEN_LINES_S = 60.0

_log = logging.getLogger(__name__)


class GuardedBus(MessageBus):
    """A MessageBus that never sees a message over the bounds, and can wait to send."""

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
        assert self._writer is not None
        self._writer.sock = self._sock


class OwnBus(GuardedBus):
    """A second connection with the same objects, whose signals the first one sends already."""

    def _interface_signal_notify(self, *_: object, **__: object) -> None:
        pass


class Guard:
    """A socket that leaves out messages that are too long, of other types, or want no answer."""

    def __init__(self, sock: socket.socket) -> None:
        self._real = sock
        self._head = bytearray()
        """What came of the next message's header, as long as it is not judged."""
        self._wanted = _FIXED
        """Bytes of it that are needed for the next look."""
        self._rest = 0
        """Bytes to come of the message that was judged."""
        self._passes = True
        self._turn = _TURN
        self.messages = 0
        self._dropped = 0
        self._say_next = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def recv(self, _size: int) -> bytes:
        """What is there, without what is too long.  Raises BlockingIOError where that is nothing.

        Also after some bytes: dbus-fast reads for as long as there is something, and whoever kept
        it supplied would keep timers and signals from the loop.
        """
        if self._turn <= 0:
            self._turn = _TURN
            raise BlockingIOError(errno.EAGAIN, "it is the turn of others")
        dropped = 0 if self._passes else min(self._rest, _TURN_DROPPED)
        data = self._real.recv(max(_TURN, dropped))
        if not data:
            return data
        self._turn -= len(data)
        passed = self._filter(memoryview(data))
        if not passed:
            raise BlockingIOError(errno.EAGAIN, "nothing that may pass")
        return passed

    def send(self, data: bytes | memoryview) -> int:
        """Send what the bus has room for; the number of bytes, 0 for none.

        dbus-fast takes a bus that has no room for one that is gone: who asked much would end us.
        """
        try:
            return self._real.send(data)
        except BlockingIOError:
            return 0

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
        kind, flags = head[1], head[2]
        reply = kind in _REPLIES
        self._passes = end + body <= (MAX_REPLY if reply else MAX_MESSAGE)
        if kind == _CALL:
            self._passes &= not flags & _NO_REPLY
        elif not reply:
            self._passes &= kind == _SIGNAL
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
        self._drop(end + body)
        return b""

    def _drop(self, size: int) -> None:
        self._dropped += 1
        now = time.monotonic()
        if now >= self._say_next:
            # A line costs ten times what it takes to drop a message.
            self._say_next = now + _BETWEEN_LINES_S
            _log.warning(
                "%d messages that nobody here takes were dropped, now one of %d bytes",
                self._dropped,
                size,
            )
