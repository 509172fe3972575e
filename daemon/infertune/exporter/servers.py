# SPDX-License-Identifier: Apache-2.0
"""Model servers as the exporter sees them: their declarations, and their units' cgroups.

Nothing here needs a privilege.  A server is known by the name of its unit or declaration, never by
a process id: those would make a new series per restart.
"""

from __future__ import annotations

import re
import tomllib

from infertune.exporter.base import bounded
from infertune.host.cgroup import cgroup, entries, group_id, processes_of
from infertune.records import dataclass
from infertune.root import Root

SLICE = "infertune.slice"
DECLARATIONS = ("/etc/infertune/servers.d", "/run/infertune/servers.d")
"""What the admin says counts first."""

MAX_SERVERS = 64
"""Bound of the label ``server``.  A machine with one memory serves a handful."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_UNIT = re.compile(r"infertune-server@([a-z0-9][a-z0-9_-]{0,63})\.service")


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
    servers = [(name, match[1]) for name in names if (match := _UNIT.fullmatch(name))]
    return (
        Unit(SLICE, "", path),
        *(Unit(name, server, f"{path}/{name}") for name, server in bounded(servers, MAX_SERVERS)),
    )


def processes(root: Root) -> dict[int, str]:
    """Server by process id, for every process of a server's unit."""
    return {
        pid: unit.server
        for unit in units(root)
        if unit.server
        for pid in processes_of(root, unit.cgroup)
    }


def cgroup_ids(root: Root) -> dict[int, str]:
    """Server by cgroup id: what a probe sees."""
    found = {group_id(root, unit.cgroup): unit.server or unit.name for unit in units(root)}
    return {number: name for number, name in found.items() if number is not None}


def ports(root: Root) -> dict[str, int]:
    """Port by name, of every declared server; a declaration that is not valid has none."""
    found: dict[str, int] = {}
    for directory in DECLARATIONS:
        for file in root.names(directory):
            name = file.removesuffix(".toml")
            if name == file or not _NAME.fullmatch(name) or name in found:
                continue
            try:
                port = tomllib.loads(root.get(f"{directory}/{file}") or "").get("port")
            except (ValueError, RecursionError):  # also a number of 5000 digits, 5000 brackets
                continue
            if isinstance(port, int) and 0 < port < 65536:
                found[name] = port
    return dict(bounded(list(found.items()), MAX_SERVERS))
