# SPDX-License-Identifier: Apache-2.0
"""The doctor: each rule fires on a machine that has it and is silent on one that has not.

Machines are the recorded Strix Halo of tests/fixtures with a few files laid over it.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from doctor_support import (
    BOOTED,
    CPUFREQ,
    GPU,
    HEALTHY,
    HWMON,
    KERNEL,
    MODPROBE,
    UNIT,
    File,
    Overlay,
    build,
    cmdline,
    log,
    memory,
    server,
    sized,
    surroundings,
    swaps,
    unit,
)
from infertune.base.records import replace
from infertune.base.root import Root
from infertune.base.units import GIB
from infertune.boot.record import Stage, save
from infertune.cli.main import main
from infertune.doctor.base import ALWAYS, Advice, Finding, Unknown, Window, need
from infertune.doctor.diagnose import Result, diagnose
from infertune.doctor.facts import Facts, Smoke, read_facts
from infertune.doctor.rules import RULES, SUBJECTS
from infertune.doctor.surroundings import FILE as SURROUNDINGS
from infertune.doctor.surroundings import (
    LlamaServer,
    Staged,
    Surroundings,
    look_around,
    recorded,
)
from infertune.host.kernel_log import SIGNS, find, messages, records, reduce_log
from infertune.host.redaction import reduce_file
from infertune.host.snapshot import open_snapshot, record
from infertune.launch.binary import linked_backends, others_may_write
from infertune.launch.system import kernel_journal

GOLDEN = Path(__file__).parents[1] / "golden"


def ask(root: Root, rule: str, smoke: Smoke | None = None) -> Result:
    [result] = diagnose(read_facts(root, recorded(root), smoke), [RULES[rule]])
    return result


# -- each rule, firing and silent ------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Two machines for one rule."""

    fires: Overlay
    silent: Overlay = field(default_factory=dict)
    severity: str | None = None
    """What the finding is; None: as the rule says."""
    says: str = ""
    """A part of the finding."""
    machine: str = "strix-halo-128"
    quiet_machine: str | None = None
    """Where the rule has nothing to say at all."""
    smoke: tuple[Smoke, Smoke] | None = None
    status: tuple[str, str] | None = None
    """Of a recommendation: on the first machine and on the second."""


OTHER_GPU: Overlay = {
    "/sys/class/drm/card2/device/vendor": "0x1002\n",
    "/sys/class/drm/card2/device/device": "0x744c\n",
    "/sys/class/drm/card2/device/driver": File(target="../../../../bus/pci/drivers/amdgpu"),
    "/sys/class/drm/card2/device/hwmon/hwmon9/name": "amdgpu\n",
}
OLD_KERNEL = {KERNEL: "6.17.9-300.fc43.x86_64\n"}
BAD_BUILD = surroundings("10566 (0123abc)")
PPD_CONF = (
    "[main]\ndefault=balanced\n[profiles]\nbalanced=balanced\nperformance=accelerator-performance\n"
)
DPKG = "Package: {}\nStatus: install ok installed\nMaintainer: a b\nVersion: {}\n\n"

