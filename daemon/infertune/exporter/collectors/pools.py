# SPDX-License-Identifier: Apache-2.0
"""The memory models can have: its size, what limits it, who holds it, and the next boot's."""

from __future__ import annotations

from collections.abc import Iterable

from infertune.base.root import Root
from infertune.boot.sizes import next_boot
from infertune.exporter.base import Absent, Collector, Metric, Sample, present
from infertune.host.machine import read_machine
from infertune.host.unknown import Unknown
from infertune.pools.facts import read_facts
from infertune.pools.judge import gpu_pool
from infertune.pools.promised import with_reservations
from infertune.profiles.resolve import assume_backend

_SOURCE = "docs/memory.md"
SETTINGS = (
    *("ttm.pages_limit", "amdttm.pages_limit", "amd_ttm.pages_limit", "default"),
    *("amdgpu.gttsize", "RAM", "amdkfd", "firmware", "VRAM"),
)

METRICS = (
    Metric(
        name="infertune_gpu_pool_bytes",
        unit="bytes",
        help="Memory the GPU allocates models from: the smallest of its limits. pool is GTT, "
        "carve-out or VRAM.",
        labels=("gpu", "pool"),
        source=_SOURCE,
        series="1",
    ),
    Metric(
        name="infertune_gpu_pool_limit_bytes",
        unit="bytes",
        help="Each limit of that memory, by the setting that makes it.",
        labels=("gpu", "setting"),
        source=_SOURCE,
        series=f"at most {len(SETTINGS)}",
    ),
    Metric(
        name="infertune_gpu_pool_held_bytes",
        unit="bytes",
        help="What of it is in use: the larger of the driver's counter and the sum over programs.",
        labels=("gpu", "pool"),
        source=f"{_SOURCE}; mem_info_*_used, KFD vram_*, fdinfo",
        series="1",
    ),
    Metric(
        name="infertune_gpu_pool_promised_bytes",
        unit="bytes",
        help="What of it servers that are still loading were promised.",
        labels=("gpu", "pool"),
        source=_SOURCE,
        series="1",
    ),
    Metric(
        name="infertune_gpu_pool_next_boot_bytes",
        unit="bytes",
        help="The same memory after the next boot, as it is configured or staged now.",
        labels=("gpu", "pool"),
        source=_SOURCE,
        series="1",
    ),
)


def read(root: Root) -> Iterable[Sample]:
    """The judge's answer.  Raises Absent where there is no GPU to run models on."""
    machine = read_machine(root)
    if machine.inference_gpu is None:
        raise Absent("no GPU to run models on")
    gpu = machine.inference_gpu.path.split("/")[-2]
    backend = assume_backend(machine)[0]
    facts = with_reservations(root, read_facts(root, machine), backend)
    pool = gpu_pool(facts, backend)
    if isinstance(pool, Unknown):
        raise Absent(pool.why)
    labels = (gpu, pool.name)
    yield Sample("infertune_gpu_pool_bytes", labels, pool.bytes)
    for setting, size in {limit.setting: limit.bytes for limit in reversed(pool.limits)}.items():
        yield Sample("infertune_gpu_pool_limit_bytes", (gpu, setting), size)
    yield from present("infertune_gpu_pool_held_bytes", labels, pool.held)
    yield Sample("infertune_gpu_pool_promised_bytes", labels, pool.reserved)
    then = next_boot(root, machine, facts)
    later = then if isinstance(then, Unknown) else gpu_pool(then, backend)
    if not isinstance(later, Unknown):
        yield Sample("infertune_gpu_pool_next_boot_bytes", (gpu, later.name), later.bytes)


POOLS = Collector(
    id="pools",
    summary="The memory models can have, and what limits it.",
    metrics=METRICS,
    read=read,
    max_age_s=5.0,
)
