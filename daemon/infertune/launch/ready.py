# SPDX-License-Identifier: Apache-2.0
"""Wait until a server answers, show how far it is, and say why when it never will."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, TextIO

from infertune.base.addresses import LOOPBACK
from infertune.base.errors import Failed, UsageError
from infertune.base.units import format_size, printable_line
from infertune.host.memory import oom_kills
from infertune.host.processes import resident_bytes
from infertune.launch.client import healthy
from infertune.launch.process import Child, Signals, cause
from infertune.launch.residency import file_size, model_files, resident

if TYPE_CHECKING:
    from infertune.base.root import Root

DEFAULT_PORT = 8080
_PORTS_TRIED = 100
_POLL_S = 0.1
_TERMINAL_S = 0.2
_PLAIN_S = 5.0


def choose_port(wanted: int | None, reserved: Collection[int] = (), address: str = LOOPBACK) -> int:
    """``wanted`` if it is free, or without a wish the first free one from 8080 on.

    ``reserved``: ports that are not free though nobody listens there now.  Raises UsageError
    where a wanted port is taken, or the address is none of this machine's.
    """
    candidates = [wanted] if wanted else range(DEFAULT_PORT, DEFAULT_PORT + _PORTS_TRIED)
    for port in candidates:
        if port in reserved:
            continue
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            # As servers do: a port that only waits out old connections counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    continue
                if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise UsageError(f"{address} is not an address of this machine") from None
                raise
            return port
    if wanted:
        raise UsageError(f"port {wanted} is taken or not allowed", hint="leave --port out")
    raise UsageError(f"no free port from {DEFAULT_PORT} on", hint="give one with --port")


def any_port(address: str = LOOPBACK) -> int:
    """A free port that no client knows (ip_local_port_range), for a server that only we ask.

    Two of us that begin together get different ones, which ``choose_port`` does not promise.
    """
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


class Progress:
    """One line that is rewritten on a terminal; elsewhere a line every few seconds."""

    def __init__(self, out: TextIO | None) -> None:
        self._out = out
        self._terminal = out is not None and out.isatty()
        self._next = 0.0
        self._open = False

    def due(self) -> bool:
        """Whether it is time for the next line."""
        return time.monotonic() >= self._next

    def show(self, text: str) -> None:
        self._next = time.monotonic() + (_TERMINAL_S if self._terminal else _PLAIN_S)
        self._write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")
        self._open = self._terminal

    def done(self) -> None:
        """Clear the line; what follows starts on an empty one."""
        if self._open:
            self._write("\r\x1b[K")
            self._open = False

    def _write(self, text: str) -> None:
        # A full disk behind the log, or a reader that left, must not end the server.
        if self._out is not None:
            with contextlib.suppress(OSError):
                self._out.write(text)
                self._out.flush()


def wait_ready(
    root: Root,
    signals: Signals,
    child: Child,
    base_url: str,
    model: str,
    out: TextIO | None,
    patience_s: float | None = None,
) -> float | None:
    """Seconds until /health said yes; None where a signal to infertune ended the server first.

    Raises Failed, with the server's last lines, when it ends by itself, and where it is not ready
    after ``patience_s``.
    """
    start = time.monotonic()
    files = model_files(model)
    total = file_size(files)
    killed_before = oom_kills(root)
    progress, done = Progress(out), False
    try:
        while (status := child.poll()) is None:
            if healthy(base_url):
                return time.monotonic() - start
            if patience_s is not None and time.monotonic() - start > patience_s:
                raise Failed(f"the server was not ready after {patience_s:g} s")
            if progress.due():
                loaded = resident(files)
                if loaded is None:
                    loaded = min(resident_bytes(root, child.pid) or 0, total)
                share = f"{format_size(loaded)} of {format_size(total)} resident"
                seconds = f"{time.monotonic() - start:.0f} s"
                name = printable_line(os.path.basename(model), 80)
                done = done or (total > 0 and loaded >= total)
                what = f"{name} is in memory, starting" if done else f"loading {name}: {share}"
                progress.show(f"{what}, {seconds}")
            time.sleep(_POLL_S)
    finally:
        progress.done()
    if signals.received():
        return None
    lines = child.last_lines()
    starved = killed_before is not None and (oom_kills(root) or 0) > killed_before
    why = cause(status, lines, out_of_memory=starved)
    raise Failed(f"the server did not get ready: {why}", hint="\n  ".join(lines[-12:]) or None)