CASES: dict[str, Case] = {
    "kernel-slow-compute": Case(
        {KERNEL: "7.0.12-200.fc44.x86_64\n"}, {KERNEL: "7.0.13-200.fc44.x86_64\n"}, says="7.0.12"
    ),
    "kernel-save-area": Case(
        OLD_KERNEL,
        {KERNEL: "6.18.4-100.fc43.x86_64\n"},
        "error",
        "6.17.9",
    ),
    "kernel-gtt-compute": Case({KERNEL: "6.9.12\n"}, {KERNEL: "6.10.1\n"}),
    "kernel-hard-clock": Case(
        {KERNEL: "7.0.14\n", f"{GPU}/power_dpm_force_performance_level": "high\n"},
        {f"{GPU}/power_dpm_force_performance_level": "high\n"},
    ),
    "platform-power-off": Case(
        {"/sys/firmware/acpi/platform_profile": "performance\n"},
        {"/sys/firmware/acpi/platform_profile": "balanced\n"},
        machine="rog-z13",
    ),
    "kernel-old-workaround": Case(
        {"/sys/module/amdgpu/parameters/cwsr_enable": "0\n"},
        {"/sys/module/amdgpu/parameters/cwsr_enable": "1\n"},
    ),
    "kernel-isolated-cpus": Case(cmdline("isolcpus=0-15")),
    "kernel-gtt-uncapped": Case(
        {**sized(128), KERNEL: "7.0.0-38-generic\n", "/etc/os-release": "ID=ubuntu\n"},
        {**sized(128), KERNEL: "7.0.0-39-generic\n", "/etc/os-release": "ID=ubuntu\n"},
        says="GTT is 128 GiB",
    ),
    "firmware-mes-broken": Case({f"{GPU}/fw_version/mes_fw_version": "0x00000083\n"}),
    "firmware-mes-hang": Case({f"{GPU}/fw_version/mes_fw_version": "0x00000086\n"}),
    "firmware-package-broken": Case(
        {
            f"{GPU}/fw_version/mes_fw_version": None,
            "/var/lib/dpkg/status": DPKG.format("linux-firmware", "20251125-1"),
        },
        {
            f"{GPU}/fw_version/mes_fw_version": None,
            "/var/lib/dpkg/status": DPKG.format("linux-firmware", "20260110-1"),
        },
        says="20251125-1",
    ),
    "firmware-leftover": Case(
        {"/var/lib/dpkg/status": DPKG.format("amdgpu-dkms-firmware", "1:6.12")},
        {"/var/lib/dpkg/status": DPKG.format("linux-firmware", "20260110-1")},
    ),
    "firmware-suspected": Case(
        {
            KERNEL: "7.2.2\n",
            "/var/lib/dpkg/status": DPKG.format("linux-firmware", "20260810-1"),
        },
        {
            KERNEL: "7.2.2\n",
            "/var/lib/dpkg/status": DPKG.format("linux-firmware", "20260910-1"),
        },
        says="20260810-1",
    ),
    "gpu-without-driver": Case(
        {"/sys/bus/pci/devices/0000:c3:00.0/driver": None}, says="1002:1586"
    ),
    "gpu-nomodeset": Case(cmdline("nomodeset")),
    "gpu-without-kfd": Case({"/sys/class/kfd": None}),
    "ttm-wrong-module": Case(
        {"/etc/modprobe.d/ttm.conf": "options ttm pages_limit=1\n", MODPROBE: None},
        {"/etc/modprobe.d/ttm.conf": "options amdttm pages_limit=1\n", MODPROBE: None},
        says="amdgpu uses the module amdttm",
        machine="dkms-amdttm",
    ),
    "driver-dkms": Case({"/sys/module/amd_ttm/parameters/pages_limit": "1\n"}),
    "gpu-not-permitted": Case(surroundings(kfd=False), says="/dev/kfd"),
    "gpu-several": Case(OTHER_GPU, says="1002:744c"),
    "rocm-too-old": Case({"/opt/rocm/.info/version": "6.3.1-48\n"}, says="6.3.1"),
    "rocm-slow-prompts": Case(
        {"/opt/rocm/.info/version": "7.1.0\n"}, {"/opt/rocm/.info/version": "7.14.0\n"}
    ),
    "rocm-save-area": Case({"/opt/rocm/.info/version": "7.1.0\n"}),
    "rocm-override": Case(
        surroundings(HSA_OVERRIDE_GFX_VERSION="11.0.0"),
        says="HSA_OVERRIDE_GFX_VERSION=11.0.0 (your environment)",
    ),
    "gpu-hidden": Case(
        surroundings(HIP_VISIBLE_DEVICES="-1"), surroundings(HIP_VISIBLE_DEVICES="0")
    ),
    "rocm-folk-settings": Case(surroundings(HSA_ENABLE_SDMA="0")),
    "option-folk-settings": Case(cmdline("amdgpu.noretry=0"), says="amdgpu.noretry=0"),
    "rocm-several-clients": Case(surroundings(clients=2), says="2 processes"),
    "rocm-spinning-thread": Case(
        {"/opt/rocm/.info/version": "7.14.0\n"}, {"/opt/rocm/.info/version": "7.2.4\n"}, says="7.14"
    ),
    "vulkan-cpu-compute": Case(
        surroundings("9672 (eae5b28)", ("vulkan", "cpu")),
        surroundings("9660 (1234567)", ("vulkan", "cpu")),
        says="in one report",
    ),
    "vulkan-slow-moe": Case(
        surroundings("8933 (1234567)", ("vulkan", "cpu")),
        surroundings("9049 (1234567)", ("vulkan", "cpu")),
        says="39 %",
    ),
    "vulkan-short-lockup": Case(
        surroundings(backends=("vulkan", "cpu")),
        {
            **surroundings(backends=("vulkan", "cpu")),
            **cmdline("amdgpu.lockup_timeout=10000,60000,10000,10000"),
        },
        says="2 s",
    ),
    "swap-zram-large": Case(
        {"/proc/swaps": swaps("/dev/zram0", kib=100 * 1024 * 1024)}, says="100 GiB"
    ),
    "swap-swappiness": Case(
        {"/proc/swaps": swaps("/dev/zram0"), "/proc/sys/vm/swappiness": "10\n"},
        {"/proc/swaps": swaps("/dev/zram0"), "/proc/sys/vm/swappiness": "180\n"},
        says="all swap is zram",
    ),
    "swap-zswap-zram": Case(
        {
            "/proc/swaps": swaps("/dev/zram0"),
            "/sys/module/zswap/parameters/enabled": "Y\n",
        },
        {
            "/proc/swaps": swaps("/dev/zram0"),
            "/sys/module/zswap/parameters/enabled": "N\n",
        },
    ),
    "coredump-large": Case(
        {
            "/proc/sys/kernel/core_pattern": "|/usr/lib/systemd/systemd-coredump %P %u\n",
            "/etc/systemd/coredump.conf": "[Coredump]\n"
            "ProcessSizeMax=infinity\nExternalSizeMax=100G\n",
        },
        {
            "/proc/sys/kernel/core_pattern": "|/usr/lib/systemd/systemd-coredump %P %u\n",
            "/etc/systemd/coredump.conf": "[Coredump]\nProcessSizeMax=infinity\n",
        },
        says="a limit of 100 GiB",
    ),
    "rocm-managed-memory": Case(server("", "Environment=GGML_CUDA_ENABLE_UNIFIED_MEMORY=1")),
    "vulkan-amdvlk": Case(
        {"/etc/vulkan/icd.d/amd_icd64.json": "{}\n"},
        {
            "/etc/vulkan/icd.d/amd_icd64.json": "{}\n",
            **surroundings(AMD_VULKAN_ICD="RADV"),
        },
        says="beside RADV",
    ),
    "vulkan-no-radv": Case(
        {
            "/usr/share/vulkan/icd.d/radeon_icd.x86_64.json": None,
            "/usr/share/vulkan/icd.d/lvp_icd.x86_64.json": "{}\n",
        }
    ),
    "llama-wrong-logits": Case(BAD_BUILD, says="b10566"),
    "llama-mixed-answers": Case(BAD_BUILD),
    "llama-misread-memory": Case(surroundings("7464 (0a0bba05e)")),
    "llama-slow-prompts": Case(surroundings("7349 (4df6e859e)")),
    "llama-top-k": Case(surroundings("10079 (1234567)")),
    "llama-gone-flags": Case(
        server("--no-mmap --mlock"),
        {**server("--no-mmap --mlock"), **surroundings("8681 (1234567)")},
        says="--mlock, --no-mmap",
    ),
    "llama-flash-value": Case(server("-fa --jinja"), server("-fa on"), says="takes the next flag"),
    "llama-gone-variables": Case(surroundings(LLAMA_ARG_MLOCK="1")),
    "llama-no-gpu": Case(surroundings(backends=("cpu",))),
    "llama-no-number": Case(surroundings("0.1.0-dev (build 1, commit 7e4c0a9)")),
    "llama-illegal-instruction": Case(
        {},
        smoke=(
            Smoke("illegal-instruction", "the server died at its first token"),
            Smoke("answered", "well"),
        ),
    ),
    "llama-no-token": Case({}, smoke=(Smoke("died", "the server died"), Smoke("answered", "well"))),
    "llama-silent": Case({}, smoke=(Smoke("silent", "nothing came"), Smoke("answered", "well"))),
    "server-ubatch-capped": Case(
        server("-ub 4096"), server("-b 4096 -ub 4096"), says="4096 tokens, and the batch is 2048"
    ),
    "server-ubatch-vulkan": Case(
        {**server("-ub 2048"), **surroundings(backends=("vulkan", "cpu"))},
        server("-ub 2048"),
        says="2048 tokens in one go",
    ),
    "server-quantised-v": Case(
        server("-ctv q8_0 -fa off"), server("-ctv q8_0"), says="V cache of q8_0"
    ),
    "server-slot-context": Case(
        server("-c 8192 --parallel 8"), server("-c 8192 --parallel 8 -kvu"), says="1024 for each"
    ),
    "server-locked-copy": Case(
        server("--load-mode mmap+mlock"),
        server("--load-mode mlock"),
        says="chat.service maps the model",
    ),
    "server-mapped-model": Case(
        server("--load-mode mmap"), server("--load-mode none"), says="asks for a mapped model"
    ),
    "server-no-offload": Case(server("-ngl 0"), server("-ngl 0 --embeddings"), says="on the CPU"),
    "server-prompt-cache": Case(
        {**server(), **sized(120)},
        {**server("--cache-ram 1024"), **sized(120)},
        says="8 GiB, llama-server's default",
    ),
    "ttm-above-ram": Case(sized(192), says="192 GiB"),
    "ttm-close-to-ram": Case(sized(120)),
    "ttm-default": Case({**sized(62), MODPROBE: None}),
    "ttm-not-in-force": Case({f"{GPU}/mem_info_gtt_total": f"{62 * GIB}\n"}),
    "gtt-above-ttm": Case(
        {f"{GPU}/mem_info_gtt_total": f"{120 * GIB}\n"}, says="TTM allows the GPU 96 GiB"
    ),
    "gpu-memory-held": Case(
        {f"{GPU}/mem_info_gtt_used": f"{70 * GIB}\n"},
        {f"{GPU}/mem_info_gtt_used": f"{1 * GIB}\n"},
        says="70 GiB of the GPU's 96 GiB are in use",
    ),
    "gpu-memory-next-boot": Case(
        {MODPROBE: "options ttm pages_limit=12582912\n"}, says="48 GiB, now 96 GiB"
    ),
    "carveout-large": Case(
        {f"{GPU}/mem_info_vram_total": f"{96 * GIB}\n", **sized(62)},
        says="carve-out of 96 GiB",
    ),
    "carveout-wasted": Case({f"{GPU}/mem_info_vram_total": f"{32 * GIB}\n"}),
    "gpu-no-system-limit": Case({"/sys/module/amdgpu/parameters/no_system_mem_limit": "Y\n"}),
    "memlock-limit": Case(
        server("--load-mode mlock"),
        server("--load-mode mlock", "LimitMEMLOCK=infinity"),
        says="chat.service",
    ),
    "container-limit": Case(
        {"/sys/fs/cgroup/memory.max": f"{120 * GIB}\n"},
        {"/sys/fs/cgroup/memory.max": "max\n", "/run/.containerenv": ""},
        says="120 GiB",
    ),
    "thp-madvise": Case(
        {"/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n"}
    ),
    "read-ahead": Case({"/sys/block/nvme0n1/queue/read_ahead_kb": "0\n"}, says="page by page"),
    "overcommit-strict": Case({"/proc/sys/vm/overcommit_memory": "2\n"}),
    "hugepages-unused": Case(memory(HugePages_Total=4096, HugePages_Free=4096), says="8 GiB"),
    "oom-kills": Case({"/proc/vmstat": "oom_kill 3\n"}, says="killed 3 processes"),
    "memory-stalls": Case(
        {"/proc/pressure/memory": "full avg10=9.00 avg60=8.00 avg300=4.20 total=1\n"}, says="4.2 %"
    ),
    "memory-fragmented": Case(
        {"/proc/buddyinfo": "Node 0, zone   Normal 9999999 9 9 9 9 9 9 9 9 9 9\n"}
    ),
    "swap-none": Case(memory(SwapTotal=0)),
    "gttsize-deprecated": Case(cmdline("amdgpu.gttsize=98304")),
    "gtt-sizes-differ": Case(
        cmdline("amdgpu.gttsize=126976", "ttm.pages_limit=25165824"),
        cmdline("ttm.pages_limit=25165824"),
        says="124 GiB",
    ),
    "option-twice": Case(
        cmdline("ttm.pages_limit=31457280"),
        cmdline("ttm.pages_limit=25165824"),
        says="in force is 25165824",
    ),
    "option-misspelt": Case(cmdline("amdgpu.gtt_size=122880"), says="amdgpu.gtt_size=122880"),
    "option-unknown": Case(
        {MODPROBE: "options ttm page_limits=1\n"},
        says="did you mean ttm.pages_limit?",
    ),
    "ttm-pool-above-limit": Case(
        {MODPROBE: "options ttm pages_limit=25165824 page_pool_size=31457280\n"},
        {MODPROBE: "options ttm pages_limit=25165824 page_pool_size=25165824\n"},
    ),
    "ttm-wrong-unit": Case({MODPROBE: "options ttm pages_limit=98304\n"}, says="pages of 4 KiB"),
    "initramfs-older": Case(
        {MODPROBE: File("options ttm pages_limit=25165824\n", BOOTED - 500)},
        says="/etc/modprobe.d/gpu.conf changed after",
    ),
    "option-not-in-force": Case(
        {MODPROBE: File("options ttm pages_limit=27262976\n", BOOTED - 2000)},
        says="is not in force",
    ),
    "boot-staged": Case(
        surroundings(staged=("overridden", ("ttm.pages_limit: /proc/cmdline says 1 and wins",))),
        surroundings(staged=("active", ())),
        says="/proc/cmdline says 1 and wins",
    ),
    "modprobe-odd-file": Case(
        {"/etc/modprobe.d/odd.conf": b"\x7fELF\x00\x00"}, says="not a text file"
    ),
    "iommu-invalid": Case(
        cmdline("amd_iommu=pt"), cmdline("amd_iommu=force_isolation"), says="iommu=pt is meant"
    ),
    "boot-value-unknown": Case(
        cmdline("amd_pstate=epp"), cmdline("amd_pstate=active"), says="amd_pstate=epp"
    ),
    "npu-without-iommu": Case(cmdline("amd_iommu=off"), cmdline("iommu=pt")),
    "iommu-trade": Case(cmdline("amd_iommu=off"), says="VFIO"),
    "thp-command-line": Case(cmdline("transparent_hugepage=never")),
    "gpu-lockup-never": Case(
        cmdline("amdgpu.lockup_timeout=-1"), cmdline("amdgpu.lockup_timeout=0,20000")
    ),
    "tuners-conflict": Case(
        {"/sys/fs/cgroup/system.slice/tlp.service/cgroup.procs": "", "/run/tlp/last_pwr": "0\n"},
        says="TuneD and TLP",
    ),
    "tuned-saves-power": Case({"/etc/tuned/active_profile": "powersave\n"}),
    "governor-powersave": Case({f"{CPUFREQ}/policy0/scaling_driver": "acpi-cpufreq\n"}),
    "preference-power": Case({f"{CPUFREQ}/policy0/energy_performance_preference": "power\n"}),
    "cpu-capped": Case(
        {
            f"{CPUFREQ}/policy0/scaling_max_freq": "2000000\n",
            f"{CPUFREQ}/policy0/cpuinfo_max_freq": "5187500\n",
        },
        {
            f"{CPUFREQ}/policy0/scaling_max_freq": "5187500\n",
            f"{CPUFREQ}/policy0/cpuinfo_max_freq": "5187500\n",
        },
        says="39%",
    ),
    "cpu-boost-off": Case({f"{CPUFREQ}/boost": "0\n"}),
    "platform-profile-low": Case({"/sys/firmware/acpi/platform_profile": "low-power\n"}),
    "on-battery": Case(
        {"/sys/class/power_supply/ACAD/online": "0\n"},
        {"/sys/class/power_supply/ACAD/online": "1\n"},
    ),
    "gpu-level-low": Case({f"{GPU}/power_dpm_force_performance_level": "low\n"}),
    "gpu-power-cap": Case(
        {f"{HWMON}/power1_cap": "60000000\n", f"{HWMON}/power1_cap_default": "120000000\n"},
        {f"{HWMON}/power1_cap": "120000000\n", f"{HWMON}/power1_cap_default": "120000000\n"},
        says="60 W",
    ),
    "gpu-fan": Case(
        {f"{HWMON}/fan1_input": "0\n", f"{HWMON}/temp1_input": "93000\n"},
        {f"{HWMON}/fan1_input": "0\n", f"{HWMON}/temp1_input": "45000\n"},
        says="is not turning",
    ),
    "gpu-hot": Case({f"{HWMON}/temp1_input": "97000\n"}, says="97 C"),
    "tuned-ppd-base": Case(
        {"/etc/tuned/ppd_base_profile": "balanced\n", "/etc/tuned/ppd.conf": PPD_CONF},
        {"/etc/tuned/ppd_base_profile": "performance\n", "/etc/tuned/ppd.conf": PPD_CONF},
        says="until tuned-ppd next starts, at boot at the latest: it then switches to balanced",
    ),
    "tuned-auto": Case(
        {"/etc/tuned/profile_mode": "auto\n"}, {"/etc/tuned/profile_mode": "manual\n"}
    ),
    "power-set-back": Case(
        {
            "/sys/firmware/acpi/platform_profile": "performance\n",
            "/sys/fs/cgroup/system.slice/power-profiles-daemon.service/cgroup.procs": "",
            "/var/lib/power-profiles-daemon/state.ini": "[State]\nProfile=balanced\n",
        },
        {
            "/sys/firmware/acpi/platform_profile": "performance\n",
            "/sys/fs/cgroup/system.slice/power-profiles-daemon.service/cgroup.procs": "",
            "/var/lib/power-profiles-daemon/state.ini": "[State]\nProfile=performance\n",
        },
        says="power-profiles-daemon next starts, at boot at the latest: it then sets balanced",
    ),
    "boot-writes-again": Case(
        {"/etc/sysctl.d/99-zram.conf": "vm.swappiness = 180\n"},
        {"/etc/sysctl.d/99-zram.conf": "vm.swappiness = 60\n"},
        says="vm.swappiness is 60, and /etc/sysctl.d/99-zram.conf writes 180 at each boot",
    ),
    "log-ring-timeout": Case(
        log("amdgpu 0000:c5:00.0: ring comp_1.1.0 timeout, signaled seq=3, emitted seq=5"),
        says="ring comp_1.1.0 timeout",
    ),
    "log-mes": Case(log("amdgpu 0000:c3:00.0: amdgpu: MES failed to respond to msg=REMOVE_QUEUE")),
    "log-gpu-reset": Case(
        log("amdgpu 0000:c3:00.0: [drm] device wedged, but recovered through reset"), says="once"
    ),
    "log-page-fault": Case(
        log("amdgpu 0000:c3:00.0: amdgpu: [gfxhub] page fault (src_id:0 ring:24 vmid:8)")
    ),
    "log-oom": Case(
        log(
            "Out of memory: Killed process 812 (llama-server) total-vm:1kB",
            "Out of memory: Killed process 4711 (firefox) total-vm:1kB",
        ),
        says="the OOM killer killed 2 processes, 1 of them not model servers",
    ),
    "log-illegal-instruction": Case(
        log(
            "traps: llama-server[4711] trap invalid opcode ip:7f0 sp:7f1 error:0 in "
            "libggml-cpu.so.0[1025a9,7f0+1000]"
        ),
        log("traps: firefox[4711] trap invalid opcode ip:7f0 sp:7f1 error:0 in libxul.so[1,2+3]"),
        says="libggml-cpu.so.0",
    ),
    "log-gttsize": Case(
        log(
            "amdgpu 0000:c3:00.0: amdgpu: [drm] Configuring gttsize via module parameter is "
            "deprecated, please use ttm.pages_limit"
        )
    ),
    "log-gtt-differs": Case(
        log(
            "amdgpu 0000:c3:00.0: [drm] GTT size has been set as 134217728000 but TTM size has "
            "been set as 65867993088, this is unusual"
        )
    ),
    "log-gtt-capped": Case(
        log("amdgpu 0000:c5:00.0: Capping GTT to 190464M to not exceed available system memory")
    ),
    "log-unknown-parameter": Case(
        log("amdgpu: unknown parameter 'gtt_size' ignored"),
        log("snd_hda_intel: unknown parameter 'x' ignored"),
    ),
    "log-iommu-option": Case(log("AMD-Vi: Unknown option - 'pt'")),
    "log-firmware-missing": Case(
        log(
            "amdgpu 0000:c3:00.0: Direct firmware load for amdgpu/gc_11_5_1_mes1.bin failed with "
            "error -2"
        )
    ),
    "log-npu-fault": Case(
        log("amdxdna 0000:c6:00.1: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0 address=0x1]")
    ),
    "log-npu-timeout": Case(
        log("amdxdna 0000:c6:00.1: aie2_dump_ctx: Firmware timeout state capture:")
    ),
    "survey-dynamic-quants": Case(
        unit("ExecStart=llama-server -m /m/q4_k_m/x-Q4_K_M.gguf"), status=("not done", "done")
    ),
    "survey-wmma-attention": Case({}, quiet_machine="intel-desktop", status=("outdated", "")),
    "survey-no-mmap": Case(
        {},
        {**surroundings("8681 (1234567)"), **server("--no-mmap")},
        status=("outdated", "done"),
    ),
    "survey-cache-types": Case(
        {}, server("-ctk q8_0 -ctv q8_0"), status=("not done", "done"), says="changes answers"
    ),
    "survey-hipblaslt": Case(
        {}, surroundings(ROCBLAS_USE_HIPBLASLT="1"), status=("outdated", "done")
    ),
    "survey-speculation": Case({}, server("--spec-type draft-mtp"), status=("not done", "done")),
    "survey-clocks": Case(
        {},
        {f"{CPUFREQ}/policy{number}/scaling_governor": "performance\n" for number in range(32)},
        status=("not done", "done"),
    ),
    "survey-prompt-compression": Case(
        {},
        {"/usr/lib/python3.14/site-packages/llmlingua-0.2.2.dist-info/METADATA": ""},
        status=("not done", "done"),
    ),
    "survey-vllm": Case(
        {},
        {"/usr/local/lib/python3.14/site-packages/vllm-0.27.0.dist-info/METADATA": ""},
        status=("not done", "done"),
    ),
    "survey-memory-reservation": Case({}, server("", "MemoryMin=8G"), status=("outdated", "done")),
    "survey-vulkan": Case(surroundings(backends=("rocm", "cpu")), status=("not done", "done")),
    "survey-pinning": Case({}, server("", "AllowedCPUs=0-7"), status=("not done", "done")),
}


