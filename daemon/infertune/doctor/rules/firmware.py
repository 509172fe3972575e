# SPDX-License-Identifier: Apache-2.0
"""Firmware of the GPU."""

from __future__ import annotations

import re

from infertune.doctor.base import Answer, Finding, Rule, Unknown, github, llama, need, rocm
from infertune.doctor.conditions import ROCM_SERVER, STRIX_HALO
from infertune.doctor.facts import Facts

_BROKEN_MES = 0x83
_HANGING_MES = 0x86


def _broken_mes(facts: Facts) -> Answer:
    if need(facts.mes) != _BROKEN_MES:
        return None
    return Finding(f"with MES firmware {_BROKEN_MES:#x} ROCm programs fault or hang the GPU")


def _hanging_mes(facts: Facts) -> Answer:
    if need(facts.mes) != _HANGING_MES:
        return None
    return Finding(
        f"with MES firmware {_HANGING_MES:#x} one machine hung without a message under long compute"
    )


_FIRMWARE = ("linux-firmware", "linux-firmware-amdgpu", "firmware-amd-graphics")


def _packaged(facts: Facts, date: str) -> str | None:
    """The package with the GPU's firmware, if it is the one of ``date``.  Raises Missing."""
    packages = need(facts.packages)
    versions = {name: packages[name] for name in _FIRMWARE if name in packages}
    known = need(versions or Unknown("no package with the GPU's firmware was found"))
    found = (f"{name} {v}" for name, v in known.items() if re.search(rf"\b{date}\b", v))
    return next(found, None)


def _broken_package(facts: Facts) -> Answer:
    if not isinstance(facts.mes, Unknown):
        return None  # what is loaded counts, and another rule looks at it
    package = _packaged(facts, "20251125")
    return Finding(f"{package} brings MES firmware 0x83") if package else None


def _suspected(facts: Facts) -> Answer:
    if facts.kernel[:2] != (7, 2) or not (package := _packaged(facts, "20260810")):
        return None
    return Finding(
        f"Linux {facts.machine.kernel} with {package} was suspected of garbled answers; measured, "
        "llama.cpp's ROCm backend was at fault, Vulkan was right"
    )


def _leftover(facts: Facts) -> Answer:
    if facts.loaded & {"amdttm", "amd_ttm"}:
        return None  # the driver it belongs to is in use
    version = need(facts.packages).get("amdgpu-dkms-firmware")
    if version is None:
        return None
    return Finding(
        f"amdgpu-dkms-firmware {version} is installed, and its driver is not in use; its files "
        "take precedence over linux-firmware's"
    )


RULES: tuple[Rule, ...] = (
    Rule(
        id="firmware-mes-broken",
        title="MES firmware 0x83 faults and hangs under ROCm",
        when=STRIX_HALO,
        check=_broken_mes,
        severity="error",
        confidence="sure",
        fix="install a linux-firmware other than 20251125, rebuild the initramfs, and reboot",
        sources=(rocm(5724),),
        covers=("log-mes", "log-page-fault", "log-ring-timeout", "log-gpu-reset"),
    ),
    Rule(
        id="firmware-mes-hang",
        title="MES firmware 0x86 has hung without a message under sustained compute",
        when=STRIX_HALO,
        check=_hanging_mes,
        severity="info",
        fix="if the machine freezes under load, try another linux-firmware; there is no known fix",
        sources=(rocm(6165), github("FrameworkComputer/SoftwareFirmwareIssueTracker", 206)),
    ),
    Rule(
        id="firmware-package-broken",
        title="linux-firmware 20251125 brings the broken MES firmware",
        when=STRIX_HALO,
        check=_broken_package,
        severity="error",
        # Distributions took the file back within the same version.
        fix="install another version, rebuild the initramfs, and reboot",
        sources=(rocm(5724),),
    ),
    Rule(
        id="firmware-leftover",
        title="firmware of amdgpu-dkms is installed without its driver",
        when=STRIX_HALO,
        check=_leftover,
        fix="apt autoremove --purge amdgpu-dkms-firmware, rebuild the initramfs, and reboot",
        sources=(rocm(5991),),
    ),
    Rule(
        id="firmware-suspected",
        title="Linux 7.2 with linux-firmware 20260810, suspected of garbled answers and cleared",
        when=STRIX_HALO & ROCM_SERVER,
        check=_suspected,
        severity="info",
        fix="keep both; where answers are garbled, look at llama-wrong-logits first",
        sources=(github("noamsto/nix-amd-ai", 105), llama(28211)),
    ),
)
