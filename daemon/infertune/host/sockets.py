# SPDX-License-Identifier: Apache-2.0
"""Who listens on a port of this machine: anybody may take one, and answer as a server would.

From /proc/net/tcp and tcp6 (proc_net_tcp.rst of the kernel), which need no privilege and name the
user of each socket.  A user's own uid cannot be had by others, and two users cannot listen on one
address and port (socket(7), SO_REUSEPORT).
"""

from __future__ import annotations

import socket
import sys

from infertune.base.records import dataclass
from infertune.base.root import Root

_LISTEN = "0A"  # TCP_LISTEN of linux/tcp_states.h
_FIELDS = 10


@dataclass(frozen=True, slots=True)
class Listener:
    """One listening socket."""

    uid: int
    """User of the process that made it."""
    inode: int
    """Its number, which no other socket has as long as it lives."""


def listeners(root: Root, port: int) -> frozenset[Listener]:
    """The sockets that a connection to 127.0.0.1 on ``port`` can reach; empty where nobody listens.

    One of IPv6 only where there is none of IPv4: it may not be reachable by IPv4 then.
    """
    return _found(root, "tcp", port) or _found(root, "tcp6", port)


def _found(root: Root, table: str, port: int) -> frozenset[Listener]:
    wanted = {f"{address}:{port:04X}" for address in _ADDRESSES[table]}
    rows = (line.split() for line in (root.get(f"/proc/net/{table}") or "").splitlines())
    return frozenset(
        Listener(int(row[7]), int(row[9]))
        for row in rows
        if len(row) >= _FIELDS and row[1] in wanted and row[3] == _LISTEN
    )


def _as_the_kernel_prints(family: int, address: str) -> str:
    """Words of 32 bits, each in the machine's own byte order."""
    packed = socket.inet_pton(family, address)
    words = (packed[at : at + 4] for at in range(0, len(packed), 4))
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)


_ADDRESSES = {
    "tcp": [_as_the_kernel_prints(socket.AF_INET, each) for each in ("127.0.0.1", "0.0.0.0")],  # noqa: S104
    "tcp6": [_as_the_kernel_prints(socket.AF_INET6, each) for each in ("::ffff:127.0.0.1", "::")],
}
