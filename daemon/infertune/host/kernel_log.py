# SPDX-License-Identifier: Apache-2.0
"""What is looked for in the kernel's log.

Messages of the drivers differ in their prefixes from release to release (``amdgpu 0000:c5:00.0:
amdgpu:``), so a sign is the part that stayed.  Names and numbers of processes never leave this
module: a victim of the OOM killer is a model server or it is somebody else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

SERVERS = ("llama-server", "llama-cli", "llama-bench", "ollama", "vllm", "lemond", "infertune")
"""Beginnings of the names of programs that serve models."""

SIGNS: Mapping[str, re.Pattern[str]] = {
    sign: re.compile(pattern)
    for sign, pattern in {
        # amdgpu_job.c; the colon of older kernels and the comma of newer ones
        "ring-timeout": r"ring \w[\w.]* timeout",
        # mes_v11_0.c; "response" until 6.12
        "mes": r"MES failed to respon(?:d to|se(?: to)?) msg=\w+"
        r"|MES might be in unrecoverable state",
        # amdgpu_device.c, drm_drv.c (wedged event, 6.15)
        "gpu-reset": r"GPU reset begin!|device wedged, but recovered through reset",
        "page-fault": r"\[(?:gfx|mm)hub\d?\] (?:no-retry )?page fault",
        # mm/oom_kill.c
        "oom": r"(?:Memory cgroup out|Out) of memory: Killed process \d+ \((?P<name>[^)]*)\)",
        # arch/x86/kernel/traps.c
        "invalid-opcode": r"(?<!\S)(?P<name>\S{1,64})\[\d+\] trap invalid opcode .* in "
        r"(?P<file>lib(?:ggml|llama)[\w.-]*)",
        # amdgpu_ttm.c
        "gttsize-deprecated": r"Configuring gttsize via module parameter is deprecated",
        "gtt-ttm-differ": r"GTT size has been set as \d+ but TTM size has been set as \d+",
        "gtt-capped": r"Capping GTT to \d+M to not exceed available system memory",
        # kernel/params.c, kernel/module/main.c
        "unknown-parameter": r"(?P<module>amdgpu|ttm|amdttm|amd_ttm|amdxdna): unknown parameter "
        r"'(?P<parameter>[\w-]+)' ignored",
        # drivers/iommu/amd/init.c
        "iommu-option": r"AMD-Vi: Unknown option - '(?P<option>[\w,=]*)'",
        # drivers/base/firmware_loader/main.c
        "firmware-missing": r"Direct firmware load for (?P<file>amdgpu/[\w.]+) failed",
        # drivers/accel/amdxdna/aie2_ctx.c, aie2_message.c
        "npu-timeout": r"amdxdna \S+: .*?(?:aie2_set_cmd_timeout|Firmware timeout state"
        r" capture|aie2_tdr_work: Device isn't making progress)",
        # drivers/iommu/amd/iommu.c, for the NPU's driver
        "npu-page-fault": r"amdxdna \S+: AMD-Vi: Event logged \[IO_PAGE_FAULT",
    }.items()
}


_LONGEST = 1024
"""PRINTKRB_RECORD_MAX of printk: what is longer in a recorded log is no message of a kernel."""


def messages(log: bytes) -> list[str]:
    """The messages of /dev/kmsg's records (Documentation/ABI/testing/dev-kmsg)."""
    lines = log.decode("utf-8", "replace").split("\n")
    # A line that starts with a space is a property of the record above it.
    return [line.partition(";")[2][:_LONGEST] for line in lines if line[:1] not in ("", " ")]


def records(lines: Iterable[str]) -> bytes:
    """Plain lines of a log (of journalctl, say) in the form of /dev/kmsg."""
    return b"".join(b"6,0,0,-;" + line.encode() + b"\n" for line in lines)


def find(sign: str, lines: Iterable[str]) -> list[re.Match[str]]:
    """Where a sign stands in a log, one match per line that has it."""
    return [match for line in lines if (match := SIGNS[sign].search(line))]


def is_server(name: str) -> bool:
    """Whether a process of this name serves models."""
    return name.startswith(SERVERS)


def reduce_log(log: bytes) -> bytes:
    """The signs alone, without names and numbers of processes."""
    kept = []
    for line in messages(log):
        for pattern in SIGNS.values():
            if match := pattern.search(line):
                kept.append(_anonymous(match))
                break
    return records(kept)


def _anonymous(match: re.Match[str]) -> str:
    text = match[0]
    if (name := match.groupdict().get("name")) is not None:
        shown = next((server for server in SERVERS if name.startswith(server)), "other")
        text = text.replace(name, shown, 1)
    text = re.sub(r"Killed process \d+", "Killed process 0", text)
    return re.sub(r"\[\d+\] trap", "[0] trap", text)
