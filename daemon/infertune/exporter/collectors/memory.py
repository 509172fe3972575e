# SPDX-License-Identifier: Apache-2.0
"""Memory of the servers' units: what they use, what protects it, and what that comes to.

GTT is not charged to any cgroup, so none of this covers weights that live on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from infertune.exporter.base import Absent, Collector, Metric, Sample
from infertune.exporter.servers import Unit, units
from infertune.host.cgroup import cgroup
from infertune.host.text import integer, pairs
from infertune.root import Root

_DOC = "Documentation/admin-guide/cgroup-v2.rst"
_PER_UNIT = "one for infertune.slice, one per server"

LIMITS = ("min", "low", "high", "max", "swap.max", "zswap.max")
EVENTS = ("low", "high", "max", "oom", "oom_kill", "oom_group_kill", "sock_throttled")
STATS = (
    "anon",
    "file",
    "kernel",
    "shmem",
    "file_mapped",
    "anon_thp",
    "file_thp",
    "shmem_thp",
    "unevictable",
    "slab",
    "zswap",
    "zswapped",
)
COUNTERS = (
    "pgfault",
    "pgmajfault",
    "pgscan",
    "pgsteal",
    "workingset_refault_anon",
    "workingset_refault_file",
    "thp_fault_alloc",
    "thp_collapse_alloc",
    "thp_swpout",
)

METRICS = (
    Metric(
        name="infertune_memory_gpu_bytes",
        unit="bytes",
        help="Memory of the machine that GPU drivers hold: active, or cached and reclaimable.",
        labels=("state",),
        source="Documentation/filesystems/proc.rst, GPUActive and GPUReclaim (where counted)",
        series="2",
    ),
    Metric(
        name="infertune_unit_memory_bytes",
        unit="bytes",
        help="Memory charged to the unit.",
        labels=("unit", "server"),
        source=f"{_DOC}, memory.current",
        series=_PER_UNIT,
    ),
    Metric(
        name="infertune_unit_memory_swap_bytes",
        unit="bytes",
        help="Memory of the unit that is swapped out.",
        labels=("unit", "server"),
        source=f"{_DOC}, memory.swap.current",
        series=_PER_UNIT,
    ),
    Metric(
        name="infertune_unit_memory_limit_bytes",
        unit="bytes",
        help="Protections (min, low) and limits as they are set; +Inf is no limit.",
        labels=("unit", "server", "limit"),
        source=f"{_DOC}, memory.min, low, high, max, swap.max, zswap.max",
        series="6 for infertune.slice, 6 per server",
    ),
    Metric(
        name="infertune_unit_memory_protected_bytes",
        unit="bytes",
        help="What memory.min and memory.low come to, given the groups above and beside it.",
        labels=("unit", "server", "limit"),
        source="mm/page_counter.c, effective_protection()",
        series="2 for infertune.slice, 2 per server",
    ),
    Metric(
        name="infertune_unit_memory_events_total",
        kind="counter",
        unit="items",
        help="How often a protection was broken (low) or a limit was reached, and OOM kills.",
        labels=("unit", "server", "event"),
        source=f"{_DOC}, memory.events",
        series="7 for infertune.slice, 7 per server",
    ),
    Metric(
        name="infertune_unit_memory_part_bytes",
        unit="bytes",
        help="What the charged memory is. Parts overlap: anon_thp is in anon.",
        labels=("unit", "server", "part"),
        source=f"{_DOC}, memory.stat",
        series=f"{len(STATS)} for infertune.slice, {len(STATS)} per server",
    ),
    Metric(
        name="infertune_unit_memory_stat_events_total",
        kind="counter",
        unit="items",
        help="Faults, reclaim, refaults (pages that were thrown out too early), huge pages.",
        labels=("unit", "server", "event"),
        source=f"{_DOC}, memory.stat",
        series=f"{len(COUNTERS)} for infertune.slice, {len(COUNTERS)} per server",
    ),
)


@dataclass(frozen=True, slots=True)
class Group:
    """What counts for the protection of one group."""

    usage: int
    protection: int
    """memory.min or memory.low, in bytes."""

    @property
    def claimed(self) -> int:
        """Protected memory that is really used."""
        return min(self.usage, self.protection)


def effective(
    group: Group,
    parent: Group,
    parent_effective: int,
    siblings_claimed: int,
    *,
    recursive: bool,
) -> int:
    """Bytes of ``group`` that reclaim of the whole machine leaves alone.

    ``siblings_claimed`` is the sum over all children of the parent, the group among them;
    ``recursive`` the mount option memory_recursiveprot, which hands down what nobody claims.
    """
    if siblings_claimed > parent_effective:
        # More is promised than there is: shared out in proportion.
        return group.claimed * parent_effective // siblings_claimed
    protected = group.claimed
    if recursive and parent_effective > siblings_claimed and parent.usage > siblings_claimed:
        unclaimed = parent_effective - siblings_claimed
        protected += unclaimed * (group.usage - protected) // (parent.usage - siblings_claimed)
    return protected


def read(root: Root) -> Iterable[Sample]:
    """The slice and each server's unit.  Raises Absent where there is neither, nor GPU memory."""
    samples = list(_gpu(root))
    mount = cgroup(root).mount
    found = units(root)
    for unit in found:
        samples += _unit(root, unit)
    if mount and found:
        samples += _protected(root, mount, found)
    if not samples:
        raise Absent("no infertune.slice with the memory controller")
    return samples