def test_every_rule_has_a_machine_that_fires_and_one_that_is_silent() -> None:
    assert CASES.keys() == RULES.keys()
    assert len(RULES) >= 40
    assert len(RULES) == sum(map(len, SUBJECTS.values()))  # no id twice


def test_the_survey_is_whole() -> None:
    """Its first tier has seven recommendations, its second five."""
    numbers = [rule.title.partition(":")[0] for rule in SUBJECTS["survey"]]
    assert numbers == [f"1.{n}" for n in range(1, 8)] + [f"2.{n}" for n in range(1, 6)]


@pytest.mark.parametrize("id_", CASES)
def test_rule_fires(id_: str, tmp_path: Path) -> None:
    case, rule = CASES[id_], RULES[id_]
    root = build(tmp_path, HEALTHY, case.fires, machine=case.machine)
    result = ask(root, id_, case.smoke[0] if case.smoke else None)
    if case.status:
        assert isinstance(result.answer, Advice), result
        assert result.answer.status == case.status[0]
        assert case.says in result.answer.why
    else:
        assert isinstance(result.answer, Finding), result
        assert result.severity == (case.severity or rule.severity)
        assert case.says in result.answer.text


@pytest.mark.parametrize("id_", CASES)
def test_rule_is_silent(id_: str, tmp_path: Path) -> None:
    case = CASES[id_]
    machine = case.quiet_machine or case.machine
    root = build(tmp_path, HEALTHY, case.silent, machine=machine)
    result = ask(root, id_, case.smoke[1] if case.smoke else None)
    if case.quiet_machine:
        assert result.outcome == "not applicable"
    elif case.status:
        assert isinstance(result.answer, Advice), result
        assert result.answer.status == case.status[1]
    else:
        assert result.outcome == "fine", result


