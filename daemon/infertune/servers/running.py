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
from infertune.host.cgroup import cgroup, entries, group_id, processes_of
from infertune.servers.adopted import read_book


@dataclass(frozen=True, slots=True)
class Unit:
    """The slice, or one server's unit in it."""

    name: str
    """As systemd has it: ``infertune.slice``, ``infertune-server@gemma.service``."""
    server: str
    """Name of the server; empty for the slice."""
    cgroup: str


def units(root: Root) -> tuple[Unit, ...]:
    """The slice and the units in it, then what is adopted; empty where no server is a unit."""
    mount = cgroup(root).mount
    if not mount:
        return ()
    return (*_own(root, f"{mount}/{SLICE}"), *_adopted(root, mount))


def _own(root: Root, path: str) -> Iterator[Unit]:
    if names := entries(root, path):
        yield Unit(SLICE, "", path)
    for name in names:
        if server := server_of_unit(name):
            yield Unit(name, server, f"{path}/{name}")


def _adopted(root: Root, mount: str) -> Iterator[Unit]:
    with contextlib.suppress(Failed):  # the daemon says what is wrong with it
        for name, each in read_book(root).units.items():
            path = f"{mount}{each.group}"
            if each.group and ".." not in each.group and entries(root, path):
                yield Unit(each.unit.unit, name, path)


def places(root: Root) -> list[str]:
    """Directories in which control groups of servers come and go; empty without cgroup v2."""
    mount = cgroup(root).mount
    if not mount:
        return []
    found = [mount, f"{mount}/{SLICE}"]
    with contextlib.suppress(Failed):
        groups = [each.group for each in read_book(root).units.values()]
        found += [f"{mount}{each}".rpartition("/")[0] for each in groups if ".." not in each]
    return list(dict.fromkeys(found))


def processes(root: Root, units: Iterable[Unit]) -> dict[int, str]:
    """Server by process id, for every process of a server's unit."""
    return {
        pid: unit.server for unit in units if unit.server for pid in processes_of(root, unit.cgroup)
    }


def cgroup_ids(root: Root, units: Iterable[Unit]) -> dict[int, str]:
    """Server by the id of its unit's control group."""
    found = {group_id(root, unit.cgroup): unit.server for unit in units if unit.server}
    return {number: name for number, name in found.items() if number is not None}
