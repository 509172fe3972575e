# SPDX-License-Identifier: Apache-2.0
"""What servers that are still loading were promised.

An engine takes a minute to allocate what it needs.  Until then its need is a *reservation*: a
small file with the process it belongs to.  What of it the process has taken counts as held, the
rest as promised; so two starts at once are never admitted for the same room.  A reservation ends
by itself: with its process, or when an engine has had time enough to load the largest model.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

from infertune.base.names import server_of_unit
from infertune.base.records import asdict, dataclass, replace
from infertune.base.root import Root
from infertune.base.units import printable_line
from infertune.host.cgroup import group_of, owner_of
from infertune.host.memory import meminfo
from infertune.host.processes import children, resident_bytes, started_ticks, uptime, user_of
from infertune.host.unknown import Unknown
from infertune.pools.facts import Holder, PoolFacts
from infertune.pools.judge import gpu_pool

LOCK = "/run/infertune/admission.lock"
"""Whoever holds it judges a start.  Root's; a server's unit gets it as its standard input."""
OF_ROOT, OF_UNITS = "/run/infertune/admission", "/run/infertune-server/admission"
"""Reservations of root's own starts, and of the units' user."""

_MAX_FILES = 64
_MOST_SWEPT = 1000
_MAX_BYTES = 4096
_MOST = 1 << 62
"""Of each number in a file: far more than any machine has, and still a number to reckon with."""
_NOBODY = 65534
_LASTS_S = 900.0
"""120 GiB at 200 MB/s are loaded in ten minutes."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a server that is loading was promised; bytes."""

    name: str
    pid: int
    started_ticks: int
    """When the process started: with its id, which one it is."""
    since: float
    """Seconds since boot."""
    gpu: int
    host: int

    @property
    def who(self) -> str:
        return f"server '{self.name}' (pid {self.pid})"


def reservations(root: Root) -> tuple[Reservation, ...]:
    """Those of processes that live, and are not too old.  Never raises."""
    found = (
        _valid(root, f"{directory}/{name}")
        for directory in (OF_ROOT, OF_UNITS)
        for name in root.names(directory)[:_MAX_FILES]
        if name.endswith(".json")
    )
    return tuple(one for one in found if one)


def _valid(root: Root, path: str) -> Reservation | None:
    """The reservation in a file, if it still counts.

    The units' user may write anything there, links to devices among it, and root reads it: a
    server that was taken over must not speak for others' processes.
    """
    try:
        data, status = root.read_file(path, _MAX_BYTES)
        one = _reservation(json.loads(data))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None  # half written, or of another version
    age = (uptime(root) or 0.0) - one.since
    # A unit's user sees no process of root's (ProtectProc=): those are believed until they are old.
    hidden = path.startswith(f"{OF_ROOT}/") and started_ticks(root, 1) is None
    lives = started_ticks(root, one.pid) == one.started_ticks
    own = _is_its_owner(root, one.pid, status.st_uid)
    return one if ((lives and own) or hidden) and 0 <= age < _LASTS_S else None


def _is_its_owner(root: Root, pid: int, uid: int) -> bool:
    """Whether a file with this owner speaks for a process: that user's, or a server's.

    The directory of the units is mapped to their user in their units alone; elsewhere its files
    are nobody's (seen with systemd 257).
    """
    owner = owner_of(group_of(root, pid)) or ""
    return uid == user_of(root, pid) or (uid == _NOBODY and server_of_unit(owner) is not None)


def _reservation(known: Any) -> Reservation:
    """Raises ValueError, KeyError, TypeError or OverflowError."""
    pid, ticks, gpu, host = (_count(known[key]) for key in ("pid", "started_ticks", "gpu", "host"))
    name = printable_line(str(known["name"]), 64)
    return Reservation(name, pid, ticks, float(known["since"]), gpu, host)


def _count(number: object) -> int:
    if type(number) is not int or not 0 <= number <= _MOST:
        raise ValueError("not a number of anything")
    return number


def with_reservations(
    root: Root, facts: PoolFacts, backend: str, *, without: int | None = None
) -> PoolFacts:
    """The facts with what servers that are still loading were promised, and what is left by now.

    ``without``: a process whose own promise does not count (it asks again).
    """
    pool = gpu_pool(facts, backend if backend != "cpu" else "vulkan")
    in_ram = not isinstance(pool, Unknown) and pool.in_ram
    holders = {each.pid: each for each in facts.holders}
    promised = [each for each in reservations(root) if each.pid != without]
    gpu = host = 0
    for one in promised:
        family = {one.pid, *children(root, one.pid)}
        taken = sum(_held(holders.get(pid)) for pid in family)
        resident = sum(resident_bytes(root, pid) or 0 for pid in family)
        left = max(0, one.gpu - taken)
        gpu += left
        host += max(0, one.host - resident) + (left if in_ram else 0)
    return replace(
        facts,
        # Read last: what an engine takes between the two readings is counted twice, not never.
        available=meminfo(root).get("MemAvailable"),
        reserved=gpu,
        reserved_ram=host,
        loading=tuple(each.who for each in promised),
    )


def _held(holder: Holder | None) -> int:
    return holder.gtt_bytes + holder.vram_bytes if holder else 0


def reserve(root: Root, directory: str, name: str, pid: int, *, gpu: int, host: int) -> str | None:
    """Promise a process so many bytes; the file, or None where it could not be written."""
    ticks, now = started_ticks(root, pid), uptime(root)
    if ticks is None or now is None:
        return None
    one = Reservation(name, pid, ticks, now, gpu, host)
    path = f"{directory}/{name}.json"
    try:
        root.mkdir(directory)
        sweep(root, directory)
        root.replace(path, json.dumps(asdict(one)).encode())
    except OSError:
        # Without root, or on a full /run: the start goes on without a promise, nor half of one.
        with contextlib.suppress(OSError):
            root.unlink(path)
        return None
    return path


def sweep(root: Root, directory: str) -> None:
    """Remove what processes that are gone have left."""
    for name in root.names(directory)[:_MOST_SWEPT]:
        path = f"{directory}/{name}"
        if _valid(root, path) is None:
            # One odd entry, such as a directory, is not to cost anybody a promise.
            with contextlib.suppress(OSError):
                root.unlink(path)
