# SPDX-License-Identifier: Apache-2.0
"""DRM clients of the model servers: engine time and memory, from /proc/PID/fdinfo.

A client may be open under several descriptors and in several processes; it is counted once, by
its drm-client-id.  Reading another user's fdinfo needs CAP_SYS_PTRACE, so the exporter runs as
the servers' user and sees theirs only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from infertune.exporter.base import Absent, Collector, Metric, Sample, leave_out
from infertune.exporter.cards import amdgpu_cards
from infertune.exporter.servers import processes
from infertune.host.text import pairs
from infertune.root import Root

_DOC = "Documentation/gpu/drm-usage-stats.rst"
_MEMORY = "servers times GPUs times memory regions (amdgpu has about 6)"

METRICS = (
    Metric(
        name="infertune_drm_clients",
        unit="items",
        help="Open DRM clients.",
        labels=("server", "gpu"),
        source=f"{_DOC}, drm-client-id",
        series="servers times GPUs",
    ),
    Metric(
        name="infertune_drm_engine_busy_seconds_total",
        kind="counter",
        unit="seconds",
        help="Time an engine worked for the server (Vulkan, OpenGL, video). ROCm's queues are "
        "not in it.",
        labels=("server", "gpu", "engine"),
        source=f"{_DOC}, drm-engine-<engine>",
        series="servers times GPUs times engines (amdgpu has 7)",
    ),
    Metric(
        name="infertune_drm_memory_resident_bytes",
        unit="bytes",
        help="Memory that is in its region now; ROCm's is in it.",
        labels=("server", "gpu", "region"),
        source=f"{_DOC}, drm-resident-<region>; drm-memory-<region> before Linux 6.13",
        series=_MEMORY,
    ),
    Metric(
        name="infertune_drm_memory_total_bytes",
        unit="bytes",
        help="Memory that was allocated in a region, resident or not.",
        labels=("server", "gpu", "region"),
        source=f"{_DOC}, drm-total-<region>",
        series=_MEMORY,
    ),
    Metric(
        name="infertune_drm_memory_shared_bytes",
        unit="bytes",
        help="Memory that other clients hold too.",
        labels=("server", "gpu", "region"),
        source=f"{_DOC}, drm-shared-<region>",
        series=_MEMORY,
    ),
    Metric(
        name="infertune_drm_memory_evicted_bytes",
        unit="bytes",
        help="Memory that was pushed out of VRAM.",
        labels=("server", "gpu"),
        source="Documentation/gpu/amdgpu/driver-core.rst, amd-evicted-vram",
        series="servers times GPUs",
    ),
)

_REGION = re.compile(r"drm-(resident|memory|total|shared)-([a-z0-9-]{1,20})")
_ENGINE = re.compile(r"drm-engine-([a-z0-9_-]{1,20})")
_UNITS = {"": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
MAX_NAMES = 16
"""Bound of engines and of regions, should a driver have more than any has today."""


def read(root: Root) -> Iterable[Sample]:
    """Sums per server.  Raises Absent without a server, PermissionError where none may be read."""
    servers = processes(root)
    if not servers:
        raise Absent("no server runs as a unit in infertune.slice")
    gpus = {card.pci_address: card.name for card in amdgpu_cards(root)}
    seen: set[tuple[str, str]] = set()
    sums: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    refused: PermissionError | None = None
    for pid, server in servers.items():
        try:
            clients = list(_clients(root, pid))
        except PermissionError as error:
            refused = error
            continue
        for client in clients:
            address = client.get("drm-pdev", "")
            gpu = gpus.get(address, address)
            identity = (address, client.get("drm-client-id", ""))
            if identity in seen:
                continue
            seen.add(identity)
            sums["infertune_drm_clients", (server, gpu)] += 1
            for metric, labels, value in _values(client):
                sums[metric, (server, gpu, *labels)] += value
    if refused and not sums:
        raise refused
    for (metric, labels), value in sorted(sums.items()):
        yield Sample(metric, labels, value)


def _clients(root: Root, pid: int) -> Iterable[dict[str, str]]:
    """The DRM descriptors of a process.  Raises PermissionError."""
    directory = f"/proc/{pid}/fdinfo"
    for descriptor in root.listed(directory):
        try:
            text = root.read(f"{directory}/{descriptor}")
        except PermissionError:
            raise
        except OSError:
            continue  # closed in between
        if "drm-client-id:" in text:
            yield dict(pairs(text, ":"))


def _values(client: dict[str, str]) -> Iterable[tuple[str, tuple[str, ...], float]]:
    engines = regions = 0
    for key, text in client.items():
        number, _, unit = text.partition(" ")
        if not number.isdecimal():
            continue
        if (match := _ENGINE.fullmatch(key)) and unit == "ns":
            engines += 1
            if engines > MAX_NAMES:
                leave_out(1)
            else:
                yield "infertune_drm_engine_busy_seconds_total", (match[1],), int(number) / 1e9
        elif (match := _REGION.fullmatch(key)) and unit in _UNITS:
            kind, region = match.groups()
            if kind == "memory":
                # The old name of resident; newer drivers print both.
                if f"drm-resident-{region}" in client:
                    continue
                kind = "resident"
            regions += 1
            if regions > 3 * MAX_NAMES:
                leave_out(1)
            else:
                yield f"infertune_drm_memory_{kind}_bytes", (region,), int(number) * _UNITS[unit]
        elif key == "amd-evicted-vram" and unit in _UNITS:
            yield "infertune_drm_memory_evicted_bytes", (), int(number) * _UNITS[unit]


FDINFO = Collector(
    id="fdinfo",
    summary="DRM clients of the servers: engine time and memory.",
    metrics=METRICS,
    read=read,
)
