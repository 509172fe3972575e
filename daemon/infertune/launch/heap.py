# SPDX-License-Identifier: Apache-2.0
"""Whether a program's heap gets the huge pages that glibc is told to ask for.

``glibc.malloc.hugetlb=1`` has malloc call madvise(MADV_HUGEPAGE) for what it gets from the kernel
(glibc 2.35, manual "Memory Allocation Tunables").  So ``madvise`` is enough for the machine: it
takes no privilege, nobody else is affected, and it ends with the process.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from infertune.base.root import Root, read_plain_file
from infertune.catalogue.launch_settings import LAUNCH_SETTINGS, TUNABLES, tunables_in
from infertune.host.thp import huge_pages
from infertune.launch.place import Placed

_SINCE = (2, 35)
_HEAD_BYTES = 64 * 1024
"""Program headers, and the name of the loader, stand in the first page."""
_SCRIPTS = 5
"""How often a script may be the interpreter of a script (fs/exec.c)."""
_PT_INTERP = 3


def placed(
    root: Root, launch: Mapping[str, str], env: Mapping[str, str], program: str
) -> tuple[Placed, ...]:
    """What becomes of the tunables among ``launch`` with a program that is started with ``env``."""
    given = tunables_in(env.get(TUNABLES, ""))
    outcomes = []
    for name, wanted in launch.items():
        tunable = LAUNCH_SETTINGS[name].tunable
        if tunable is None:
            continue
        got = given.get(tunable)
        why = why_without_effect(root, program) if wanted == "1" else None
        if got != wanted:
            why = f"{TUNABLES} of whoever starts it says otherwise"
            outcomes.append(Placed(name, wanted, "rejected", TUNABLES, got, why))
        elif why:
            outcomes.append(Placed(name, wanted, "absent", None, why=why))
        else:
            outcomes.append(Placed(name, wanted, "applied", TUNABLES, got))
    return tuple(outcomes)


def why_without_effect(root: Root, program: str) -> str | None:
    """Why a program's heap gets no huge pages though malloc is to ask for them."""
    mode = huge_pages(root)
    if mode is None:
        return "this kernel has no transparent huge pages"
    if mode == "never":
        return "transparent_hugepage.enabled is never"
    return _why_no_glibc(program)


def _why_no_glibc(program: str) -> str | None:
    """Why a program has no malloc of glibc's; None where it has, or that cannot be told."""
    head = b""
    for _ in range(_SCRIPTS):
        try:
            head, _status = read_plain_file(Path(program), _HEAD_BYTES, follow=True)
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
    return _why_too_old()


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


def _why_too_old() -> str | None:
    """The server has the machine's C library, as Python has."""
    name = "CS_GNU_LIBC_VERSION"
    version = (os.confstr(name) if name in os.confstr_names else None) or ""
    found = re.fullmatch(r"glibc (\d+)\.(\d+).*", version)
    if found and (int(found[1]), int(found[2])) < _SINCE:
        return f"{version} does not know it; 2.35 does"
    return None
