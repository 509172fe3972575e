# SPDX-License-Identifier: Apache-2.0
"""Processes: who they are, and which memory of the GPU they hold."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from infertune.base.records import dataclass, field
from infertune.base.root import Root
from infertune.base.units import printable_line
from infertune.host.cgroup import group_of, owner_of
from infertune.host.memory import PAGE
from infertune.host.text import integer, pairs, sizes

MAX_PROCESSES = 4096
"""Bound of processes looked at."""
MAX_NAMES = 1000
"""Bound of processes whose names alone are asked for."""
MAX_DESCRIPTORS = 1024
"""Bound of descriptors of one process looked at."""
_NAME_LENGTH = 64

# Each begins with a plain text, which the search for it is fast with; a line break is put before.
_ADDRESS = re.compile(r"\ndrm-pdev:[ \t]*(\S+)")
_NUMBER = re.compile(r"\ndrm-client-id:[ \t]*(\S+)")
_MEASURED = re.compile(
    r"\ndrm-(engine|resident|memory)-([a-z0-9_-]{1,20}):"
    r"[ \t]*([0-9]{1,20}) ?(ns|KiB|MiB|GiB|)[ \t]*(?=\n|$)"
)
_EVICTED = re.compile(r"\namd-evicted-vram:[ \t]*([0-9]{1,20}) ?(KiB|MiB|GiB|)[ \t]*(?=\n|$)")
_BITS = re.compile(r"[0-9a-f]{1,16}")
_UNITS = {"": 1, "ns": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


@dataclass(frozen=True, slots=True)
class DrmClient:
    """One open DRM device of a process (Documentation/gpu/drm-usage-stats.rst)."""

    pci_address: str
    number: str
    """drm-client-id: one client may be open under several descriptors, and in several processes."""
    resident_bytes: Mapping[str, int] = field(default_factory=dict)
    """By region (``gtt``, ``vram``): memory that is there now."""
    engine_ns: Mapping[str, int] = field(default_factory=dict)
    evicted_vram_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    name: str
    """Its comm, at most 15 characters; those that are not printable are escaped."""
    owner: str | None
    """Unit or container it runs in; None where its group names neither."""


def pids(root: Root) -> tuple[int, ...]:
    """Every process that is shown, at most MAX_PROCESSES."""
    found = (int(name) for name in root.names("/proc") if name.isdecimal() and len(name) < 12)
    return tuple(sorted(found))[:MAX_PROCESSES]


def comm(root: Root, pid: int | str) -> str | None:
    """Name of a process, as the kernel cuts it: 15 characters."""
    return root.get(f"/proc/{pid}/comm") or None


def comms(root: Root) -> frozenset[str]:
    """Names of processes: of the MAX_NAMES with the lowest numbers, as services start early.

    It is most of what a verb reads, and somebody who starts thousands must not make it slow.
    """
    names = (root.get(f"/proc/{pid}/comm") for pid in pids(root)[:MAX_NAMES])
    return frozenset(name for name in names if name)


def process(root: Root, pid: int) -> Process:
    """A process by name and owner; one that is gone is called by its number."""
    # A program may call itself anything, with line breaks and what drives a terminal.
    name = printable_line(comm(root, pid) or f"process {pid}", _NAME_LENGTH)
    return Process(pid, name, owner_of(group_of(root, pid)))


def resident_bytes(root: Root, pid: int | str) -> int | None:
    """Memory of a process that is in RAM, pages of files among them (proc_pid_statm(5))."""
    fields = (root.get(f"/proc/{pid}/statm") or "").split()
    pages = integer(fields[1]) if len(fields) > 1 else None
    return None if pages is None else pages * PAGE


def _stat(root: Root, pid: int | str) -> list[str]:
    """Fields of /proc/PID/stat from the third on (the state); empty where it is gone."""
    # The name in parentheses may hold anything, also parentheses and spaces.
    return (root.get(f"/proc/{pid}/stat") or "").rpartition(")")[2].split()


def started_ticks(root: Root, pid: int | str) -> int | None:
    """When a process started, in clock ticks since boot: with its id, who it is (proc_pid_stat(5)).

    None where it is gone.
    """
    fields = _stat(root, pid)
    return integer(fields[19]) if len(fields) > 19 else None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used so far (proc_pid_stat(5))."""

    cpu_ticks: int
    """User and system, all threads."""
    major_faults: int
    """Pages that had to be read from a disk."""
    started: int
    """With the id, who it is."""


def usage(root: Root, pid: int | str) -> Usage | None:
    """CPU time and major faults of a process; None where it is gone."""
    fields = _stat(root, pid)
    values = [integer(fields[at]) for at in (11, 12, 9, 19)] if len(fields) > 19 else []
    known = [each for each in values if each is not None]
    if len(known) < 4:
        return None
    user, system, faults, started = known
    return Usage(user + system, faults, started)


def threads(root: Root, pid: int | str) -> list[int]:
    """Ids of the threads of a process; empty where it is gone."""
    return [tid for tid in map(integer, root.names(f"/proc/{pid}/task")) if tid is not None]


