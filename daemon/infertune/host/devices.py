# SPDX-License-Identifier: Apache-2.0
"""Devices that are not GPUs: the PCI bus, NPUs, power supplies, disks."""

from __future__ import annotations

import os
from collections.abc import Mapping

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.host.gpu import driver_of

_MOST = 400
"""Devices of one bus that are looked at."""

XDNA_IDS = ("1022:17f0", "1022:1502")
"""XDNA 2 (Strix, Strix Halo, Krackan) and XDNA (Phoenix, Hawk Point), amdxdna's table of ids."""


@dataclass(frozen=True, slots=True)
class PciDevice:
    ids: str
    """``1002:1586``."""
    kind: str
    """Class with ``0x``; base class 0x03 is a display controller."""
    driver: str | None


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A device of the kernel's accel class: an NPU."""

    name: str
    """``accel0``."""
    driver: str | None
    model: str
    """amdxdna's vbnv; empty where it has none."""
    firmware: str
    active: bool | None
    """Powered, or suspended; None where the kernel does not say (runtime_pm.rst)."""


def pci_devices(root: Root) -> tuple[PciDevice, ...]:
    """Every device on the PCI bus; empty where the bus cannot be read."""
    found = []
    for path in root.glob("/sys/bus/pci/devices/*")[:_MOST]:
        vendor, device = root.get(f"{path}/vendor"), root.get(f"{path}/device")
        if vendor and device:
            ids = f"{vendor.removeprefix('0x')}:{device.removeprefix('0x')}"
            found.append(PciDevice(ids, root.get(f"{path}/class") or "", driver_of(root, path)))
    return tuple(found)


def accelerators(root: Root) -> tuple[Accelerator, ...]:
    """Every accelerator, with or without a driver."""
    return tuple(accelerator(root, name) for name in accelerator_names(root)[:_MOST])


def accelerator_names(root: Root) -> list[str]:
    """Names of the kernel's accel class."""
    return root.names("/sys/class/accel")


def accelerator(root: Root, name: str) -> Accelerator:
    """One of them, with or without a driver."""
    device = f"/sys/class/accel/{name}/device"
    status = root.get(f"{device}/power/runtime_status")
    return Accelerator(
        name=name,
        driver=driver_of(root, device),
        model=root.get(f"{device}/vbnv") or "",
        firmware=root.get(f"{device}/fw_version") or "",
        active=status == "active" if status in ("active", "suspended") else None,
    )


def on_mains(root: Root) -> bool | None:
    """Whether a power supply is plugged in; None where there is none to ask (a desktop)."""
    # Named by the firmware: AC, ACAD, ADP1; no other supply is called so.
    online = [root.get_int(path) for path in root.glob("/sys/class/power_supply/A*/online")]
    known = [each for each in online if each is not None]
    return any(known) if known else None


@dataclass(frozen=True, slots=True)
class Disk:
    """What reading from a disk depends on (Documentation/block/queue-sysfs.rst, stat.rst)."""

    rotating: bool
    """False for a virtio disk: it says so whatever is behind it."""
    read_ahead_kib: int | None
    reading_ms: int | None
    """Time since boot that reads took, of all of them together."""


def disk_of(root: Root, device: int) -> Disk | None:
    """The disk of a file, by its st_dev; None where it has none (tmpfs), or it is not told."""
    there = root.real(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    # A partition has no queue of its own.
    whole = there if root.exists(f"{there}/queue") else there.rpartition("/")[0]
    rotational = root.get_int(f"{whole}/queue/rotational")
    if rotational is None:
        return None
    words = (root.get(f"{whole}/stat") or "").split()[3:4]
    reading = int(words[0]) if words and words[0].isdecimal() else None
    rotating = rotational == 1 and not whole.rpartition("/")[2].startswith("vd")
    return Disk(rotating, root.get_int(f"{whole}/queue/read_ahead_kb"), reading)


def read_ahead_kib(root: Root) -> Mapping[str, int]:
    """Read-ahead by NVMe disk (Documentation/block/queue-sysfs.rst)."""
    return {
        path.split("/")[3]: value
        for path in root.glob("/sys/block/nvme*/queue/read_ahead_kb")
        if (value := root.get_int(path)) is not None
    }
