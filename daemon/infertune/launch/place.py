# SPDX-License-Identifier: Apache-2.0
"""Put a process where the profile wants it: cgroup, CPUs, limits, priority.

A cgroup v2 group of its own where this process may make one (cgroup-v2.rst,
"Delegation"), and what the process itself can be given where not.  Each
setting yields an outcome; none of them stops the launch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import time
from collections.abc import Callable, Mapping
from typing import Literal

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.base.units import format_cpulist, parse_cpulist
from infertune.catalogue.launch_settings import LAUNCH_SETTINGS, LaunchSetting
from infertune.host.cgroup import (
    Cgroup,
    controllers,
    effective_cpus,
    entries,
    group_of,
    handed_down,
    memory_limit,
    processes_of,
)

_PREFIX = "infertune-"
"""Our groups are ``infertune-PID``, so that one left by a killed infertune can be told."""

_EMPTY_S = 2.0
"""How long a killed group may take to be empty."""


@dataclass(frozen=True, slots=True)
class Placed:
    """What became of one launch setting."""

    id: str
    wanted: str
    outcome: Literal["applied", "clamped", "absent", "rejected"]
    how: str | None
    """``cgroup cpuset.cpus``, ``affinity``; None where there was no way."""
    got: str | None = None
    why: str | None = None


class Unavailable(Exception):
    """This process may not have a group of its own, and why."""


@dataclass
class Group:
    """A cgroup we made for one child."""

    root: Root
    parent: str
    path: str
    enabled: tuple[str, ...]
    """Controllers that we switched on in the parent."""
    waiting_room: str | None
    """Where we moved ourselves, because a group with processes cannot hand out controllers."""

    def remove(self) -> None:
        """Kill what is left in it, remove it, and put the parent back as it was."""
        with contextlib.suppress(OSError):  # cgroup.kill came with Linux 5.14
            self.root.write_value(f"{self.path}/cgroup.kill", "1")
        end = time.monotonic() + _EMPTY_S
        while processes_of(self.root, self.path) and time.monotonic() < end:
            time.sleep(0.02)
        with contextlib.suppress(OSError):
            self.root.rmdir(self.path)
        _leave(self.root, self.parent, self.enabled, self.waiting_room)


def _leave(root: Root, parent: str, enabled: tuple[str, ...], waiting_room: str | None) -> None:
    with contextlib.suppress(OSError):
        if enabled:
            root.write_value(f"{parent}/cgroup.subtree_control", _signed("-", enabled))
        if waiting_room:
            us = os.getpid()
            for pid in (*(set(processes_of(root, waiting_room)) - {us}), us):
                root.write_value(f"{parent}/cgroup.procs", str(pid))
            root.rmdir(waiting_room)


def _signed(sign: str, controllers: tuple[str, ...]) -> str:
    return " ".join(sign + name for name in controllers)


def why_no_group(root: Root, cgroup: Cgroup, settings: Mapping[str, str]) -> str | None:
    """Why a process with these launch settings gets no group; None where it may get one."""
    try:
        parent, _ = _offered(root, cgroup, _controllers(settings))
    except Unavailable as reason:
        return str(reason)
    return None if root.writable(parent) else _why_not(OSError(errno.EACCES, ""))


def _controllers(settings: Mapping[str, str]) -> set[str]:
    entries = map(LAUNCH_SETTINGS.__getitem__, settings)
    return {entry.controller for entry in entries if entry.controller}


def _offered(root: Root, cgroup: Cgroup, wanted: set[str]) -> tuple[str, set[str]]:
    """Our own group, and which ``wanted`` controllers it is given.  Raises Unavailable."""
    if cgroup.mount is None or cgroup.version != 2:
        raise Unavailable("cgroup v2 is not what this system uses")
    own = group_of(root, "self")
    if own is None:
        raise Unavailable("this process is in no cgroup v2 group")
    parent = cgroup.mount + own.rstrip("/")
    offered = set(controllers(root, parent)) & wanted
    if not offered:
        raise Unavailable(f"this process's group is not given {', '.join(sorted(wanted))}")
    return parent, offered


def make_group(root: Root, cgroup: Cgroup, wanted: set[str], child: int) -> Group:
    """A group below our own with as many ``wanted`` controllers as may be had.

    Raises Unavailable with the reason.
    """
    parent, offered = _offered(root, cgroup, wanted)
    _remove_stale(root, parent)
    missing = tuple(sorted(offered - set(handed_down(root, parent))))
    waiting_room = None
    try:
        if missing:
            waiting_room = _enable(root, parent, missing, child)
        path = f"{parent}/{_PREFIX}{child}"
        root.mkdir(path)
    except OSError as error:
        _leave(root, parent, (), waiting_room)
        raise Unavailable(_why_not(error)) from None
    return Group(root, parent, path, missing, waiting_room)


def _enable(root: Root, parent: str, controllers: tuple[str, ...], child: int) -> str | None:
    """Switch controllers on for groups below ``parent``; the place we had to move to, if any."""
    request = _signed("+", controllers)
    control = f"{parent}/cgroup.subtree_control"
    try:
        root.write_value(control, request)
    except OSError as error:
        # Only the root group may have both processes and controllers to hand out.
        ours = {os.getpid(), child}
        if error.errno != errno.EBUSY or not set(processes_of(root, parent)) <= ours:
            raise
        waiting_room = f"{parent}/{_PREFIX}self"
        root.mkdir(waiting_room)
        try:
            for pid in sorted(ours):
                root.write_value(f"{waiting_room}/cgroup.procs", str(pid))
            root.write_value(control, request)
        except OSError:
            _leave(root, parent, (), waiting_room)
            raise
        return waiting_room
    return None


def _why_not(error: OSError) -> str:
    if error.errno == errno.EBUSY:
        return (
            "other processes share our group; start with: "
            "systemd-run --scope -p Delegate=yes infertune run ..."
        )
    return f"no group of its own may be made here ({os.strerror(error.errno or 0)})"


def _remove_stale(root: Root, parent: str) -> None:
    """Groups that a killed infertune left: ours by name, and empty."""
    for name in entries(root, parent):
        group = f"{parent}/{name}"
        if name.startswith(_PREFIX) and not processes_of(root, group):
            with contextlib.suppress(OSError):
                root.rmdir(group)


def place(
    root: Root, cgroup: Cgroup, pid: int, settings: Mapping[str, str], *, no_group: str = ""
) -> tuple[tuple[Placed, ...], Group | None]:
    """Give process ``pid`` the launch ``settings`` (canonical values by id).

    Meant for a process that has not reached its exec: memory is charged where it
    is first touched.  The group, where there is one, is the caller's to remove;
    ``no_group`` is why none is to be made.  Tunables are the environment's (heap.py).
    """
    known = ((LAUNCH_SETTINGS[name], wanted) for name, wanted in settings.items())
    entries = [(entry, wanted) for entry, wanted in known if not entry.tunable]
    # A partition is made of CPUs that the group has been given before.
    entries.sort(key=lambda pair: pair[0].id == "cpus_partition")
    controllers = _controllers(settings)
    group, why = None, no_group
    if controllers and not no_group:
        try:
            group = make_group(root, cgroup, controllers, pid)
        except Unavailable as reason:
            why = str(reason)
    outcomes = tuple(_place_one(root, group, why, pid, entry, value) for entry, value in entries)
    if group:
        try:
            root.write_value(f"{group.path}/cgroup.procs", str(pid))
        except OSError as error:
            group.remove()
            group, why = None, f"the process may not be moved ({os.strerror(error.errno or 0)})"
            outcomes = tuple(
                _place_one(root, None, why, pid, entry, value) for entry, value in entries
            )
    return outcomes, group


def _place_one(
    root: Root, group: Group | None, why: str, pid: int, entry: LaunchSetting, wanted: str
) -> Placed:
    if group and entry.cgroup_file and root.exists(f"{group.path}/{entry.cgroup_file}"):
        return _in_group(root, group, entry, wanted)
    if entry.process is None:
        why = why or f"the controller {entry.controller} is not given to this process's group"
        return Placed(entry.id, wanted, "absent", None, why=why)
    try:
        got = _GIVE[entry.process](root, pid, wanted)
    except OSError as error:
        return Placed(entry.id, wanted, "rejected", entry.process, why=_words(error))
    if got != wanted:
        return Placed(entry.id, wanted, "clamped", entry.process, got, "the kernel allows no more")
    return Placed(entry.id, wanted, "applied", entry.process, got)


def _in_group(root: Root, group: Group, entry: LaunchSetting, wanted: str) -> Placed:
    file = f"{group.path}/{entry.cgroup_file}"
    how = f"cgroup {entry.cgroup_file}"
    try:
        root.write_value(file, wanted)
        got = entry.value.decode(root.read_bytes(file))
    except OSError as error:
        return Placed(entry.id, wanted, "rejected", how, why=_words(error))
    if entry.id == "memory_min":
        return _protected(root, group, wanted, got, how)
    # The kernel counts memory in pages, and drops CPUs that are not there when it is read.
    if entry.id == "cpus" and (now := effective_cpus(root, group.path)):
        got = now
    same = got == wanted or (entry.id.startswith("memory") and _same_pages(got, wanted))
    return Placed(entry.id, wanted, "applied" if same else "clamped", how, got)


def _protected(root: Root, group: Group, wanted: str, got: str, how: str) -> Placed:
    """memory.min holds only as far as every group above grants it (cgroup-v2.rst)."""
    above, bound, by = group.parent, int(got), None
    while (limit := memory_limit(root, above, "min")) is not None:
        if limit < bound:
            bound, by = int(limit), above
        above = os.path.dirname(above)
    if by is None:
        return Placed("memory_min", wanted, "applied", how, got)
    why = f"{by} has memory.min {bound}, and a group gets no more than those above it"
    return Placed("memory_min", wanted, "clamped", how, str(bound), why)


def _same_pages(got: str, wanted: str) -> bool:
    page = resource.getpagesize()
    return got.isdecimal() and wanted.isdecimal() and int(got) // page == int(wanted) // page


def _words(error: OSError) -> str:
    return f"{errno.errorcode.get(error.errno or 0, '?')}: {os.strerror(error.errno or 0)}"


def _affinity(_root: Root, pid: int, wanted: str) -> str:
    os.sched_setaffinity(pid, parse_cpulist(wanted))
    return format_cpulist(os.sched_getaffinity(pid))


def _memlock(_root: Root, pid: int, wanted: str) -> str:
    limit = resource.RLIM_INFINITY if wanted == "unlimited" else int(wanted)
    _, hard = resource.prlimit(pid, resource.RLIMIT_MEMLOCK)
    try:
        resource.prlimit(pid, resource.RLIMIT_MEMLOCK, (limit, limit))
    except PermissionError:  # raising the hard limit takes CAP_SYS_RESOURCE
        resource.prlimit(pid, resource.RLIMIT_MEMLOCK, (hard, hard))
    soft, _ = resource.prlimit(pid, resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)


def oom_score_adj(root: Root, pid: int) -> int:
    """How willingly the kernel ends a process for memory (proc_pid_oom_score_adj(5)).

    Raises OSError where it is gone.
    """
    return int(root.read(f"/proc/{pid}/oom_score_adj"))


def set_oom_score_adj(root: Root, pid: int, value: int) -> None:
    """Raises OSError: EACCES where it may only be raised."""
    root.write_value(f"/proc/{pid}/oom_score_adj", str(value))


def nice(_root: Root, tid: int) -> int:
    """Nice value of a thread.  Raises OSError where it is gone."""
    return os.getpriority(os.PRIO_PROCESS, tid)


def set_nice(_root: Root, tid: int, value: int) -> None:
    """Raises OSError: EACCES where it may only be raised."""
    os.setpriority(os.PRIO_PROCESS, tid, value)


def _oom_score_adj(root: Root, pid: int, wanted: str) -> str:
    set_oom_score_adj(root, pid, int(wanted))
    return str(oom_score_adj(root, pid))


def _nice(root: Root, pid: int, wanted: str) -> str:
    set_nice(root, pid, int(wanted))
    return str(nice(root, pid))


def _scheduling_policy(_root: Root, pid: int, wanted: str) -> str:
    policy = POLICIES[wanted]
    priority = os.sched_get_priority_min(policy)
    os.sched_setscheduler(pid, policy, os.sched_param(priority))
    got = os.sched_getscheduler(pid)
    return next((name for name, number in POLICIES.items() if number == got), str(got))


POLICIES: Mapping[str, int] = {
    "other": os.SCHED_OTHER,
    "batch": os.SCHED_BATCH,
    "idle": os.SCHED_IDLE,
    "rr": os.SCHED_RR,
    "fifo": os.SCHED_FIFO,
}

_GIVE: Mapping[str, Callable[[Root, int, str], str]] = {
    "affinity": _affinity,
    "memlock": _memlock,
    "oom_score_adj": _oom_score_adj,
    "nice": _nice,
    "scheduling_policy": _scheduling_policy,
}
