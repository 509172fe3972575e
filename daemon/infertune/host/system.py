# SPDX-License-Identifier: Apache-2.0
"""The running system: kernel, command line, boot, distribution, board."""

from __future__ import annotations

import re

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.host.text import bracketed, integer, pairs
from infertune.host.unknown import Unknown

COMMAND_LINE = "/proc/cmdline"
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


@dataclass(frozen=True, slots=True)
class Dmi:
    """What the firmware calls this machine (Documentation/ABI/testing/sysfs-firmware-dmi)."""

    vendor: str | None
    product: str | None
    board: str | None
    bios_version: str | None
    bios_date: str | None


def release(root: Root) -> str | None:
    """Release of the kernel, e.g. ``7.1.3-200.fc44.x86_64``."""
    return root.get("/proc/sys/kernel/osrelease") or None


def command_line(root: Root) -> str | None:
    """The kernel's command line; None where it cannot be read."""
    return root.get(COMMAND_LINE) or None


def command_line_bytes(root: Root) -> bytes:
    """The same as the kernel has it, whatever the encoding.  Raises OSError."""
    return root.read_value(COMMAND_LINE, 64 * 1024)


def parameters(cmdline: str) -> list[tuple[str, str]]:
    """Names and values of a kernel command line, in order; a flag has the value "".

    Double quotes protect spaces, what follows ``--`` is for init
    (Documentation/admin-guide/kernel-parameters.rst).
    """
    found = []
    for word in re.findall(r'(?:[^\s"]|"[^"]*"?)+', cmdline):
        if word == "--":
            break
        name, _, value = word.replace('"', "").partition("=")
        found.append((name, value))
    return found


def loader_number(root: Root) -> int | None:
    """What loaded the kernel, as it told the kernel itself; x86 only, None elsewhere.

    7 is GRUB, 0xd kexec, 0xf something without a number; 2 the kernel's own EFI stub, whoever
    started that, so also newer GRUBs (Documentation/arch/x86/boot.rst, type_of_loader;
    Documentation/admin-guide/sysctl/kernel.rst, bootloader_type: shifted left by 4).
    """
    number = integer(root.get("/proc/sys/kernel/bootloader_type"))
    return number >> 4 if number else None


def machine_id(root: Root) -> str | None:
    """Id of this installation (machine-id(5)), 32 digits; None where it has none."""
    text = root.get("/etc/machine-id") or ""
    return text.lower() if re.fullmatch(r"[0-9a-fA-F]{32}", text) else None


def boot_id(root: Root) -> str:
    """Id of this boot (random(4)); ``unknown`` where the kernel does not say."""
    return root.get(_BOOT_ID) or "unknown"


def booted(root: Root) -> int | Unknown:
    """When the machine was booted, in seconds since 1970."""
    for line in (root.get("/proc/stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name == "btime" and (seconds := integer(value)) is not None and len(value) < 15:
            return seconds
    return Unknown("/proc/stat does not say when the machine was booted")


@dataclass(frozen=True, slots=True)
class CpuTime:
    """What all CPUs together have done since boot, in clock ticks (proc_stat(5))."""

    busy: int
    """Running something; time of guests is in it, stolen time is not."""
    stolen: int
    """Wanted, and given to other guests by the hypervisor."""
    total: int


def cpu_time(root: Root) -> CpuTime | None:
    """The first line of /proc/stat; None where it is not told."""
    words = (root.get("/proc/stat") or "").partition("\n")[0].split()
    numbers = [integer(word) for word in words[1:9]]
    ticks = [each for each in numbers if each is not None]
    if words[:1] != ["cpu"] or len(ticks) < 8:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, stolen = ticks
    return CpuTime(user + nice + system + irq + softirq, stolen, sum(ticks))


def load_average(root: Root) -> float | None:
    """Runnable tasks over the last minute."""
    found = re.match(r"\d+\.\d+", root.get("/proc/loadavg") or "")
    return float(found[0]) if found else None


def os_release(root: Root) -> dict[str, str]:
    """os-release(5): the file of /etc counts before the one of /usr/lib."""
    text = root.get("/etc/os-release") or root.get("/usr/lib/os-release")
    return {key: value.strip("\"'") for key, value in pairs(text, "=").items()}


def product(root: Root) -> str | None:
    """What the firmware calls this machine."""
    return _dmi(root, "product_name")


def dmi(root: Root) -> Dmi:
    """Vendor, product, board and firmware."""
    return Dmi(
        vendor=_dmi(root, "sys_vendor"),
        product=product(root),
        board=_dmi(root, "board_name"),
        bios_version=_dmi(root, "bios_version"),
        bios_date=_dmi(root, "bios_date"),
    )


def _dmi(root: Root, name: str) -> str | None:
    return root.get(f"/sys/class/dmi/id/{name}") or None


def hostname(root: Root) -> str:
    """Name of this machine; empty where it has none."""
    return root.get("/proc/sys/kernel/hostname") or root.get("/etc/hostname") or ""


def lockdown(root: Root) -> str | None:
    """Mode of kernel lockdown: none, integrity or confidentiality (kernel_lockdown(7))."""
    return bracketed(root.get("/sys/kernel/security/lockdown"))


def locked_limit(root: Root) -> int | None:
    """RLIMIT_MEMLOCK (hard) of this process in bytes; None for no limit, or where none is told."""
    limits = root.get("/proc/self/limits") or ""
    found = re.search(r"^Max locked memory\s+\S+\s+(\d+|unlimited)\s", f"{limits} ", re.MULTILINE)
    return int(found[1]) if found and found[1] != "unlimited" else None