def _gpu(root: Root) -> Iterable[Sample]:
    info = pairs(root.get("/proc/meminfo"), ":")
    for state, key in (("active", "GPUActive"), ("reclaimable", "GPUReclaim")):
        kib = integer(info.get(key, "").removesuffix(" kB"))
        if kib is not None:
            yield Sample("infertune_memory_gpu_bytes", (state,), kib * 1024)


def _unit(root: Root, unit: Unit) -> Iterable[Sample]:
    labels = (unit.name, unit.server)
    for metric, file in (
        ("infertune_unit_memory_bytes", "memory.current"),
        ("infertune_unit_memory_swap_bytes", "memory.swap.current"),
    ):
        value = root.get_int(f"{unit.cgroup}/{file}")
        if value is not None:
            yield Sample(metric, labels, value)
    for limit in LIMITS:
        text = root.get(f"{unit.cgroup}/memory.{limit}")
        if text:
            number = float("inf") if text == "max" else float(text)
            yield Sample("infertune_unit_memory_limit_bytes", (*labels, limit), number)
    stat = pairs(root.get(f"{unit.cgroup}/memory.stat"))
    events = pairs(root.get(f"{unit.cgroup}/memory.events"))
    for metric, table, keys in (
        ("infertune_unit_memory_events_total", events, EVENTS),
        ("infertune_unit_memory_part_bytes", stat, STATS),
        ("infertune_unit_memory_stat_events_total", stat, COUNTERS),
    ):
        yield from _listed(metric, labels, table, keys)


def _listed(
    metric: str, labels: tuple[str, ...], table: Mapping[str, str], keys: Iterable[str]
) -> Iterable[Sample]:
    for key in keys:
        value = integer(table.get(key))
        if value is not None:
            yield Sample(metric, (*labels, key), value)


def _protected(root: Root, mount: str, found: tuple[Unit, ...]) -> Iterable[Sample]:
    options = [
        line.split()[3]
        for line in (root.get("/proc/self/mounts") or "").splitlines()
        if len(line.split()) > 3 and line.split()[1:3] == [mount, "cgroup2"]
    ]
    recursive = any("memory_recursiveprot" in each.split(",") for each in options)
    top, *servers = found
    for limit in ("min", "low"):
        parent = _group(root, top.cgroup, limit)
        if parent is None:
            continue
        # A child of the root group gets what it asks for (mem_cgroup_calculate_protection).
        given = parent.protection
        yield Sample("infertune_unit_memory_protected_bytes", (top.name, "", limit), given)
        children = {
            name: group
            for name in root.names(top.cgroup)
            if (group := _group(root, f"{top.cgroup}/{name}", limit))
        }
        claimed = sum(group.claimed for group in children.values())
        for unit in servers:
            if unit.name in children:
                value = effective(children[unit.name], parent, given, claimed, recursive=recursive)
                labels = (unit.name, unit.server, limit)
                yield Sample("infertune_unit_memory_protected_bytes", labels, value)


def _group(root: Root, path: str, limit: str) -> Group | None:
    usage = root.get_int(f"{path}/memory.current")
    text = root.get(f"{path}/memory.{limit}")
    if usage is None or not text:
        return None
    # PAGE_COUNTER_MAX for "max": larger than any usage is all that matters.
    return Group(usage, 2**63 if text == "max" else int(text))


MEMORY = Collector(
    id="memory",
    summary="Memory of the servers' units, and what protects it.",
    metrics=METRICS,
    read=read,
)
