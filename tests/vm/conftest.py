# SPDX-License-Identifier: Apache-2.0
"""Guests for the tests of tests/vm: booted once, infertune installed from a fresh wheel.

``guest``       each of the kernels in turn
``guest_612``   Linux 6.12, two NUMA nodes, 2 GiB
``guest_7x``    the newest 7.x, 1 GiB
``new_guest``   a function that starts another one, which is gone after the test

A test puts back what it changes: the next one is given the same guest.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vm import lab
from vm.guest import Guest

HERE = Path(__file__).parent
TIMEOUT_S = 1200
"""Of one test: the first also builds the image and boots."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vm)
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="session")
def image() -> Path:
    try:
        return lab.image()
    except lab.Unavailable as reason:
        pytest.skip(f"no guests here: {reason}")


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the wheel of this checkout and of everything it needs in a guest."""
    directory = tmp_path_factory.mktemp("wheels")
    lab.wheels(directory)
    return directory


# The parameters put the kernel into a test's id, by which tests/conftest.py sends all tests
# of one guest to one process: with two of them both guests run, and both cores work.


@pytest.fixture(scope="session", params=["6.12"])
def guest_612(image: Path, wheels: Path) -> Iterator[Guest]:
    yield from _booted(image, wheels, "6.12")


@pytest.fixture(scope="session", params=["7.x"])
def guest_7x(image: Path, wheels: Path) -> Iterator[Guest]:
    yield from _booted(image, wheels, "7.x")


@pytest.fixture(scope="session", params=lab.KERNELS)
def guest(request: pytest.FixtureRequest) -> Guest:
    name = {"6.12": "guest_612", "7.x": "guest_7x"}[request.param]
    found: Guest = request.getfixturevalue(name)
    return found


@pytest.fixture
def new_guest(image: Path) -> Iterator[Callable[[str], Guest]]:
    """Start a clean guest of a kernel: nothing of infertune is in it (see ``install``)."""
    guests: list[Guest] = []

    def start(kernel: str) -> Guest:
        guests.append(Guest(image, kernel))
        guests[-1].start()
        return guests[-1]

    yield start
    for each in guests:
        each.stop()


def _booted(image: Path, wheels: Path, kernel: str) -> Iterator[Guest]:
    one = Guest(image, kernel)
    try:
        began = time.monotonic()
        one.start()
        booted = time.monotonic()
        one.install(wheels)
        installed = time.monotonic()
        print(
            f"guest {one.read('/proc/sys/kernel/osrelease')}: boot {booted - began:.0f} s, "
            f"installation {installed - booted:.0f} s",
            file=sys.__stderr__,
        )
        yield one
    finally:
        one.stop()