# -- whole machines --------------------------------------------------------------------


def test_nothing_is_wrong_with_a_healthy_machine(tmp_path: Path) -> None:
    root = build(tmp_path, HEALTHY)
    results = diagnose(read_facts(root, recorded(root)), RULES.values())
    found = [(each.severity, each.rule.id) for each in results if each.outcome == "finding"]
    assert found == []
    # Fedora's package database is SQLite, which infertune does not read.
    assert [each.rule.id for each in results if each.outcome == "unknown"] == ["firmware-leftover"]


@pytest.mark.parametrize(
    ("gone", "rules"),
    [
        ("/proc/sys/vm/overcommit_memory", ["overcommit-strict"]),
        ("/proc/meminfo", ["hugepages-unused", "swap-none"]),
        (CPUFREQ, ["governor-powersave", "preference-power", "cpu-capped", "cpu-boost-off"]),
    ],
)
def test_what_cannot_be_read_is_not_fine(gone: str, rules: list[str], tmp_path: Path) -> None:
    root = build(tmp_path, HEALTHY)
    at = root.at(gone)
    shutil.rmtree(at) if at.is_dir() else at.unlink()
    results = diagnose(read_facts(root, recorded(root)), [RULES[each] for each in rules])
    assert {each.rule.id: each.outcome for each in results} == dict.fromkeys(rules, "unknown")


