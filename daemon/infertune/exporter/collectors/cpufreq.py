# SPDX-License-Identifier: Apache-2.0
"""CPU clocks and their limits, by cpufreq policy; throttling where the processor counts it."""

from __future__ import annotations

from collections.abc import Iterable

from infertune.exporter.base import Absent, Collector, Metric, Sample, bounded, present
from infertune.host.cpu import clocks, policy_numbers, throttles, throttling_cpus
from infertune.root import Root

_DOC = "Documentation/admin-guide/pm/cpufreq.rst"
MAX_POLICIES = 512

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
    policies = bounded(policy_numbers(root), MAX_POLICIES)
    if not policies:
        raise Absent("no cpufreq driver")
    for policy in policies:
        found = clocks(root, policy)
        yield from present("infertune_cpu_clock_hertz", (policy,), found.current, scale=1000)
        for limit, khz in (
            ("scaling_min", found.scaling_min),
            ("scaling_max", found.scaling_max),
            ("hardware_min", found.hardware_min),
            ("hardware_max", found.hardware_max),
            ("firmware_max", found.firmware_max),
        ):
            yield from present("infertune_cpu_clock_limit_hertz", (policy, limit), khz, scale=1000)
    for cpu in bounded(throttling_cpus(root), MAX_POLICIES):
        for level, count in throttles(root, cpu).items():
            yield Sample("infertune_cpu_throttles_total", (cpu, level), count)


CPUFREQ = Collector(
    id="cpufreq",
    summary="CPU clocks, their limits, throttling.",
    metrics=METRICS,
    read=read,
)
