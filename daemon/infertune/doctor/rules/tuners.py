# SPDX-License-Identifier: Apache-2.0
"""Power: other programs that set it, and caps that cost speed."""

from __future__ import annotations

from infertune.doctor.base import (
    Answer,
    Finding,
    Rule,
    Source,
    Unknown,
    github,
    kernel_doc,
    need,
)
from infertune.doctor.conditions import ALWAYS, AMDGPU
from infertune.doctor.facts import Facts, Processor

_POWER = ("tuned", "power-profiles-daemon", "tlp", "auto-cpufreq", "system76-power")
"""Tuners each of which sets governor, preference and platform profile."""


def _conflict(facts: Facts) -> Answer:
    running = [each for each in facts.machine.tuners if each.running and each.id in _POWER]
    if len(running) < 2:
        return None
    names = " and ".join(each.name for each in running)
    return Finding(f"{names} run at once: each undoes what the other sets")


_SAVING = ("powersave", "laptop-battery-powersave", "balanced-battery", "spindown-disk")


def _saving_profile(facts: Facts) -> Answer:
    running = any(each.id == "tuned" and each.running for each in facts.machine.tuners)
    profile = need(facts.tuned_profile)
    if not running or profile is None:
        return None
    if not any(name in _SAVING for name in profile.split()):
        return None
    return Finding(f"TuneD's profile is {profile}, which saves power")


def _cpufreq(facts: Facts) -> Processor:
    """Raises Missing where no policy has a governor."""
    found = need(facts.processor)
    return need(found if found.governors else Unknown("there is no cpufreq driver"))


def _governor(facts: Facts) -> Answer:
    driver = facts.machine.cpu.scaling_driver
    governors = _cpufreq(facts).governors
    if driver is None:
        return Unknown("the kernel does not say which cpufreq driver it has")
    if driver.endswith("-epp") or driver == "intel_pstate":
        return None  # powersave there lets the preference decide
    if "powersave" not in governors:
        return None
    return Finding(f"governor powersave with {driver}: CPUs stay at their lowest clock")


def _preference(facts: Facts) -> Answer:
    preferences = _cpufreq(facts).preferences
    if "power" not in preferences:
        return None
    return Finding("the energy preference is power: CPUs rise to speed late")


def _capped(facts: Facts) -> Answer:
    share = _cpufreq(facts).lowest_limit
    if share is None:
        return Unknown("the limits of the CPUs' clocks cannot be read")
    if share >= 0.9:
        return None
    return Finding(f"a CPU may run at {share:.0%} of its highest clock only (scaling_max_freq)")


def _boost_off(facts: Facts) -> Answer:
    if _cpufreq(facts).boost is not False:
        return None  # without the file there is no such switch
    return Finding("boost is off: CPUs stay at their base clock")


def _quiet(facts: Facts) -> Answer:
    profile = need(facts.processor).platform_profile
    if profile not in ("low-power", "quiet", "cool"):
        return None
    return Finding(f"platform profile {profile}: the firmware gives CPU and GPU less power")


def _battery(facts: Facts) -> Answer:
    if need(facts.processor).mains is not False:
        return None
    return Finding("the machine runs on its battery: the firmware gives less power")


def _level(facts: Facts) -> Answer:
    level = need(facts.sensors).level
    if level is None:
        return Unknown("the driver shows no performance level")
    if level in ("auto", "high", "profile_peak"):
        return None
    if level in ("low", "profile_min_sclk", "profile_min_mclk"):
        return Finding(f"GPU level {level}: the GPU stays at its lowest clock")
    return Finding(f"GPU level {level}: somebody sets the clocks", "info", "likely")


def _power_cap(facts: Facts) -> Answer:
    sensors = need(facts.sensors)
    cap, default = sensors.cap_watts, sensors.cap_default_watts
    if cap is None or default is None:
        return None  # this GPU's power is the firmware's business
    if cap >= 0.95 * default:
        return None
    return Finding(f"the GPU may draw {cap:.0f} W, by default {default:.0f} W")


_HOT_C = 90.0


def _fan(facts: Facts) -> Answer:
    sensors = need(facts.sensors)
    if sensors.fan_by_hand:
        return Finding("the GPU's fan is set by hand: it does not follow the temperature")
    if sensors.fan_rpm == 0 and (sensors.temperature_c or 0) >= _HOT_C:
        return Finding(f"the GPU is at {sensors.temperature_c:.0f} C and its fan stands still")
    return None


