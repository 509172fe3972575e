# SPDX-License-Identifier: Apache-2.0
"""Giving up every capability, for good (capabilities(7), prctl(2))."""

from __future__ import annotations

import ctypes
import os

from infertune.base.errors import Failed
from infertune.base.root import Root
from infertune.host.processes import capability_sets, tasks

_VERSION_3 = 0x20080522
_CAP_SETPCAP = 8
_PR_CAPBSET_DROP = 24
_PR_SET_SECUREBITS = 28
_PR_SET_NO_NEW_PRIVS = 38
_SECURE_ALL_LOCKED = 0xEF
"""NOROOT, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE and their locks; KEEP_CAPS only locked, off."""

FIELDS = ("CapInh", "CapPrm", "CapEff", "CapAmb")


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def held(root: Root, task: str = "self") -> int:
    """Every capability a thread has in any of its sets.  Raises OSError."""
    sets = capability_sets(root, task)
    found = 0
    for field in FIELDS:
        found |= sets.get(field, 0)
    return found


def drop_all() -> None:
    """Give up every capability of this process; no child and no exec can have one again.

    Call it before any thread is started: capabilities are a thread's own.  Raises Failed where
    one is left.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    root = Root("/")
    if held(root) & 1 << _CAP_SETPCAP:
        # Only then can it be made true for root, whose exec would get all of them again.
        capability = 0
        while libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
            capability += 1
        libc.prctl(_PR_SET_SECUREBITS, _SECURE_ALL_LOCKED, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header, nothing = _Header(_VERSION_3, 0), (_Data * 2)()
    if libc.capset(ctypes.byref(header), ctypes.byref(nothing)) != 0:
        raise Failed(f"capabilities: {os.strerror(ctypes.get_errno())}")
    for task in tasks(root):
        if left := held(root, f"self/task/{task}"):
            raise Failed(f"capabilities: {left:#x} are left in thread {task}")
