# SPDX-License-Identifier: Apache-2.0
"""DRM clients of the model servers: engine time and memory, from /proc/PID/fdinfo.

A client may be open under several descriptors and in several processes; it is counted once, by
its drm-client-id.  Reading another user's fdinfo needs CAP_SYS_PTRACE, so the exporter runs as
the servers' user and sees theirs only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from infertune.base.root import Root
from infertune.exporter.base import MAX_GPUS, Absent, Collector, Metric, Sample, bounded
from infertune.exporter.servers import processes
from infertune.host.gpu import amdgpu_cards
from infertune.host.processes import MAX_DESCRIPTORS, DrmClient, descriptors, drm_client

_DOC = "Documentation/gpu/drm-usage-stats.rst"
_MEMORY = "servers times GPUs times memory regions (amdgpu has about 6)"

METRICS = (
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
        name="infertune_drm_memory_evicted_bytes",
        unit="bytes",
        help="Memory that was pushed out of VRAM.",
        labels=("server", "gpu"),
        source="Documentation/gpu/amdgpu/driver-core.rst, amd-evicted-vram",
        series="servers times GPUs",
    ),
)

MAX_NAMES = 16
"""Bound of engines, and of regions, should a driver have more than any has today."""


def read(root: Root) -> Iterable[Sample]:
    """Sums per server.  Raises Absent without a server, PermissionError where none may be read."""
    servers = processes(root)
    if not servers:
        raise Absent("no server runs as a unit in infertune.slice")
    gpus = {card.pci_address: card.name for card in bounded(amdgpu_cards(root), MAX_GPUS)}
    seen: set[tuple[str, str]] = set()
    sums: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    refused: PermissionError | None = None
    for pid, server in servers.items():
        try:
            clients = _clients(root, pid)
        except PermissionError as error:
            refused = error
            continue
        for client in clients:
            identity = (client.pci_address, client.number)
            if identity in seen:
                continue
            seen.add(identity)
            gpu = gpus.get(client.pci_address, client.pci_address)
            for metric, labels, value in _values(client):
                sums[metric, (server, gpu, *labels)] += value
    if refused and not sums:
        raise refused
    for (metric, labels), value in sorted(sums.items()):
        yield Sample(metric, labels, value)


def _clients(root: Root, pid: int) -> list[DrmClient]:
    """Raises PermissionError."""
    numbers = bounded(descriptors(root, pid), MAX_DESCRIPTORS)
    clients = (drm_client(root, pid, number) for number in numbers)
    return [client for client in clients if client]


def _values(client: DrmClient) -> Iterable[tuple[str, tuple[str, ...], float]]:
    for engine, busy_ns in bounded([*client.engine_ns.items()], MAX_NAMES):
        yield "infertune_drm_engine_busy_seconds_total", (engine,), busy_ns / 1e9
    for region, size in bounded([*client.resident_bytes.items()], MAX_NAMES):
        yield "infertune_drm_memory_resident_bytes", (region,), size
    if client.evicted_vram_bytes is not None:
        yield "infertune_drm_memory_evicted_bytes", (), client.evicted_vram_bytes


FDINFO = Collector(
    id="fdinfo",
    summary="DRM clients of the servers: engine time and memory.",
    metrics=METRICS,
    read=read,
)
