# SPDX-License-Identifier: Apache-2.0
"""Pressure stall information: time that work stood still for want of a resource."""

from __future__ import annotations

import re
from collections.abc import Iterable

from infertune.exporter.base import Absent, Collector, Metric, Sample
from infertune.exporter.servers import units
from infertune.root import Root

_DOC = "Documentation/accounting/psi.rst"
RESOURCES = ("cpu", "io", "memory")

METRICS = (
    Metric(
        name="infertune_pressure_stalled_seconds_total",
        kind="counter",
        unit="seconds",
        help="Time in which some or all (full) tasks waited for the resource. unit is 'system' "
        "for the whole machine.",
        labels=("unit", "server", "resource", "share"),
        source=_DOC,
        series="6 for the system, 6 for infertune.slice, 6 per server",
    ),
)


def read(root: Root) -> Iterable[Sample]:
    """The system, the slice and each server's unit.  Raises Absent where PSI is off."""
    if not root.exists("/proc/pressure"):
        raise Absent("this kernel has no PSI, or it was started with psi=0")
    for resource in RESOURCES:
        yield from _stalled("system", "", resource, root.get(f"/proc/pressure/{resource}"))
    for unit in units(root):
        for resource in RESOURCES:
            text = root.get(f"{unit.cgroup}/{resource}.pressure")
            yield from _stalled(unit.name, unit.server, resource, text)


def _stalled(unit: str, server: str, resource: str, text: str | None) -> Iterable[Sample]:
    for share, total in re.findall(r"^(some|full) .*\btotal=(\d+)", text or "", re.MULTILINE):
        labels = (unit, server, resource, share)
        yield Sample("infertune_pressure_stalled_seconds_total", labels, int(total) / 1e6)


PRESSURE = Collector(
    id="pressure",
    summary="Time that work stood still for want of CPU, I/O or memory.",
    metrics=METRICS,
    read=read,
)
