# SPDX-License-Identifier: Apache-2.0
"""Huge pages for one server's heap: what glibc is told in the server's environment.

``glibc.malloc.hugetlb=1`` has malloc call madvise(MADV_HUGEPAGE) for what it gets from the kernel
(glibc 2.35, manual "Memory Allocation Tunables").  So ``madvise``, the default of most
distributions, is enough: it takes no privilege, nothing of the machine changes, and it ends with
the process.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from infertune.base.root import Root, read_plain_file
from infertune.catalogue.launch_settings import MALLOC_HUGETLB
from infertune.host.thp import huge_pages
from infertune.launch.place import Placed
from infertune.profiles.resolve import Desired

VARIABLE = "GLIBC_TUNABLES"
_TUNABLE = "glibc.malloc.hugetlb"
_SINCE = (2, 35)
_HEAD = 64 * 1024
"""Bytes; program headers and the name of the loader stand in the first page."""
_SCRIPTS = 5
"""How often a script may be the interpreter of a script (fs/exec.c)."""
_PT_INTERP = 3


def asks(desired: Desired) -> bool:
    """Whether a profile wants it."""
    setting = desired.launch.get(MALLOC_HUGETLB)
    return setting is not None and setting.canonical == "1"


def mode_under(root: Root, desired: Desired) -> str | None:
    """transparent_hugepage.enabled as it is once the profile is applied; None: no such thing."""
    wanted = (each.canonical for each in desired.now if each.id == "transparent_hugepage.enabled")
    return next(wanted, None) or huge_pages(root)


def environment(desired: Desired) -> dict[str, str]:
    """A profile's variables, with what it wants of the heap."""
    env = {name: setting.canonical for name, setting in sorted(desired.env.items())}
    return with_huge_pages(env) if asks(desired) else env


def with_huge_pages(env: Mapping[str, str]) -> dict[str, str]:
    """The environment with the tunable beside those that are set; one that names it is left."""
    given = env.get(VARIABLE, "")
    names = {each.partition("=")[0] for each in given.split(":")}
    both = given if _TUNABLE in names else ":".join(filter(None, (given, f"{_TUNABLE}=1")))
    return {**env, VARIABLE: both}


def placed(mode: str | None, program: str) -> Placed:
    """What becomes of the setting with a program; ``mode`` as for ``why_without_effect``."""
    why = why_without_effect(mode) or _why_no_glibc(program)
    if why:
        return Placed(MALLOC_HUGETLB, "1", "absent", None, why=why)
    return Placed(MALLOC_HUGETLB, "1", "applied", VARIABLE, "1")


def why_without_effect(mode: str | None) -> str | None:
    """Why the kernel gives no huge pages to who asks; ``mode`` is transparent_hugepage.enabled."""
    if mode is None:
        return "this kernel has no transparent huge pages"
    return "transparent_hugepage.enabled is never" if mode == "never" else None


def _why_no_glibc(program: str) -> str | None:
    """Why a program has no heap of glibc's; None where it has, or that cannot be told."""
    head = b""
    for _ in range(_SCRIPTS):
        try:
            head, _status = read_plain_file(Path(program), _HEAD, follow=True)
        except OSError:
            return None
        words = head[2:256].split(b"\n")[0].split()
        if not head.startswith(b"#!") or not words:
            break
        program = os.fsdecode(words[0])
    if not head.startswith(b"\x7fELF\x02\x01"):
        return None
    loader = _loader(head)
    if loader is None:
        return "the program is linked statically"
    if b"ld-musl" in loader:
        return "the program's C library is musl, not glibc"
    return _why_too_old(os.confstr("CS_GNU_LIBC_VERSION") or "")


def _loader(head: bytes) -> bytes | None:
    """The dynamic loader that a program asks for (elf(5), PT_INTERP); None where it asks for none.

    Of 64-bit little-endian programs.
    """
    try:
        at, size, count = struct.unpack_from("<Q14xHH", head, 32)
        for number in range(count):
            kind, _, start, _, _, length = struct.unpack_from("<IIQQQQ", head, at + number * size)
            if kind == _PT_INTERP:
                return head[start : start + length]
    except struct.error:
        return b""  # not as a compiler makes them: nothing is claimed
    return None


def _why_too_old(version: str) -> str | None:
    """The server has the machine's C library, as Python has."""
    found = re.fullmatch(r"glibc (\d+)\.(\d+).*", version)
    if found and (int(found[1]), int(found[2])) < _SINCE:
        return f"{version} cannot do it, 2.35 can"
    return None
