# SPDX-License-Identifier: Apache-2.0
"""Guests for the tests of tests/vm: booted once, infertune installed from a fresh wheel.

``guest``       each of the kernels in turn: 6.12, and the newest 7.x with 1 GiB
``guest_612``   Linux 6.12, two NUMA nodes, 2 GiB
``service``     ``guest`` with the service set up and running

``ready``       a function: the image of a machine that a boot loader starts (efi.py), with
                infertune set up on it and a profile of kernel words
``efi``         a function: such a machine, started afresh for each test

A test puts back what it changes: the next one is given the same guest.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vm import lab
from vm.circle import PROFILE, Stack
from vm.efi import EfiGuest
from vm.guest import STATE, Guest

HERE = Path(__file__).parent
TIMEOUT_S = 1200
"""Of one test: the first also builds the image and boots."""


OURS = (
    "find /etc /run /usr/share /var/lib -xdev -iname '*infertune*' -not -path '/etc/infertune*' "
    "-not -path '/run/systemd/*' | sort"
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vm)
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(TIMEOUT_S))
            if not config.getoption("--thorough"):
                _without_time(item)


def _without_time(item: pytest.Item) -> None:
    """Leave out what its mark ``quick_on`` does not name: 15 minutes on two cores is the limit."""
    marker = item.get_closest_marker("quick_on")
    kernel = item.callspec.params.get("guest") if hasattr(item, "callspec") else None
    if marker and kernel not in marker.args:
        others = f"; it runs on {marker.args[0]}" if marker.args else ""
        item.add_marker(pytest.mark.skip(reason=f"takes long: with --thorough{others}"))


@pytest.fixture(autouse=True)
def no_leaks() -> None:
    """Not the rule of the other tests: a guest outlives a test, also if that restarts it."""


@pytest.fixture(scope="session")
def image() -> Path:
    try:
        return lab.image()
    except lab.Unavailable as reason:
        pytest.skip(f"no guests here: {reason}")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    return lab.wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def booted(image: Path, wheel: Path) -> Iterator[Callable[[str], Guest]]:
    """The guest of a kernel: booted when it is asked for first, and kept to the end."""
    guests: dict[str, Guest] = {}

    def get(kernel: str) -> Guest:
        if kernel not in guests:
            guests[kernel] = Guest(image, kernel)
            _boot(guests[kernel], wheel)
        return guests[kernel]

    yield get
    for each in guests.values():
        each.stop()


def _boot(guest: Guest, wheel: Path) -> None:
    times = [time.monotonic()]
    guest.start()
    times.append(time.monotonic())
    guest.install(wheel)
    times.append(time.monotonic())
    release = guest.read("/proc/sys/kernel/osrelease")
    boot, installation = (b - a for a, b in itertools.pairwise(times))
    text = f"guest {release}: boot {boot:.0f} s, installation {installation:.0f} s"
    print(text, file=sys.__stderr__)


# The parameters put the kernel into a test's id, by which tests/conftest.py sends all tests
# of one guest to one process: with two of them both guests run, and both cores work.


@pytest.fixture(scope="session", params=lab.KERNELS)
def guest(request: pytest.FixtureRequest, booted: Callable[[str], Guest]) -> Guest:
    return booted(request.param)


@pytest.fixture(scope="session", params=["6.12"])
def guest_612(request: pytest.FixtureRequest, booted: Callable[[str], Guest]) -> Guest:
    return booted(request.param)


@pytest.fixture(scope="module")
def set_up(guest: Guest) -> Iterator[Guest]:
    """The guest with the service set up and enabled; afterwards without it, and as it was."""
    guest.sh(f"rm -rf {STATE}")
    settings, files = guest.settings(), guest.sh(OURS)
    guest.infertune("setup")
    guest.sh("systemctl enable -q infertune.service")
    yield guest
    guest.sh("systemctl disable -q --now infertune.service")
    guest.infertune("setup --remove")
    guest.sh(f"rm -rf {STATE}")
    assert guest.settings() == settings
    assert guest.sh(OURS) == files


CONFIGURED = "/etc/infertune/infertuned.toml"


@pytest.fixture
def service(set_up: Guest) -> Iterator[Guest]:
    """The running service, with nothing applied before the test and after it."""
    set_up.sh("systemctl reset-failed -q infertune.service; systemctl start infertune.service")
    settings = set_up.settings()
    yield set_up
    set_up.run(
        "infertune revert; "
        f"if [ -e {CONFIGURED} ]; then rm {CONFIGURED}; systemctl restart infertune.service; fi"
    )
    assert set_up.settings() == settings


# -- machines that a boot loader starts (efi.py) ------------------------------------------


@pytest.fixture(scope="session")
def ready(wheel: Path) -> Callable[[Stack], Path]:
    def get(stack: Stack) -> Path:
        try:
            image = lab.image(stack.name)
        except lab.Unavailable as reason:
            pytest.skip(f"no guests here: {reason}")
        return lab.ready_image(image, wheel, stack.prepare, lambda path: _prepare(stack, path))

    def _prepare(stack: Stack, path: Path) -> None:
        machine = EfiGuest(lab.image_path(stack.name), stack.name)
        try:
            machine.start()
            machine.sh(stack.prepare, timeout=300)
            machine.install(wheel)
            machine.infertune("setup")
            machine.sh("mkdir -p /etc/infertune/profiles")
            words = '[boot]\ntransparent_hugepage = "madvise"\n'
            machine.write(f"/etc/infertune/profiles/{PROFILE}.toml", words)
            machine.keep(path)
        finally:
            machine.stop()

    return get


@pytest.fixture
def efi(ready: Callable[[Stack], Path]) -> Iterator[Callable[[Stack], EfiGuest]]:
    machines: list[EfiGuest] = []

    def get(stack: Stack) -> EfiGuest:
        machine = EfiGuest(ready(stack), stack.name)
        machines.append(machine)
        with machine.timed("power on to login"):
            machine.start()
        return machine

    yield get
    for machine in machines:
        machine.stop()