def _hot(facts: Facts) -> Answer:
    temperature = need(facts.sensors).temperature_c
    if temperature is None:
        return Unknown("the GPU shows no temperature")
    if temperature < _HOT_C:
        return None
    return Finding(f"the GPU is at {temperature:.0f} C: it takes its clocks back near 100 C")


_AMDGPU_THERMAL = kernel_doc("gpu/amdgpu/thermal")

RULES: tuple[Rule, ...] = (
    Rule(
        id="tuners-conflict",
        title="several programs set the machine's power",
        when=ALWAYS,
        check=_conflict,
        severity="warning",
        confidence="sure",
        fix="keep one: systemctl disable --now the others",
        sources=(
            github("redhat-performance/tuned", 670),
            Source(
                "power-profiles-daemon",
                "https://gitlab.freedesktop.org/upower/power-profiles-daemon",
            ),
        ),
    ),
    Rule(
        id="tuned-saves-power",
        title="TuneD has a profile that saves power",
        when=ALWAYS,
        check=_saving_profile,
        severity="warning",
        confidence="likely",
        fix="tuned-adm profile accelerator-performance, or let infertune apply a profile",
        sources=(github("kyuz0/amd-strix-halo-toolboxes", 66),),
    ),
    Rule(
        id="governor-powersave",
        title="the governor powersave holds the lowest clock",
        when=ALWAYS,
        check=_governor,
        severity="warning",
        confidence="sure",
        fix="set the governor schedutil or performance",
        sources=(kernel_doc("admin-guide/pm/cpufreq"),),
    ),
    Rule(
        id="preference-power",
        title="the energy preference slows the CPUs",
        when=ALWAYS,
        check=_preference,
        severity="info",
        confidence="likely",
        fix="set energy_performance_preference to balance_performance",
        sources=(kernel_doc("admin-guide/pm/amd-pstate"),),
    ),
    Rule(
        id="cpu-capped",
        title="CPUs are kept from their highest clock",
        when=ALWAYS,
        check=_capped,
        severity="warning",
        confidence="sure",
        fix="write cpuinfo_max_freq to scaling_max_freq, or find the tuner that lowers it",
        sources=(kernel_doc("admin-guide/pm/cpufreq"),),
    ),
    Rule(
        id="cpu-boost-off",
        title="boost is off",
        when=ALWAYS,
        check=_boost_off,
        severity="warning",
        confidence="sure",
        fix="write 1 to /sys/devices/system/cpu/cpufreq/boost",
        sources=(kernel_doc("admin-guide/pm/cpufreq"),),
    ),
    Rule(
        id="platform-profile-low",
        title="the platform profile limits power",
        when=AMDGPU,
        check=_quiet,
        severity="warning",
        confidence="likely",
        fix="set it to balanced or performance (see platform-power-off first)",
        sources=(kernel_doc("userspace-api/sysfs-platform_profile"),),
    ),
    Rule(
        id="on-battery",
        title="the machine runs on its battery",
        when=AMDGPU,
        check=_battery,
        severity="info",
        confidence="sure",
        fix="plug it in before measuring anything",
        sources=(kernel_doc("power/power_supply_class"),),
    ),
    Rule(
        id="gpu-level-low",
        title="the GPU's performance level is not left to the driver",
        when=AMDGPU,
        check=_level,
        severity="warning",
        confidence="sure",
        fix="write auto to power_dpm_force_performance_level",
        sources=(_AMDGPU_THERMAL,),
    ),
    Rule(
        id="gpu-power-cap",
        title="the GPU may draw less power than it was made for",
        when=AMDGPU,
        check=_power_cap,
        severity="info",
        confidence="sure",
        fix="write power1_cap_default to power1_cap, unless it was meant",
        sources=(_AMDGPU_THERMAL,),
    ),
    Rule(
        id="gpu-fan",
        title="the GPU's fan does not follow its temperature",
        when=AMDGPU,
        check=_fan,
        severity="warning",
        confidence="likely",
        fix="write 2 to pwm1_enable: automatic",
        sources=(_AMDGPU_THERMAL,),
    ),
    Rule(
        id="gpu-hot",
        title="the GPU is hot",
        when=AMDGPU,
        check=_hot,
        severity="warning",
        confidence="likely",
        fix="look at fans, dust and the platform profile; a lower clock costs generation nothing",
        sources=(_AMDGPU_THERMAL,),
    ),
)
