# SPDX-License-Identifier: Apache-2.0
"""Tests with a real llama-server, from a directory that ``scripts/real-root`` makes.

Not a part of ``scripts/test``: they need root and ``--real-root DIR``.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest) -> Path:
    given = request.config.getoption("--real-root")
    if not given:
        pytest.skip("--real-root DIR is not given (scripts/real-root makes one)")
    directory = Path(given).resolve()
    assert (directory / "usr/bin/llama-server").is_file(), f"{directory}: no llama-server in it"
    version = ["chroot", directory, "llama-server", "--version"]
    print(subprocess.run(version, capture_output=True, text=True, check=True).stderr)
    return directory
