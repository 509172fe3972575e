# SPDX-License-Identifier: Apache-2.0
"""Transparent huge pages.

They back anonymous memory of the CPU side only: weights that live in GTT are
allocated by TTM, which asks for high orders by itself whatever is set here.
"""

from functools import partial

from infertune.catalogue.knobs.base import Evidence, Knob
from infertune.catalogue.values import Choice, Integer, Switch

_THP = "/sys/kernel/mm/transparent_hugepage"
_DOC = "Documentation/admin-guide/mm/transhuge.rst"
_ABSENT = "this kernel is built without CONFIG_TRANSPARENT_HUGEPAGE"
_ABSENT_MTHP = "this kernel has no anonymous folios of this size (multi-size THP came with 6.8)"

_UNMEASURED = Evidence(
    "no effect found",
    "No measurement on a GPU-offloaded model shows a gain; CPU-side buffers get 2 MiB pages.",
    "survey of published Strix Halo benchmarks, 2026-11",
)
_ALWAYS = Evidence(
    "measured",
    "With load_mode none, madvise gave llama-server (build 11669) no huge pages at all of "
    "1129 MB, always gave 1100 MB: llama.cpp does not call MADV_HUGEPAGE. Launch setting "
    "malloc_hugetlb has malloc call it, for one server. Speed was not measured.",
    "measured on a 2-core VM, 2026-11; llama.cpp PR #22022",
)
_KHUGEPAGED = Evidence(
    "protective, unmeasured",
    "khugepaged competes with the model for one core and for memory bandwidth.",
    _DOC,
)

_SIZES_KB = (16, 32, 64, 128, 256, 512, 1024, 2048)

_knob = partial(Knob, doc=_DOC, absent=_ABSENT)

KNOBS: tuple[Knob, ...] = (
    _knob(
        id="transparent_hugepage.enabled",
        paths=(f"{_THP}/enabled",),
        value=Choice(("always", "madvise", "never")),
        summary="Which anonymous memory gets 2 MiB pages; acts on pages faulted in later.",
        evidence=_ALWAYS,
        # Starting or stopping khugepaged recomputes it (set_recommended_min_free_kbytes).
        touches=("vm.min_free_kbytes",),
    ),
    _knob(
        id="transparent_hugepage.defrag",
        paths=(f"{_THP}/defrag",),
        value=Choice(("always", "defer", "defer+madvise", "madvise", "never")),
        summary="Whether a page fault may stall to compact memory for a huge page.",
        evidence=_UNMEASURED,
    ),
    _knob(
        id="transparent_hugepage.shmem_enabled",
        paths=(f"{_THP}/shmem_enabled",),
        value=Choice(("always", "within_size", "advise", "never", "deny", "force")),
        summary="Huge pages for shared memory and tmpfs (a model file on /dev/shm).",
        evidence=_UNMEASURED,
    ),
    _knob(
        id="transparent_hugepage.khugepaged.defrag",
        paths=(f"{_THP}/khugepaged/defrag",),
        value=Switch(),
        summary="Whether khugepaged may compact memory to collapse pages.",
        evidence=_KHUGEPAGED,
    ),
    _knob(
        id="transparent_hugepage.khugepaged.pages_to_scan",
        paths=(f"{_THP}/khugepaged/pages_to_scan",),
        value=Integer(1, 2**32 - 1, "pages"),
        summary="Pages khugepaged looks at in one pass.",
        evidence=_KHUGEPAGED,
    ),
    _knob(
        id="transparent_hugepage.khugepaged.scan_sleep_millisecs",
        paths=(f"{_THP}/khugepaged/scan_sleep_millisecs",),
        value=Integer(0, 2**32 - 1, "ms"),
        summary="Pause of khugepaged between passes.",
        evidence=_KHUGEPAGED,
    ),
    _knob(
        id="transparent_hugepage.khugepaged.alloc_sleep_millisecs",
        paths=(f"{_THP}/khugepaged/alloc_sleep_millisecs",),
        value=Integer(0, 2**32 - 1, "ms"),
        summary="Pause of khugepaged after it could not get a huge page.",
        evidence=_KHUGEPAGED,
    ),
    *(
        _knob(
            id=f"transparent_hugepage.khugepaged.{name}",
            paths=(f"{_THP}/khugepaged/{name}",),
            # 511 = HPAGE_PMD_NR - 1 on x86-64.
            value=Integer(0, 511, "pages"),
            summary=summary,
            evidence=_KHUGEPAGED,
        )
        for name, summary in (
            ("max_ptes_none", "Unmapped pages a range may have and still be collapsed."),
            ("max_ptes_swap", "Swapped pages that may be read back to collapse a range."),
            ("max_ptes_shared", "Shared pages a range may have and still be collapsed."),
        )
    ),
    *(
        knob
        for size in _SIZES_KB
        for knob in (
            _knob(
                id=f"transparent_hugepage.hugepages-{size}kB.enabled",
                paths=(f"{_THP}/hugepages-{size}kB/enabled",),
                value=Choice(("always", "inherit", "madvise", "never")),
                summary=f"Which anonymous memory gets {size} KiB folios.",
                evidence=_UNMEASURED,
                absent=_ABSENT_MTHP,
                touches=("vm.min_free_kbytes",),
            ),
            _knob(
                id=f"transparent_hugepage.hugepages-{size}kB.shmem_enabled",
                paths=(f"{_THP}/hugepages-{size}kB/shmem_enabled",),
                value=Choice(
                    ("always", "inherit", "within_size", "advise", "never", "deny", "force")
                ),
                summary=f"Which shared memory gets {size} KiB folios (Linux 6.11).",
                evidence=_UNMEASURED,
                absent=_ABSENT_MTHP,
            ),
        )
    ),
)
