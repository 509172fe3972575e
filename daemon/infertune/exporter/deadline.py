# SPDX-License-Identifier: Apache-2.0
"""Sockets with one time limit for everything.

``settimeout`` alone limits one call: a peer that sends a byte now and then keeps its reader for
ever.  Here the calls share what is left until ``end``.
"""

from __future__ import annotations

import math
import socket
import ssl
import time
from typing import Any


class _Limited:
    end = math.inf
    """CLOCK_MONOTONIC in seconds; after it, reading and writing raise TimeoutError."""

    def limit(self: Any, seconds: float) -> None:
        """From now on, for all calls together."""
        self.end = time.monotonic() + seconds
        self.hurry()

    def hurry(self: Any) -> None:
        """Let the next call have what is left.  Raises TimeoutError where that is nothing."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time is left")
        self.settimeout(None if left == math.inf else left)

    def recv_into(self: Any, *given: Any, **named: Any) -> int:
        self.hurry()
        return int(super().recv_into(*given, **named))  # type: ignore[misc]

    def send(self: Any, *given: Any, **named: Any) -> int:
        self.hurry()
        return int(super().send(*given, **named))  # type: ignore[misc]

    def sendall(self: Any, *given: Any, **named: Any) -> None:
        self.hurry()
        super().sendall(*given, **named)  # type: ignore[misc]


class Socket(_Limited, socket.socket):
    """A plain socket."""


class TlsSocket(_Limited, ssl.SSLSocket):
    """What an SSLContext makes of one, where its ``sslsocket_class`` says so."""
