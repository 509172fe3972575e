# SPDX-License-Identifier: Apache-2.0
"""Device nodes of the GPU: whose they are, and whether this process may use them."""

from __future__ import annotations

import grp
import pwd
import stat

from infertune.base.records import dataclass
from infertune.base.root import Root

_NOBODY = 65534
_FIRST_PERSON = 1000
"""UIDs below belong to the system (login.defs(5)), and so do their names."""


@dataclass(frozen=True, slots=True)
class Node:
    usable: bool
    """Whether the caller may open it for writing."""
    owner: str | None = None
    """Name, or number where it has none or is a person's; None where nobody noted it."""
    group: str | None = None
    mode: int | None = None
    """Permission bits."""

    @property
    def owners(self) -> str:
        """As ls(1) shows it: ``root:render, mode 0660``.  Empty where it is not known."""
        if self.owner is None or self.group is None or self.mode is None:
            return ""
        return f"{self.owner}:{self.group}, mode {self.mode:04o}"


def gpu_nodes(root: Root) -> dict[str, Node]:
    """KFD's node and the render nodes, by path; those that do not exist are left out."""
    paths = ["/dev/kfd", *root.glob("/dev/dri/renderD*")]
    return {path: node for path in paths if (node := _read_node(root, path))}


def _read_node(root: Root, path: str) -> Node | None:
    try:
        status = root.at(path).stat()
    except OSError:
        return None
    return Node(
        usable=root.writable(path),
        owner=_user(root, status.st_uid),
        group=_group(root, status.st_gid),
        mode=stat.S_IMODE(status.st_mode),
    )


def _user(root: Root, uid: int) -> str:
    if not root.live or _FIRST_PERSON <= uid < _NOBODY:
        return str(uid)
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(root: Root, gid: int) -> str:
    if not root.live or _FIRST_PERSON <= gid < _NOBODY:
        return str(gid)
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
