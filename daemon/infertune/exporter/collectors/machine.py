# SPDX-License-Identifier: Apache-2.0
"""The machine itself: what it is, and how the kernel sees its memory."""

from __future__ import annotations

from collections.abc import Iterable

from infertune.base.root import Root
from infertune.exporter.base import Absent, Collector, Metric, Sample, present
from infertune.host.cpu import model_name
from infertune.host.memory import meminfo
from infertune.host.system import product, release

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
    named = (product(root) or "", model_name(root) or "", release(root) or "")
    info = meminfo(root)
    if not info and not any(named):
        raise Absent("the machine does not say what it is")
    yield Sample("infertune_machine_info", named, 1)
    for kind, key in KINDS.items():
        yield from present("infertune_memory_bytes", (kind,), info.get(key))


MACHINE = Collector(
    id="machine",
    summary="The machine itself: what it is, and the memory of its CPU side.",
    metrics=METRICS,
    read=read,
)
