# SPDX-License-Identifier: Apache-2.0
"""How much of each server's memory is in huge pages, resident, locked or swapped.

The kernel walks the server's page tables for it, under its mmap lock: milliseconds per GiB of
4 KiB pages.  So it is read twice a minute at most, whatever the scrape interval.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from infertune.base.root import Root
from infertune.exporter.base import Absent, Collector, Metric, Sample
from infertune.exporter.servers import processes
from infertune.host.processes import rolled_up

PARTS = {
    "resident": "Rss",
    "anonymous_huge": "AnonHugePages",
    "file_huge": "FilePmdMapped",
    "shared_huge": "ShmemPmdMapped",
    "locked": "Locked",
    "swapped": "Swap",
}

METRICS = (
    Metric(
        name="infertune_server_memory_bytes",
        unit="bytes",
        help="Memory mapped by the server's processes, by part; parts overlap.",
        labels=("server", "part"),
        source="Documentation/filesystems/proc.rst, /proc/PID/smaps_rollup",
        series=f"{len(PARTS)} per server",
    ),
)


def read(root: Root) -> Iterable[Sample]:
    """Sums per server.  Raises Absent without a server, OSError where none could be read."""
    servers = processes(root)
    if not servers:
        raise Absent("no server runs as a unit in infertune.slice")
    sums: dict[tuple[str, str], int] = defaultdict(int)
    refused: OSError | None = None
    for pid, server in servers.items():
        try:
            found = rolled_up(root, pid)
        except PermissionError as error:
            refused = error
            continue
        except OSError:
            continue  # it ended in between (ESRCH, ENOENT)
        for part, key in PARTS.items():
            if key in found:
                sums[server, part] += found[key]
    if refused and not sums:
        raise refused
    for (server, part), value in sorted(sums.items()):
        yield Sample("infertune_server_memory_bytes", (server, part), value)


SMAPS = Collector(
    id="smaps",
    summary="Huge, locked and swapped memory of each server.",
    metrics=METRICS,
    read=read,
    timeout_s=3.0,
    max_age_s=30.0,
)
