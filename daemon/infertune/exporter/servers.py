# SPDX-License-Identifier: Apache-2.0
"""The servers that the exporter tells of: at most so many, whatever is declared or runs."""

from __future__ import annotations

from infertune.base.addresses import LOOPBACK
from infertune.base.root import Root
from infertune.exporter.base import bounded
from infertune.servers import running
from infertune.servers.running import Unit
from infertune.servers.store import declared_ports

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


def ports(root: Root) -> dict[str, int]:
    """Port by name of every declared server that loopback leads to.

    The exporter's unit reaches no other address, and it has no key: whoever took the port of a
    server that is down would be given it.
    """
    return dict(bounded(list(declared_ports(root, at=LOOPBACK).items()), MAX_SERVERS))
