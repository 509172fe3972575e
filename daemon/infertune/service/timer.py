# SPDX-License-Identifier: Apache-2.0
"""A timer that neither suspend nor the wall clock can fool."""

from __future__ import annotations

import ctypes
import os

_TFD_TIMER_ABSTIME = 1  # linux/timerfd.h


class Deadline:
    """A kernel timer on CLOCK_BOOTTIME: it runs through suspend, and no clock setting moves it."""

    def __init__(self) -> None:
        # os.timerfd_create came with Python 3.13.
        self._libc = ctypes.CDLL(None, use_errno=True)
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        self.fd: int = self._libc.timerfd_create(7, flags)  # CLOCK_BOOTTIME of linux/time.h
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

    def set(self, at_s: float | None) -> None:
        """Make ``fd`` readable at ``at_s`` on CLOCK_BOOTTIME; never for None."""
        # struct itimerspec: interval (s, ns), value (s, ns); all zero disarms.
        whole = int(at_s or 0)
        nanoseconds = int(((at_s or 0) - whole) * 1e9)
        spec = (ctypes.c_long * 4)(0, 0, whole, nanoseconds)
        if self._libc.timerfd_settime(self.fd, _TFD_TIMER_ABSTIME, spec, None) < 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def close(self) -> None:
        os.close(self.fd)
