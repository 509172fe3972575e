# SPDX-License-Identifier: Apache-2.0
"""Every unit is closed as far as its work allows, and says why where it is open."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infertune.service.setup import FILES

SYSTEMD = Path(__file__).resolve().parents[2] / "systemd"
UNITS = sorted(path.name for path in SYSTEMD.glob("*.service"))
BOOT = ("infertune-boot-confirm.service", "infertune-boot-guard.service")

EXPOSURE = {name: 35 if name in BOOT else 20 for name in UNITS}
"""The most that ``systemd-analyze security`` may say, in tenths.  The boot units run the system's
tools as root, with all that those need; what is open there is told in the unit."""

EVERYWHERE = {
    "NoNewPrivileges": "yes",
    "PrivateMounts": "yes",
    "ProtectClock": "yes",
    "ProtectHostname": "yes",
    "ProtectKernelLogs": "yes",
    "ProtectControlGroups": "yes",
    "RestrictRealtime": "yes",
    "LockPersonality": "yes",
    "SystemCallArchitectures": "native",
    "SystemCallErrorNumber": "EPERM",
    "KeyringMode": "private",
    "IPAddressDeny": "any",
}
SERVICES = {
    "ProtectSystem": "strict",
    "PrivateTmp": "yes",
    "ProtectKernelModules": "yes",
    "ProtectProc": "invisible",
    "DevicePolicy": "closed",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "RemoveIPC": "yes",
    "UMask": "0077",
}
AT_BOOT = {
    "ProtectHome": "read-only",
    "PrivateNetwork": "yes",
    "RestrictAddressFamilies": "AF_UNIX",
    "RestrictNamespaces": "mnt",
    "SystemCallFilter": "~@clock @cpu-emulation @debug @module @obsolete @raw-io @reboot @swap",
}
OPEN = {
    "infertune-adopted@.service": {"ProtectProc", "DevicePolicy"},
    "infertune-user@.service": {"RemoveIPC"},
}
"""What a service leaves open of these; PrivateDevices= closes devices, too."""
NEVER_AT_BOOT = ("CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_PTRACE", "CAP_SYS_BOOT", "CAP_NET")

ITEMS = (
    "AmbientCapabilities", "CapabilityBoundingSet", "DeviceAllow", "IPAddressDeny",
    "MemoryDenyWriteExecute", "PrivateDevices", "PrivateMounts", "PrivateNetwork", "PrivateTmp",
    "PrivateUsers", "ProcSubset", "ProtectHome", "ProtectKernelModules", "ProtectKernelTunables",
    "ProtectProc", "ProtectSystem", "RestrictAddressFamilies", "RestrictNamespaces",
    "RestrictSUIDSGID", "RootDirectory", "SystemCallFilter", "UMask", "User",
)  # fmt: skip
"""What systemd 252 looks at and one of our units leaves open; a later systemd may look at more."""


def _directives(name: str) -> dict[str, str]:
    """The last value of each directive of a unit."""
    lines = (SYSTEMD / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"[A-Z]\w+=", line))


def test_all_of_them_are_looked_at() -> None:
    assert sorted(source for source, _ in FILES if source.endswith(".service")) == UNITS


@pytest.mark.parametrize("name", UNITS)
def test_what_a_unit_may_not_do(name: str) -> None:
    found = _directives(name)
    wanted = EVERYWHERE | (AT_BOOT if name in BOOT else SERVICES)
    wanted = {key: value for key, value in wanted.items() if key not in OPEN.get(name, ())}
    assert {key: found.get(key) for key in wanted} == wanted
    if name in BOOT:
        assert not [word for word in NEVER_AT_BOOT if word in found["CapabilityBoundingSet"]]


def test_both_boot_units_are_closed_alike() -> None:
    guard, confirm = (_directives(name) for name in sorted(BOOT, reverse=True))
    # So early there is no /tmp that could be private.
    assert confirm.pop("PrivateTmp") == "yes"
    assert "PrivateTmp" not in guard
    own = {"Description", "After", "ExecStart", "WantedBy"}
    assert {key: guard[key] for key in guard.keys() & confirm.keys() - own} == {
        key: confirm[key] for key in guard.keys() & confirm.keys() - own
    }


def _analysed(name: str, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / name
    unit.write_text((SYSTEMD / name).read_text().replace("@PYTHON@", sys.executable))
    command = [tool, "security", "--offline=yes", "--no-pager", *options, str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unrecognized option" in done.stderr:
        pytest.skip("systemd-analyze here has no --offline (systemd 250)")
    return done


@pytest.mark.parametrize("name", UNITS)
def test_how_exposed_a_unit_is(name: str, tmp_path: Path) -> None:
    done = _analysed(name, tmp_path, f"--threshold={EXPOSURE[name]}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", UNITS)
def test_what_is_open_is_explained(name: str, tmp_path: Path) -> None:
    """Each item that counts against a unit is named in a comment of it."""
    done = _analysed(name, tmp_path, "--json=short")
    # What is open in one boot unit is open in the other, for the same reasons.
    told = "infertune-boot-guard.service" if name in BOOT else name
    comments = re.findall(r"^#.*", (SYSTEMD / told).read_text(), re.MULTILINE)
    silent = [
        each["name"]
        for each in json.loads(done.stdout)
        if not each["set"]
        and each["exposure"]
        and each["name"].partition("=")[0] in ITEMS
        and not _is_named(each["name"], " ".join(comments))
    ]
    assert silent == []


def _is_named(item: str, comments: str) -> bool:
    """An item is ``ProcSubset=``, or one of many as ``CapabilityBoundingSet=~CAP_(A|B)``."""
    directive, _, value = item.partition("=~")
    if not value or directive == "RestrictNamespaces":
        return f"{directive.partition('=')[0]}=" in comments
    before, _, choice = value.partition("(")
    names = [before + each.strip("*)") for each in choice.split("|")]
    return any(each in comments for each in names)
