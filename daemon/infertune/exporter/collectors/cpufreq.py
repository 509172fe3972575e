# SPDX-License-Identifier: Apache-2.0
"""CPU clocks and their limits, by cpufreq policy; throttling where the processor counts it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from infertune.exporter.base import Absent, Collector, Metric, Sample, bounded, present
from infertune.root import Root

_CPU = "/sys/devices/system/cpu"
_DOC = "Documentation/admin-guide/pm/cpufreq.rst"
MAX_POLICIES = 512
LIMITS = {
    "scaling_min": "scaling_min_freq",
    "scaling_max": "scaling_max_freq",
    "hardware_min": "cpuinfo_min_freq",
    "hardware_max": "cpuinfo_max_freq",
    "firmware_max": "bios_limit",
}

METRICS = (
    Metric(
        name="infertune_cpu_clock_hertz",
        unit="hertz",
        help="Clock of a policy's CPUs as the kernel last set or measured it.",
        labels=("policy",),
        source=f"{_DOC}, scaling_cur_freq",
        series="one per policy (amd-pstate: one per CPU), at most 512",
    ),
    Metric(
        name="infertune_cpu_clock_limit_hertz",
        unit="hertz",
        help="Limits: what is set (scaling), what the processor can (hardware), what the "
        "firmware allows.",
        labels=("policy", "limit"),
        source=f"{_DOC}, scaling_min_freq, scaling_max_freq, cpuinfo_*_freq, bios_limit",
        series="5 per policy",
    ),
    Metric(
        name="infertune_cpu_throttles_total",
        kind="counter",
        unit="items",
        help="How often heat throttled a core or a package (Intel; AMD does not count it here).",
        labels=("cpu", "level"),
        source="drivers/thermal/intel/therm_throt.c",
        series="2 per CPU",
    ),
)


def read(root: Root) -> Iterable[Sample]:
    """Every policy.  Raises Absent where nothing scales the clocks."""
    policies = bounded(root.glob(f"{_CPU}/cpufreq/policy*"), MAX_POLICIES)
    if not policies:
        raise Absent("no cpufreq driver")
    for path in policies:
        policy = path.rpartition("policy")[2]
        clock = root.get_int(f"{path}/scaling_cur_freq")
        yield from present("infertune_cpu_clock_hertz", (policy,), clock, scale=1000)
        for limit, file in LIMITS.items():
            value = root.get_int(f"{path}/{file}")
            yield from present(
                "infertune_cpu_clock_limit_hertz", (policy, limit), value, scale=1000
            )
    for path in bounded(root.glob(f"{_CPU}/cpu*/thermal_throttle"), MAX_POLICIES):
        match = re.search(r"/cpu(\d+)/", path)
        cpu = match[1] if match else ""
        for level in ("core", "package"):
            count = root.get_int(f"{path}/{level}_throttle_count")
            yield from present("infertune_cpu_throttles_total", (cpu, level), count)


CPUFREQ = Collector(
    id="cpufreq",
    summary="CPU clocks, their limits, throttling.",
    metrics=METRICS,
    read=read,
)
