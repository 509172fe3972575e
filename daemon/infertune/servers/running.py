# SPDX-License-Identifier: Apache-2.0
"""What of the servers runs: their units' control groups and processes.

Nothing here needs a privilege.  A server is known by the name of its unit or declaration, never by
a process id: those would make a new series per restart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from infertune.host.cgroup import cgroup, entries, group_id, processes_of
from infertune.names import SLICE, server_of_unit
from infertune.root import Root


@dataclass(frozen=True, slots=True)
class Unit:
    """The slice, or one server's unit in it."""

    name: str
    """As systemd has it: ``infertune.slice``, ``infertune-server@gemma.service``."""
    server: str
    """Name of the server; empty for the slice."""
    cgroup: str


def units(root: Root) -> tuple[Unit, ...]:
    """The slice and the units in it; empty where no server runs as a unit."""
    mount = cgroup(root).mount
    path = f"{mount}/{SLICE}"
    names = entries(root, path) if mount else []
    if not names:
        return ()
    servers = [(name, server) for name in names if (server := server_of_unit(name))]
    return (
        Unit(SLICE, "", path),
        *(Unit(name, server, f"{path}/{name}") for name, server in servers),
    )


def processes(root: Root, units: Iterable[Unit]) -> dict[int, str]:
    """Server by process id, for every process of a server's unit."""
    return {
        pid: unit.server for unit in units if unit.server for pid in processes_of(root, unit.cgroup)
    }


def cgroup_ids(root: Root, units: Iterable[Unit]) -> dict[int, str]:
    """Server by cgroup id: what a probe sees."""
    found = {group_id(root, unit.cgroup): unit.server or unit.name for unit in units}
    return {number: name for number, name in found.items() if number is not None}
