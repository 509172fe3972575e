# SPDX-License-Identifier: Apache-2.0
"""Where a server listens, and who may come there.  Pure."""

from __future__ import annotations

import ipaddress

LOOPBACK = "127.0.0.1"
"""Where a server listens unless its declaration says otherwise."""

PRIVATE = (
    *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"),  # RFC 1918
    *("100.64.0.0/10", "169.254.0.0/16"),  # RFC 6598, RFC 3927
    *("fc00::/7", "fe80::/10"),  # RFC 4193, RFC 4291
)
"""Addresses that no machine on the Internet has."""

ANYBODY = "any"
"""Every address, as systemd writes it (systemd.resource-control(5))."""


def listen_address(text: object) -> str:
    """An address that a server can listen on.  Raises ValueError.

    No name: what it stands for may change.  No Unix socket, which llama-server takes too.
    """
    try:
        if not isinstance(text, str):
            raise ValueError
        found = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError("is not an address, such as '192.168.1.5' or '::'") from None
    if _is_ambiguous(found):
        raise ValueError(_AMBIGUOUS)
    if found.is_multicast or found == _BROADCAST:
        raise ValueError("is an address of many machines")
    return str(found)


_AMBIGUOUS = "has a zone, or is an IPv4 address written as IPv6"
_BROADCAST = ipaddress.IPv4Address("255.255.255.255")


def _is_ambiguous(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if address.version == 4:
        return False
    return address.ipv4_mapped is not None or address.scope_id is not None


def client(text: object) -> str:
    """An address or a network of clients, or ``any``.  Raises ValueError."""
    if text == ANYBODY:
        return ANYBODY
    try:
        if not isinstance(text, str):
            raise ValueError
        found = ipaddress.ip_network(text)
    except ValueError:
        raise ValueError("is no address and no network, such as '192.168.1.0/24'") from None
    if _is_ambiguous(found.network_address):  # systemd refuses the one, and no packet has the other
        raise ValueError(_AMBIGUOUS)
    return str(found)


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(address).is_loopback


def is_every(address: str) -> bool:
    """Whether it stands for all addresses of this machine."""
    return ipaddress.ip_address(address).is_unspecified


def reached_at(address: str) -> str:
    """Where this machine itself reaches who listens there."""
    if not is_every(address):
        return address
    return LOOPBACK if ipaddress.ip_address(address).version == 4 else "::1"


def url(address: str, port: int) -> str:
    """Where this machine's programs find the server."""
    at = reached_at(address)
    return f"http://[{at}]:{port}" if ":" in at else f"http://{at}:{port}"
