# SPDX-License-Identifier: Apache-2.0
"""Other programs that set the same knobs."""

from __future__ import annotations

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.host.cgroup import Cgroup


@dataclass(frozen=True, slots=True)
class Tuner:
    """Another program that sets the same knobs."""

    id: str
    name: str
    running: bool


@dataclass(frozen=True, slots=True)
class KnownTuner:
    """How to recognise a program that sets the same knobs."""

    id: str
    name: str
    units: tuple[str, ...]
    comms: tuple[str, ...]
    """Names of its processes, as the kernel cuts them: 15 characters."""
    marks: tuple[str, ...] = ()
    """Files it leaves while in force, where no process stays."""
    bus_names: tuple[str, ...] = ()
    """Well-known names it takes on the system bus while it runs."""
    writes: tuple[str, ...] = ()
    """Knobs it may set, as patterns of their ids; what its profile of now sets is fewer."""
    profile_file: str | None = None
    """Where it notes the profile it has applied."""


_PPD_NAMES = ("org.freedesktop.UPower.PowerProfiles", "net.hadess.PowerProfiles")
"""power-profiles-daemon's own since 0.20, and before; tuned-ppd and tlp-pd take them too."""

_PPD_WRITES = (
    "platform_profile",
    "cpufreq.energy_performance_preference",
    "cpufreq.scaling_governor",
    "cpufreq.boost",
)

TUNERS: tuple[KnownTuner, ...] = (
    KnownTuner(
        "tuned",
        "TuneD",
        ("tuned.service",),
        ("tuned",),
        bus_names=("com.redhat.tuned",),
        # Plugins acpi, cpu, sysctl, sysfs, video and vm.
        writes=(
            *("platform_profile", "cpufreq.*", "cpu_dma_latency", "vm.*", "kernel.*"),
            *("transparent_hugepage.*", "amdgpu.*", "ksm.*"),
        ),
        profile_file="/etc/tuned/active_profile",
    ),
    KnownTuner(
        "tuned-ppd",
        "tuned-ppd",
        ("tuned-ppd.service",),
        ("tuned-ppd",),
        bus_names=_PPD_NAMES,
    ),
    KnownTuner(
        "power-profiles-daemon",
        "power-profiles-daemon",
        ("power-profiles-daemon.service",),
        ("power-profiles-",),
        bus_names=_PPD_NAMES,
        # Its action amdgpu_dpm lowers the GPU's level in power-saver (0.22).
        writes=(*_PPD_WRITES, "amdgpu.power_dpm_force_performance_level"),
    ),
    KnownTuner(
        "tlp",
        "TLP",
        ("tlp.service", "tlp-pd.service"),
        ("tlp-pd",),
        marks=("/run/tlp/last_pwr",),
        bus_names=_PPD_NAMES,
        writes=(*_PPD_WRITES, "amdgpu.power_dpm_force_performance_level"),
    ),
    KnownTuner(
        "asusd",
        "asusd",
        ("asusd.service",),
        ("asusd",),
        bus_names=("xyz.ljones.Asusd", "org.asuslinux.Daemon"),
        # platform_profile_linked_epp, and the power limits of its profiles.
        writes=("platform_profile", "cpufreq.energy_performance_preference"),
    ),
    KnownTuner(
        "auto-cpufreq",
        "auto-cpufreq",
        ("auto-cpufreq.service",),
        ("auto-cpufreq",),
        writes=_PPD_WRITES,
    ),
    KnownTuner("irqbalance", "irqbalance", ("irqbalance.service",), ("irqbalance",)),
    KnownTuner(
        "gamemode",
        "GameMode",
        ("gamemoded.service",),
        ("gamemoded",),
        writes=(
            "cpufreq.scaling_governor",
            "platform_profile",
            "amdgpu.power_dpm_force_performance_level",
        ),
    ),
    KnownTuner(
        "system76-power",
        "system76-power",
        ("com.system76.PowerDaemon.service", "system76-power.service"),
        ("system76-power",),
        bus_names=("com.system76.PowerDaemon",),
        writes=(*_PPD_WRITES, "vm.*"),
    ),
)


def tuner_by_id(tuner: str) -> KnownTuner:
    """The entry of a tuner that was found on a machine."""
    return next(known for known in TUNERS if known.id == tuner)


_UNIT_DIRECTORIES = ("/etc/systemd/system", "/usr/lib/systemd/system", "/usr/lib/systemd/user")


def tuners(root: Root, cgroup: Cgroup, names: frozenset[str]) -> tuple[Tuner, ...]:
    """The tuners that are installed; running: a service, a process or a mark says so.

    ``names`` are those of processes (processes.comms).
    """
    # systemd's own tree: the v2 one, or beside it the named v1 hierarchy.
    trees = {cgroup.mount, "/sys/fs/cgroup/systemd"} - {None}
    found = []
    for known in TUNERS:
        running = (
            any(root.exists(f"{tree}/system.slice/{u}") for tree in trees for u in known.units)
            or not names.isdisjoint(known.comms)
            or any(map(root.exists, known.marks))
        )
        installed = running or any(
            root.exists(f"{directory}/{unit}")
            for directory in _UNIT_DIRECTORIES
            for unit in known.units
        )
        if installed:
            found.append(Tuner(known.id, known.name, running))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Tuned:
    """What TuneD notes of itself in /etc/tuned."""

    profile: str | None
    """The one it has applied; several words are merged."""
    automatic: bool
    """Whether it chooses one anew when it starts (tuned-adm auto_profile)."""
    added: str | None
    """Profile that is merged over any other one (post_loaded_profile)."""


def tuned(root: Root) -> Tuned | None:
    """None where TuneD notes nothing (tuned/utils/active_profile.py)."""
    profile, mode, added = (
        (root.get(f"/etc/tuned/{name}") or "")[:60] or None
        for name in ("active_profile", "profile_mode", "post_loaded_profile")
    )
    if profile is None and mode is None and added is None:
        return None
    return Tuned(profile, mode == "auto", added)
