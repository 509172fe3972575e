# SPDX-License-Identifier: Apache-2.0
"""Swap: where the pages go.  /proc/swaps and zswap's parameter."""

from __future__ import annotations

from typing import Literal

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.base.units import KIB
from infertune.host.text import integer
from infertune.host.unknown import Unknown

Kind = Literal["zram", "file", "partition"]

_AREAS_LIMIT = 32
"""The kernel takes about as many (MAX_SWAPFILES)."""


@dataclass(frozen=True, slots=True)
class SwapArea:
    kind: Kind
    size_bytes: int
    """Of zram: what it takes in before compression."""


@dataclass(frozen=True, slots=True)
class Swaps:
    areas: tuple[SwapArea, ...]
    zswap: bool | None
    """Whether pages are compressed in memory before they are written; None: no such parameter."""

    @property
    def zram_bytes(self) -> int:
        return sum(area.size_bytes for area in self.areas if area.kind == "zram")

    @property
    def in_memory(self) -> Literal["zram", "zswap"] | None:
        """What keeps swapped pages in memory first; None where they go to a disk, or nowhere."""
        if not self.areas:
            return None
        if all(area.kind == "zram" for area in self.areas):
            return "zram"
        return "zswap" if self.zswap else None


def swaps(root: Root) -> Swaps | None:
    """The swap areas in use (proc_swaps(5)); None where the kernel does not show them."""
    text = root.get("/proc/swaps")
    if text is None:
        return None
    rows = [line.split() for line in text.splitlines()[1 : 1 + _AREAS_LIMIT]]
    enabled = root.get("/sys/module/zswap/parameters/enabled")
    return Swaps(
        areas=tuple(_area(row) for row in rows if len(row) == 5),
        zswap=None if enabled is None else enabled in ("Y", "1"),
    )


def _area(row: list[str]) -> SwapArea:
    path, how, size, _, _ = row
    kind: Kind = "file" if how == "file" else "partition"
    return SwapArea(
        kind="zram" if path.startswith("/dev/zram") else kind,
        size_bytes=(integer(size) or 0) * KIB,
    )


def swappiness(root: Root) -> int | Unknown:
    """vm.swappiness, 0 to 200 (admin-guide/sysctl/vm)."""
    value = root.get_int("/proc/sys/vm/swappiness")
    return Unknown("vm.swappiness cannot be read") if value is None else value
