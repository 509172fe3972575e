# SPDX-License-Identifier: Apache-2.0
"""How the kernel writes numbers and tables; every reader of the host shares these."""

from __future__ import annotations

from collections.abc import Mapping

from infertune.units import KIB

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
        key, *rest = line.split(separator, 1)
        if rest:
            found.setdefault(key.strip(), rest[0].strip())
    return found


def counters(text: str | None) -> dict[str, int]:
    """Lines of ``name number`` (vmstat, memory.stat); what is not a number is left out."""
    found = {name: integer(value) for name, value in pairs(text).items()}
    return {name: value for name, value in found.items() if value is not None}


def sizes(text: str | None) -> dict[str, int]:
    """Lines of ``Name: 123 kB`` (meminfo, smaps_rollup), in bytes; counts stay as they are."""
    found: Mapping[str, str] = pairs(text, ":")
    plain = {name: (integer(value.removesuffix("kB")), value) for name, value in found.items()}
    return {
        name: number * (KIB if value.endswith(" kB") else 1)
        for name, (number, value) in plain.items()
        if number is not None
    }
