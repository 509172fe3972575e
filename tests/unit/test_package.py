# SPDX-License-Identifier: Apache-2.0
"""What scripts/package lets in (tests/vm installs what it builds)."""

from __future__ import annotations

import hashlib
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "package"


def test_a_wheel_that_the_lock_does_not_know_is_refused(tmp_path: Path) -> None:
    compare = runpy.run_path(str(SCRIPT))["compare"]
    good, bad = tmp_path / "good.whl", tmp_path / "bad.whl"
    good.write_bytes(b"as it was")
    bad.write_bytes(b"as it was not")
    lock = f"good==1 \\\n    --hash=sha256:{hashlib.sha256(b'as it was').hexdigest()}\n"
    compare([good], lock)
    with pytest.raises(OSError, match=r"bad\.whl is not the one that requirements\.lock names"):
        compare([good, bad], lock)
