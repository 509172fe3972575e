# SPDX-License-Identifier: Apache-2.0
"""Pressure stall information: time that work stood still for want of a resource."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from infertune.base.root import Root
from infertune.exporter.base import Absent, Collector, Metric, Sample
from infertune.exporter.servers import units
from infertune.host.memory import Pressure, has_pressure, pressure

_DOC = "Documentation/accounting/psi.rst"

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
    if not has_pressure(root):
        raise Absent("this kernel has no PSI, or it was started with psi=0")
    yield from _stalled("system", "", pressure(root))
    for unit in units(root):
        yield from _stalled(unit.name, unit.server, pressure(root, unit.cgroup))


def _stalled(unit: str, server: str, found: Mapping[str, tuple[Pressure, ...]]) -> Iterable[Sample]:
    for resource, lines in found.items():
        for line in lines:
            labels = (unit, server, resource, line.share)
            yield Sample("infertune_pressure_stalled_seconds_total", labels, line.stalled_seconds)


PRESSURE = Collector(
    id="pressure",
    summary="Time that work stood still for lack of CPU, I/O or memory.",
    metrics=METRICS,
    read=read,
)
