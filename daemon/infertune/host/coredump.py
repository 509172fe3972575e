# SPDX-License-Identifier: Apache-2.0
"""What becomes of the memory of a program that crashes."""

from __future__ import annotations

import re

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.base.units import GIB
from infertune.host.ini import DIRECTORIES, drop_ins, part_of, sections
from infertune.host.unknown import Unknown

_DEFAULT = 32 * GIB
"""ProcessSizeMax and ExternalSizeMax on 64 bits (coredump.conf(5))."""
_NO_LIMIT = 1 << 63


@dataclass(frozen=True, slots=True)
class CoreDumps:
    """Of systemd-coredump."""

    limit_bytes: int | None
    """The largest dump it takes; None for no limit."""
    source: str | None
    """The file that sets the limit; None where it is the default."""


def core_dumps(root: Root) -> CoreDumps | Unknown | None:
    """systemd-coredump's limit; None where the kernel gives dumps to another program (core(5))."""
    pattern = root.get("/proc/sys/kernel/core_pattern")
    if pattern is None:
        return Unknown("the kernel does not say here what becomes of core dumps")
    if "systemd-coredump" not in pattern:
        return None
    limits: dict[str, tuple[int, str | None]] = {
        "ProcessSizeMax": (_DEFAULT, None),
        "ExternalSizeMax": (_DEFAULT, None),
    }
    named = tuple(f"{each}/systemd/coredump.conf.d" for each in DIRECTORIES)
    for path in ["/etc/systemd/coredump.conf", *drop_ins(root, named)]:
        settings = sections(part_of(root, path)).get("Coredump", {})
        for key in limits:
            size = _size(settings.get(key, ""))
            if size is not None:
                limits[key] = (size, path)
    limit, source = min(limits.values(), key=lambda each: each[0])
    return CoreDumps(None if limit == _NO_LIMIT else limit, source)


def _size(text: str) -> int | None:
    """A size as systemd writes it, or None."""
    if text == "infinity":
        return _NO_LIMIT
    found = re.fullmatch(r"(\d{1,15})([KMGTP]?)", text)
    return int(found[1]) << (10 * " KMGTP".index(found[2] or " ")) if found else None
