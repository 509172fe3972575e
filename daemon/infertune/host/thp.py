# SPDX-License-Identifier: Apache-2.0
"""Transparent huge pages (Documentation/admin-guide/mm/transhuge.rst)."""

from __future__ import annotations

from infertune.base.root import Root

_THP = "/sys/kernel/mm/transparent_hugepage"


def has_huge_pages(root: Root) -> bool:
    """Whether this kernel has them (CONFIG_TRANSPARENT_HUGEPAGE)."""
    return root.exists(_THP)
