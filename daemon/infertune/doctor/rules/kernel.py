# SPDX-License-Identifier: Apache-2.0
"""Releases of Linux that are known to be bad for inference on these machines."""

from __future__ import annotations

import re

from infertune.base.units import format_size
from infertune.doctor.base import (
    Answer,
    Finding,
    Rule,
    Unknown,
    When,
    Window,
    github,
    kernel_doc,
    linux,
    need,
    rocm,
)
from infertune.doctor.conditions import AMDGPU, INTEGRATED, RDNA35, STRIX_HALO
from infertune.doctor.facts import Facts
from infertune.host.unknown import known

_SLOW = Window(first=(7, 0, 12), last=(7, 0, 12), good=(7, 0, 13))


def _slow_compute(facts: Facts) -> Answer:
    release = facts.machine.kernel
    if re.match(r"7\.0\.0-\d", release or "") and facts.machine.distro_id == "ubuntu":
        # Ubuntu takes stable patches in and keeps 7.0.0: its number does not say which.
        return Unknown(f"Ubuntu's {release} has stable patches, and its number does not say which")
    if _SLOW.says(facts.kernel) == "good":
        return None
    return Finding(f"Linux {release} loads models and computes up to 42 times slower")


_SAVE_AREA = Window(first=(0,), last=(6, 18, 3), good=(6, 18, 4))


def _save_area(facts: Facts) -> Answer:
    if _SAVE_AREA.says(facts.kernel) == "good" or facts.kfd_context is True:
        return None
    if known(facts.option("amdgpu", "cwsr_enable")) == "0":
        return None  # the workaround of before the fix
    text = f"Linux {facts.machine.kernel} may save too little of a compute queue's state (CWSR)"
    if facts.rocm is None:
        return Finding(f"{text}; ROCm is not installed, and Vulkan does not need it", "info")
    return Finding(f"{text}: ROCm programs hang or fault under load")


_GTT_COMPUTE = Window(first=(0,), last=(6, 9), good=(6, 10))


def _gtt_compute(facts: Facts) -> Answer:
    if _GTT_COMPUTE.says(facts.kernel) == "good":
        return None
    return Finding(f"on Linux {facts.machine.kernel} ROCm allocates from the carve-out only")


_HARD_CLOCK = Window(first=(0,), last=(7, 0), good=(7, 1))


def _hard_clock(facts: Facts) -> Answer:
    level = need(facts.sensors).level
    if level not in ("high", "profile_peak") or _HARD_CLOCK.says(facts.kernel) == "good":
        return None
    return Finding(f"GPU level {level} on Linux {facts.machine.kernel} sets a hard minimum clock")


_Z13 = When(
    "ROG Flow Z13 (GZ302)", lambda facts: "GZ302" in (facts.machine.dmi.product or "").upper()
)


def _power_off(facts: Facts) -> Answer:
    profile = need(facts.processor).platform_profile
    if profile not in ("performance", "max-power"):
        return None
    return Finding(
        f"the platform profile is {profile}: machines of this model have powered off under load"
    )


def _old_workaround(facts: Facts) -> Answer:
    fixed = _SAVE_AREA.says(facts.kernel) == "good" or facts.kfd_context is True
    if not fixed or need(facts.option("amdgpu", "cwsr_enable")) != "0":
        return None
    origins = [each.origin for each in facts.configured("amdgpu", "cwsr_enable")]
    where = f" ({origins[-1]})" if origins else ""
    return Finding(
        f"amdgpu.cwsr_enable=0{where} is set, and Linux {facts.machine.kernel} has the fix"
    )


_UNCAPPED_UBUNTU = 38
"""Last 7.0.0-N of Ubuntu's reported without the cap."""


def _uncapped(facts: Facts) -> Answer:
    found = re.match(r"7\.0\.0-(\d{1,4})-", facts.machine.kernel or "")
    if facts.machine.distro_id != "ubuntu" or not found or int(found[1]) > _UNCAPPED_UBUNTU:
        return None
    total, gtt = facts.machine.memory.total_bytes, facts.gpu.gtt_bytes
    if total is None or gtt is None:
        return Unknown("the size of RAM or of GTT cannot be read")
    if gtt <= total:
        return None
    return Finding(
        f"GTT is {format_size(gtt)} and RAM {format_size(total)}: newer Ubuntu kernels "
        "(7.0.0-39 and later) cap GTT at RAM, and a model that needs more will no longer fit"
    )


