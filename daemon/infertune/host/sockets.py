# SPDX-License-Identifier: Apache-2.0
"""Who listens on a port of this machine: anybody may take one, and answer as a server would.

From /proc/net/tcp and tcp6 (proc_net_tcp.rst of the kernel), which need no privilege and name the
user of each socket.  A user's own uid cannot be had by others, and two users cannot listen on one
address and port (socket(7), SO_REUSEPORT).
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

from infertune.base.addresses import LOOPBACK
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


def listeners(root: Root, port: int, address: str = LOOPBACK) -> frozenset[Listener]:
    """The sockets that a connection to ``address`` on ``port`` can reach; empty where none is.

    To an address of IPv4 one of IPv6 counts only where there is none of IPv4: it may not be
    reachable by IPv4 then.
    """
    if ":" in address:
        return _found(root, "tcp6", port, [address, "::"])
    return _found(root, "tcp", port, [address, "0.0.0.0"]) or _found(  # noqa: S104
        root, "tcp6", port, [f"::ffff:{address}", "::"]
    )


def _found(root: Root, table: str, port: int, addresses: Sequence[str]) -> frozenset[Listener]:
    family = socket.AF_INET if table == "tcp" else socket.AF_INET6
    wanted = {f"{_as_the_kernel_prints(family, each)}:{port:04X}" for each in addresses}
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
