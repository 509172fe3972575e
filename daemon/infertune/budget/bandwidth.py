# SPDX-License-Identifier: Apache-2.0
"""How fast this machine's processor reads memory: what bounds the tokens per second.

Some threads search their share of a buffer, which is larger than any cache, for a byte that is
not there: memchr(3) reads 32 bytes or more at once, does nothing with them, and a call through
ctypes lets the other threads go on.  The best of a few rounds counts; all of it takes a second.
"""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor

from infertune.base.units import MIB
from infertune.host.machine import Machine

BUFFER_BYTES = 512 * MIB
"""Caches: 64 MiB L3 and 32 MiB of the memory's side on Strix Halo."""
_LEAST_BYTES = 64 * MIB
_ROUNDS = 8
_PATIENCE_S = 1.0

_libc = ctypes.CDLL(None)
_libc.memchr.restype = ctypes.c_void_p
_libc.memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)


def read_bandwidth(machine: Machine) -> float | None:
    """Bytes per second that all cores read together; None where there is no memory to spare."""
    size = min(BUFFER_BYTES, (machine.memory.available_bytes or 0) // 8)
    if size < _LEAST_BYTES:
        return None
    threads = max(len(machine.cpu.cores), 1)
    share = size // threads
    # Written, or every page would be the same page of zeros.
    buffer = bytearray(b"\x01") * (share * threads)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))

    def read(number: int) -> None:
        _libc.memchr(address + number * share, 0, share)

    best = None
    give_up = time.monotonic() + _PATIENCE_S
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_ROUNDS):
            begin = time.perf_counter()
            list(pool.map(read, range(threads)))
            taken = time.perf_counter() - begin
            best = taken if best is None else min(best, taken)
            if time.monotonic() > give_up:
                break
    return share * threads / best if best else None
