# SPDX-License-Identifier: Apache-2.0
"""Transparent huge pages (Documentation/admin-guide/mm/transhuge.rst)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from infertune.root import Root

_THP = "/sys/kernel/mm/transparent_hugepage"


def has_huge_pages(root: Root) -> bool:
    """Whether this kernel has them (CONFIG_TRANSPARENT_HUGEPAGE)."""
    return root.exists(_THP)


def folio_sizes(root: Root) -> list[str]:
    """Sizes of folios that are counted (``64kB``), smallest first; none before Linux 6.10."""
    paths = root.glob(f"{_THP}/hugepages-*kB/stats")
    return [path.split("/")[-2].removeprefix("hugepages-") for path in paths]


def folio_statistics(root: Root, size: str, names: Iterable[str]) -> Mapping[str, int]:
    """Counts of one size by name; each is a file, and those not asked for are not opened."""
    here = f"{_THP}/hugepages-{size}/stats"
    counts = {name: root.get_int(f"{here}/{name}") for name in names}
    return {name: count for name, count in counts.items() if count is not None}
