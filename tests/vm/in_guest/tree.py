# SPDX-License-Identifier: Apache-2.0
"""Runs in a guest: prints as JSON what /etc, /proc/sys, /sys and the groups hold, but counters.

A file that differs between two readings, a second apart, is a counter or a clock.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator

# What is large, or changes with what a machine does and not with what it is told.
SKIPPED = ("/sys/kernel/debug", "/sys/kernel/tracing", "/sys/kernel/slab", "/sys/kernel/btf",
           "/sys/fs/cgroup", "/sys/kernel/security", "/sys/firmware/acpi/tables",
           "/sys/power/wakeup_count")  # fmt: skip
ENDINGS = ("/uevent", "/stat", "/statistics", "/trace", "/tstamp")


def files(top: str) -> Iterator[str]:
    for directory, names, found in os.walk(top):
        names[:] = [n for n in names if not f"{directory}/{n}".startswith(SKIPPED)]
        for name in found:
            path = f"{directory}/{name}"
            if not path.startswith(SKIPPED) and not path.endswith(ENDINGS):
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


first = everything()
time.sleep(1)
second = everything()
print(json.dumps({path: text for path, text in second.items() if first.get(path) == text}))
