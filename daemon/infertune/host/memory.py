# SPDX-License-Identifier: Apache-2.0
"""The kernel's view of memory: one function per file of /proc."""

from __future__ import annotations

import re
from collections.abc import Mapping

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.host.text import bracketed, counters, sizes

PAGE = 4096
"""Bytes; of x86-64, the only architecture with the GPUs that infertune tunes."""

_RESOURCES = ("cpu", "io", "memory")


@dataclass(frozen=True, slots=True)
class Memory:
    """/proc/meminfo, as far as a model's room depends on it; bytes."""

    total_bytes: int | None
    available_bytes: int | None
    swap_bytes: int | None
    cma_total_bytes: int | None
    cma_free_bytes: int | None
    gpu_active_bytes: int | None
    """GPUActive: pages the GPU holds, where the kernel counts them."""
    numa_nodes: int | None


@dataclass(frozen=True, slots=True)
class Pressure:
    """One line of a pressure file (Documentation/accounting/psi.rst)."""

    share: str
    """``some`` or ``full``."""
    average_300s_percent: float
    stalled_seconds: float
    """In all, since boot."""


def meminfo(root: Root) -> dict[str, int]:
    """/proc/meminfo in bytes; counts of huge pages as they are (proc_meminfo(5))."""
    return sizes(root.get("/proc/meminfo"))


def memory(root: Root, numa_nodes: int | None) -> Memory:
    """The figures of meminfo that profiles are resolved against."""
    info = meminfo(root)
    return Memory(
        total_bytes=info.get("MemTotal"),
        available_bytes=info.get("MemAvailable"),
        swap_bytes=info.get("SwapTotal"),
        cma_total_bytes=info.get("CmaTotal"),
        cma_free_bytes=info.get("CmaFree"),
        gpu_active_bytes=info.get("GPUActive"),
        numa_nodes=numa_nodes,
    )


def vmstat(root: Root) -> dict[str, int]:
    """Counters of /proc/vmstat."""
    return counters(root.get("/proc/vmstat"))


def oom_kills(root: Root) -> int | None:
    """Processes the kernel has killed for want of memory since boot."""
    return vmstat(root).get("oom_kill")


def pressure(root: Root, group: str | None = None) -> Mapping[str, tuple[Pressure, ...]]:
    """Pressure by resource (cpu, io, memory), of the system or of a control group."""
    files = {
        resource: f"{group}/{resource}.pressure" if group else f"/proc/pressure/{resource}"
        for resource in _RESOURCES
    }
    return {resource: _pressure(root.get(path)) for resource, path in files.items()}


def has_pressure(root: Root) -> bool:
    """Whether this kernel tells pressure at all (CONFIG_PSI, not psi=0)."""
    return root.exists("/proc/pressure")


_STALLED = re.compile(
    r"^(some|full) .*?\bavg300=(\d{1,3}\.\d+) .*?\btotal=(\d{1,20})", re.MULTILINE | re.ASCII
)


def _pressure(text: str | None) -> tuple[Pressure, ...]:
    return tuple(
        Pressure(share, float(average), int(total) / 1e6)
        for share, average, total in _STALLED.findall(text or "")
    )


def free_huge_blocks(root: Root) -> int | None:
    """Free blocks of 2 MiB in all zones; larger ones count as so many of them.

    None where /proc/buddyinfo is not there.
    """
    text = root.get("/proc/buddyinfo")
    if not text:
        return None
    total = 0
    for line in text.splitlines():
        found = re.match(r"Node \d+, zone +\w+ +([\d ]+)$", line)
        counts = found[1].split() if found else []
        total += sum(int(count[:18]) << at for at, count in enumerate(counts[9:12]))
    return total


def chosen(root: Root, path: str) -> str | None:
    """The word in brackets of a file such as transparent_hugepage/enabled."""
    return bracketed(root.get(path))


def overcommit(root: Root) -> int | None:
    """vm.overcommit_memory: 0, 1 or 2."""
    return root.get_int("/proc/sys/vm/overcommit_memory")
