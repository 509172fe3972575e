# SPDX-License-Identifier: Apache-2.0
"""Telling systemd how the service is (sd_notify(3), the protocol itself)."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


class Notifier:
    """Sends states to the socket the service manager gave us; without one, to nobody."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        # An address that starts with @ is in the abstract namespace.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        usec = environment.get("WATCHDOG_USEC", "")
        ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_s = int(usec) / 1_000_000 if usec.isdecimal() and ours else None
        """How often systemd wants to hear from us at the least; None without a watchdog."""

    @property
    def heard(self) -> bool:
        """Whether a service manager started us."""
        return bool(self._address)

    def send(self, **states: str | int) -> None:
        """``send(READY=1, STATUS="idle")``; what cannot be sent is lost, as is usual."""
        if not self._address:
            return
        text = "\n".join(f"{name}={value}" for name, value in states.items())
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            try:
                sender.connect(self._address)
                sender.send(text.encode())
            except OSError:
                return
