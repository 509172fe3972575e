# SPDX-License-Identifier: Apache-2.0
"""Memory of the servers' units: what they use, what protects it, and what that comes to.

GTT is not charged to any cgroup, so none of this covers weights that live on the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.exporter.base import Absent, Collector, Metric, Sample, present
from infertune.exporter.servers import units
from infertune.host.cgroup import (
    cgroup,
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

_FILES = ("cgroup.", "cpu.", "cpuset.", "dmem.", "hugetlb.", "io.", "irq.", "memory.", "misc.",
          "pids.", "rdma.")  # fmt: skip
"""What the files of a group begin with; all else in its directory is a group."""
_MOST_BESIDE = 512
"""Groups beside one that are looked at: whoever has a part of the tree can make many there."""

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
        series="2 for infertune.slice, 2 per server; none beside more than 512 groups",
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
    mount = cgroup(root).mount or ""
    tree = Tree(root, mount, recursive=hands_down_protection(root))
    for unit in units(root):
        samples += _unit(root, unit, tree.charged(unit.cgroup))
        for limit in LIMITS:
            labels = (unit.name, unit.server, limit)
            protected = tree.effective(unit.cgroup, limit)
            samples += present("infertune_unit_memory_protected_bytes", labels, protected)
    if not samples:
        raise Absent("no server runs as a unit with the memory controller")
    return samples


class Tree:
    """Control groups as they are at one moment, each read once."""

    def __init__(self, root: Root, mount: str, *, recursive: bool) -> None:
        self._root = root
        self._mount = mount
        self._recursive = recursive
        self._charged: dict[str, Charged] = {}
        self._children: dict[str, tuple[str, ...] | None] = {}

    def charged(self, group: str) -> Charged:
        if group not in self._charged:
            self._charged[group] = _charged(self._root, group, LIMITS)
        return self._charged[group]

    def effective(self, path: str, limit: str) -> int | None:
        """Bytes of a group that are protected, given all above and beside it.

        None where that is not known: no memory controller, or too many beside it.
        """
        group, above = self.charged(path).group(limit), path.rpartition("/")[0]
        if group is None or len(path) <= len(self._mount):
            return None
        if above == self._mount:
            # A child of the root group gets what it asks for (mem_cgroup_calculate_protection).
            return group.protection
        parent, given = self.charged(above).group(limit), self.effective(above, limit)
        beside = self._groups(above)
        if parent is None or given is None or beside is None:
            return None
        others = (self.charged(each).group(limit) for each in beside)
        claimed = sum(each.claimed for each in others if each)
        return effective(group, parent, given, claimed, recursive=self._recursive)

    def _groups(self, above: str) -> tuple[str, ...] | None:
        """Groups directly below one; None for too many."""
        if above not in self._children:
            names = entries(self._root, above)
            groups = tuple(f"{above}/{name}" for name in names if not name.startswith(_FILES))
            self._children[above] = groups if len(groups) <= _MOST_BESIDE else None
        return self._children[above]


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


MEMORY = Collector(
    id="memory",
    summary="Memory of the servers' units, and what protects it.",
    metrics=METRICS,
    read=read,
)
