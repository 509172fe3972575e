# SPDX-License-Identifier: Apache-2.0
"""How much of a model file is in memory: the progress of a load."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from glob import escape, glob

_SYS_CACHESTAT = 451  # the same number on every architecture, Linux >= 6.5
_MINCORE_STEP = 2**30

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Statistics(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


def model_files(model: str) -> list[str]:
    """The files of a model: one, or all parts of ``NAME-00001-of-00004.gguf``."""
    part = re.fullmatch(r"(.*-)\d{5}(-of-\d{5}\.gguf)", model)
    return sorted(glob(f"{escape(part[1])}?????{escape(part[2])}")) if part else [model]


def file_size(paths: list[str]) -> int:
    """Bytes of all ``paths``.  Raises OSError."""
    return sum(os.stat(path).st_size for path in paths)


def resident(paths: list[str]) -> int | None:
    """Bytes of ``paths`` in the page cache; None where this kernel does not tell."""
    total = 0
    for path in paths:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            size = os.fstat(fd).st_size
            cached = cachestat(fd)
            # Of a file that we may not write mincore claims that all of it is there.
            if cached is None and os.access(path, os.W_OK):
                cached = mincore(fd, size)
        finally:
            os.close(fd)
        if cached is None:
            return None
        total += min(cached, size)  # the last page counts whole
    return total


def cachestat(fd: int, offset: int = 0, length: int = 0) -> int | None:
    """Bytes of the open file in the page cache, by cachestat(2); None before Linux 6.5.

    Of the part from ``offset`` on; a ``length`` of 0 is up to the end.
    """
    part, statistics = _Range(offset, length), _Statistics()
    failed = _libc.syscall(
        ctypes.c_long(_SYS_CACHESTAT),
        ctypes.c_uint(fd),
        ctypes.byref(part),
        ctypes.byref(statistics),
        ctypes.c_uint(0),
    )
    return None if failed else int(statistics.cached) * mmap.PAGESIZE


def mincore(fd: int, size: int) -> int | None:
    """The same by mincore(2), a byte per page; since Linux 5.2 only for files one may write."""
    pages = 0
    for offset in range(0, size, _MINCORE_STEP):
        length = min(_MINCORE_STEP, size - offset)
        address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
        if address == ctypes.c_void_p(-1).value:
            return None
        vector = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
        failed = _libc.mincore(address, length, vector)
        _libc.munmap(address, length)
        if failed:
            return None
        pages += vector.raw[: -(-length // mmap.PAGESIZE)].count(1)
    return pages * mmap.PAGESIZE
