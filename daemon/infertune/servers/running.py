# SPDX-License-Identifier: Apache-2.0
"""What of the servers runs: their units' control groups and processes.

Nothing here needs a privilege.  A server is known by the name of its unit or declaration, never by
a process id: those would make a new series per restart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from infertune.base.errors import Failed
from infertune.base.names import SLICE, server_of_unit
from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.host.cgroup import cgroup, entries, group_id, group_of_unit, processes_below
from infertune.servers.adopted import Adopted, read_book
from infertune.servers.foreground import foreground

RUN = "infertune run"
"""What a server in the foreground has for a unit."""


@dataclass(frozen=True, slots=True)
class Unit:
    """The slice, or the control group of one server."""

    name: str
    """As systemd has it: ``infertune.slice``, ``infertune-server@gemma.service``; or RUN."""
    server: str
    """Name of the server; empty for the slice."""
    cgroup: str


def units(root: Root) -> tuple[Unit, ...]:
    """The slice and the units in it, then what is adopted, then what runs in the foreground.

    Empty where no server has a group of its own.
    """
    mount = cgroup(root).mount
    if not mount:
        return ()
    return (*_own(root, f"{mount}/{SLICE}"), *_adopted(root, mount), *_foreground(root))


def _foreground(root: Root) -> Iterator[Unit]:
    for each in foreground(root):
        if each.own:
            yield Unit(RUN, each.name, each.group)


def _own(root: Root, path: str) -> Iterator[Unit]:
    if names := entries(root, path):
        yield Unit(SLICE, "", path)
    for name in names:
        if server := server_of_unit(name):
            yield Unit(name, server, f"{path}/{name}")


def _adopted(root: Root, mount: str) -> Iterator[Unit]:
    with contextlib.suppress(Failed):  # the daemon says what is wrong with it
        for name, each in read_book(root).units.items():
            if path := _group_of_adopted(root, mount, each):
                yield Unit(each.unit.unit, name, path)


def group_of_adopted(root: Root, adopted: Adopted) -> str | None:
    """The control group of an adopted unit; None where it does not run."""
    mount = cgroup(root).mount
    return _group_of_adopted(root, mount, adopted) if mount else None


def _group_of_adopted(root: Root, mount: str, adopted: Adopted) -> str | None:
    if not adopted.group or ".." in adopted.group:
        return None
    path = f"{mount}{adopted.group}"
    if adopted.user is not None:
        return group_of_unit(root, path, adopted.unit.unit)
    return path if entries(root, path) else None


def places(root: Root) -> list[str]:
    """Directories in which control groups of servers come and go; empty without cgroup v2."""
    mount = cgroup(root).mount
    if not mount:
        return []
    found = [mount, f"{mount}/{SLICE}"]
    with contextlib.suppress(Failed):
        for each in read_book(root).units.values():
            if each.user is not None:
                # He may log in, his manager has app.slice, and what is in that is his.
                own = f"{mount}{each.group}"
                found += [f"{mount}/user.slice", own.rpartition("/")[0], own, f"{own}/app.slice"]
                if now := _group_of_adopted(root, mount, each):
                    found.append(now.rpartition("/")[0])
            elif ".." not in each.group:
                found.append(f"{mount}{each.group}".rpartition("/")[0])
    return list(dict.fromkeys(found))


def processes(root: Root, units: Iterable[Unit]) -> dict[int, str]:
    """Server by process id, for every process of a server's unit; a container's are below it."""
    return {
        pid: unit.server
        for unit in units
        if unit.server
        for pid in processes_below(root, unit.cgroup)
    }


def cgroup_ids(root: Root, units: Iterable[Unit]) -> dict[int, str]:
    """Server by the id of its unit's control group."""
    found = {group_id(root, unit.cgroup): unit.server for unit in units if unit.server}
    return {number: name for number, name in found.items() if number is not None}
