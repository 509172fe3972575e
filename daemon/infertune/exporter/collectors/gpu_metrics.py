# SPDX-License-Identifier: Apache-2.0
"""amdgpu's ``gpu_metrics``: power, limits and throttling as the power firmware has them.

A version of the table that infertune.host.gpu_metrics does not know is absent.

The busy fields are left out: their unit changed with a firmware version (percent since 0x5d4600,
hundredths of it before, smu_v14_0_0_ppt.c) that this table does not carry; gpu_busy_percent has
it right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from infertune.base.root import Root
from infertune.exporter.base import MAX_GPUS, Absent, Collector, Metric, Sample, bounded, present
from infertune.host.gpu import amdgpu_cards
from infertune.host.gpu_metrics import Table, gpu_metrics

_HEADER = "drivers/gpu/drm/amd/include/kgd_pp_interface.h"

# Which field is which series.
_SENSORS = {
    "gfx": "temperature_gfx",
    "soc": "temperature_soc",
    "skin": "temperature_skin",
    "core": "temperature_core",
    "l3": "temperature_l3",
}
_DOMAINS = {
    "socket": "average_socket_power",
    "apu": "average_apu_power",
    "gfx": "average_gfx_power",
    "dgpu": "average_dgpu_power",
    "cpu": "average_cpu_power",
    "soc": "average_soc_power",
    "cores": "average_all_core_power",
    "npu": "average_ipu_power",
    "system": "average_sys_power",
}
_LIMITS = {"stapm": "stapm_power_limit", "stapm_now": "current_stapm_power_limit"}
_TRAFFIC = {
    ("dram", "read"): "average_dram_reads",
    ("dram", "write"): "average_dram_writes",
    ("npu", "read"): "average_ipu_reads",
    ("npu", "write"): "average_ipu_writes",
}
LIMITERS = ("prochot", "spl", "fppt", "sppt", "thm_core", "thm_gfx", "thm_soc")

METRICS = (
    Metric(
        name="infertune_gpu_metrics_temperature_celsius",
        unit="celsius",
        help="Temperature as the power firmware has it; cores and L3 caches are numbered.",
        labels=("gpu", "sensor"),
        source=_HEADER,
        series="at most 19 per GPU",
    ),
    Metric(
        name="infertune_gpu_metrics_power_watts",
        unit="watts",
        help="Power by domain, filtered over time: CPU and GPU share what the socket has.",
        labels=("gpu", "domain"),
        source=_HEADER,
        series="at most 9 per GPU",
    ),
    Metric(
        name="infertune_gpu_metrics_power_limit_watts",
        unit="watts",
        help="Sustained power limit: stapm the highest allowed, stapm_now the one in force.",
        labels=("gpu", "limit"),
        source=_HEADER,
        series="2 per GPU",
    ),
    Metric(
        name="infertune_gpu_metrics_traffic_bytes_per_second",
        unit="bytes per second",
        help="Memory traffic, filtered over time; the firmware counts in MB/s, taken as 10^6.",
        labels=("gpu", "client", "direction"),
        source=_HEADER,
        series="4 per GPU",
    ),
    Metric(
        name="infertune_gpu_metrics_throttle_cycles_total",
        kind="counter",
        unit="cycles",
        help="Time a limiter was engaged, in cycles of the power firmware's timer: compare "
        "limiters with each other.",
        labels=("gpu", "limiter"),
        source=f"{_HEADER}; smu14_driver_if_v14_0_0.h, ThrottleResidency_*",
        series="7 per GPU",
    ),
)


def read(root: Root) -> Iterable[Sample]:
    """The table of every card.  Raises Absent with the reason where none has one, OSError
    where none could be read."""
    reasons = ["no GPU that amdgpu drives"]
    samples: list[Sample] = []
    failed: OSError | None = None
    for card in bounded(amdgpu_cards(root), MAX_GPUS):
        try:
            samples += _samples(card.name, gpu_metrics(root, card.device))
        except FileNotFoundError:
            reasons.append(f"{card.name} has no gpu_metrics")
        except OSError as error:
            failed = error
        except ValueError as error:
            reasons.append(f"{card.name}: {error}")
    if failed and not samples:
        raise failed
    if not samples:
        raise Absent(reasons[-1])
    return samples


def _samples(gpu: str, table: Table) -> Iterator[Sample]:
    fields = table.fields
    for sensor, field in _SENSORS.items():
        values = fields.get(field, [])
        for number, value in enumerate(values):
            # A part with fewer cores than the table has room for leaves the rest at zero.
            if value is None or (value == 0 and len(values) > 1):
                continue
            name = sensor if len(values) == 1 else f"{sensor}{number}"
            # Hundredths of a degree: smu_v14_0_0_get_smu_metrics_data divides by 100.
            yield Sample("infertune_gpu_metrics_temperature_celsius", (gpu, name), value / 100)
    for metric, names in (
        ("infertune_gpu_metrics_power_watts", _DOMAINS),
        ("infertune_gpu_metrics_power_limit_watts", _LIMITS),
    ):
        for name, field in names.items():
            for value in fields.get(field, []):
                yield from present(metric, (gpu, name), value, per=1000)
    for (client, direction), field in _TRAFFIC.items():
        metric = "infertune_gpu_metrics_traffic_bytes_per_second"
        for value in fields.get(field, []):
            yield from present(metric, (gpu, client, direction), value, scale=1_000_000)
    for limiter in LIMITERS:
        for value in fields.get(f"throttle_residency_{limiter}", []):
            metric = "infertune_gpu_metrics_throttle_cycles_total"
            yield from present(metric, (gpu, limiter), value)


GPU_METRICS = Collector(
    id="gpu_metrics",
    summary="The power firmware's own table: power by domain, limits, throttling.",
    metrics=METRICS,
    read=read,
)
