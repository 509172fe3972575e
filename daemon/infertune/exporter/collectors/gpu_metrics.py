# SPDX-License-Identifier: Apache-2.0
"""amdgpu's ``gpu_metrics``: one binary table from the power firmware, by version.

The layouts are those of drivers/gpu/drm/amd/include/kgd_pp_interface.h.  An APU of the generation
of Strix Halo (SMU 14.0.0 and 14.0.1, smu_v14_0_0_ppt.c) answers with version 3.0, older ones with
2.x.  A version that is not in the table here is absent, not guessed at.

The busy fields are left out: their unit changed with a firmware version (percent since 0x5d4600,
hundredths of it before, smu_v14_0_0_ppt.c) that this table does not carry; gpu_busy_percent has
it right.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from infertune.exporter.base import Absent, Collector, Metric, Sample, present
from infertune.exporter.cards import amdgpu_cards
from infertune.root import Root

_HEADER = "drivers/gpu/drm/amd/include/kgd_pp_interface.h"

# Name, C type (H: uint16_t, I: uint32_t, Q: uint64_t) and number of elements, in order.
_V2_4 = """
temperature_gfx H, temperature_soc H, temperature_core H 8, temperature_l3 H 2,
average_gfx_activity H, average_mm_activity H,
system_clock_counter Q,
average_socket_power H, average_cpu_power H, average_soc_power H, average_gfx_power H,
average_core_power H 8,
average_gfxclk_frequency H, average_socclk_frequency H, average_uclk_frequency H,
average_fclk_frequency H, average_vclk_frequency H, average_dclk_frequency H,
current_gfxclk H, current_socclk H, current_uclk H, current_fclk H, current_vclk H,
current_dclk H, current_coreclk H 8, current_l3clk H 2,
throttle_status I,
fan_pwm H, padding H 3,
indep_throttle_status Q,
average_temperature_gfx H, average_temperature_soc H, average_temperature_core H 8,
average_temperature_l3 H 2,
average_cpu_voltage H, average_soc_voltage H, average_gfx_voltage H,
average_cpu_current H, average_soc_current H, average_gfx_current H
"""

_V3_0 = """
temperature_gfx H, temperature_soc H, temperature_core H 16, temperature_skin H,
average_gfx_activity H, average_vcn_activity H, average_ipu_activity H 8,
average_core_c0_activity H 16,
average_dram_reads H, average_dram_writes H, average_ipu_reads H, average_ipu_writes H,
system_clock_counter Q,
average_socket_power I, average_ipu_power H, average_apu_power I, average_gfx_power I,
average_dgpu_power I, average_all_core_power I, average_core_power H 16, average_sys_power H,
stapm_power_limit H, current_stapm_power_limit H,
average_gfxclk_frequency H, average_socclk_frequency H, average_vpeclk_frequency H,
average_ipuclk_frequency H, average_fclk_frequency H, average_vclk_frequency H,
average_uclk_frequency H, average_mpipu_frequency H,
current_coreclk H 16, current_core_maxfreq H, current_gfx_maxfreq H,
throttle_residency_prochot I, throttle_residency_spl I, throttle_residency_fppt I,
throttle_residency_sppt I, throttle_residency_thm_core I, throttle_residency_thm_gfx I,
throttle_residency_thm_soc I,
time_filter_alphavalue I
"""


@dataclass(frozen=True)
class Layout:
    """The fields of one version, and how a C compiler lays them out."""

    fields: tuple[tuple[str, str, int], ...]

    @property
    def code(self) -> str:
        # Native alignment (@), and "0Q": the whole is a multiple of its widest member.
        return "@HBB" + "".join(f"{count}{kind}" for _, kind, count in self.fields) + "0Q"

    @property
    def size(self) -> int:
        return struct.calcsize(self.code)

    def unpack(self, data: bytes) -> dict[str, list[int | None]]:
        """Values by field; one that the driver left unset (all bits one) is None."""
        values = iter(struct.unpack(self.code, data)[3:])
        unset = {kind: 2 ** (8 * struct.calcsize(kind)) - 1 for kind in "HIQ"}
        return {
            name: [None if v == unset[kind] else v for v in islice(values, count)]
            for name, kind, count in self.fields
        }


def _layout(text: str) -> Layout:
    entries = (entry.split() for entry in text.split(","))
    return Layout(tuple((name, kind, int(*count or "1")) for name, kind, *count in entries))


LAYOUTS: Mapping[tuple[int, int], Layout] = {(2, 4): _layout(_V2_4), (3, 0): _layout(_V3_0)}
"""By format and content revision."""

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
_CLOCKS = {
    "gfx": "average_gfxclk_frequency",
    "soc": "average_socclk_frequency",
    "memory": "average_uclk_frequency",
    "fabric": "average_fclk_frequency",
    "video": "average_vclk_frequency",
    "npu": "average_ipuclk_frequency",
}
_CLOCK_LIMITS = {"core": "current_core_maxfreq", "gfx": "current_gfx_maxfreq"}
_TRAFFIC = {
    ("dram", "read"): "average_dram_reads",
    ("dram", "write"): "average_dram_writes",
    ("npu", "read"): "average_ipu_reads",
    ("npu", "write"): "average_ipu_writes",
}
LIMITERS = ("prochot", "spl", "fppt", "sppt", "thm_core", "thm_gfx", "thm_soc")

METRICS = (
    Metric(
        name="infertune_gpu_metrics_info",
        unit="1",
        help="Version of the table that was read.",
        labels=("gpu", "version"),
        source=f"{_HEADER}, struct metrics_table_header",
        series="one per GPU",
    ),
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
        name="infertune_gpu_metrics_clock_hertz",
        unit="hertz",
        help="Clock by domain, filtered over time.",
        labels=("gpu", "clock"),
        source=_HEADER,
        series="at most 6 per GPU",
    ),
    Metric(
        name="infertune_gpu_metrics_clock_limit_hertz",
        unit="hertz",
        help="Clock limit that the firmware enforces now.",
        labels=("gpu", "clock"),
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
    """The table of every card.  Raises Absent with the reason where none can be read."""
    reasons = ["no GPU that amdgpu drives"]
    samples: list[Sample] = []
    for card in amdgpu_cards(root):
        try:
            data = root.read_value(f"{card.device}/gpu_metrics", 4096)
            samples += _samples(card.name, data)
        except FileNotFoundError:
            reasons.append(f"{card.name} has no gpu_metrics")
        except ValueError as error:
            reasons.append(f"{card.name}: {error}")
    if not samples:
        raise Absent(reasons[-1])
    return samples


def parse(data: bytes) -> tuple[tuple[int, int], dict[str, list[int | None]]]:
    """Version and fields of a table.

    Raises ValueError where the version is not known or the size is not that version's.
    """
    if len(data) < 4:
        raise ValueError(f"{len(data)} bytes are less than a header")
    size, *revision = struct.unpack_from("=HBB", data)
    version = (revision[0], revision[1])
    if version not in LAYOUTS:
        known = ", ".join(f"{major}.{minor}" for major, minor in LAYOUTS)
        raise ValueError(f"gpu_metrics version {version[0]}.{version[1]}; known are {known}")
    layout = LAYOUTS[version]
    if not size == len(data) == layout.size:
        raise ValueError(
            f"gpu_metrics version {version[0]}.{version[1]} has {layout.size} bytes; the header "
            f"says {size}, the file has {len(data)}"
        )
    return version, layout.unpack(data)


def _samples(gpu: str, data: bytes) -> Iterator[Sample]:
    (major, minor), fields = parse(data)
    yield Sample("infertune_gpu_metrics_info", (gpu, f"{major}.{minor}"), 1)
    for sensor, field in _SENSORS.items():
        values = fields.get(field, [])
        for number, value in enumerate(values):
            # A part with fewer cores than the table has room for leaves the rest at zero.
            if value is None or (value == 0 and len(values) > 1):
                continue
            name = sensor if len(values) == 1 else f"{sensor}{number}"
            # Hundredths of a degree: smu_v14_0_0_get_smu_metrics_data divides by 100.
            yield Sample("infertune_gpu_metrics_temperature_celsius", (gpu, name), value / 100)
    for metric, names, scale, per in (
        ("infertune_gpu_metrics_power_watts", _DOMAINS, 1, 1000),
        ("infertune_gpu_metrics_power_limit_watts", _LIMITS, 1, 1000),
        ("infertune_gpu_metrics_clock_hertz", _CLOCKS, 1_000_000, 1),
        ("infertune_gpu_metrics_clock_limit_hertz", _CLOCK_LIMITS, 1_000_000, 1),
    ):
        for name, field in names.items():
            for value in fields.get(field, []):
                yield from present(metric, (gpu, name), value, scale=scale, per=per)
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
