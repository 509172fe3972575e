# SPDX-License-Identifier: Apache-2.0
"""amdgpu: load, clocks, power, temperature, memory, from sysfs and hwmon."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from infertune.exporter.base import Absent, Collector, Metric, Sample, present
from infertune.exporter.cards import amdgpu_cards
from infertune.root import Root

_SYSFS = "Documentation/gpu/amdgpu/thermal.rst"
_MEMORY = "drivers/gpu/drm/amd/amdgpu/amdgpu_vram_mgr.c, amdgpu_gtt_mgr.c"
_PER_GPU = "one per GPU"

POOLS = (
    ("vram", "mem_info_vram"),
    ("visible_vram", "mem_info_vis_vram"),
    ("gtt", "mem_info_gtt"),
)
DPM_CLOCKS = ("sclk", "mclk", "fclk", "socclk")

METRICS = (
    Metric(
        name="infertune_gpu_info",
        unit="1",
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
        name="infertune_gpu_memory_busy_ratio",
        unit="ratio",
        help="How busy the memory controller is; APUs have no such file.",
        labels=("gpu",),
        source=f"{_SYSFS}, mem_busy_percent",
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
        name="infertune_gpu_dpm_clock_hertz",
        unit="hertz",
        help="Clock of the power level that is chosen now.",
        labels=("gpu", "clock"),
        source=f"{_SYSFS}, pp_dpm_*",
        series="4 per GPU",
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
        name="infertune_gpu_power_cap_watts",
        unit="watts",
        help="Power limit in force.",
        labels=("gpu",),
        source=f"{_SYSFS}, hwmon power1_cap",
        series=_PER_GPU,
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
        name="infertune_gpu_voltage_volts",
        unit="volts",
        help="Voltage by rail.",
        labels=("gpu", "rail"),
        source=f"{_SYSFS}, hwmon in*_input",
        series="at most 4 per GPU",
    ),
    Metric(
        name="infertune_gpu_fan_speed_rpm",
        unit="rpm",
        help="Speed of the GPU's own fan; on an APU the fan belongs to the board.",
        labels=("gpu",),
        source=f"{_SYSFS}, hwmon fan1_input",
        series=_PER_GPU,
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
    cards = amdgpu_cards(root)
    if not cards:
        raise Absent("no GPU that amdgpu drives")
    for card in cards:
        yield Sample("infertune_gpu_info", (card.name, card.pci_address, card.pci_id), 1)
        yield from _device(root, card.name, card.device)
        for monitor in root.glob(f"{card.device}/hwmon/hwmon*")[:1]:
            yield from _hwmon(root, card.name, monitor)


def _device(root: Root, gpu: str, device: str) -> Iterator[Sample]:
    for file, metric in (
        ("gpu_busy_percent", "infertune_gpu_busy_ratio"),
        ("mem_busy_percent", "infertune_gpu_memory_busy_ratio"),
    ):
        yield from present(metric, (gpu,), root.get_int(f"{device}/{file}"), per=100)
    for clock in DPM_CLOCKS:
        chosen, highest = dpm_levels(root.get(f"{device}/pp_dpm_{clock}") or "")
        yield from present("infertune_gpu_dpm_clock_hertz", (gpu, clock), chosen)
        yield from present("infertune_gpu_dpm_clock_max_hertz", (gpu, clock), highest)
    for pool, file in POOLS:
        size = root.get_int(f"{device}/{file}_total")
        used = root.get_int(f"{device}/{file}_used")
        yield from present("infertune_gpu_memory_bytes", (gpu, pool), size)
        yield from present("infertune_gpu_memory_used_bytes", (gpu, pool), used)


def dpm_levels(table: str) -> tuple[int | None, int | None]:
    """Chosen and highest clock, in hertz, of a table with lines such as ``1: 800Mhz *``."""
    rows = re.findall(r"^\S+:\s*(\d+)Mhz ?(\*?)", table, re.MULTILINE | re.IGNORECASE)
    chosen = [int(clock) for clock, star in rows if star]
    highest = max((int(clock) for clock, _ in rows), default=None)
    return (
        chosen[0] * 1_000_000 if chosen else None,
        None if highest is None else highest * 1_000_000,
    )


def _hwmon(root: Root, gpu: str, monitor: str) -> Iterator[Sample]:
    for number in range(1, 5):
        name = root.get(f"{monitor}/freq{number}_label")
        if name:
            clock = root.get_int(f"{monitor}/freq{number}_input")
            yield from present("infertune_gpu_clock_hertz", (gpu, name), clock)
    for reading, file in (("average", "power1_average"), ("instant", "power1_input")):
        power = root.get_int(f"{monitor}/{file}")
        yield from present("infertune_gpu_power_watts", (gpu, reading), power, per=1_000_000)
    cap = root.get_int(f"{monitor}/power1_cap")
    yield from present("infertune_gpu_power_cap_watts", (gpu,), cap, per=1_000_000)
    for number in range(1, 9):
        celsius = root.get_int(f"{monitor}/temp{number}_input")
        if celsius is not None:
            name = root.get(f"{monitor}/temp{number}_label") or f"temp{number}"
            yield Sample("infertune_gpu_temperature_celsius", (gpu, name), celsius / 1000)
    for number in range(4):
        name = root.get(f"{monitor}/in{number}_label")
        if name:
            volts = root.get_int(f"{monitor}/in{number}_input")
            yield from present("infertune_gpu_voltage_volts", (gpu, name), volts, per=1000)
    fan = root.get_int(f"{monitor}/fan1_input")
    yield from present("infertune_gpu_fan_speed_rpm", (gpu,), fan)


AMDGPU = Collector(
    id="amdgpu",
    summary="Load, clocks, power, temperature and memory of the GPU.",
    metrics=METRICS,
    read=read,
)
