# SPDX-License-Identifier: Apache-2.0
"""Device events of this kernel."""

from __future__ import annotations

import ctypes.util
import os
import select

import pytest

from infertune.base.root import Root
from infertune.service.watch import open_udev


@pytest.fixture
def root() -> Root:
    if ctypes.util.find_library("udev") is None:
        pytest.skip("libudev is not installed")
    return Root("/")


def test_a_monitor_opens_and_does_not_block(root: Root) -> None:
    source = open_udev(root)
    assert source is not None
    assert os.readlink(f"/proc/self/fd/{source.fileno()}").startswith("socket:")
    assert list(source.events()) == []


@pytest.mark.root_only
def test_an_event_of_the_kernel_arrives(root: Root) -> None:
    uevent = "/sys/devices/system/cpu/cpu0/uevent"
    if os.geteuid() != 0 or not os.access(uevent, os.W_OK):
        pytest.skip("may not ask the kernel for an event")
    source = open_udev(root)
    assert source is not None
    with open(uevent, "w") as file:  # asks for an event to be sent again; changes nothing
        file.write("change")
    ready, _, _ = select.select([source.fileno()], [], [], 5)
    if not ready:
        pytest.skip("no events reach this network namespace")
    found = source.events()
    assert [(e.subsystem, e.action, e.path) for e in found] == [
        ("cpu", "change", "/sys/devices/system/cpu/cpu0")
    ]
