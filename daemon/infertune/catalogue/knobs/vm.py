# SPDX-License-Identifier: Apache-2.0
"""Memory management sysctls."""

from infertune.base.units import GIB, KIB, MIB
from infertune.catalogue.knobs.base import Evidence, Knob
from infertune.catalogue.values import Integer, Size
from infertune.host.machine import Machine

_VM = "/proc/sys/vm"
_DOC = "Documentation/admin-guide/sysctl/vm.rst"


def _one_node(machine: Machine) -> str | None:
    if machine.memory.numa_nodes == 1:
        return "no effect here: this machine has one NUMA node, there is nowhere to migrate to"
    return None


def _swap_in_memory(machine: Machine) -> str | None:
    if machine.swap and not machine.swap.areas:
        return "no effect here: there is no swap"
    where = machine.swap.in_memory if machine.swap else None
    if where is None:
        return None
    swap = "all swap here is zram" if where == "zram" else "zswap compresses swap here"
    return (
        f"{swap}: below 100 the kernel drops the model's file pages before it compresses idle "
        f"memory; {_DOC} suggests more than 100 for swap in memory"
    )


KNOBS: tuple[Knob, ...] = (
    Knob(
        id="vm.swappiness",
        paths=(f"{_VM}/swappiness",),
        value=Integer(0, 200),
        summary="How readily anonymous memory is swapped rather than page cache dropped.",
        evidence=Evidence(
            "protective, unmeasured",
            "Keeps the server's CPU-side buffers in memory while a model file streams through "
            "the page cache.",
            _DOC,
        ),
        doc=_DOC,
        absent="this kernel is built without CONFIG_SWAP or hides /proc/sys",
        note=_swap_in_memory,
    ),
    Knob(
        id="vm.compaction_proactiveness",
        paths=(f"{_VM}/compaction_proactiveness",),
        value=Integer(0, 100),
        summary="How hard the kernel compacts memory in the background (Linux 5.9).",
        evidence=Evidence(
            "reported",
            "Compaction while GTT is allocated made model loads take tens of minutes on hosts "
            "short of memory; compacting ahead is the untested opposite.",
            "peonist-ai issues #12, #33, #71, #85",
        ),
        doc=_DOC,
        absent="this kernel is built without CONFIG_COMPACTION",
    ),
    Knob(
        id="vm.watermark_scale_factor",
        paths=(f"{_VM}/watermark_scale_factor",),
        # 1000 in the document; the code allows 3000 since Linux 5.18.
        value=Integer(1, 3000, "in 1/10000 of a node"),
        summary="How much memory kswapd keeps free; more means fewer direct-reclaim stalls.",
        evidence=Evidence(
            "protective, unmeasured",
            "Reclaim in the background instead of in the server's own allocations.",
            _DOC,
        ),
        doc=_DOC,
        absent="this kernel hides /proc/sys/vm",
    ),
    Knob(
        id="vm.min_free_kbytes",
        paths=(f"{_VM}/min_free_kbytes",),
        value=Size(unit_bytes=KIB, low_bytes=1 * MIB, high_bytes=16 * GIB, unit="kB"),
        summary="Memory the kernel never gives away but for emergencies.",
        evidence=Evidence(
            "reported",
            "Freeing 13 GiB of host memory removed multi-second queue evictions; a reserve this "
            "small is a cushion for atomic allocations only.",
            "peonist-ai issue #85",
        ),
        doc=_DOC,
        absent="this kernel hides /proc/sys/vm",
    ),
    Knob(
        id="kernel.numa_balancing",
        paths=("/proc/sys/kernel/numa_balancing",),
        value=Integer(0, 3, "(bits: 1 locality, 2 memory tiers)"),
        summary="Unmaps pages to learn which node uses them, and migrates them there.",
        evidence=Evidence(
            "no effect found",
            "Strix Halo is one NUMA node: nothing to migrate. Costs page faults elsewhere.",
            "Documentation/admin-guide/sysctl/kernel.rst",
        ),
        doc="Documentation/admin-guide/sysctl/kernel.rst",
        absent="this kernel is built without CONFIG_NUMA_BALANCING",
        note=_one_node,
    ),
)
