# SPDX-License-Identifier: Apache-2.0
"""Sizes and CPU lists as people write them, and as the kernel does.

Regular expressions are imported where one is needed: to show a size takes none, and a verb that the
daemon does takes hardly longer than to import them.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
PAGES_PER_GIB = 262144
"""4 KiB pages in one GiB: how TTM counts (``ttm.pages_limit``)."""

_UNITS = {
    "B": 1,
    "KiB": KIB,
    "MiB": MIB,
    "GiB": GIB,
    "TiB": 1024 * GIB,
    "kB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
}
_SIZE = r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([A-Za-z]{1,3}|%)"


def parse_size(text: str | int, *, total: int | None = None, step: int = 1) -> int:
    """Bytes of ``"96GiB"``, ``"512 MiB"``, ``"85%"`` (of ``total`` bytes) or a plain integer.

    ``"96GiB, at least 75%, at most 80%"`` is 96 GiB where that is between the two shares, and
    otherwise the nearer of them; either bound may be left out.  A share is rounded down to a
    multiple of ``step`` bytes, unless it is less than one.
    Raises ValueError with a sentence that says what is accepted.
    """
    if isinstance(text, bool):
        raise ValueError("a size is a number of bytes or a text such as '96GiB', not true or false")
    if isinstance(text, int):
        if text < 0:
            raise ValueError("a size cannot be negative")
        return text
    text, _, most = text.partition(", at most ")
    text, _, least = text.partition(", at least ")
    size = _parse_amount(text, total, step)
    if least:
        size = max(size, _parse_amount(least, total, step))
    return min(size, _parse_amount(most, total, step)) if most else size


def _parse_amount(text: str, total: int | None, step: int) -> int:
    import re

    match = re.fullmatch(_SIZE, text.strip())
    if not match:
        raise ValueError(f"'{text}' is not a size; write '96GiB', '512MiB' or '85%'")
    number, unit = float(match[1]), match[2]
    if unit == "%":
        if number > 100:
            raise ValueError(f"'{text}' is more than the whole")
        if total is None:
            raise ValueError(f"'{text}' is a share, but the size of the whole is not known here")
        share = int(total * number / 100)
        return share - share % step if share >= step else share
    if unit not in _UNITS:
        raise ValueError(f"'{unit}' is not a unit; use one of {', '.join(_UNITS)} or %")
    return round(number * _UNITS[unit])


def format_size(size: int) -> str:
    """``size`` bytes in the largest binary unit that keeps it readable: ``96 GiB``, ``1.5 MiB``."""
    for name in ("TiB", "GiB", "MiB", "KiB"):
        unit = _UNITS[name]
        if size >= unit:
            return f"{size / unit:.1f}".removesuffix(".0") + f" {name}"
    return f"{size} B"


def parse_cpulist(text: str) -> frozenset[int]:
    """CPU numbers of a kernel list such as ``0-3,8,10-11`` (Documentation/admin-guide/cputopology).

    The empty text is the empty set.  Raises ValueError for anything else that is not a list.
    """
    import re

    cpus: set[int] = set()
    text = text.strip()
    if not text:
        return frozenset()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part.strip())
        if not match:
            raise ValueError(f"'{text}' is not a CPU list; write '0-3,8'")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"'{part}' runs backwards; write '{last}-{first}'")
        cpus.update(range(first, last + 1))
    return frozenset(cpus)


def format_cpulist(cpus: Iterable[int]) -> str:
    """The kernel's short form of a set of CPUs: ``0-3,8``."""
    parts: list[str] = []
    ordered = sorted(set(cpus))
    start = 0
    for index, cpu in enumerate(ordered):
        if index + 1 < len(ordered) and ordered[index + 1] == cpu + 1:
            continue
        first = ordered[start]
        parts.append(str(cpu) if first == cpu else f"{first}-{cpu}")
        start = index + 1
    return ",".join(parts)


def printable_line(text: str, length: int) -> str:
    """At most ``length`` characters of ``text``, none of which can drive a terminal or a log."""
    shown = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )
    return shown if len(shown) <= length else f"{shown[: length - 3]}..."
