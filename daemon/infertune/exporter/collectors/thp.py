# SPDX-License-Identifier: Apache-2.0
"""Transparent huge pages and compaction of the whole machine."""

from __future__ import annotations

from collections.abc import Iterable

from infertune.exporter.base import Absent, Collector, Metric, Sample, bounded, present
from infertune.host.memory import meminfo, vmstat
from infertune.host.thp import folio_sizes, folio_statistics, has_huge_pages
from infertune.root import Root

_DOC = "Documentation/admin-guide/mm/transhuge.rst"

EVENTS = (
    "fault_alloc",
    "fault_fallback",
    "collapse_alloc",
    "collapse_alloc_failed",
    "file_alloc",
    "file_fallback",
    "file_mapped",
    "split_page",
    "split_page_failed",
    "deferred_split_page",
    "split_pmd",
    "swpout",
    "swpout_fallback",
)
COMPACTION = ("stall", "fail", "success", "daemon_wake")
MEMINFO = {
    "anonymous": "AnonHugePages",
    "shared": "ShmemHugePages",
    "shared_mapped": "ShmemPmdMapped",
    "file": "FileHugePages",
    "file_mapped": "FilePmdMapped",
}
FOLIO_EVENTS = (
    "anon_fault_alloc",
    "anon_fault_fallback",
    "anon_fault_fallback_charge",
    "shmem_alloc",
    "shmem_fallback",
    "split",
    "split_failed",
    "split_deferred",
    "swpout",
    "swpout_fallback",
    "swpin",
    "zswpout",
)
FOLIO_COUNTS = ("nr_anon", "nr_anon_partially_mapped")
MAX_SIZES = 12
"""Orders 2 to 13; x86-64 has 9 sizes of anonymous folios (16 kB to 2 MB and smaller)."""

METRICS = (
    Metric(
        name="infertune_thp_memory_bytes",
        unit="bytes",
        help="Memory of the machine that is in huge pages.",
        labels=("kind",),
        source="Documentation/filesystems/proc.rst, meminfo",
        series="5",
    ),
    Metric(
        name="infertune_thp_events_total",
        kind="counter",
        unit="items",
        help="Huge pages allocated, failed, split, swapped.",
        labels=("event",),
        source=f"{_DOC}, thp_* of /proc/vmstat",
        series=str(len(EVENTS)),
    ),
    Metric(
        name="infertune_compaction_events_total",
        kind="counter",
        unit="items",
        help="Allocations that stalled to compact memory, and how that ended. Long loads into "
        "GTT come with these.",
        labels=("event",),
        source=f"{_DOC}, compact_* of /proc/vmstat",
        series=str(len(COMPACTION)),
    ),
    Metric(
        name="infertune_mthp_events_total",
        kind="counter",
        unit="items",
        help="Folios of one size allocated, failed, split, swapped.",
        labels=("size", "event"),
        source=f"{_DOC}, hugepages-<size>kB/stats (Linux 6.10)",
        series=f"at most {MAX_SIZES} sizes times {len(FOLIO_EVENTS)}",
    ),
    Metric(
        name="infertune_mthp_folios",
        unit="items",
        help="Anonymous folios of one size that exist, and those only partly mapped.",
        labels=("size", "kind"),
        source=f"{_DOC}, nr_anon, nr_anon_partially_mapped (Linux 6.12)",
        series=f"at most {MAX_SIZES} sizes times 2",
    ),
)


def read(root: Root) -> Iterable[Sample]:
    """Counters of the machine.  Raises Absent where the kernel has no huge pages."""
    if not has_huge_pages(root):
        raise Absent("this kernel is built without CONFIG_TRANSPARENT_HUGEPAGE")
    info = meminfo(root)
    for kind, key in MEMINFO.items():
        yield from present("infertune_thp_memory_bytes", (kind,), info.get(key))
    counts = vmstat(root)
    for metric, prefix, events in (
        ("infertune_thp_events_total", "thp_", EVENTS),
        ("infertune_compaction_events_total", "compact_", COMPACTION),
    ):
        for event in events:
            yield from present(metric, (event,), counts.get(prefix + event))
    for size in bounded(folio_sizes(root), MAX_SIZES):
        folios = folio_statistics(root, size, (*FOLIO_EVENTS, *FOLIO_COUNTS))
        for event in FOLIO_EVENTS:
            yield from present("infertune_mthp_events_total", (size, event), folios.get(event))
        for kind in FOLIO_COUNTS:
            labels = (size, kind.removeprefix("nr_"))
            yield from present("infertune_mthp_folios", labels, folios.get(kind))


THP = Collector(
    id="thp",
    summary="Huge pages and compaction of the machine.",
    metrics=METRICS,
    read=read,
)
