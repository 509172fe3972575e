# SPDX-License-Identifier: Apache-2.0
"""What is mounted: /proc/self/mounts (fstab(5))."""

from __future__ import annotations

import os

from infertune.base.records import dataclass
from infertune.base.root import Root


@dataclass(frozen=True, slots=True)
class Mount:
    device: str
    path: str
    kind: str
    options: tuple[str, ...]


def mounts(root: Root) -> tuple[Mount, ...]:
    """Every mount this process sees, in order; lines that are none are passed over."""
    rows = [line.split() for line in (root.get("/proc/self/mounts") or "").splitlines()]
    return tuple(
        Mount(row[0], row[1], row[2], tuple(row[3].split(","))) for row in rows if len(row) > 3
    )


def mounted(root: Root, path: str) -> Mount | None:
    """The mount that a path lies on; None where that is not known."""
    places = {mount.path: mount for mount in mounts(root)}
    while path != "/" and path not in places:
        path = os.path.dirname(path)
    return places.get(path)
