# SPDX-License-Identifier: Apache-2.0
"""KFD, the compute driver under ROCm: what each server holds, and how long it was evicted.

ROCm's user queues never pass the GPU scheduler, so its tracepoints and fdinfo show no engine time
for them.  This is what there is instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from infertune.exporter.base import Absent, Collector, Metric, Sample
from infertune.exporter.cards import amdgpu_cards
from infertune.exporter.servers import processes
from infertune.host.text import integer, pairs
from infertune.root import Root

_PROC = "/sys/class/kfd/kfd/proc"
_NODES = "/sys/class/kfd/kfd/topology/nodes"
_PROCESS = "drivers/gpu/drm/amd/amdkfd/kfd_process.c"
_TOPOLOGY = "drivers/gpu/drm/amd/amdkfd/kfd_topology.c"
_PER_SERVER = "servers times GPUs, and one for all other processes together (server is empty)"

METRICS = (
    Metric(
        name="infertune_kfd_node_info",
        unit="1",
        help="A GPU as the compute driver knows it.",
        labels=("gpu", "gfx_target"),
        source=_TOPOLOGY,
        series="one per GPU",
    ),
    Metric(
        name="infertune_kfd_node_simds",
        unit="items",
        help="SIMD units; two are one compute unit.",
        labels=("gpu",),
        source=f"{_TOPOLOGY}, simd_count",
        series="one per GPU",
    ),
    Metric(
        name="infertune_kfd_node_max_clock_hertz",
        unit="hertz",
        help="Highest engine clock for compute.",
        labels=("gpu",),
        source=f"{_TOPOLOGY}, max_engine_clk_fcompute",
        series="one per GPU",
    ),
    Metric(
        name="infertune_kfd_processes",
        unit="items",
        help="Processes that opened the compute driver.",
        labels=("server",),
        source=_PROCESS,
        series="servers, and one for all others",
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
        help="Time the queues were evicted: the model stood still, mostly for want of memory.",
        labels=("server", "gpu"),
        source=f"{_PROCESS}, stats_<gpu_id>/evicted_ms",
        series=_PER_SERVER,
    ),
    Metric(
        name="infertune_kfd_occupied_compute_units",
        unit="items",
        help="Compute units with a wave of this process; not every generation counts them.",
        labels=("server", "gpu"),
        source=f"{_PROCESS}, stats_<gpu_id>/cu_occupancy",
        series=_PER_SERVER,
    ),
)


def read(root: Root) -> Iterable[Sample]:
    """Topology, and the sums per server.  Raises Absent where there is no compute driver."""
    if not root.exists("/sys/class/kfd/kfd"):
        raise Absent("no KFD: ROCm cannot run here")
    gpus: dict[int, str] = {}
    for node in root.glob(f"{_NODES}/*"):
        properties = pairs(root.get(f"{node}/properties"))
        target = integer(properties.get("gfx_target_version"))
        if not target:
            continue  # the CPU is a node too
        minor = integer(properties.get("drm_render_minor"))
        cards = [card.name for card in amdgpu_cards(root) if card.render_minor == minor]
        gpu = cards[0] if cards else f"node{node.rpartition('/')[2]}"
        gpu_id = root.get_int(f"{node}/gpu_id")
        if gpu_id is not None:
            gpus[gpu_id] = gpu
        yield Sample("infertune_kfd_node_info", (gpu, gfx_name(target)), 1)
        simds = integer(properties.get("simd_count"))
        if simds is not None:
            yield Sample("infertune_kfd_node_simds", (gpu,), simds)
        clock = integer(properties.get("max_engine_clk_fcompute"))
        if clock is not None:
            yield Sample("infertune_kfd_node_max_clock_hertz", (gpu,), clock * 1e6)
    yield from _processes(root, gpus)


def gfx_name(target: int) -> str:
    """``gfx1151`` for 110501: minor and stepping are one hexadecimal digit each in the name."""
    return f"gfx{target // 10000}{target // 100 % 100:x}{target % 100:x}"


def _processes(root: Root, gpus: dict[int, str]) -> Iterable[Sample]:
    servers = processes(root)
    sums: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    for name in root.names(_PROC):
        pid = integer(name)
        if pid is None:
            continue
        server = servers.get(pid, "")
        here = f"{_PROC}/{name}"
        sums["infertune_kfd_processes", (server,)] += 1
        for queue in root.names(f"{here}/queues"):
            gpu = gpus.get(root.get_int(f"{here}/queues/{queue}/gpuid") or 0)
            if gpu:
                sums["infertune_kfd_queues", (server, gpu)] += 1
        for gpu_id, gpu in gpus.items():
            for metric, file, per in (
                ("infertune_kfd_memory_bytes", f"vram_{gpu_id}", 1),
                ("infertune_kfd_evicted_seconds_total", f"stats_{gpu_id}/evicted_ms", 1000),
                ("infertune_kfd_occupied_compute_units", f"stats_{gpu_id}/cu_occupancy", 1),
            ):
                value = root.get_int(f"{here}/{file}")
                if value is not None:
                    sums[metric, (server, gpu)] += value / per
    for (metric, labels), total in sorted(sums.items()):
        yield Sample(metric, labels, total)


KFD = Collector(
    id="kfd",
    summary="The compute driver: queues, memory and evictions by server.",
    metrics=METRICS,
    read=read,
)