@pytest.mark.parametrize(
    "machine", ["strix-halo-128", "strix-halo-64-laptop", "rog-z13", "intel-desktop", "recorded-vm"]
)
def test_no_error_on_recorded_machines(machine: str, tmp_path: Path) -> None:
    """What an old snapshot does not say is unknown, and never an error."""
    root = build(tmp_path, machine=machine)
    results = diagnose(read_facts(root, recorded(root)), RULES.values())
    assert [each.rule.id for each in results if each.severity == "error"] == []
    unknown = {each.rule.id for each in results if each.outcome == "unknown"}
    assert "log-mes" in unknown


def test_surroundings_are_not_guessed(tmp_path: Path) -> None:
    result = ask(build(tmp_path, HEALTHY, {SURROUNDINGS: None}), "rocm-override")
    assert result.answer == Unknown("the snapshot does not say")


def test_between_the_known_ends_a_build_is_a_doubt(tmp_path: Path) -> None:
    result = ask(build(tmp_path, HEALTHY, surroundings("10900 (1234567)")), "llama-wrong-logits")
    assert isinstance(result.answer, Finding)
    assert (result.severity, result.answer.confidence) == ("warning", "likely")
    assert "may be from before the fix" in result.answer.text


@pytest.mark.parametrize(
    ("version", "says"),
    [((1, 9), "good"), ((2,), "bad"), ((2, 5), "bad"), ((3, 0), "bad"), ((3, 0, 9), "bad"),
     ((3, 1), "maybe"), ((4,), "good"), ((4, 0, 1), "good")],
)  # fmt: skip
def test_window(version: tuple[int, ...], says: str) -> None:
    assert Window(first=(2,), last=(3, 0), good=(4,)).says(version) == says


