# SPDX-License-Identifier: Apache-2.0
"""Events of directories (inotify(7)), by ctypes: the standard library has none."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection

_WHAT = 0x100 | 0x200 | 0x40 | 0x80 | 0x01000000
"""IN_CREATE, IN_DELETE, IN_MOVED_FROM, IN_MOVED_TO, IN_ONLYDIR (linux/inotify.h)."""


class Groups:
    """Control groups that come and go below some directories (inotify(7))."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._watched: set[int] = set()

    def watch(self, directories: Collection[os.PathLike[str]]) -> None:
        """Hear of these directories and no others; of those that are there."""
        found = {
            self._libc.inotify_add_watch(self.fd, os.fsencode(each), _WHAT) for each in directories
        }
        found.discard(-1)
        for gone in self._watched - found:
            self._libc.inotify_rm_watch(self.fd, gone)  # may have gone with its directory
        self._watched = found

    def drain(self) -> None:
        """Forget what was heard: who hears anything looks again."""
        try:
            while os.read(self.fd, 64 * 1024):
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        os.close(self.fd)
