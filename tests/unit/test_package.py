# SPDX-License-Identifier: Apache-2.0
"""What scripts/package lets in, and what its scripts do (tests/vm installs what it builds)."""

from __future__ import annotations

import hashlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from infertune.base.root import Root
from infertune.service.setup import FILES, install, rendered

POSTINST = Path(__file__).resolve().parents[2] / "packaging" / "deb" / "postinst"
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


IN_ETC = [target for _, target in FILES if target.startswith("/etc/")]
SERVER = "/etc/systemd/system/infertune-server@.service"


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """A machine on which the package's files are there and nothing was configured yet."""
    machine = tmp_path / "machine"
    for path, content in rendered("/usr/lib/infertune/bin/python3").items():
        (machine / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        (machine / path.lstrip("/")).write_bytes(content)
    return machine


def _configure(machine: Path, earlier: str = "") -> str:
    """Run postinst on it, with nothing of this system in reach; returns what it said."""
    stubs = machine.parent / "stubs"
    stubs.mkdir(exist_ok=True)
    for name in ("deb-systemd-helper", "deb-systemd-invoke", "systemctl"):
        (stubs / name).write_text("#!/bin/sh\n")
        (stubs / name).chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", str(POSTINST), "configure", earlier],
        env={"PATH": f"{stubs}:/usr/bin:/bin", "DPKG_ROOT": str(machine)},
        capture_output=True,
        text=True,
        check=True,
    )
    return "".join(line for line in done.stderr.splitlines() if line.startswith("infertune:"))


def _in_etc(machine: Path) -> list[str]:
    found = (path for path in (machine / "etc").rglob("*") if not path.is_dir())
    return sorted("/" + str(path.relative_to(machine)) for path in found)


@pytest.mark.parametrize("python", ["/opt/infertune/bin/python", "/opt/my tools/bin/python"])
def test_what_setup_wrote_makes_way(
    python: str, unpacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", python)
    install(Root(unpacked))
    assert _in_etc(unpacked) == sorted(IN_ETC)
    assert _configure(unpacked) == ""
    assert _in_etc(unpacked) == []


@pytest.mark.parametrize("path", IN_ETC)
def test_what_somebody_else_wrote_is_kept_beside(path: str, unpacked: Path) -> None:
    """A unit of the same name, or one of setup's that was changed since."""
    install(Root(unpacked))
    file = unpacked / path.lstrip("/")
    mine = file.read_text() + "# mine\n"
    file.write_text(mine)
    said = _configure(unpacked)
    assert f"{path} is not as the package has it" in said
    assert _in_etc(unpacked) == [f"{path}.dpkg-bak"]
    assert (unpacked / f"{path}.dpkg-bak".lstrip("/")).read_text() == mine


def test_another_program_is_not_the_only_difference(unpacked: Path) -> None:
    file = unpacked / SERVER.lstrip("/")
    file.parent.mkdir(parents=True)
    packaged = rendered("/usr/lib/infertune/bin/python3")[SERVER.replace("/etc", "/usr/lib")]
    file.write_bytes(packaged.replace(b"-I -m infertune.launcher", b"-m mine"))
    _configure(unpacked)
    assert _in_etc(unpacked) == [f"{SERVER}.dpkg-bak"]


def test_links_and_upgrades_are_an_administrators(unpacked: Path) -> None:
    file = unpacked / SERVER.lstrip("/")
    file.parent.mkdir(parents=True)
    file.symlink_to("/dev/null")
    assert _configure(unpacked) == ""
    assert file.is_symlink()
    file.unlink()
    file.write_text("# mine\n")
    assert _configure(unpacked, "0.1.0") == ""
    assert file.read_text() == "# mine\n"
