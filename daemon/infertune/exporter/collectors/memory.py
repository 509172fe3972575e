# SPDX-License-Identifier: Apache-2.0
"""Memory of the servers' units: what they use, what protects it, and what that comes to.

GTT is not charged to any cgroup, so none of this covers weights that live on the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from infertune.base.names import SLICE
from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.exporter.base import Absent, Collector, Metric, Sample, present
from infertune.exporter.servers import units
from infertune.host.cgroup import (
    entries,
    hands_down_protection,
    memory_events,
    memory_limit,
    memory_stat,
    memory_used,
)
from infertune.servers.running import Unit

_DOC = "Documentation/admin-guide/cgroup-v2.rst"
_PER_UNIT = "one for infertune.slice, one per server"

LIMITS = ("min", "low")
EVENTS = ("low", "high", "max", "oom_kill")
STATS = ("anon", "file", "shmem")

METRICS = (
    Metric(
        name="infertune_unit_memory_bytes",
        unit="bytes",
        help="Memory charged to the unit.",
        labels=("unit", "server"),
        source=f"{_DOC}, memory.current",
        series=_PER_UNIT,
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
        series="4 for infertune.slice, 4 per server",
    ),
    Metric(
        name="infertune_unit_memory_part_bytes",
        unit="bytes",
        help="What the charged memory is; shmem is in file.",
        labels=("unit", "server", "part"),
        source=f"{_DOC}, memory.stat",
        series=f"{len(STATS)} for infertune.slice, {len(STATS)} per server",
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


@dataclass(frozen=True, slots=True)
class Charged:
    """What one group has been charged, and its protections and limits; bytes."""

    used: int | None
    limits: Mapping[str, float]

    def group(self, limit: str) -> Group | None:
        """As the protection ``limit`` counts; None where the group has no memory controller."""
        protection = self.limits.get(limit)
        if self.used is None or protection is None:
            return None
        # PAGE_COUNTER_MAX for "max": larger than any usage is all that matters.
        return Group(self.used, 2**63 if math.isinf(protection) else int(protection))


def read(root: Root) -> Iterable[Sample]:
    """The slice and each server's unit.  Raises Absent where there is neither."""
    samples: list[Sample] = []
    found = units(root)
    charged = {unit.name: _charged(root, unit.cgroup, LIMITS) for unit in found}
    for unit in found:
        samples += _unit(root, unit, charged[unit.name])
    if found and found[0].name == SLICE:
        inside = tuple(unit for unit in found if unit.cgroup.startswith(found[0].cgroup))
        samples += _protected(root, inside, charged)
    if not samples:
        raise Absent("no server runs as a unit with the memory controller")
    return samples


def _charged(root: Root, group: str, names: Iterable[str]) -> Charged:
    limits = {name: memory_limit(root, group, name) for name in names}
    known = {name: value for name, value in limits.items() if value is not None}
    return Charged(memory_used(root, group), known)


def _unit(root: Root, unit: Unit, charged: Charged) -> Iterable[Sample]:
    labels = (unit.name, unit.server)
    yield from present("infertune_unit_memory_bytes", labels, charged.used)
    stat, events = memory_stat(root, unit.cgroup), memory_events(root, unit.cgroup)
    for metric, table, keys in (
        ("infertune_unit_memory_events_total", events, EVENTS),
        ("infertune_unit_memory_part_bytes", stat, STATS),
    ):
        for key in keys:
            yield from present(metric, (*labels, key), table.get(key))


def _protected(
    root: Root, found: tuple[Unit, ...], charged: Mapping[str, Charged]
) -> Iterable[Sample]:
    recursive = hands_down_protection(root)
    top, *servers = found
    beside = _beside(root, top.cgroup, charged)
    for limit in ("min", "low"):
        parent = charged[top.name].group(limit)
        if parent is None:
            continue
        # A child of the root group gets what it asks for (mem_cgroup_calculate_protection).
        given = parent.protection
        yield Sample("infertune_unit_memory_protected_bytes", (top.name, "", limit), given)
        children = {unit.name: charged[unit.name].group(limit) for unit in servers}
        others = (each.group(limit) for each in beside)
        claimed = sum(group.claimed for group in (*children.values(), *others) if group)
        for unit in servers:
            if group := children[unit.name]:
                value = effective(group, parent, given, claimed, recursive=recursive)
                labels = (unit.name, unit.server, limit)
                yield Sample("infertune_unit_memory_protected_bytes", labels, value)


def _beside(root: Root, top: str, charged: Mapping[str, Charged]) -> list[Charged]:
    """Groups in the slice that have no series: their claims count all the same."""
    return [
        _charged(root, f"{top}/{name}", LIMITS)
        for name in entries(root, top)
        # A file of the slice is no group, and has nothing in it.
        if name not in charged and memory_used(root, f"{top}/{name}") is not None
    ]


MEMORY = Collector(
    id="memory",
    summary="Memory of the servers' units, and what protects it.",
    metrics=METRICS,
    read=read,
)