def test_a_shorter_version_than_the_fix_is_a_doubt() -> None:
    window = Window(first=(7, 0), last=(7, 2, 0), good=(7, 2, 1))
    assert [window.says(each) for each in ((7, 1), (7, 2), (7, 2, 0), (7, 2, 1))] == [
        "bad", "maybe", "bad", "good",
    ]  # fmt: skip


def test_rocm_of_a_distribution(tmp_path: Path) -> None:
    library = "/usr/lib64/libamdhip64.so.7.2.53211"
    result = ask(
        build(tmp_path, HEALTHY, {"/opt/rocm/.info/version": None, library: ""}),
        "rocm-slow-prompts",
    )
    assert isinstance(result.answer, Finding)
    assert "ROCm 7.2 may compile" in result.answer.text


def test_window_without_a_fix() -> None:
    assert Window(first=(2,), last=(3,), good=None).says((99,)) == "maybe"


def test_an_end_that_nobody_has_named_says_about() -> None:
    known = Window(first=(7349,), last=(7522,), good=(7700,))
    assert str(known) == "bad 7349 to 7522, good from 7700"
    assert str(replace(known, estimated=True)) == "bad 7349 to 7522, good from about 7700"


@pytest.mark.parametrize(
    ("version", "build_number"),
    [("0.7.0 (build 11669, commit Debian)", 11669), ("7464 (0a0bba05e)", 7464),
     ("b10079-mix-fb3d4ca", 10079), ("0.1.0-dev (build 1, commit 7e4c0a9)", None),
     ("0 (unknown)", None), ("xllamacpp 2026.10.11549", None), ("", None), ("9" * 5000, None)],
)  # fmt: skip
def test_build_number(version: str, build_number: int | None) -> None:
    assert LlamaServer(version, ("cpu",)).build == build_number


def test_a_rule_that_fails_is_unknown_and_stops_no_other(tmp_path: Path) -> None:
    def fails(facts: Facts) -> None:
        raise ZeroDivisionError("seven")

    bad = replace(RULES["swap-none"], id="bad", when=ALWAYS, check=fails)
    root = build(tmp_path, HEALTHY, memory(SwapTotal=0))
    results = diagnose(read_facts(root, recorded(root)), [bad, RULES["swap-none"]])
    assert [each.outcome for each in results] == ["unknown", "finding"]
    assert results[0].answer == Unknown("the rule failed, please report: ZeroDivisionError: seven")


def test_a_reading_that_fails_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(root: Root) -> None:
        raise RuntimeError("seven")

    monkeypatch.setattr("infertune.doctor.facts._paging", fails)
    facts = read_facts(build(tmp_path, HEALTHY), Surroundings({}, None, {}))
    assert facts.paging == Unknown("reading it failed, please report: RuntimeError: seven")
    assert need(facts.log)


class Closed(Root):
    """A machine whose kernel log is for somebody else."""

    def read_records(self, path: str, limit: int) -> bytes:
        raise PermissionError(1, "Operation not permitted", path)


def test_a_log_that_may_not_be_read_is_not_a_clean_one(tmp_path: Path) -> None:
    build(tmp_path, HEALTHY)
    facts = read_facts(Closed(tmp_path), Surroundings({}, None, {}))
    results = diagnose(facts, SUBJECTS["logs"])
    assert {each.outcome for each in results} == {"unknown"}
    assert {each.answer for each in results} == {
        Unknown("the kernel log is for root here, and the journal gives none of it")
    }


