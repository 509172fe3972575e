# SPDX-License-Identifier: Apache-2.0
"""amdgpu's ``gpu_metrics``: one binary table from the power firmware, by version.

The layouts are those of drivers/gpu/drm/amd/include/kgd_pp_interface.h.  An APU of the generation
of Strix Halo (SMU 14.0.0 and 14.0.1, smu_v14_0_0_ppt.c) answers with version 3.0, older ones with
2.x.  A version that is not in the table here is not guessed at.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from itertools import islice

from infertune.base.records import dataclass
from infertune.base.root import Root

_LIMIT = 4096
"""Bytes: an attribute of sysfs is one page at most (Documentation/filesystems/sysfs.rst)."""

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


@dataclass(frozen=True, slots=True)
class Table:
    """One reading."""

    version: tuple[int, int]
    """Format and content revision."""
    fields: Mapping[str, list[int | None]]
    """As the driver names them; None for what it left unset."""


LAYOUTS: Mapping[tuple[int, int], Layout] = {(2, 4): _layout(_V2_4), (3, 0): _layout(_V3_0)}
"""By format and content revision."""


def gpu_metrics(root: Root, device: str) -> Table:
    """The table of one GPU.

    Raises OSError where it has none, ValueError where its version is not known.
    """
    return parse(root.read_value(f"{device}/gpu_metrics", _LIMIT))


def parse(data: bytes) -> Table:
    """A table as the driver hands it out.

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
    return Table(version, layout.unpack(data))
