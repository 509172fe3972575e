# SPDX-License-Identifier: Apache-2.0
"""What happens to the machine: devices that come and go.  No polling; idle means asleep.

What has no event is found when somebody asks: a sysctl or a sysfs file that an
admin writes wakes nobody up (inotify does not fire there).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.base.units import parse_cpulist
from infertune.service.udev import Monitor

SUBSYSTEMS = ("cpu", "drm", "power_supply", "platform-profile", "module")
_ONLINE, _WEDGED = "POWER_SUPPLY_ONLINE", "WEDGED"
UDEVD = "/run/udev/control"
"""There where udevd runs (libudev asks the same)."""


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """One event of the kernel's device model."""

    subsystem: str
    action: str
    path: str
    """Below /sys: ``/sys/devices/system/cpu/cpu3``."""
    online: str | None = None
    """POWER_SUPPLY_ONLINE of a power supply; None for others and for batteries."""
    wedged: bool = False
    """A GPU that was reset (drm-uapi, device wedging; amdgpu since Linux 6.15)."""


class Source(Protocol):
    """Where device events come from."""

    def fileno(self) -> int:
        """Readable when there are events."""

    def events(self) -> Sequence[DeviceEvent]:
        """Those that wait; never blocks."""


class Udev:
    """Device events from udevd, or from the kernel itself where there is none."""

    def __init__(self, root: Root) -> None:
        # From udevd they come after its rules ran: a rule may set a knob as well.
        source = "udev" if root.exists(UDEVD) else "kernel"
        self._monitor = Monitor(source, SUBSYSTEMS, (_ONLINE, _WEDGED))

    def fileno(self) -> int:
        return self._monitor.fileno()

    def events(self) -> Sequence[DeviceEvent]:
        return [
            DeviceEvent(
                subsystem=each.subsystem,
                action=each.action,
                path=each.path,
                online=each.properties.get(_ONLINE),
                wedged=_WEDGED in each.properties,
            )
            for each in self._monitor.events()
        ]


def open_udev(root: Root) -> Source | None:
    """Device events of this machine; None for a recorded one.  Raises OSError."""
    return Udev(root) if root.live else None


def started_anew(root: Root, events: Collection[DeviceEvent]) -> Callable[[str], bool]:
    """Whether one of ``events`` may have started a file anew, so that nobody chose its value.

    A change of a platform profile is not such an event: the kernel sends it for
    an admin's write and for the firmware's own alike.
    """
    cpus = {
        int(name.removeprefix("cpu"))
        for event in events
        if event.subsystem == "cpu" and event.action in ("online", "add")
        if (name := event.path.rpartition("/")[2]).removeprefix("cpu").isdecimal()
    }
    gpus = {
        root.real(f"{event.path}/device")
        for event in events
        if event.subsystem == "drm" and (event.action == "add" or event.wedged)
    }
    profile = any(
        event.subsystem == "platform-profile" and event.action == "add" for event in events
    )

    def anew(path: str) -> bool:
        if path.startswith("/sys/devices/system/cpu/cpufreq/policy"):
            # A policy that had another CPU online all the time is not a new one.
            policy = path.rpartition("/")[0]
            return bool(cpus) and _cpus_of(root, policy) <= cpus
        if path.startswith("/sys/class/drm/"):
            return root.real(path).rpartition("/")[0] in gpus
        return profile and path.rpartition("/")[2] == "platform_profile"

    return anew


def _cpus_of(root: Root, policy: str) -> set[int]:
    text = root.get(f"{policy}/affected_cpus") or ""
    try:
        return set(parse_cpulist(",".join(text.split())))
    except ValueError:
        return set()


class PowerSupplies:
    """Whether the machine changed between mains and battery; supplies report far more often."""

    def __init__(self) -> None:
        self._online: dict[str, str] = {}

    def changed(self, events: Collection[DeviceEvent]) -> bool:
        """Take in ``events``; True if one of them is news.  The first word of a supply is."""
        before = dict(self._online)
        for event in events:
            if event.subsystem == "power_supply" and event.online is not None:
                self._online[event.path] = event.online
        return self._online != before


def worth_a_look(events: Collection[DeviceEvent]) -> bool:
    """Whether anything but a power supply said something."""
    return any(event.subsystem != "power_supply" for event in events)
