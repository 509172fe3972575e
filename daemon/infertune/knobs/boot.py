# SPDX-License-Identifier: Apache-2.0
"""Settings the kernel reads at its start: compared and explained here, never written live.

``ttm.pages_limit`` can be written while the machine runs, but amdgpu took its
GTT size from it at its own start: only a reboot changes what a model may use.
"""

from infertune.knobs.base import Evidence, Knob
from infertune.units import GIB
from infertune.values import Size

KNOBS: tuple[Knob, ...] = (
    Knob(
        id="ttm.pages_limit",
        paths=("{ttm}/parameters/pages_limit",),
        value=Size(unit_bytes=4096, low_bytes=1 * GIB, high_bytes=1024 * GIB, unit="pages"),
        summary="Most memory the GPU may take for GTT; half of RAM by default.",
        evidence=Evidence(
            "reported",
            "25165824 pages gave mem_info_gtt_total 96 GiB exactly (Linux 7.1); from 108 GiB on "
            "some 128 GB machines fail at load.",
            "field reports collected 2026-11; drivers/gpu/drm/ttm/ttm_tt.c",
        ),
        doc="drivers/gpu/drm/ttm/ttm_tt.c",
        absent="no TTM module is loaded",
        time="boot",
        risk="boot",
    ),
)
