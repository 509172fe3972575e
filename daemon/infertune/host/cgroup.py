# SPDX-License-Identifier: Apache-2.0
"""Control groups: which there are, who is in them, what limits this system."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.host.mounts import mounts
from infertune.host.text import counters, integer


@dataclass(frozen=True, slots=True)
class Cgroup:
    version: int | None
    """2 unified, 1 legacy or hybrid, None where no cgroup file system is mounted."""
    mount: str | None
    """Where the v2 hierarchy is mounted."""
    controllers: tuple[str, ...]
    """Controllers of the v2 root: what a group can be given at all."""


def cgroup(root: Root) -> Cgroup:
    """Which control groups there are, and where."""
    found = mounts(root)
    unified = next(
        (
            each
            for each in found
            if each.kind == "cgroup2"
            and each.path.startswith("/")
            and ".." not in each.path.split("/")
        ),
        None,
    )
    legacy = any(each.kind == "cgroup" for each in found)
    return Cgroup(
        version=1 if legacy else 2 if unified else None,
        mount=unified.path if unified else None,
        controllers=controllers(root, unified.path) if unified else (),
    )


def controllers(root: Root, group: str) -> tuple[str, ...]:
    """Controllers that a group has been given by the one above it."""
    return tuple((root.get(f"{group}/cgroup.controllers") or "").split())


def handed_down(root: Root, group: str) -> tuple[str, ...]:
    """Controllers that a group gives to those below it (cgroup.subtree_control)."""
    return tuple((root.get(f"{group}/cgroup.subtree_control") or "").split())


def entries(root: Root, group: str) -> list[str]:
    """Names in a group's directory: its files, and the groups below it; empty where it is gone."""
    return root.names(group)


def group_id(root: Root, group: str) -> int | None:
    """Id of a group: the inode of its directory (cgroup-v2.rst); None where it is gone."""
    try:
        return root.at(group).stat().st_ino
    except OSError:
        return None


def effective_cpus(root: Root, group: str) -> str | None:
    """CPUs that the processes of a group may use, as a list of the kernel; None: not told."""
    return root.get(f"{group}/cpuset.cpus.effective") or None


def cpu_time_used(root: Root, group: str) -> int | None:
    """CPU time that a group and those below it have used, in microseconds (cpu.stat)."""
    return counters(root.get(f"{group}/cpu.stat")).get("usage_usec")


def memory_used(root: Root, group: str) -> int | None:
    """Memory charged to a group, in bytes (memory.current)."""
    return root.get_int(f"{group}/memory.current")


def memory_limit(root: Root, group: str, name: str) -> int | float | None:
    """A protection (``min``, ``low``) or limit (``high``, ``max``, ``swap.max``) in bytes.

    Infinity for the kernel's ``max``; None where the group has no such file.
    """
    text = root.get(f"{group}/memory.{name}")
    return math.inf if text == "max" else integer(text)


def memory_events(root: Root, group: str) -> Mapping[str, int]:
    """How often a group's limits were reached and its protections broken (memory.events)."""
    return counters(root.get(f"{group}/memory.events"))


def memory_stat(root: Root, group: str) -> Mapping[str, int]:
    """What a group's memory is, in bytes, and what was done with it (memory.stat)."""
    return counters(root.get(f"{group}/memory.stat"))


def hands_down_protection(root: Root) -> bool:
    """Mount option memory_recursiveprot: protection that no child claims is handed down."""
    return any(
        each.kind == "cgroup2" and "memory_recursiveprot" in each.options for each in mounts(root)
    )


def processes_of(root: Root, group: str) -> tuple[int, ...]:
    """Ids of the processes in a group, without those of its children."""
    listed = (root.get(f"{group}/cgroup.procs") or "").split()
    return tuple(pid for pid in map(integer, listed) if pid is not None)


_MOST_BELOW = 256
"""Bound of groups below one: whoever has it can make as many as he likes."""


def processes_below(root: Root, group: str) -> Iterator[int]:
    """Ids of the processes in a group and in those below it, the nearest first."""
    groups = [group]
    for _ in range(_MOST_BELOW):
        if not groups:
            return
        one = groups.pop(0)
        yield from processes_of(root, one)
        groups += [
            f"{one}/{name}"
            for name in entries(root, one)
            if "." not in name or name.endswith((".service", ".scope", ".slice"))
        ]


_MOST_SLICES = 256
"""Bound of what is looked into for a unit: a user can make as many groups as he likes."""


def group_of_unit(root: Root, above: str, unit: str) -> str | None:
    """The group of a unit that is in ``above`` or in slices below it; None where it does not run.

    Of several the one that is nearest to the top.
    """
    groups = [above]
    for _ in range(_MOST_SLICES):
        if not groups:
            break
        group = groups.pop(0)
        names = entries(root, group)
        if unit in names:
            return f"{group}/{unit}"
        groups += [f"{group}/{name}" for name in names if name.endswith(".slice")]
    return None


def group_limit(root: Root) -> int | None:
    """memory.max of the group this whole system is in (a container), in bytes; None: no limit."""
    # In the real root group there is no such file: it stands for a control group namespace.
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        value = root.get_int(path)
        if value is not None and value < 1 << 60:  # v1 says "no limit" with a very large number
            return value
    return None


def group_of(root: Root, pid: int | str) -> str | None:
    """Path of a process's group below the mount; None where it has none, or is gone.

    Of the v2 hierarchy; on a hybrid one, where that is empty, of systemd's own (cgroups(7)).
    """
    found: dict[str, str] = {}
    for line in (root.get(f"/proc/{pid}/cgroup") or "").splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if path.startswith("/"):
            found[controllers if number != "0" else "v2"] = path
    unified = found.get("v2")
    return found.get("name=systemd", unified) if unified in (None, "/") else unified


_CONTAINER = re.compile(
    r"(?P<engine>libpod|docker|crio|cri-containerd|nerdctl)-(?P<id>[0-9a-f]{12})[0-9a-f]*"
)
_LXC = re.compile(r"/lxc(?:\.payload\.|\.payload/|/)(?P<name>[\w.-]{1,64})")
_UNIT = re.compile(r"[\w@:.\\-]{1,200}\.(?:service|scope)")


def owner_of(group: str | None) -> str | None:
    """Whom a group stands for: a container or a unit; None where the path names neither."""
    if not group:
        return None
    if found := _CONTAINER.search(group):
        engine = {"libpod": "podman"}.get(found["engine"], found["engine"])
        return f"{engine} container {found['id']}"
    if found := _LXC.search(group):
        return f"LXC container {found['name']}"
    units = [part for part in group.split("/") if _UNIT.fullmatch(part)]
    if not units:
        return None
    manager = next((part for part in units if part.startswith("user@")), None)
    own = [part for part in units if part not in (manager, "init.scope")]
    if manager and own:
        uid = manager.removeprefix("user@").removesuffix(".service")
        return f"{own[-1]} of user {uid}"
    return units[-1]
