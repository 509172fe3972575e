# SPDX-License-Identifier: Apache-2.0
"""The machine itself: what it is, and how the kernel sees its memory."""

from __future__ import annotations

from collections.abc import Iterable

from infertune.exporter.base import Absent, Collector, Metric, Sample
from infertune.host.text import integer, pairs
from infertune.root import Root

KINDS = {
    "total": "MemTotal",
    "free": "MemFree",
    "available": "MemAvailable",
    "cma_total": "CmaTotal",
    "cma_free": "CmaFree",
    "swap_total": "SwapTotal",
    "swap_free": "SwapFree",
}
"""What /proc/meminfo calls them."""

METRICS = (
    Metric(
        name="infertune_machine_info",
        unit="1",
        help="Product, processor and running kernel; empty where the machine does not say.",
        labels=("product", "processor", "kernel"),
        source="/sys/class/dmi/id/product_name, /proc/cpuinfo, /proc/sys/kernel/osrelease",
        series="1",
    ),
    Metric(
        name="infertune_memory_bytes",
        unit="bytes",
        help="Memory of the CPU side: a carve-out is not in total, GTT is. cma_free is memory that "
        "the GPU's pages cannot take, though it counts as free and available.",
        labels=("kind",),
        source="Documentation/filesystems/proc.rst, meminfo",
        series=str(len(KINDS)),
    ),
)


def read(root: Root) -> Iterable[Sample]:
    """Raises Absent where the machine says nothing of itself."""
    processor = pairs(root.get("/proc/cpuinfo"), ":").get("model name", "")
    named = (
        root.get("/sys/class/dmi/id/product_name") or "",
        processor,
        root.get("/proc/sys/kernel/osrelease") or "",
    )
    info = pairs(root.get("/proc/meminfo"), ":")
    if not info and not any(named):
        raise Absent("the machine does not say what it is")
    yield Sample("infertune_machine_info", named, 1)
    for kind, key in KINDS.items():
        kib = integer(info.get(key, "").removesuffix(" kB"))
        if kib is not None:
            yield Sample("infertune_memory_bytes", (kind,), kib * 1024)


MACHINE = Collector(
    id="machine",
    summary="The machine itself: what it is, and the memory of its CPU side.",
    metrics=METRICS,
    read=read,
)