_ISOLATION = ("isolcpus", "nohz_full", "rcu_nocbs")


def _isolated(facts: Facts) -> Answer:
    given = [name for name in _ISOLATION if facts.parameter(name) is not None]
    if not given:
        return None
    return Finding(
        f"{', '.join(given)} on the command line: these CPUs run only what is placed on them"
    )


_SAVE_AREA_SOURCES = (
    linux("b42f3bf9536c", "7.0, 6.18.4"),
    linux("71776e0965f9", "7.0"),
    rocm(5991),
)

RULES: tuple[Rule, ...] = (
    Rule(
        id="kernel-slow-compute",
        title="Linux 7.0.12 loads models and computes many times slower",
        when=AMDGPU,
        check=_slow_compute,
        severity="error",
        confidence="sure",
        fix="boot Linux 7.0.11, 7.0.13 or 7.1",
        sources=(rocm(6358), github("Comfy-Org/ComfyUI", 14488)),
        window=_SLOW,
    ),
    Rule(
        id="kernel-save-area",
        title="kernels before 6.18.4 save too little of a compute queue's state on gfx1151 (CWSR)",
        when=STRIX_HALO,
        check=_save_area,
        severity="error",
        # A distribution may have the fix in an older release.
        fix="use Linux 6.18.4 or newer, or a distribution's kernel with the fix; until then "
        "amdgpu.cwsr_enable=0",
        sources=_SAVE_AREA_SOURCES,
        window=_SAVE_AREA,
        covers=("log-page-fault",),
    ),
    Rule(
        id="kernel-gtt-compute",
        title="kernels before 6.10 give ROCm on an APU no memory beyond the carve-out",
        when=INTEGRATED,
        check=_gtt_compute,
        fix="use Linux 6.10 or newer",
        sources=(linux("89773b85599a", "6.10"),),
        window=_GTT_COMPUTE,
    ),
    Rule(
        id="kernel-hard-clock",
        title="GPU level high before Linux 7.1 sets a hard minimum clock",
        when=STRIX_HALO,
        check=_hard_clock,
        severity="error",
        fix="set power_dpm_force_performance_level to auto, or use Linux 7.1",
        sources=(
            linux("03b70e0d8aa26bab", "7.1"),
            github("superm1/amd-debug-tools", 47),
        ),
        window=_HARD_CLOCK,
    ),
    Rule(
        id="platform-power-off",
        title="ROG Flow Z13 powers off under load with the platform profile performance",
        when=_Z13 & RDNA35,
        check=_power_off,
        severity="error",
        fix="set the platform profile to balanced",
        sources=(github("superm1/amd-debug-tools", 47), github("superm1/amd-debug-tools", 48)),
    ),
    Rule(
        id="kernel-old-workaround",
        title="amdgpu.cwsr_enable=0 on a kernel that no longer needs it",
        when=STRIX_HALO,
        check=_old_workaround,
        severity="info",
        confidence="sure",
        fix="remove the option; without CWSR one program cannot interrupt another's compute",
        sources=_SAVE_AREA_SOURCES,
    ),
    Rule(
        id="kernel-isolated-cpus",
        title="CPUs isolated at boot, which run only what is placed on them",
        check=_isolated,
        severity="info",
        confidence="sure",
        fix="place the server there (cpus in a profile), or remove the parameters; no gain for "
        "inference on a GPU has been measured",
        sources=(kernel_doc("admin-guide/kernel-parameters"),),
    ),
    Rule(
        id="kernel-gtt-uncapped",
        title="GTT above RAM, which newer Ubuntu kernels cap",
        when=STRIX_HALO,
        check=_uncapped,
        severity="info",
        fix="set pages_limit below RAM before you upgrade",
        sources=(linux("5dafdd649280", "July 2026"),),
    ),
)
