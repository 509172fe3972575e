# SPDX-License-Identifier: Apache-2.0
"""Counters of energy in the processor (RAPL), as the kernel offers them to perf."""

from __future__ import annotations

import re

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.host.cpu import cpulist, package

_PMU = "/sys/bus/event_source/devices/power"
_EVENT = re.compile(r"event=(0x[0-9a-f]{1,16})", re.ASCII)


@dataclass(frozen=True, slots=True)
class EnergyPmu:
    """How the energy of a package is counted (arch/x86/events/rapl.c; Intel, and AMD since Zen)."""

    type: int
    config: int
    joules: float
    """What one of the counter is."""
    packages: dict[str, int]
    """The CPU to ask, by number of its package."""


def energy_pmu(root: Root) -> EnergyPmu | None:
    """Which counter it is; None where this kernel or processor has none."""
    kind = root.get_int(f"{_PMU}/type")
    event = _EVENT.fullmatch(root.get(f"{_PMU}/events/energy-pkg") or "")
    try:
        joules = float(root.get(f"{_PMU}/events/energy-pkg.scale") or "")
    except ValueError:
        return None
    if kind is None or event is None or not 0 < joules < 1:
        return None
    packages: dict[str, int] = {}
    for cpu in sorted(cpulist(root, f"{_PMU}/cpumask")):
        packages.setdefault(str(package(root, cpu) or 0), cpu)
    return EnergyPmu(kind, int(event[1], 16), joules, packages) if packages else None
