# SPDX-License-Identifier: Apache-2.0
"""Neighbours that take what a server needs, while it is measured: ours, and gone afterwards.

They are one process group, in a control group of its own where one may be made, and end with
infertune however it ends.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping

from infertune.base.root import Root
from infertune.host.cgroup import Cgroup
from infertune.launch.place import place
from infertune.launch.process import environment, start

FEWEST = 2
"""Busy neighbours, on a machine with one CPU; on others as many as it has CPUs."""

_BUSY = """
import os, sys
first = os.getpid()
for _ in range(int(sys.argv[1]) - 1):
    if not os.fork():
        break
# A neighbour that outlived the first, which dies with infertune, would be in everybody's way.
while first in (os.getpid(), os.getppid()):
    for _ in range(1000000):
        pass
"""
_WEIGHT = {"cpu_weight": "100"}
"""The kernel's default: neighbours of a server are other groups, with the same right to CPUs."""


@contextlib.contextmanager
def busy_neighbours(root: Root, cgroup: Cgroup, caller: Mapping[str, str]) -> Iterator[int]:
    """Busy loops until the block ends; gives the id of their process group.

    Nothing that was started after them may outlive the block (process.py adopts what a child
    leaves behind).  Raises Failed where they cannot be started.
    """
    count = max(FEWEST, os.cpu_count() or 1)
    argv = (sys.executable, "-I", "-S", "-c", _BUSY, str(count))
    groups = []

    def settle(pid: int) -> None:
        groups.append(place(root, cgroup, pid, _WEIGHT)[1])

    child = start(argv, environment({}, caller), settle, capture=True)
    try:
        yield child.pid
    finally:
        child.stop(0.0)
        for group in groups:
            if group is not None:
                group.remove()
