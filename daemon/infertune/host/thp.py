# SPDX-License-Identifier: Apache-2.0
"""Transparent huge pages (Documentation/admin-guide/mm/transhuge.rst)."""

from __future__ import annotations

from infertune.base.root import Root
from infertune.host.memory import chosen

_THP = "/sys/kernel/mm/transparent_hugepage"


def has_huge_pages(root: Root) -> bool:
    """Whether this kernel has them (CONFIG_TRANSPARENT_HUGEPAGE)."""
    return root.exists(_THP)


def huge_pages(root: Root) -> str | None:
    """Which memory gets them: ``always``, ``madvise`` (who asks) or ``never``; None: nobody."""
    return chosen(root, f"{_THP}/enabled")
