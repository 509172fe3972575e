# SPDX-License-Identifier: Apache-2.0
"""There is one kernel, however many checkouts are tested on it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def the_kernel_to_oneself(request: pytest.FixtureRequest) -> Iterator[None]:
    """Who changes the kernel's values or takes the first free port waits for who does already."""
    changes = request.node.get_closest_marker("root_only") or "runner" in request.fixturenames
    if os.geteuid() != 0 or not changes:
        yield
        return
    with open("/run/infertune-tests.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
