# SPDX-License-Identifier: Apache-2.0
"""Keeps a server from the others of its user (landlock(7)).

All servers and the exporter are one user, or the exporter could not count what they do
(docs/architecture.md).  A Landlock domain takes from the servers what one user may do to its own
processes: whoever is in a domain reaches none outside of it by what is guarded as ptrace(2) is
(/proc/PID/mem, environ and fdinfo, process_vm_readv), and sends none a signal.  Who is in no
domain, as the exporter, still sees them.  No file and no port is touched by it.
"""

from __future__ import annotations

import ctypes
import os

_CREATE_RULESET, _RESTRICT_SELF = 444, 446
"""Numbers of system calls; the same on every architecture that came after alpha."""
_ASK_VERSION = 1
_SCOPES_SINCE = 6
"""ABI of Linux 6.12.  Before it a domain has to restrict files or ports, too."""
_SCOPE_SIGNAL = 1 << 1


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


def available() -> bool:
    """Whether this kernel can do it."""
    version: int = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _ASK_VERSION)
    return version >= _SCOPES_SINCE


def keep_apart() -> str | None:
    """Enter a domain of our own, with whatever is executed or started from here on.

    Returns why not, None where it is done.  Takes no_new_privs (a unit of ours has it), and only
    the thread that calls is in it.
    """
    if not available():
        return "the kernel has no Landlock with scopes (Linux 6.12)"
    wanted = _Ruleset(0, 0, _SCOPE_SIGNAL)
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    ruleset: int = _libc.syscall(_CREATE_RULESET, ctypes.byref(wanted), size, 0)
    if ruleset < 0:
        return f"landlock_create_ruleset: {os.strerror(ctypes.get_errno())}"
    try:
        if _libc.syscall(_RESTRICT_SELF, ruleset, 0) != 0:
            return f"landlock_restrict_self: {os.strerror(ctypes.get_errno())}"
    finally:
        os.close(ruleset)
    return None


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
