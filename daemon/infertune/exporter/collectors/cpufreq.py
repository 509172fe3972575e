# SPDX-License-Identifier: Apache-2.0
"""CPU clocks, by cpufreq policy."""

from __future__ import annotations

from collections.abc import Iterable

from infertune.base.root import Root
from infertune.exporter.base import Absent, Collector, Metric, Sample, bounded, present
from infertune.host.cpu import clock, policy_numbers

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
)


def read(root: Root) -> Iterable[Sample]:
    """Every policy.  Raises Absent where nothing scales the clocks."""
    policies = bounded(policy_numbers(root), MAX_POLICIES)
    if not policies:
        raise Absent("no cpufreq driver")
    for policy in policies:
        yield from present("infertune_cpu_clock_hertz", (policy,), clock(root, policy), scale=1000)


CPUFREQ = Collector(
    id="cpufreq",
    summary="CPU clocks.",
    metrics=METRICS,
    read=read,
)
