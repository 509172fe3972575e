# SPDX-License-Identifier: Apache-2.0
"""Transparent huge pages of the whole machine."""

from __future__ import annotations

from collections.abc import Iterable

from infertune.base.root import Root
from infertune.exporter.base import Absent, Collector, Metric, Sample, present
from infertune.host.memory import meminfo, vmstat
from infertune.host.thp import has_huge_pages

_DOC = "Documentation/admin-guide/mm/transhuge.rst"

EVENTS = (
    "fault_alloc",
    "fault_fallback",
    "collapse_alloc",
    "collapse_alloc_failed",
    "split_page",
    "swpout_fallback",
)
MEMINFO = {
    "anonymous": "AnonHugePages",
    "shared": "ShmemHugePages",
    "shared_mapped": "ShmemPmdMapped",
    "file": "FileHugePages",
    "file_mapped": "FilePmdMapped",
}
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
)


def read(root: Root) -> Iterable[Sample]:
    """Counters of the machine.  Raises Absent where the kernel has no huge pages."""
    if not has_huge_pages(root):
        raise Absent("this kernel is built without CONFIG_TRANSPARENT_HUGEPAGE")
    info = meminfo(root)
    for kind, key in MEMINFO.items():
        yield from present("infertune_thp_memory_bytes", (kind,), info.get(key))
    counts = vmstat(root)
    for event in EVENTS:
        yield from present("infertune_thp_events_total", (event,), counts.get(f"thp_{event}"))


THP = Collector(
    id="thp",
    summary="Huge pages of the machine.",
    metrics=METRICS,
    read=read,
)
