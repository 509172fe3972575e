# SPDX-License-Identifier: Apache-2.0
"""The processor: model, cores, caches, and how its clocks are driven."""

from __future__ import annotations

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.base.units import parse_cpulist
from infertune.host.text import pairs

CPUS = "/sys/devices/system/cpu"


@dataclass(frozen=True, slots=True)
class Core:
    """One physical core."""

    cpus: tuple[int, ...]
    """Logical CPUs (SMT siblings), lowest first."""
    package: int | None
    l3: int | None
    """Number of the last-level cache group (CCD on Zen), the lowest CPU that shares it."""
    kind: str | None
    """"performance" or "efficiency" on a hybrid processor, else None."""


@dataclass(frozen=True, slots=True)
class Cpu:
    vendor: str | None
    model: str | None
    online: tuple[int, ...]
    cores: tuple[Core, ...]
    scaling_driver: str | None
    """cpufreq driver of the first policy, e.g. ``amd-pstate-epp``."""
    amd_pstate: str | None
    """/sys/devices/system/cpu/amd_pstate/status: active, guided, passive, disable."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One cpufreq policy: its clock and its limits in kHz, and what chooses them.

    admin-guide/pm/cpufreq.
    """

    number: str
    """0 of ``policy0``."""
    current: int | None
    scaling_min: int | None
    scaling_max: int | None
    hardware_min: int | None
    hardware_max: int | None
    firmware_max: int | None
    """bios_limit."""
    governor: str | None
    preference: str | None
    """energy_performance_preference."""


def cpulist(root: Root, path: str) -> frozenset[int]:
    """CPUs or nodes that a file lists; empty where there is none."""
    try:
        return parse_cpulist(root.get(path) or "")
    except ValueError:
        return frozenset()


def numa_nodes(root: Root) -> int | None:
    """How many NUMA nodes are online; None where the kernel does not say."""
    return len(cpulist(root, "/sys/devices/system/node/online")) or None


def model_name(root: Root) -> str | None:
    """As /proc/cpuinfo names the first CPU: ``AMD RYZEN AI MAX+ 395 w/ Radeon 8060S``."""
    return _first_processor(root).get("model name")


def _first_processor(root: Root) -> dict[str, str]:
    # An empty line ends each; a large machine has hundreds of them.
    return pairs((root.get("/proc/cpuinfo") or "").partition("\n\n")[0], ":")


def cpu(root: Root) -> Cpu:
    """Cores with their siblings, cache groups and kinds; only CPUs that are online."""
    info = _first_processor(root)
    online = frozenset(online_cpus(root))
    efficient = _efficient_cpus(root, online)
    cores: dict[int, Core] = {}
    for number in sorted(online):
        here = f"{CPUS}/cpu{number}"
        # core_cpus_list since Linux 5.3, thread_siblings_list is its older name.
        siblings = cpulist(root, f"{here}/topology/core_cpus_list") or cpulist(
            root, f"{here}/topology/thread_siblings_list"
        )
        cpus = tuple(sorted(siblings & online)) or (number,)
        if cpus[0] in cores:
            continue
        cores[cpus[0]] = Core(
            cpus=cpus,
            package=package(root, number),
            l3=_l3_group(root, here),
            kind=("efficiency" if number in efficient else "performance") if efficient else None,
        )
    return Cpu(
        vendor=info.get("vendor_id"),
        model=info.get("model name"),
        online=tuple(sorted(online)),
        cores=tuple(cores.values()),
        scaling_driver=scaling_driver(root),
        amd_pstate=amd_pstate(root),
    )


def scaling_driver(root: Root) -> str | None:
    """cpufreq driver of the first policy; it is another one after a write to amd_pstate/status."""
    drivers = root.glob(f"{CPUS}/cpufreq/policy*/scaling_driver")
    return (root.get(drivers[0]) or None) if drivers else None


def amd_pstate(root: Root) -> str | None:
    """Mode of amd-pstate (admin-guide/pm/amd-pstate)."""
    return root.get(f"{CPUS}/amd_pstate/status") or None


def online_cpus(root: Root) -> tuple[int, ...]:
    """CPUs that are online, lowest first."""
    return tuple(sorted(cpulist(root, f"{CPUS}/online")))


def package(root: Root, number: int) -> int | None:
    """The package that a CPU is in; None where the kernel does not say."""
    return root.get_int(f"{CPUS}/cpu{number}/topology/physical_package_id")


def _l3_group(root: Root, here: str) -> int | None:
    for level in root.glob(f"{here}/cache/index*/level"):
        if root.get_int(level) == 3:
            shared = cpulist(root, level.removesuffix("level") + "shared_cpu_list")
            return min(shared, default=None)
    return None


def _efficient_cpus(root: Root, online: frozenset[int]) -> frozenset[int]:
    """The small CPUs of a hybrid processor; empty where all are alike.

    Intel's PMUs name them (cpu_atom, cpu_lowpower beside cpu_core).  Elsewhere the scheduler's
    capacity tells: favoured cores of one kind differ by a few percent, kinds by far more.
    """
    if root.exists("/sys/devices/cpu_core"):
        return cpulist(root, "/sys/devices/cpu_atom/cpus") | cpulist(
            root, "/sys/devices/cpu_lowpower/cpus"
        )
    capacity = {
        number: value
        for number in online
        if (value := root.get_int(f"{CPUS}/cpu{number}/cpu_capacity"))
    }
    largest = max(capacity.values(), default=0)
    return frozenset(number for number, value in capacity.items() if value < 0.75 * largest)


def policies(root: Root, most: int) -> tuple[Policy, ...]:
    """cpufreq policies, at most so many; empty where nothing scales the clocks."""
    return tuple(_policy(root, number) for number in policy_numbers(root)[:most])


def policy_numbers(root: Root) -> list[str]:
    """Which cpufreq policies there are, in order; empty where nothing scales the clocks."""
    return [path.rpartition("policy")[2] for path in root.glob(f"{CPUS}/cpufreq/policy*")]


def clock(root: Root, number: str) -> int | None:
    """Clock of a policy now, in kHz."""
    return root.get_int(f"{CPUS}/cpufreq/policy{number}/scaling_cur_freq")


def _policy(root: Root, number: str) -> Policy:
    path = f"{CPUS}/cpufreq/policy{number}"
    return Policy(
        number=number,
        current=clock(root, number),
        scaling_min=root.get_int(f"{path}/scaling_min_freq"),
        scaling_max=root.get_int(f"{path}/scaling_max_freq"),
        hardware_min=root.get_int(f"{path}/cpuinfo_min_freq"),
        hardware_max=root.get_int(f"{path}/cpuinfo_max_freq"),
        firmware_max=root.get_int(f"{path}/bios_limit"),
        governor=root.get(f"{path}/scaling_governor") or None,
        preference=root.get(f"{path}/energy_performance_preference") or None,
    )


def boost(root: Root) -> bool | None:
    """Whether boost is on; None where there is no such switch."""
    value = root.get_int(f"{CPUS}/cpufreq/boost")
    return None if value is None else value == 1


def platform_profile(root: Root) -> str | None:
    """The firmware's power profile (userspace-api/sysfs-platform_profile)."""
    return root.get("/sys/firmware/acpi/platform_profile") or None
