# SPDX-License-Identifier: Apache-2.0
"""Which kind of container this system is, if it is one."""

from __future__ import annotations

import re

from infertune.base.root import Root


def container_kind(root: Root) -> str | None:
    """``lxc``, ``podman``, ``docker``, ``toolbox`` or another word of its manager's; None: none.

    /run/systemd/container: systemd's Container Interface, written from the variable ``container``.
    The other marks are left by toolbox, podman and docker themselves.
    """
    if root.exists("/run/.toolboxenv"):
        return "toolbox"
    word = root.get("/run/systemd/container") or ""
    if re.fullmatch(r"[a-z][a-z-]{1,30}", word):
        return word
    if root.exists("/run/.containerenv"):
        return "podman"
    if root.exists("/.dockerenv"):
        return "docker"
    return None