def test_rules_say_who_says_so() -> None:
    for rule in RULES.values():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", rule.id)
        assert rule.sources
        assert all(source.url.startswith("https://") for source in rule.sources), rule.id
        assert not rule.title.endswith(".")
        assert not rule.fix.endswith(".")


# -- the command line ------------------------------------------------------------------

SICK: Overlay = {
    **BAD_BUILD,
    **cmdline("amdgpu.gttsize=126976", "amd_iommu=off", "nomodeset"),
    KERNEL: "7.0.12-200.fc44.x86_64\n",
    f"{CPUFREQ}/boost": "0\n",
    "/proc/pressure/memory": None,
    "/dev/kmsg": None,
}


def doctor(capsys: pytest.CaptureFixture[str], root: Root, *words: str) -> tuple[int, str]:
    code = main(["--root", str(root.base), "doctor", *words])
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    return code, out.out


def test_exit_code_is_1_only_for_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(capsys, build(tmp_path / "well", HEALTHY))[0] == 0
    warned = build(tmp_path / "warned", HEALTHY, {f"{CPUFREQ}/boost": "0\n"})
    assert doctor(capsys, warned)[0] == 0
    code, out = doctor(capsys, build(tmp_path / "sick", HEALTHY, SICK))
    assert code == 1
    kinds = re.findall(r"^(error|warning|info): ", out, re.MULTILINE)
    assert kinds == sorted(kinds, key=["error", "warning", "info"].index)
    assert {"error", "warning", "info"} == set(kinds)
    assert "https://github.com/ggml-org/llama.cpp/issues/28211" in out
    assert re.search(r"^not known \(\d+ rules\): there is no kernel log here \(1\d\)", out, re.M)
    assert re.search(r"^5 errors, 1 warning, 2 notes; of \d+ rules ", out, re.MULTILINE), out[-200:]


def test_chosen_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = build(tmp_path, HEALTHY, SICK)
    code, out = doctor(capsys, root, "--rule", "swap-none", "--rule", "iommu-trade", "--all")
    assert code == 0
    assert "of 2 rules 1 fine" in out
    assert main(["doctor", "--rule", "swap-non"]) == 2
    assert "did you mean 'swap-none'?" in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(RULES) + 1


def test_smoke_is_for_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(tmp_path), "doctor", "--smoke"]) == 2
    assert "this machine only" in capsys.readouterr().err


def test_json_golden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    code, out = doctor(capsys, build(tmp_path, HEALTHY, SICK), "--json")
    assert code == 1
    golden = GOLDEN / "strix-halo-128-doctor.json"
    if request.config.getoption("--update-golden"):
        golden.write_text(out)
    assert out == golden.read_text()


# -- snapshots -------------------------------------------------------------------------


def taken(root: Root) -> str:
    def read(recorder: Root) -> None:
        read_facts(recorder, recorded(recorder))

    return record(root, read)


def test_a_snapshot_is_diagnosed_as_the_machine_is(tmp_path: Path) -> None:
    sick = {**SICK, **log("amdgpu 0000:c5:00.0: ring comp_1.1.0 timeout, signaled seq=3")}
    root = build(tmp_path / "machine", HEALTHY, sick)
    here = diagnose(read_facts(root, recorded(root)), RULES.values())
    file = tmp_path / "machine.snapshot"
    file.write_text(taken(root))
    with open_snapshot(str(file)) as replay:
        there = diagnose(read_facts(replay, recorded(replay)), RULES.values())
        assert taken(replay).partition("\n\n")[2] == file.read_text().partition("\n\n")[2]
    assert [(each.rule.id, each.answer) for each in there] == [
        (each.rule.id, each.answer) for each in here
    ]
    assert sum(each.outcome == "finding" for each in there) >= 8


def test_nothing_private_gets_into_a_snapshot(tmp_path: Path) -> None:
    private: Overlay = {
        MODPROBE: "# alice's laptop\noptions ttm pages_limit=25165824\ninstall x /home/alice/x\n"
        "options alice_wifi key=hunter2\n",
        "/etc/modprobe.d/alice-vpn.conf": "options other secret=hunter2\n",
        UNIT: "[Unit]\nDescription=alice\n[Service]\nUser=alice\n"
        "Environment=HF_TOKEN=hunter2 HSA_ENABLE_SDMA=0\n"
        "ExecStart=/home/alice/llama-server -m /home/alice/diary-Q4_K_M.gguf --api-key hunter2 \\\n"
        " -ctk q8_0 --alias alice\n",
        "/etc/systemd/system/alice-backup.service": "[Service]\nExecStart=/home/alice/b\n",
        "/etc/infertune/servers.d/a.toml": 'model = "/home/alice/diary-UD-Q4_K_XL.gguf"\n',
        "/var/lib/dpkg/status": DPKG.format("alice-tools", "1") + DPKG.format("rocm-core", "7.2.4"),
        **log(
            "alice-diary[4711]: segfault",
            "Out of memory: Killed process 4711 (alice-diary) total-vm:1kB, UID:1000",
            "amdgpu 0000:c5:00.0:  Process alice-diary pid 4711 thread alice-diary pid 4711",
        ),
        "/proc/self/limits": "Max processes 4711 4711 processes\nMax locked memory 1 1 bytes\n",
    }
    text = taken(build(tmp_path, HEALTHY, private))
    for secret in ("alice", "hunter2", "4711", "diary", "UID:"):
        assert secret not in text, secret
    for kept in (
        "options ttm pages_limit=25165824",
        (
            "ExecStart=/elsewhere/llama-server -m model-Q4_K_M.gguf --api-key redacted "
            "-ctk q8_0 --alias redacted"
        ),
        "Environment=HSA_ENABLE_SDMA=0",
        'model = "model-UD-Q4_K_XL.gguf"',
        "Package: rocm-core",
        "6,0,0,-;Out of memory: Killed process 0 (other)",
    ):
        assert f"\n{kept}\n" in text, kept


