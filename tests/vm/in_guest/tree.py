# SPDX-License-Identifier: Apache-2.0
"""Runs in a guest: prints as JSON what /etc holds, and what can be set below /proc/sys and /sys.

Of the kernel's files those that somebody may write: the others count, or say what is there.
"""

import hashlib
import json
import os
from collections.abc import Iterator

# What is large, or changes with what a machine does and not with what it is told.
SKIPPED = ("/sys/kernel/debug", "/sys/kernel/tracing", "/sys/kernel/slab", "/sys/kernel/btf",
           "/sys/fs/cgroup", "/sys/kernel/security", "/sys/firmware/acpi/tables",
           "/sys/power/wakeup_count")  # fmt: skip
MOVING = ("/byte_queue_limits/", "/virtual/bdi/")
"""The kernel sets these by what it has seen."""


def files(top: str) -> Iterator[str]:
    for directory, names, found in os.walk(top):
        names[:] = [n for n in names if not f"{directory}/{n}".startswith(SKIPPED)]
        for name in found:
            path = f"{directory}/{name}"
            if path.startswith(SKIPPED) or any(each in path for each in MOVING):
                continue
            if top == "/etc" or (not os.path.islink(path) and os.lstat(path).st_mode & 0o222):
                yield path


def hold(path: str) -> str | None:
    try:
        status = os.lstat(path)
        if os.path.islink(path):
            return f"-> {os.readlink(path)}"
        about = f"{status.st_mode:o} {status.st_uid}:{status.st_gid}"
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            data = os.read(fd, 65536)
        finally:
            os.close(fd)
    except OSError as error:
        return f"errno {error.errno}"
    digest = hashlib.sha256(data).hexdigest()[:16]
    return f"{about} {digest if len(data) > 80 else data!r}"


def everything() -> dict[str, str | None]:
    found = {path: hold(path) for top in ("/etc", "/proc/sys", "/sys") for path in files(top)}
    for directory, _, names in os.walk("/sys/fs/cgroup"):
        if directory.count("/") <= 4:
            for name in names:
                if name.endswith((".min", ".low", ".max", ".high", ".cpus", ".partition")):
                    found[f"{directory}/{name}"] = hold(f"{directory}/{name}")
    return found


print(json.dumps(everything()))
