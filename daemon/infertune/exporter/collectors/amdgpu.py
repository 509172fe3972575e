# SPDX-License-Identifier: Apache-2.0
"""amdgpu: load, clocks, power, temperature, memory, from sysfs and hwmon."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from infertune.base.root import Root
from infertune.exporter.base import MAX_GPUS, Absent, Collector, Metric, Sample, bounded, present
from infertune.host.gpu import (
    Hwmon,
    MemoryInfo,
    amdgpu_cards,
    busy_percent,
    dpm_clock,
    hwmon,
    memory_info,
)

_SYSFS = "Documentation/gpu/amdgpu/thermal.rst"
_MEMORY = "drivers/gpu/drm/amd/amdgpu/amdgpu_vram_mgr.c, amdgpu_gtt_mgr.c"
_PER_GPU = "one per GPU"

DPM_CLOCKS = ("sclk", "mclk", "fclk", "socclk")

METRICS = (
    Metric(
        name="infertune_gpu_info",
        help="A GPU that amdgpu drives; joins the card's name to its PCI address and ID.",
        labels=("gpu", "pci_address", "pci_id"),
        source="/sys/class/drm",
        series=_PER_GPU,
    ),
    Metric(
        name="infertune_gpu_busy_ratio",
        unit="ratio",
        help="How busy the GPU is, as its power firmware counts; also sees ROCm, which the "
        "scheduler's tracepoints do not.",
        labels=("gpu",),
        source=f"{_SYSFS}, gpu_busy_percent",
        series=_PER_GPU,
    ),
    Metric(
        name="infertune_gpu_clock_hertz",
        unit="hertz",
        help="Clock now. A sleeping GPU shows low values; do not judge load by it.",
        labels=("gpu", "clock"),
        source=f"{_SYSFS}, hwmon freq*_input",
        series="at most 4 per GPU",
    ),
    Metric(
        name="infertune_gpu_dpm_clock_max_hertz",
        unit="hertz",
        help="Clock of the highest power level.",
        labels=("gpu", "clock"),
        source=f"{_SYSFS}, pp_dpm_*",
        series="4 per GPU",
    ),
    Metric(
        name="infertune_gpu_power_watts",
        unit="watts",
        help="Power of the package (APU) or the board, averaged or at this instant, as labelled.",
        labels=("gpu", "reading"),
        source=f"{_SYSFS}, hwmon power1_average, power1_input",
        series="2 per GPU",
    ),
    Metric(
        name="infertune_gpu_temperature_celsius",
        unit="celsius",
        help="Temperature by sensor.",
        labels=("gpu", "sensor"),
        source=f"{_SYSFS}, hwmon temp*_input",
        series="at most 8 per GPU",
    ),
    Metric(
        name="infertune_gpu_memory_bytes",
        unit="bytes",
        help="Size by pool: vram is the carve-out on an APU, gtt the limit amdgpu took at its "
        "start.",
        labels=("gpu", "pool"),
        source=_MEMORY,
        series="3 per GPU",
    ),
    Metric(
        name="infertune_gpu_memory_used_bytes",
        unit="bytes",
        help="Used by pool. No memory cgroup is charged for it.",
        labels=("gpu", "pool"),
        source=_MEMORY,
        series="3 per GPU",
    ),
)


def read(root: Root) -> Iterable[Sample]:
    """All of every amdgpu card.  Raises Absent where there is none."""
    cards = bounded(amdgpu_cards(root), MAX_GPUS)
    if not cards:
        raise Absent("no GPU that amdgpu drives")
    for card in cards:
        yield Sample("infertune_gpu_info", (card.name, card.pci_address, card.pci_id or ""), 1)
        percent = busy_percent(root, card.device)
        yield from present("infertune_gpu_busy_ratio", (card.name,), percent, per=100)
        for clock in DPM_CLOCKS:
            levels, labels = dpm_clock(root, card.device, clock), (card.name, clock)
            yield from present("infertune_gpu_dpm_clock_max_hertz", labels, levels.highest_hz)
        yield from _memory(card.name, memory_info(root, card.device))
        if monitor := hwmon(root, card.device):
            yield from _hwmon(card.name, monitor)


def _memory(gpu: str, found: MemoryInfo) -> Iterator[Sample]:
    for pool, size, used in (
        ("vram", found.vram_bytes, found.vram_used_bytes),
        ("visible_vram", found.visible_vram_bytes, found.visible_vram_used_bytes),
        ("gtt", found.gtt_bytes, found.gtt_used_bytes),
    ):
        yield from present("infertune_gpu_memory_bytes", (gpu, pool), size)
        yield from present("infertune_gpu_memory_used_bytes", (gpu, pool), used)


def _hwmon(gpu: str, found: Hwmon) -> Iterator[Sample]:
    for reading, power in (
        ("average", found.power_average_uw),
        ("instant", found.power_instant_uw),
    ):
        yield from present("infertune_gpu_power_watts", (gpu, reading), power, per=1_000_000)
    for metric, values, per in (
        ("infertune_gpu_clock_hertz", found.clocks_hz, 1),
        ("infertune_gpu_temperature_celsius", found.temperatures_mc, 1000),
    ):
        for name, value in values.items():
            yield from present(metric, (gpu, name), value, per=per)


AMDGPU = Collector(
    id="amdgpu",
    summary="Load, clocks, power, temperature and memory of the GPU.",
    metrics=METRICS,
    read=read,
)