def test_reducing_twice_changes_nothing(tmp_path: Path) -> None:
    root = build(tmp_path, HEALTHY, log("Out of memory: Killed process 4711 (ollama) x"))
    for path in (MODPROBE, UNIT, "/dev/kmsg", "/proc/self/limits", "/proc/stat"):
        once = reduce_file(path, root.read_bytes(path))
        assert once
        assert reduce_file(path, once) == once


def test_a_log_that_is_made_to_be_slow_is_not() -> None:
    """Patterns that try every beginning took 8 s for a line of 16,000 characters."""
    begin = time.process_time()
    for text in ("[1]" * 20_000, "amdxdna x: " * 6_000, "(" * 60_000, "ring a" * 10_000):
        assert not any(find(sign, messages(records([text]))) for sign in SIGNS)
    assert not find("invalid-opcode", ["[1]" * 20_000])
    assert time.process_time() - begin < 2


def test_a_message_is_cut_where_the_kernel_would() -> None:
    log = records(["x" * 60_000, "[1]" * 20_000])
    assert [len(each) for each in messages(log)] == [1024, 1024]


def test_signs_survive_the_snapshot() -> None:
    """What a rule looks for, it also finds in what is left of the log."""
    lines = [
        line
        for case in CASES.values()
        for line in messages(case.fires.get("/dev/kmsg", b""))  # type: ignore[arg-type]
    ]
    for sign in SIGNS:
        whole = find(sign, lines)
        assert whole, sign
        assert len(find(sign, messages(reduce_log(records(lines))))) == len(whole), sign


# -- the surroundings ------------------------------------------------------------------


def test_surroundings_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "bin" / "llama-server"
    binary.parent.mkdir()
    binary.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'version: 7464 (0a0bba05e)'\n")
    binary.chmod(0o755)
    (tmp_path / "bin" / "libggml-hip.so").touch()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libggml-vulkan.so.0").touch()
    monkeypatch.setattr("infertune.doctor.surroundings._journal", lambda: ("one", "two"))
    caller = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "AMD_VULKAN_ICD": "RADV", "HF_TOKEN": "x"}
    around = look_around(Root("/"), caller)
    assert around.environment == {"AMD_VULKAN_ICD": "RADV"}
    place = ("/elsewhere/llama-server",)
    assert around.server == LlamaServer("7464 (0a0bba05e)", ("rocm", "vulkan", "cpu"), place)
    # The same comes back out of a snapshot.
    (tmp_path / "run/infertune").mkdir(parents=True)
    (tmp_path / SURROUNDINGS[1:]).write_bytes(around.to_file())
    again = recorded(Root(tmp_path))
    assert again == replace(around, journal=None)


def test_what_became_of_staged_boot_settings_is_asked(tmp_path: Path) -> None:
    root = build(tmp_path, HEALTHY)
    assert look_around(root, {}).staged == Staged("none", ())
    why = "its start was not confirmed"
    stage = Stage(phase="failed", profile="x", since="2026-01-01", boot_id="b", reason=why)
    save(root, stage)
    around = look_around(root, {})
    assert around.staged == Staged("failed", (why,))
    root.replace(SURROUNDINGS, around.to_file(), 0o644)
    assert recorded(root).staged == around.staged
    assert "/var/lib/infertune/boot" not in taken(root)
    [result] = diagnose(read_facts(root, around), [RULES["boot-staged"]])
    assert isinstance(result.answer, Finding)
    assert result.answer.text.endswith(f"are not in force ({why})")
    root.replace("/var/lib/infertune/boot", b"nothing\n", 0o644)
    found = look_around(root, {}).staged
    assert isinstance(found, Unknown)
    assert "is damaged" in found.why


@pytest.mark.parametrize(
    ("state", "severity", "says"),
    [("pending-reboot", "info", "next boot"), ("staged", "warning", "half staged or half put back"),
     ("failed", "warning", "are not in force"), ("overridden", "warning", "overridden")],
)  # fmt: skip
def test_staged_boot_settings(state: str, severity: str, says: str, tmp_path: Path) -> None:
    root = build(tmp_path, HEALTHY, surroundings(staged=(state, ())))
    result = ask(root, "boot-staged")
    assert isinstance(result.answer, Finding)
    assert (result.severity, says in result.answer.text) == (severity, True)
    old = build(tmp_path / "old", HEALTHY, surroundings(staged=("banana", ())))
    assert ask(old, "boot-staged").outcome == "unknown"


def test_a_server_with_its_needs_inside(tmp_path: Path) -> None:
    binary = tmp_path / "llama-server"
    binary.write_bytes(b"\x7fELF" + bytes(5000) + b"\0libamdhip64.so.7\0" + bytes(5000))
    assert linked_backends(str(binary)) == {"rocm", "cpu"}


def test_others_may_write(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: files of root are what it is about")
    binary = tmp_path / "llama-server"
    binary.touch()
    assert not others_may_write(str(binary))
    os.chown(binary, 65534, -1)
    assert others_may_write(str(binary))
    os.chown(binary, 0, -1)
    binary.chmod(0o775)
    assert others_may_write(str(binary))
    binary.chmod(0o755)
    tmp_path.chmod(0o777)
    assert others_may_write(str(binary))


def test_the_journal_stands_in_for_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "journalctl"
    program.write_text("#!/bin/sh\necho 'amdgpu 0000:c5:00.0: ring comp_1.1.0 timeout, signaled'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    lines = kernel_journal(5)
    assert lines
    around = Surroundings({}, None, {}, journal=tuple(lines))
    facts = read_facts(build(tmp_path / "machine", HEALTHY), around)
    [result] = diagnose(facts, [RULES["log-ring-timeout"]])
    assert result.outcome == "finding"
    program.write_text("#!/bin/sh\nexit 1\n")
    assert kernel_journal(5) is None
