# SPDX-License-Identifier: Apache-2.0
"""KFD, the compute driver under ROCm: what each server holds, and how long it was evicted.

ROCm's user queues never pass the GPU scheduler, so its tracepoints and fdinfo show no engine time
for them.  This is what there is instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from infertune.base.root import Root
from infertune.exporter.base import MAX_GPUS, Absent, Collector, Metric, Sample, bounded
from infertune.exporter.servers import processes
from infertune.host.gpu import (
    MAX_PROCESSES,
    amdgpu_cards,
    has_kfd,
    kfd_nodes,
    kfd_pids,
    kfd_process,
)

_PROCESS = "drivers/gpu/drm/amd/amdkfd/kfd_process.c"
_TOPOLOGY = "drivers/gpu/drm/amd/amdkfd/kfd_topology.c"
_PER_SERVER = "servers times GPUs, and one for all other processes together (server is empty)"

METRICS = (
    Metric(
        name="infertune_kfd_node_info",
        help="A GPU as the compute driver knows it.",
        labels=("gpu", "gfx_target"),
        source=_TOPOLOGY,
        series="one per GPU",
    ),
    Metric(
        name="infertune_kfd_queues",
        unit="items",
        help="User queues.",
        labels=("server", "gpu"),
        source=f"{_PROCESS}, queues/",
        series=_PER_SERVER,
    ),
    Metric(
        name="infertune_kfd_memory_bytes",
        unit="bytes",
        help="GPU memory allocated through the compute driver; on an APU that prefers GTT, GTT.",
        labels=("server", "gpu"),
        source=f"{_PROCESS}, vram_<gpu_id>",
        series=_PER_SERVER,
    ),
    Metric(
        name="infertune_kfd_evicted_seconds_total",
        kind="counter",
        unit="seconds",
        help="Time the queues were evicted: the model stood still, mostly for lack of memory.",
        labels=("server", "gpu"),
        source=f"{_PROCESS}, stats_<gpu_id>/evicted_ms",
        series=_PER_SERVER,
    ),
)


def read(root: Root) -> Iterable[Sample]:
    """Topology, and the sums per server.  Raises Absent where there is no compute driver."""
    if not has_kfd(root):
        raise Absent("no KFD: ROCm cannot run here")
    gpus: dict[int, str] = {}
    cards = bounded(amdgpu_cards(root), MAX_GPUS)
    for node in kfd_nodes(root):
        names = (card.name for card in cards if card.render_minor == node.render_minor)
        gpu = next(names, f"node{node.number}")
        if node.gpu_id is not None:
            gpus[node.gpu_id] = gpu
        yield Sample("infertune_kfd_node_info", (gpu, node.gfx_target), 1)
    yield from _processes(root, gpus)


def _processes(root: Root, gpus: Mapping[int, str]) -> Iterable[Sample]:
    servers = processes(root)
    sums: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    for pid in bounded(kfd_pids(root), MAX_PROCESSES):
        server, found = servers.get(pid, ""), kfd_process(root, pid)
        for number in found.queues:
            if number in gpus:
                sums["infertune_kfd_queues", (server, gpus[number])] += 1
        for metric, values, per in (
            ("infertune_kfd_memory_bytes", found.vram_bytes, 1),
            ("infertune_kfd_evicted_seconds_total", found.evicted_ms, 1000),
        ):
            for number, value in values.items():
                if number in gpus:
                    sums[metric, (server, gpus[number])] += value / per
    for (metric, labels), total in sorted(sums.items()):
        yield Sample(metric, labels, total)


KFD = Collector(
    id="kfd",
    summary="The compute driver: queues, memory and evictions by server.",
    metrics=METRICS,
    read=read,
)
