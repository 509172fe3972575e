# SPDX-License-Identifier: Apache-2.0
"""A Strix Halo that is well set up, and ways to make it less so, for tests of the doctor."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from infertune.base.root import Root
from infertune.base.units import GIB
from infertune.doctor.surroundings import FILE as SURROUNDINGS
from infertune.host.kernel_log import records
from infertune.host.snapshot import open_snapshot

FIXTURES = Path(__file__).parent / "fixtures"

GPU = "/sys/class/drm/card1/device"
HWMON = f"{GPU}/hwmon/hwmon3"
CPUFREQ = "/sys/devices/system/cpu/cpufreq"
KERNEL = "/proc/sys/kernel/osrelease"
MODPROBE = "/etc/modprobe.d/gpu.conf"
UNIT = "/etc/systemd/system/chat.service"
BOOTED = 1_790_000_000


@dataclass(frozen=True)
class File:
    """A file with a time, or a link."""

    text: str = ""
    modified: int | None = None
    target: str | None = None


Overlay = Mapping[str, str | bytes | File | None]


def surroundings(
    version: str = "0.7.0 (build 11669, commit 1234567)",
    backends: tuple[str, ...] = ("rocm", "vulkan", "cpu"),
    server: bool = True,
    kfd: bool = True,
    staged: tuple[str, tuple[str, ...]] = ("none", ()),
    clients: int = 1,
    **environment: str,
) -> dict[str, str]:
    known = {"version": version, "backends": backends} if server else None
    document = {
        "environment": environment,
        "server": known,
        "devices": {"/dev/kfd": kfd, "/dev/dri/renderD128": True},
        "compute_clients": clients,
        "staged": dict(zip(("state", "said"), staged, strict=True)),
    }
    return {SURROUNDINGS: json.dumps(document)}


def unit(*lines: str) -> dict[str, str]:
    return {UNIT: "\n".join(("[Service]", *lines, ""))}


def server(flags: str = "", *lines: str) -> dict[str, str]:
    return unit(f"ExecStart=/usr/bin/llama-server --model /m/x-UD-Q4_K_XL.gguf {flags}", *lines)


def cmdline(*words: str) -> dict[str, str]:
    return {"/proc/cmdline": f"BOOT_IMAGE=(hd0,gpt2)/vmlinuz ro quiet {' '.join(words)}\n"}


def log(*lines: str) -> dict[str, bytes]:
    return {"/dev/kmsg": records(lines)}


def memory(**sizes: int) -> dict[str, str]:
    """/proc/meminfo with other values, in KiB (HugePages_* are counts)."""
    known = {
        "MemTotal": 131009772,
        "MemAvailable": 124518400,
        "SwapTotal": 8388604,
        "HugePages_Total": 0,
        "HugePages_Free": 0,
        "Hugepagesize": 2048,
        **sizes,
    }
    return {
        "/proc/meminfo": "".join(
            f"{name}: {size}{'' if name.startswith('HugePages_') else ' kB'}\n"
            for name, size in known.items()
        )
    }


def pages(number: int) -> dict[str, str]:
    return {"/sys/module/ttm/parameters/pages_limit": f"{number}\n"}


def sized(gib: int) -> dict[str, str]:
    """A limit of so many GiB, taken over by the driver."""
    return {**pages(gib * 262144), f"{GPU}/mem_info_gtt_total": f"{gib * GIB}\n"}


def swaps(*areas: str, kib: int = 8388604) -> str:
    head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    return head + "".join(f"{area} partition\t{kib}\t0\t-2\n" for area in areas)


HEALTHY: Overlay = {
    **surroundings(),
    **log("Linux version 7.1.3", "amdgpu 0000:c3:00.0: amdgpu: 98304M of GTT memory ready."),
    **memory(),
    **sized(96),
    MODPROBE: File("options ttm pages_limit=25165824\n", BOOTED - 2000),
    "/boot/initramfs-7.1.3-200.fc44.x86_64.img": File("", BOOTED - 1000),
    "/proc/stat": f"cpu 1 2 3\nbtime {BOOTED}\n",
    "/proc/self/limits": "Max locked memory         unlimited            unlimited    bytes     \n",
    "/proc/vmstat": "oom_kill 0\ncompact_fail 0\n",
    "/proc/pressure/memory": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\n"
    "full avg10=0.00 avg60=0.00 avg300=0.00 total=1\n",
    "/proc/buddyinfo": "Node 0, zone   Normal    9   9   9   9   9   9   9   9   9  9  20000\n",
    "/proc/sys/vm/overcommit_memory": "0\n",
    "/sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never\n",
    "/sys/block/nvme0n1/queue/read_ahead_kb": "4096\n",
    "/sys/bus/pci/devices/0000:c3:00.0/vendor": "0x1002\n",
    "/sys/bus/pci/devices/0000:c3:00.0/device": "0x1586\n",
    "/sys/bus/pci/devices/0000:c3:00.0/class": "0x038000\n",
    "/sys/bus/pci/devices/0000:c3:00.0/driver": File(target="../../../../bus/pci/drivers/amdgpu"),
    "/sys/bus/pci/devices/0000:c4:00.1/vendor": "0x1022\n",
    "/sys/bus/pci/devices/0000:c4:00.1/device": "0x17f0\n",
    "/sys/bus/pci/devices/0000:c4:00.1/class": "0x118000\n",
    f"{GPU}/fw_version/mes_fw_version": "0x00000080\n",
    f"{GPU}/mem_info_gtt_used": "18653184\n",
    f"{HWMON}/temp1_input": "45000\n",
    f"{CPUFREQ}/policy0/scaling_max_freq": "5187500\n",
    f"{CPUFREQ}/policy0/cpuinfo_max_freq": "5187500\n",
    "/usr/share/vulkan/icd.d/radeon_icd.x86_64.json": "{}\n",
    "/opt/rocm/.info/version": "7.2.4\n",
    "/etc/tuned/active_profile": "accelerator-performance\n",
    "/etc/tuned/ppd_base_profile": "performance\n",
    "/etc/tuned/ppd.conf": "[profiles]\nperformance=accelerator-performance\n",
    "/proc/swaps": swaps("/dev/dm-1"),
    "/proc/sys/kernel/core_pattern": "|/usr/lib/systemd/systemd-coredump %P %u\n",
    "/usr/lib/sysctl.d/50-default.conf": "kernel.sysrq = 16\n",
    "/sys/module/amdgpu/parameters/cwsr_enable": "1\n",
    "/sys/module/amdgpu/parameters/no_system_mem_limit": "N\n",
    **server("--parallel 1"),
}
"""What the recorded machine does not say, as it is on one that is well set up."""


@functools.cache
def unpacked(machine: str) -> Path:
    """A recorded machine on disk, once for all tests of this process."""
    # Not the directory of open_snapshot itself: a child of multiprocessing forgets what stands in
    # atexit (since Python 3.13), and what nobody refers to any more would be removed under us.
    kept = Path(tempfile.mkdtemp(prefix="infertune-tests-"))
    atexit.register(shutil.rmtree, kept, ignore_errors=True)
    with open_snapshot(str(FIXTURES / f"{machine}.snapshot")) as root:
        shutil.copytree(root.base, kept / machine, symlinks=True)
    return kept / machine


def build(base: Path, *overlays: Overlay, machine: str = "strix-halo-128") -> Root:
    """The recorded machine with overlays, one over the other."""
    # Hard links: nothing is written through them, files are only put in their place.
    shutil.copytree(
        unpacked(machine), base, symlinks=True, dirs_exist_ok=True, copy_function=os.link
    )
    merged = {path: content for overlay in overlays for path, content in overlay.items()}
    for path, content in merged.items():
        where = base / path.lstrip("/")
        if where.is_dir() and not where.is_symlink():
            shutil.rmtree(where)
        elif where.exists() or where.is_symlink():
            where.unlink()
        if content is None:
            continue
        where.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, File) and content.target:
            where.symlink_to(content.target)
            continue
        text = content.text if isinstance(content, File) else content
        where.write_bytes(text if isinstance(text, bytes) else text.encode())
        if isinstance(content, File) and content.modified:
            os.utime(where, (content.modified, content.modified))
    return Root(base)
