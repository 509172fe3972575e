# SPDX-License-Identifier: Apache-2.0
"""Power: other programs that set it, limits that cost speed, and what a boot changes."""

from __future__ import annotations

import re

from infertune.catalogue.knobs import KNOBS
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
from infertune.doctor.conditions import AMDGPU
from infertune.doctor.facts import Facts, Processor
from infertune.host.boot_writes import BootWrite
from infertune.host.power_at_boot import PowerAtBoot
from infertune.host.tuners import Tuned

_POWER = ("tuned", "power-profiles-daemon", "tlp", "auto-cpufreq", "system76-power")
"""Tuners each of which sets governor, preference and platform profile."""


def _conflict(facts: Facts) -> Answer:
    running = [each for each in facts.machine.tuners if each.running and each.id in _POWER]
    if len(running) < 2:
        return None
    names = " and ".join(each.name for each in running)
    return Finding(f"{names} are running: each undoes what the other sets")


_SAVING = ("powersave", "laptop-battery-powersave", "balanced-battery", "spindown-disk")


_SILENT = Unknown("TuneD runs, and its profile is not shown here")


def _tuned(facts: Facts) -> Tuned | None:
    """None where TuneD does not run.  Raises Missing where it runs and notes nothing."""
    return need(need(facts.tuned) or _SILENT) if runs(facts, "tuned") else None


def _saving_profile(facts: Facts) -> Answer:
    tuned = _tuned(facts)
    if tuned is None:
        return None
    if any(name in _SAVING for name in (tuned.added or "").split()):
        return Finding(
            f"TuneD merges {tuned.added}, which saves power, into every profile "
            "(/etc/tuned/post_loaded_profile)",
            fix="empty /etc/tuned/post_loaded_profile, and restart tuned",
        )
    if any(name in _SAVING for name in (tuned.profile or "").split()):
        return Finding(f"TuneD's profile is {tuned.profile}, which saves power")
    return None


_RECOMMENDED = re.compile(
    r"(?:balanced|balanced-battery|desktop|powersave|throughput-performance|virtual-guest"
    r"|virtual-host|atomic-\w+|cpu-partitioning.*|mssql|spectrumscale-ece|openshift.*|aws)"
)
"""Profiles that TuneD's own recommend.conf names."""


def _automatic(facts: Facts) -> Answer:
    tuned = _tuned(facts)
    if tuned is None or not tuned.automatic or tuned.profile is None:
        return None
    if _RECOMMENDED.fullmatch(tuned.profile):
        return None
    return Finding(
        f"TuneD's profile is {tuned.profile} and its mode is auto (/etc/tuned/profile_mode): at "
        "each boot it chooses the profile it recommends instead",
        fix=f"run 'tuned-adm profile {tuned.profile}', which makes the mode manual",
    )


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
    return Finding(f"the governor is powersave with {driver}: CPUs stay at their lowest clock")


def _preference(facts: Facts) -> Answer:
    preferences = _cpufreq(facts).preferences
    if "power" not in preferences:
        return None
    return Finding("the energy preference is power: CPUs are slow to raise their clocks")


def _capped(facts: Facts) -> Answer:
    share = _cpufreq(facts).lowest_limit
    if share is None:
        return Unknown("the limits of the CPUs' clocks cannot be read")
    if share >= 0.9:
        return None
    return Finding(f"scaling_max_freq limits a CPU to {share:.0%} of its highest clock")


def _boost_off(facts: Facts) -> Answer:
    if _cpufreq(facts).boost is not False:
        return None  # without the file there is no such switch
    return Finding("cpufreq/boost is 0: CPUs stay at their base clock")


def _quiet(facts: Facts) -> Answer:
    profile = need(facts.processor).platform_profile
    if profile not in ("low-power", "quiet", "cool"):
        return None
    return Finding(f"the platform profile is {profile}: the firmware limits CPU and GPU power")


def _battery(facts: Facts) -> Answer:
    if need(facts.processor).mains is not False:
        return None
    return Finding("the machine runs on battery: the firmware limits power")


def _level(facts: Facts) -> Answer:
    level = need(facts.sensors).level
    if level is None:
        return Unknown("the driver shows no performance level")
    if level in ("auto", "high", "profile_peak"):
        return None
    if level in ("low", "profile_min_sclk", "profile_min_mclk"):
        return Finding(f"the GPU level is {level}: the GPU stays at its lowest clock")
    return Finding(f"the GPU level is {level}: another program sets the clocks", "info", "likely")


def _power_cap(facts: Facts) -> Answer:
    sensors = need(facts.sensors)
    cap, default = sensors.cap_watts, sensors.cap_default_watts
    if cap is None or default is None:
        return None  # the firmware alone limits this GPU's power
    if cap >= 0.95 * default:
        return None
    return Finding(
        f"the GPU may draw {cap:.0f} W; the default is {default:.0f} W",
        fix=f"write {default * 1e6:.0f} to power1_cap, unless the limit is meant",
    )


