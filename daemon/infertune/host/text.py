# SPDX-License-Identifier: Apache-2.0
"""How the kernel writes numbers and tables; every reader of the host shares these."""

from __future__ import annotations

import re

from infertune.base.units import KIB

_DIGITS = 20
"""A 64-bit number has at most 20 digits; int() refuses thousands of them with an error."""


def integer(text: str | None) -> int | None:
    """A plain decimal number, or None."""
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _DIGITS else None


def pairs(text: str | None, separator: str | None = None) -> dict[str, str]:
    """Lines of ``key SEPARATOR value``; the first of equal keys counts."""
    found: dict[str, str] = {}
    for line in (text or "").splitlines():
        row = line.split(separator, 1)
        if len(row) == 2:
            found.setdefault(row[0].strip(), row[1].strip())
    return found


def bracketed(text: str | None) -> str | None:
    """The word in brackets, where a file lists what could be chosen: ``always [madvise] never``."""
    found = re.search(r"\[(\w+)\]", text or "")
    return found[1] if found else None


# One expression for a whole table: memory.stat of each server is a large part of a page of metrics.
_COUNTER = re.compile(rf"^(\S+)[ \t]+([0-9]{{1,{_DIGITS}}})[ \t]*$", re.MULTILINE)
_SIZE = re.compile(rf"^([^:\n]+):[ \t]*([0-9]{{1,{_DIGITS}}})( kB)?[ \t]*$", re.MULTILINE)


def counters(text: str | None) -> dict[str, int]:
    """Lines of ``name number`` (vmstat, memory.stat); what is not a number is left out."""
    return {name: int(number) for name, number in _COUNTER.findall(text or "")}


def sizes(text: str | None) -> dict[str, int]:
    """Lines of ``Name: 123 kB`` (meminfo, smaps_rollup), in bytes; counts stay as they are."""
    rows = _SIZE.findall(text or "")
    return {name: int(number) * (KIB if unit else 1) for name, number, unit in rows}
