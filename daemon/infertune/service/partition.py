# SPDX-License-Identifier: Apache-2.0
"""Gives infertune.slice its CPUs for itself.  Runs as root before a server that asks for it.

systemd has no setting for a cpuset partition.  The slice is a child of the root
group, which is always a partition root, so nothing above it has to change
(cgroup-v2.rst, cpuset.cpus.partition); it ends when the slice ends.
"""

from __future__ import annotations

import sys

from infertune.base.errors import Exit
from infertune.base.names import SLICE
from infertune.base.root import Root
from infertune.catalogue.launch_settings import LAUNCH_SETTINGS
from infertune.host.machine import read_machine

_FILE = LAUNCH_SETTINGS["cpus_partition"].cgroup_file


def make_partition(root: Root, mount: str, wanted: str) -> str | None:
    """Make the slice a partition; returns why not, with the slice an ordinary member then."""
    path = f"{mount}/{SLICE}/{_FILE}"
    try:
        root.write_value(path, wanted)
        # "isolated invalid (reason)" where the kernel took the word and cannot do it.
        got = root.read(path)
        if got == wanted:
            return None
        root.write_value(path, "member")
    except OSError as error:
        return f"{path}: {error.strerror}"
    return f"{path}: the kernel made it '{got}'"


def main() -> int:
    """``partition isolated|root``.  A server without one is better than no server."""
    wanted = sys.argv[1:]
    if len(wanted) != 1 or wanted[0] not in ("root", "isolated"):
        print("partition: takes 'root' or 'isolated'", file=sys.stderr)
        return Exit.USAGE
    root = Root("/")
    cgroup = read_machine(root).cgroup
    if cgroup.version != 2 or cgroup.mount is None:
        print("<4>cpus_partition: absent: cgroup v2 is not what this system uses")
        return Exit.DONE
    why = make_partition(root, cgroup.mount, wanted[0])
    print(f"<4>cpus_partition: clamped: {why}" if why else f"cpus_partition: {wanted[0]}")
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(main())
