# SPDX-License-Identifier: Apache-2.0
"""Who holds a lock on a file (Root.lock takes it).

A module of its own, with next to no imports: every verb begins by asking whether infertuned runs.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DAEMON_LOCK = "/run/infertune/daemon"
"""Held by infertuned for as long as it lives: whether it runs is asked without a bus."""

MACHINE_LOCK = "/run/infertune/lock"
"""Held by whoever changes the machine, for as long as nobody else may."""

SOMEBODY = "another infertune"

_SECOND = {
    MACHINE_LOCK: "/var/lib/infertune/lock",
    DAEMON_LOCK: "/var/lib/infertune/daemon",
}


def places(path: str) -> tuple[str, ...]:
    """The files of one lock, in the order in which they are taken.

    A file that is unlinked keeps its lock, and nobody finds it any more.  So what may be held for
    days has a second place, as the journal has: who empties /run lets nobody else in.
    """
    return (path, _SECOND[path]) if path in _SECOND else (path,)


def owner(path: str, at: Callable[[str], str] = str) -> str | None:
    """Who holds the lock on a file of this system right now, or None.  Does not take it.

    Whoever may not read the file is told that somebody does, and not who.  ``at`` says where a
    file of another system is.
    """
    for place in places(path):
        if holder := _owner(at(place)):
            return holder
    return None


def _owner(path: str) -> str | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        return SOMEBODY if _is_locked(path) else None
    except OSError:
        return None
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, whole_file(fcntl.F_WRLCK))
        kind = struct.unpack_from("h", answer)[0]
        return None if kind == fcntl.F_UNLCK else noted_owner(fd)
    finally:
        os.close(fd)


def noted_owner(fd: int) -> str:
    """What the holder of a lock wrote into its file, a moment after it took the lock."""
    for _ in range(20):
        if text := os.pread(fd, 4096, 0).decode("utf-8", "replace").strip():
            return text
        time.sleep(0.005)
    return SOMEBODY


def whole_file(kind: int) -> bytes:
    """``struct flock`` for a lock of one kind on a whole file."""
    return struct.pack("hhqqi", kind, os.SEEK_SET, 0, 0, 0)


def _is_locked(path: str) -> bool:
    """Whether /proc/locks has a lock on a file; takes no right to open it (proc_locks(5))."""
    try:
        status = os.stat(path, follow_symlinks=False)
        with open("/proc/locks", "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return False
    device = status.st_dev
    wanted = f"{os.major(device):02x}:{os.minor(device):02x}:{status.st_ino}"
    return any(wanted.encode() in line.split() for line in lines)