_HOT_C = 90.0


def _fan(facts: Facts) -> Answer:
    sensors = need(facts.sensors)
    if sensors.temperature_c is None and sensors.fan_rpm is None:
        return Unknown("the GPU shows no sensors")
    if sensors.fan_by_hand:
        return Finding("the GPU's fan is in manual mode and does not follow the temperature")
    if sensors.fan_rpm == 0 and (sensors.temperature_c or 0) >= _HOT_C:
        return Finding(f"the GPU is at {sensors.temperature_c:.0f} C and its fan is not turning")
    return None


def _hot(facts: Facts) -> Answer:
    temperature = need(facts.sensors).temperature_c
    if temperature is None:
        return Unknown("the GPU shows no temperature")
    if temperature < _HOT_C:
        return None
    return Finding(f"the GPU is at {temperature:.0f} C: it lowers its clocks near 100 C")


def runs(facts: Facts, service: str) -> bool:
    """Whether a service that sets power runs."""
    return any(each.id == service and each.running for each in facts.machine.tuners)


def _tuned_base(facts: Facts) -> Answer:
    if not (runs(facts, "tuned") and runs(facts, "tuned-ppd")):
        return None
    tuned = _tuned(facts)
    profile = tuned.profile if tuned else None
    base = next((each for each in need(facts.power_at_boot) if each.service == "tuned-ppd"), None)
    if base is None:
        return Unknown("tuned-ppd's configuration cannot be read here")
    if profile is None or profile == base.value:
        return None
    return Finding(
        f"TuneD's profile is {profile} only until tuned-ppd next starts, at boot at the latest: it "
        f"then switches to {base.value} ({base.path})",
        fix=f"write performance={profile} below [profiles] in /etc/tuned/ppd.conf, restart "
        "tuned-ppd, and choose performance (powerprofilesctl set performance)",
    )


_FAST = ("performance", "max-power")


def short_lived(facts: Facts) -> list[PowerAtBoot]:
    """What running services set lower at their start than it is now.  Raises Missing."""
    processor = need(facts.processor)
    tuned = need(facts.tuned)
    profile = tuned.profile if tuned else None
    now = {
        "platform profile": {processor.platform_profile},
        "governor": processor.governors,
        "energy preference": processor.preferences,
        "TuneD profile": {profile},
    }

    def is_fast(each: PowerAtBoot) -> bool:
        values = now[each.setting]
        return each.setting == "TuneD profile" or (bool(values) and values <= {*_FAST})

    return [
        each
        for each in need(facts.power_at_boot)
        if runs(facts, each.service) and is_fast(each) and each.value not in now[each.setting]
    ]


def _set_back(facts: Facts) -> Answer:
    # A profile of TuneD's is what tuned-ppd-base is about.
    found = [each for each in short_lived(facts) if each.setting != "TuneD profile"]
    if not found:
        return _not_saved(facts)
    first = found[0]
    return Finding(
        f"the {first.setting} is performance only until {first.service} next starts, at boot at "
        f"the latest: it then sets {first.value} ({first.path})"
    )


def _not_saved(facts: Facts) -> Unknown | None:
    """power-profiles-daemon saves what is chosen; a profile it has not saved is not its own."""
    service = "power-profiles-daemon"
    saved = any(each.service == service for each in need(facts.power_at_boot))
    if saved or not runs(facts, service) or need(facts.processor).platform_profile not in _FAST:
        return None
    return Unknown(f"what {service} sets at boot is not shown here")


_KNOB_PATHS = frozenset(path for knob in KNOBS.values() for path in knob.paths if "*" not in path)


def _rewritten(facts: Facts) -> Answer:
    found = [
        each
        for each in need(facts.boot_writes)
        if each.path in _KNOB_PATHS and each.live is not None and each.live != each.value
    ]
    if not found:
        return None
    return Finding("; ".join(map(_told, found)))


def _told(write: BootWrite) -> str:
    sysctl = write.path.removeprefix("/proc/sys/")
    name = write.path if sysctl == write.path else sysctl.replace("/", ".")
    return f"{name} is {write.live}, and {write.source} writes {write.value} at each boot"


_AMDGPU_THERMAL = kernel_doc("gpu/amdgpu/thermal")

