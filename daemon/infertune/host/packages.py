# SPDX-License-Identifier: Apache-2.0
"""What is installed: packages, ROCm, Vulkan drivers, Python programs."""

from __future__ import annotations

import re
from collections.abc import Mapping

from infertune.base.root import Root
from infertune.base.units import KIB
from infertune.host.redaction import reduce_file
from infertune.host.unknown import Unknown
from infertune.host.version import Version

_STATUS_LIMIT = 32 * 1024 * KIB
"""dpkg's status file: some 1.5 KiB a package."""
_FILES_LIMIT = 400
"""Files looked into in one directory."""


def packages(root: Root) -> Mapping[str, str] | Unknown:
    """Versions of the packages that matter, by name; absent ones are left out.

    Raises OSError where dpkg's database cannot be read.
    """
    if root.exists("/var/lib/dpkg/status"):
        text = root.read_small("/var/lib/dpkg/status", _STATUS_LIMIT)
        part = (reduce_file("/var/lib/dpkg/status", text.encode()) or b"").decode()
        rows = re.findall(
            r"^Package: (\S+)\nStatus: install ok installed\nVersion: (\S+)$", part, re.MULTILINE
        )
        return dict(rows)
    # pacman: one directory for each package, with its version in the name.
    found = {}
    for name in ("linux-firmware-amdgpu", "linux-firmware", "rocm-core", "hsa-rocr", "amdvlk"):
        for path in root.glob(f"/var/lib/pacman/local/{name}-[0-9]*"):
            if root.exists(path):
                found[name] = path.rpartition("/")[2].removeprefix(f"{name}-")
    return found or Unknown("the package database of this system is not one infertune reads")


def rocm_version(root: Root, installed: Mapping[str, str] | Unknown) -> Version | Unknown | None:
    """ROCm as installed: in /opt/rocm, as a library or as a package; None where it is not."""
    # /opt/rocm is a link to one of them, the one that programs find.
    for path in ("/opt/rocm/.info/version", *reversed(root.glob("/opt/rocm-*/.info/version"))):
        text = root.get(path)
        if text is not None:
            numbers = re.match(r"\d{1,4}(?:\.\d{1,6}){1,3}", text)
            if numbers is None:
                return Unknown(f"{path} holds no version")
            return tuple(int(part) for part in numbers[0].split("."))
    # A distribution's own: the library's name has the first two numbers of ROCm's version.
    for pattern in ("/usr/lib64/libamdhip64.so.*", "/usr/lib/*-linux-gnu/libamdhip64.so.*"):
        for path in root.glob(pattern):
            numbers = re.search(r"\.so\.(\d{1,4})\.(\d{1,6})\.", path, re.ASCII)
            if numbers and root.exists(path):
                return int(numbers[1]), int(numbers[2])
    if isinstance(installed, Unknown):
        return Unknown("ROCm is not in /opt/rocm, and the package database cannot be read")
    for name in ("rocm-core", "hsa-rocr"):
        numbers = re.match(r"(?:\d+:)?(\d{1,4}(?:\.\d{1,6}){1,3})", installed.get(name, ""))
        if numbers:
            return tuple(int(part) for part in numbers[1].split("."))
    return None


_ICD = re.compile(r"(radeon_icd|amd_icd|amd_pro_icd|intel_icd|nvidia_icd|lvp_icd)[\w.-]*\.json")


def vulkan_drivers(root: Root) -> tuple[str, ...]:
    """Names of the ICD manifests that are installed."""
    found = []
    for directory in ("/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d"):
        for path in root.glob(f"{directory}/*.json")[:_FILES_LIMIT]:
            name = path.rpartition("/")[2]
            if _ICD.fullmatch(name) and root.exists(path):
                found.append(name)
    return tuple(dict.fromkeys(found))


def python_programs(root: Root) -> frozenset[str]:
    """Of vllm and llmlingua, those in the system's Python."""
    found = set()
    for name in ("vllm", "llmlingua"):
        for where in ("/usr/lib", "/usr/local/lib"):
            for path in root.glob(f"{where}/python3*/*-packages/{name}-*.dist-info"):
                if root.exists(path):
                    found.add(name)
    return frozenset(found)