def user_of(root: Root, pid: int | str) -> int | None:
    """Real user id of a process (proc_pid_status(5)); None where it is gone or not shown."""
    # Not the owner of /proc/PID: that is root for a process that may not dump core.
    ids = pairs(root.get(f"/proc/{pid}/status"), ":").get("Uid", "").split()
    return integer(ids[0]) if ids else None


def arguments(root: Root, pid: int | str) -> tuple[str, ...]:
    """Words of a process's command line (proc_pid_cmdline(5)); empty where it is gone."""
    return tuple(filter(None, (root.get(f"/proc/{pid}/cmdline") or "").split("\0")))


def children(root: Root, pid: int | str) -> tuple[int, ...]:
    """Processes a process has started (CONFIG_PROC_CHILDREN); empty where it is not told."""
    listed = (root.get(f"/proc/{pid}/task/{pid}/children") or "").split()
    return tuple(child for child in map(integer, listed) if child is not None)


def uptime(root: Root) -> float | None:
    """Seconds since boot."""
    first = (root.get("/proc/uptime") or "").partition(" ")[0]
    try:
        return float(first)
    except ValueError:
        return None


def status(root: Root, task: int | str = "self") -> Mapping[str, str]:
    """Fields of /proc/PID/status.  Raises OSError."""
    return pairs(root.read(f"/proc/{task}/status"), ":")


def capability_sets(root: Root, task: int | str = "self") -> Mapping[str, int]:
    """Capabilities of a thread as bits, by set: CapInh, CapPrm, CapEff, CapBnd, CapAmb.

    Raises OSError (proc_pid_status(5)).
    """
    return {
        name: int(value, 16)
        for name, value in status(root, task).items()
        if name.startswith("Cap") and _BITS.fullmatch(value)
    }


def tasks(root: Root) -> list[str]:
    """Threads of this process.  Raises OSError."""
    return root.listed("/proc/self/task")


def rolled_up(root: Root, pid: int) -> Mapping[str, int]:
    """/proc/PID/smaps_rollup in bytes.  Raises OSError; it costs a walk of the page tables."""
    return sizes(root.read(f"/proc/{pid}/smaps_rollup"))


_FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""PROC_PID_INIT_INO (include/linux/proc_ns.h)."""


def sees_all_processes(root: Root) -> bool:
    """Whether this process is in the kernel's own PID namespace, and no container's."""
    return root.readlink("/proc/self/ns/pid") in (None, _FIRST_PID_NAMESPACE)


def drm_clients(root: Root, pid: int) -> Iterator[DrmClient]:
    """The DRM devices a process has open.  Raises PermissionError where it may not be looked at."""
    for number in descriptors(root, pid)[:MAX_DESCRIPTORS]:
        if client := drm_client(root, pid, number):
            yield client


def descriptors(root: Root, pid: int) -> list[int]:
    """Numbers of a process's open files, lowest first; empty where it has ended.

    Raises PermissionError where it may not be looked at.
    """
    try:
        names = root.listed(f"/proc/{pid}/fdinfo")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return sorted(number for number in map(integer, names) if number is not None)


def drm_client(root: Root, pid: int, descriptor: int) -> DrmClient | None:
    """The DRM device behind a descriptor; None for other files, and where it has been closed.

    Raises PermissionError where the process may not be looked at.
    """
    try:
        text = root.read(f"/proc/{pid}/fdinfo/{descriptor}")
    except PermissionError:
        raise
    except OSError:
        return None
    return _client(text) if "drm-client-id:" in text else None


def _client(text: str) -> DrmClient:
    text = f"\n{text}"
    address, number, evicted = (each.search(text) for each in (_ADDRESS, _NUMBER, _EVICTED))
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for kind, name, value, unit in _MEASURED.findall(text):
        # Time is in ns and memory never is; drm-engine-capacity-NAME is neither.
        if (kind == "engine") == (unit == "ns"):
            found[kind][name] = int(value) * _UNITS[unit]
    return DrmClient(
        pci_address=address[1] if address else "",
        number=number[1] if number else "",
        # drm-memory is the name before Linux 6.13; newer drivers print both.
        resident_bytes={**found["memory"], **found["resident"]},
        engine_ns=found["engine"],
        evicted_vram_bytes=int(evicted[1]) * _UNITS[evicted[2]] if evicted else None,
    )


def open_file(root: Root, pid: int, descriptor: int) -> str | None:
    """What is behind a descriptor: a path, or ``socket:[4711]``; None where that is not told."""
    return root.readlink(f"/proc/{pid}/fd/{descriptor}")


def opens_gpu(root: Root, pid: int) -> bool | None:
    """Whether a process has a DRM or KFD device open; None where it may not be looked at."""
    try:
        names = root.listed(f"/proc/{pid}/fd")
    except OSError:
        return None
    links = (root.readlink(f"/proc/{pid}/fd/{each}") for each in names[:MAX_DESCRIPTORS])
    return any(link and link.startswith(("/dev/dri/", "/dev/kfd")) for link in links)
