# SPDX-License-Identifier: Apache-2.0
"""amdgpu power management of the GPU that serves the model."""

from infertune.catalogue.knobs.base import Evidence, Knob
from infertune.catalogue.values import Choice, Table

_DOC = "Documentation/gpu/amdgpu/thermal.rst"
_ABSENT = "no single amdgpu device on this machine, or the driver does not offer it"

KNOBS: tuple[Knob, ...] = (
    Knob(
        id="amdgpu.power_dpm_force_performance_level",
        paths=("{gpu}/power_dpm_force_performance_level",),
        value=Choice(
            (
                "auto",
                "low",
                "high",
                "manual",
                "profile_standard",
                "profile_min_sclk",
                "profile_min_mclk",
                "profile_peak",
            )
        ),
        summary="Whether the GPU picks its clocks by load or holds a fixed level.",
        evidence=Evidence(
            "no effect found",
            "No measured gain for inference from pinning; a cap at 2400 MHz costs about 6 % "
            "prefill, no decode, and saves 20 to 35 W.",
            "1bit-MONSTER issue #1216; survey 2026-11",
        ),
        doc=_DOC,
        absent=_ABSENT,
        risk="power",
    ),
    Knob(
        id="amdgpu.pp_power_profile_mode",
        paths=("{gpu}/pp_power_profile_mode",),
        value=Table(
            (
                "BOOTUP_DEFAULT",
                "3D_FULL_SCREEN",
                "POWER_SAVING",
                "VIDEO",
                "VR",
                "COMPUTE",
                "WINDOW_3D",
            ),
            fixed=("CUSTOM", "CAPPED", "UNCAPPED"),
        ),
        summary="The GPU firmware's heuristics: how fast clocks follow load.",
        evidence=Evidence(
            "protective, unmeasured",
            "No published Strix Halo measurement of COMPUTE against the default.",
            _DOC,
        ),
        doc=_DOC,
        absent=f"{_ABSENT} (the power firmware of Strix Halo has no such profiles)",
        risk="power",
        # Some parts take it only while the level is manual.
        after=("amdgpu.power_dpm_force_performance_level",),
    ),
)
