# SPDX-License-Identifier: Apache-2.0
"""The collectors: one file each, one entry here, and nothing else to touch."""

from infertune.exporter.base import Collector
from infertune.exporter.collectors.amdgpu import AMDGPU
from infertune.exporter.collectors.boot import BOOT
from infertune.exporter.collectors.cpufreq import CPUFREQ
from infertune.exporter.collectors.engines import ENGINES_COLLECTOR
from infertune.exporter.collectors.fdinfo import FDINFO
from infertune.exporter.collectors.gpu_metrics import GPU_METRICS
from infertune.exporter.collectors.journal import JOURNAL, PROFILE
from infertune.exporter.collectors.kfd import KFD
from infertune.exporter.collectors.knobs import KNOBS_COLLECTOR
from infertune.exporter.collectors.machine import MACHINE
from infertune.exporter.collectors.measured import MEASURED
from infertune.exporter.collectors.memory import MEMORY
from infertune.exporter.collectors.npu import NPU
from infertune.exporter.collectors.pools import POOLS
from infertune.exporter.collectors.pressure import PRESSURE
from infertune.exporter.collectors.smaps import SMAPS
from infertune.exporter.collectors.thp import THP

COLLECTORS: dict[str, Collector] = {
    collector.id: collector
    for collector in (
        PROFILE,
        JOURNAL,
        KNOBS_COLLECTOR,
        BOOT,
        MEASURED,
        MACHINE,
        AMDGPU,
        GPU_METRICS,
        POOLS,
        KFD,
        FDINFO,
        PRESSURE,
        MEMORY,
        SMAPS,
        THP,
        CPUFREQ,
        NPU,
        ENGINES_COLLECTOR,
    )
}
"""Every collector by its id, in the order of the page and of docs/metrics.md."""
