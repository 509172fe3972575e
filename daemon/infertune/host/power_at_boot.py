# SPDX-License-Identifier: Apache-2.0
"""What power services set when they start, whatever was set since: their saved or configured state.

Read as simply as the files are: a service that takes its settings elsewhere is not found here.
"""

from __future__ import annotations

import re
from typing import Literal

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.host.ini import drop_ins, part_of, sections

Setting = Literal["TuneD profile", "platform profile", "governor", "energy preference"]


@dataclass(frozen=True, slots=True)
class PowerAtBoot:
    """One setting that one service makes at its start."""

    service: str
    """Id of a tuner (host/tuners.py)."""
    setting: Setting
    value: str
    path: str
    """The file that says so."""


def power_at_boot(root: Root) -> tuple[PowerAtBoot, ...]:
    """Of every service that has such a file, whether it runs or not."""
    readers = (_tuned_ppd, _power_profiles_daemon, _tlp, _auto_cpufreq, _asusd)
    return tuple(each for read in readers for each in read(root))


def _tuned_ppd(root: Root) -> list[PowerAtBoot]:
    """tuned/ppd/controller.py, initialize: the saved base profile, else the default, is applied."""
    config = "/etc/tuned/ppd.conf"
    table = sections(part_of(root, config))
    saved = (part_of(root, "/etc/tuned/ppd_base_profile") or "").strip()
    base = saved or table.get("main", {}).get("default", "")
    profile = table.get("profiles", {}).get(base)
    if profile is None:
        return []
    path = "/etc/tuned/ppd_base_profile" if saved else config
    return [PowerAtBoot("tuned-ppd", "TuneD profile", profile, path)]


_PLATFORM_PROFILES = {"power-saver": "low-power"}
"""power-profiles-daemon's words that the kernel has another for."""


def _power_profiles_daemon(root: Root) -> list[PowerAtBoot]:
    """ppd's load_configuration: the last chosen profile is activated again."""
    path = "/var/lib/power-profiles-daemon/state.ini"
    profile = sections(part_of(root, path)).get("State", {}).get("Profile")
    if profile is None:
        return []
    word = _PLATFORM_PROFILES.get(profile, profile)
    return [PowerAtBoot("power-profiles-daemon", "platform profile", word, path)]


def _tlp(root: Root) -> list[PowerAtBoot]:
    """TLP's settings on mains; later files win, /etc/tlp.conf over all (TLP, Configuration)."""
    found: dict[str, tuple[str, str]] = {}
    for path in [*drop_ins(root, ("/etc/tlp.d",)), "/etc/tlp.conf"]:
        settings = sections(part_of(root, path)).get("", {})
        plain = {key: value.partition("#")[0].strip(" \"'") for key, value in settings.items()}
        found |= {key: (value, path) for key, value in plain.items()}
    # Since TLP 1.9 the profile that is chosen on mains decides which settings these are.
    profile, _ = found.get("TLP_PROFILE_AC", ("PRF", ""))
    ending = {"BAL": "BAT", "SAV": "SAV"}.get(profile, "AC")
    return [
        PowerAtBoot("tlp", setting, *found[key])
        for name, setting in _TLP_SETTINGS.items()
        if found.get(key := f"{name}_ON_{ending}", ("", ""))[0]
    ]


_TLP_SETTINGS: dict[str, Setting] = {
    "PLATFORM_PROFILE": "platform profile",
    "CPU_SCALING_GOVERNOR": "governor",
    "CPU_ENERGY_PERF_POLICY": "energy preference",
}


def _auto_cpufreq(root: Root) -> list[PowerAtBoot]:
    """auto-cpufreq's section for mains."""
    path = "/etc/auto-cpufreq.conf"
    charger = sections(part_of(root, path)).get("charger", {})
    settings: dict[str, Setting] = {
        "governor": "governor",
        "energy_performance_preference": "energy preference",
        "platform_profile": "platform profile",
    }
    return [
        PowerAtBoot("auto-cpufreq", setting, charger[key], path)
        for key, setting in settings.items()
        if charger.get(key)
    ]


def _asusd(root: Root) -> list[PowerAtBoot]:
    """asusd's profile on mains, where it may change it (update_policy_ac_or_bat of asusctl)."""
    path = "/etc/asusd/asusd.ron"
    found = dict(re.findall(r"^\s*(\w+):\s*(\w+),", part_of(root, path) or "", re.MULTILINE))
    word = found.get("platform_profile_on_ac")
    if word is None or found.get("change_platform_profile_on_ac", "true") != "true":
        return []
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", word).lower()  # LowPower is low-power
    # asus-wmi has called quiet low-power since Linux 6.14, and asusd takes either.
    choices = (root.get("/sys/firmware/acpi/platform_profile_choices") or "").split()
    if name == "quiet" and "low-power" in choices and "quiet" not in choices:
        name = "low-power"
    return [PowerAtBoot("asusd", "platform profile", name, path)]