RULES: tuple[Rule, ...] = (
    Rule(
        id="tuners-conflict",
        title="several programs set the machine's power",
        check=_conflict,
        confidence="sure",
        fix="keep one, and 'systemctl disable --now' the others",
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
        check=_saving_profile,
        fix="'tuned-adm profile accelerator-performance', or apply a profile of infertune's",
        sources=(github("kyuz0/amd-strix-halo-toolboxes", 66),),
        covers=("platform-profile-low", "preference-power"),
    ),
    Rule(
        id="governor-powersave",
        title="the governor powersave keeps CPUs at the lowest clock",
        check=_governor,
        confidence="sure",
        fix="set the governor schedutil or performance",
        sources=(kernel_doc("admin-guide/pm/cpufreq"),),
    ),
    Rule(
        id="preference-power",
        title="the energy preference slows the CPUs",
        check=_preference,
        severity="info",
        fix="set energy_performance_preference to balance_performance",
        sources=(kernel_doc("admin-guide/pm/amd-pstate"),),
    ),
    Rule(
        id="cpu-capped",
        title="CPUs may not reach their highest clock",
        check=_capped,
        confidence="sure",
        fix="write cpuinfo_max_freq to scaling_max_freq, or find the tuner that lowers it",
        sources=(kernel_doc("admin-guide/pm/cpufreq"),),
    ),
    Rule(
        id="cpu-boost-off",
        title="boost is off",
        check=_boost_off,
        confidence="sure",
        fix="write 1 to /sys/devices/system/cpu/cpufreq/boost",
        sources=(kernel_doc("admin-guide/pm/cpufreq"),),
    ),
    Rule(
        id="platform-profile-low",
        title="the platform profile limits power",
        when=AMDGPU,
        check=_quiet,
        fix="set it to balanced or performance (see platform-power-off first)",
        sources=(kernel_doc("userspace-api/sysfs-platform_profile"),),
    ),
    Rule(
        id="on-battery",
        title="the machine runs on battery",
        when=AMDGPU,
        check=_battery,
        severity="info",
        confidence="sure",
        fix="plug it in before measuring",
        sources=(kernel_doc("power/power_supply_class"),),
    ),
    Rule(
        id="gpu-level-low",
        title="the GPU's performance level is not left to the driver",
        when=AMDGPU,
        check=_level,
        confidence="sure",
        fix="write auto to power_dpm_force_performance_level",
        sources=(_AMDGPU_THERMAL,),
    ),
    Rule(
        id="gpu-power-cap",
        title="the GPU's power limit is below its default",
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
        fix="write 2 to pwm1_enable: automatic",
        sources=(_AMDGPU_THERMAL,),
    ),
    Rule(
        id="gpu-hot",
        title="the GPU is hot",
        when=AMDGPU,
        check=_hot,
        fix="check fans, dust and the platform profile; a lower clock costs generation nothing",
        sources=(_AMDGPU_THERMAL,),
    ),
    Rule(
        id="tuned-ppd-base",
        title="tuned-ppd goes back to its own profile at the next boot",
        check=_tuned_base,
        severity="info",
        confidence="sure",
        fix="map a profile of tuned-ppd to it in /etc/tuned/ppd.conf",
        sources=(
            github("redhat-performance/tuned", 669),
            github("ublue-os/bluefin", 1824),
            github("ublue-os/bazzite", 907),
        ),
    ),
    Rule(
        id="tuned-auto",
        title="TuneD chooses another profile at each boot",
        check=_automatic,
        severity="info",
        # A recommend.conf of the owner's may name the profile.
        fix="choose the profile with tuned-adm",
        sources=(
            Source(
                "TuneD: daemon.py",
                "https://github.com/redhat-performance/tuned/blob/master/tuned/daemon/daemon.py",
            ),
        ),
    ),
    Rule(
        id="power-set-back",
        title="a power service will lower at the next boot what is set now",
        check=_set_back,
        severity="info",
        fix="choose performance in that service (powerprofilesctl, asusctl, tlp.conf), or have "
        "infertune apply its profile at boot",
        sources=(
            Source(
                "power-profiles-daemon",
                "https://gitlab.freedesktop.org/upower/power-profiles-daemon",
            ),
            Source("TLP: settings", "https://linrunner.de/tlp/settings/platform.html"),
            Source("asusctl", "https://gitlab.com/asus-linux/asusctl"),
            Source("auto-cpufreq", "https://github.com/AdnanHodzic/auto-cpufreq"),
        ),
    ),
    Rule(
        id="boot-writes-again",
        title="sysctl.d or tmpfiles.d writes another value at each boot",
        check=_rewritten,
        severity="info",
        confidence="sure",
        fix="change the file, or have infertune apply its profile at boot",
        sources=(
            Source(
                "sysctl.d(5)",
                "https://www.freedesktop.org/software/systemd/man/latest/sysctl.d.html",
            ),
            Source(
                "tmpfiles.d(5)",
                "https://www.freedesktop.org/software/systemd/man/latest/tmpfiles.d.html",
            ),
        ),
    ),
)
