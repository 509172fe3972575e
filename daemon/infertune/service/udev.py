# SPDX-License-Identifier: Apache-2.0
"""Events of devices through libudev.so.1 of the system (libudev(3)), by ctypes.

The library is systemd's or eudev's, and there where udevd is.  A binding of it costs the daemon
1.4 MiB, which is more than all that is asked of it: a socket on our loop, and what arrives there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from ctypes import c_char_p, c_int, c_void_p
from typing import Any

from infertune.base.records import dataclass

_NAME = "libudev.so.1"

_FUNCTIONS: dict[str, tuple[type, tuple[type, ...]]] = {
    "udev_new": (c_void_p, ()),
    "udev_unref": (c_void_p, (c_void_p,)),
    "udev_monitor_new_from_netlink": (c_void_p, (c_void_p, c_char_p)),
    "udev_monitor_filter_add_match_subsystem_devtype": (c_int, (c_void_p, c_char_p, c_char_p)),
    "udev_monitor_enable_receiving": (c_int, (c_void_p,)),
    "udev_monitor_get_fd": (c_int, (c_void_p,)),
    "udev_monitor_receive_device": (c_void_p, (c_void_p,)),
    "udev_monitor_unref": (c_void_p, (c_void_p,)),
    "udev_device_get_subsystem": (c_char_p, (c_void_p,)),
    "udev_device_get_action": (c_char_p, (c_void_p,)),
    "udev_device_get_syspath": (c_char_p, (c_void_p,)),
    "udev_device_get_property_value": (c_char_p, (c_void_p, c_char_p)),
    "udev_device_unref": (c_void_p, (c_void_p,)),
}
"""What they give and take; structures are void pointers."""


@dataclass(frozen=True, slots=True)
class Event:
    """What was said of a device."""

    subsystem: str
    action: str
    path: str
    """Below /sys."""
    properties: Mapping[str, str]
    """Those that were asked for and that it has."""


class Monitor:
    """Events of some subsystems, from udevd (``udev``) or from the kernel itself (``kernel``)."""

    def __init__(self, source: str, subsystems: Sequence[str], properties: Sequence[str]) -> None:
        """Raises OSError where events cannot be had."""
        library = _library()
        self._udev = c_void_p(library.udev_new())
        self._monitor = c_void_p(library.udev_monitor_new_from_netlink(self._udev, source.encode()))
        self._library = library
        self._properties = properties
        if not self._monitor:
            raise OSError(None, "libudev opens no socket for events")
        for subsystem in subsystems:
            self._filter(subsystem)
        if self._library.udev_monitor_enable_receiving(self._monitor) < 0:
            raise OSError(None, "libudev receives no events")

    def _filter(self, subsystem: str) -> None:
        add = self._library.udev_monitor_filter_add_match_subsystem_devtype
        if add(self._monitor, subsystem.encode(), None) < 0:
            raise OSError(None, f"libudev has no filter for {subsystem}")

    def fileno(self) -> int:
        """Readable when there are events."""
        return int(self._library.udev_monitor_get_fd(self._monitor))

    def events(self) -> Iterator[Event]:
        """Those that wait; never blocks."""
        library = self._library
        while device := library.udev_monitor_receive_device(self._monitor):
            try:
                found = (
                    (name, library.udev_device_get_property_value(device, name.encode()))
                    for name in self._properties
                )
                yield Event(
                    _text(library.udev_device_get_subsystem(device)),
                    _text(library.udev_device_get_action(device)),
                    _text(library.udev_device_get_syspath(device)),
                    {name: _text(value) for name, value in found if value is not None},
                )
            finally:
                library.udev_device_unref(device)

    def __del__(self) -> None:
        if not hasattr(self, "_library"):  # there was none to open it with
            return
        self._library.udev_monitor_unref(self._monitor)
        self._library.udev_unref(self._udev)


def _library() -> Any:
    """libudev, ready to use.  Raises OSError where there is none, or one that lacks a function."""
    library = ctypes.CDLL(_NAME)
    try:
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise OSError(None, str(error)) from None
    return library


def _text(data: bytes | None) -> str:
    return (data or b"").decode("utf-8", "replace")
