# SPDX-License-Identifier: Apache-2.0
"""The servers that the exporter tells of: at most so many, whatever is declared or runs."""

from __future__ import annotations

from collections.abc import Iterable

from infertune.base.addresses import LOOPBACK, reached_at
from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.exporter.base import bounded
from infertune.host.processes import arguments
from infertune.host.servers import unit_engine
from infertune.servers import running
from infertune.servers.declaration import Declaration, Foreign
from infertune.servers.engines import ENGINES, engine_titled
from infertune.servers.engines.base import Engine, Known
from infertune.servers.engines.llama_server import LLAMA_SERVER
from infertune.servers.foreground import foreground
from infertune.servers.running import Unit
from infertune.servers.store import declarations

MAX_SERVERS = 64
"""Bound of the label ``server``.  A machine with one memory serves a handful."""


def units(root: Root) -> tuple[Unit, ...]:
    """The slice and the servers' units; empty where no server runs as a unit."""
    found = running.units(root)
    slices = [each for each in found if not each.server]
    return (*slices, *bounded([each for each in found if each.server], MAX_SERVERS))


def processes(root: Root) -> dict[int, str]:
    """Server by process id."""
    return running.processes(root, units(root))


def cgroup_ids(root: Root) -> dict[int, str]:
    """Server by cgroup id: what a probe sees, and what is below it."""
    return running.cgroup_ids(root, units(root))


@dataclass(frozen=True, slots=True)
class Asked:
    """A declared server that answers somewhere."""

    port: int
    engine: Engine | None
    """None: not known, so that it is not known either what a question would do to it."""
    known: Known = Known()


def asked(root: Root) -> dict[str, Asked]:
    """Every server that loopback leads to, declared or in the foreground, by name.

    A declaration that is not valid is left out.

    The exporter's unit reaches no other address, and it has no key: whoever took the port of a
    server that is down would be given it.
    """
    found = [
        (name, each)
        for name, each in declarations(root).items()
        if each.port is not None and _is_reached(each)
    ]
    chosen = dict(bounded(found, MAX_SERVERS))
    own = [unit for unit in units(root) if isinstance(chosen.get(unit.server), Declaration)]
    awake = _told_nothing_of_sleep(root, own)
    declared = {
        name: Asked(each.port or 0, _engine(root, each), Known(never_sleeps=name in awake))
        for name, each in chosen.items()
    }
    # Whose port is known there is llama-server; of its settings nothing is.
    runs = {each.name: Asked(each.port, LLAMA_SERVER) for each in foreground(root) if each.port}
    return dict(bounded(list({**declared, **runs}.items()), MAX_SERVERS))


def _is_reached(declared: Declaration | Foreign) -> bool:
    return isinstance(declared, Foreign) or reached_at(declared.host) == LOOPBACK


def _engine(root: Root, declared: Declaration | Foreign) -> Engine | None:
    if declared.engine is not None:
        return ENGINES[declared.engine]
    return engine_titled(unit_engine(root, declared.unit))


def _told_nothing_of_sleep(root: Root, own: Iterable[Unit]) -> set[str]:
    """Our servers whose command lines are seen and do not have them sleep.

    Ours get no variables that could (launch_settings.py); those of others may.
    """
    words: dict[str, set[str]] = {}
    for pid, server in running.processes(root, own).items():
        words.setdefault(server, set()).update(arguments(root, pid))
    return {server for server, said in words.items() if said and _SLEEP not in said}


_SLEEP = "--sleep-idle-seconds"
