# SPDX-License-Identifier: Apache-2.0
"""Machines as owners have them, and what the doctor has to say of each: reported, or like those.

Every case is asked on the tree and on a snapshot of it.  ``quiet`` machines are well set up: a
finding about them is as wrong as a missing one.
"""

from __future__ import annotations

import json
import re
import time
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from doctor_support import (
    BOOTED,
    CPUFREQ,
    HEALTHY,
    KERNEL,
    MODPROBE,
    UNIT,
    File,
    Overlay,
    build,
    cmdline,
    surroundings,
    swaps,
)
from infertune.base.root import Root
from infertune.cli.main import main
from infertune.doctor.base import Finding, Unknown
from infertune.doctor.diagnose import Result, diagnose
from infertune.doctor.facts import read_facts
from infertune.doctor.rules import RULES
from infertune.doctor.surroundings import FILE as SURROUNDINGS
from infertune.doctor.surroundings import recorded
from infertune.host.snapshot import open_snapshot, record
from infertune.server_files.script import script

SYSTEM = "/etc/systemd/system"
RUNNING = "/sys/fs/cgroup/system.slice"
PROFILE = "/sys/firmware/acpi/platform_profile"
CHOICES = {f"{PROFILE}_choices": "low-power balanced performance\n"}
FAST: Overlay = {PROFILE: "performance\n", **CHOICES}
NO_TUNED: Overlay = {f"{RUNNING}/tuned.service": None, f"{RUNNING}/tuned-ppd.service": None}
VULKAN = ("vulkan", "cpu")


def unit(path: str, start: str, *lines: str) -> dict[str, str]:
    return {path: "\n".join(("[Service]", f"ExecStart={start}", *lines, ""))}


def server(flags: str, **around: object) -> dict[str, str]:
    """A unit with flags, and the llama-server of ``around``."""
    given: dict[str, object] = {"backends": VULKAN, **around}
    start = f"/usr/bin/llama-server -m /srv/models/a-UD-Q4_K_XL.gguf {flags}"
    return {**unit(UNIT, start), **surroundings(**given)}  # type: ignore[arg-type]


def running(service: str) -> dict[str, str]:
    return {f"{RUNNING}/{service}.service/cgroup.procs": ""}


def nodes(container: str | None = None, **found: tuple[bool, str, str]) -> dict[str, str]:
    """Device nodes by kind: whether they can be used, owner and group, mode."""
    paths = {"kfd": "/dev/kfd", "render": "/dev/dri/renderD128"}
    document = json.loads(surroundings()[SURROUNDINGS])
    document["devices"] = {
        paths[kind]: {
            "usable": usable,
            "owner": owners.partition(":")[0],
            "group": owners.partition(":")[2],
            "mode": mode,
        }
        for kind, (usable, owners, mode) in found.items()
    }
    marks = {"/run/systemd/container": f"{container}\n"} if container else {}
    return {SURROUNDINGS: json.dumps(document), **marks}


@dataclass(frozen=True)
class Case:
    why: str
    """The right answer, and who says so."""
    overlay: Overlay
    says: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Rules that must find something: severity, and an expression for text and fix."""
    unknown: Mapping[str, str] = field(default_factory=dict)
    """Rules that must not know, and why."""
    others: tuple[str, ...] = ()
    """Rules that may find something as well."""


def quiet(why: str, *overlays: Overlay, unknown: Mapping[str, str] | None = None) -> Case:
    merged = {path: text for overlay in overlays for path, text in overlay.items()}
    return Case(why, merged, unknown=unknown or {})


LLAMA_SWAP = unit(
    f"{SYSTEM}/llama-swap.service",
    "/usr/local/bin/llama-swap --config /etc/llama-swap/config.yaml --listen :8080",
)
SWAP_MACROS = """\
healthCheckTimeout: 300
macros:
  "server": >
    /opt/llama/llama-server --port ${PORT}
    -ngl 99 %s
models:
  "qwen3-30b":
    cmd: |
      ${server}
      -m /srv/models/a-UD-Q4_K_XL.gguf -c 32768
    ttl: 600
"""
SCRIPT = """\
#!/usr/bin/env bash
set -euo pipefail
MODEL="$HOME/models/a-UD-Q4_K_XL.gguf"
ARGS=(
  -m "$MODEL"
  %s   # as the guide says
  -c 32768
)
exec /opt/llama.cpp/build/bin/llama-server "${ARGS[@]}" --port 8080
"""
QUADLET = """\
[Unit]
Description=llama.cpp
[Container]
Image=ghcr.io/ggml-org/llama.cpp:server-vulkan-b11669
AddDevice=/dev/dri
Exec=-m /models/a-UD-Q4_K_XL.gguf -c 32768 %s
"""
IDLE: Overlay = {UNIT: None}

VALUES: dict[str, Case] = {
    "F02-amd-iommu-on": Case(
        "cnspec 3835: the kernel logs \"Unknown option - 'on'\"; page_tool_size is no parameter",
        cmdline("ttm.pages_limit=25165824", "ttm.page_tool_size=25165824", "amd_iommu=on"),
        {
            "iommu-invalid": ("info", "amd_iommu=on.*ignores it.*remove it"),
            "option-unknown": ("warning", "page_tool_size.*did you mean ttm.page_pool_size"),
        },
    ),
    "amd-iommu-pt": Case(
        "kyuz0 66: pt is a word of iommu=",
        cmdline("amd_iommu=pt"),
        {"iommu-invalid": ("warning", "iommu=pt is meant")},
    ),
    "iommu-on": Case(
        "arch/x86/kernel/pci-dma.c: iommu_setup knows no 'on'",
        cmdline("iommu=on"),
        {"iommu-invalid": ("info", "iommu=on.*on anyway")},
    ),
    "iommu-words": quiet(
        "parse_amd_iommu_options takes all of these", cmdline("amd_iommu=pgtbl_v2,force_isolation")
    ),
    "iommu-force-enable": quiet("a word since Linux 5.17", cmdline("amd_iommu=force_enable")),
    "pages-limit-96G": Case(
        "ttm's parameter is an unsigned long: '96G' is refused",
        cmdline("ttm.pages_limit=96G"),
        {"ttm-wrong-unit": ("error", "not a number.*ttm.pages_limit=25165824")},
        others=("option-twice", "option-not-in-force"),
    ),
    "pages-limit-hex": quiet(
        "kstrtoul with base 0 takes 0x",
        {MODPROBE: File("options ttm pages_limit=0x1800000\n", BOOTED - 2000)},
    ),
    "cwsr-off": Case(
        "an int: module loading ends with \"'off' invalid for parameter\"",
        cmdline("amdgpu.cwsr_enable=off"),
        {
            "boot-value-unknown": (
                "error",
                "cwsr_enable=off.*command line.*not a number",
            )
        },
    ),
    "amd-pstate-epp": Case(
        "amd-pstate.c: disable, passive, active, guided",
        cmdline("amd_pstate=epp"),
        {"boot-value-unknown": ("warning", "amd_pstate=epp is ignored.*passive, active, guided")},
    ),
    "amd-pstate-guided": quiet("one of the four", cmdline("amd_pstate=guided")),
    "thp-defer": Case(
        "setup_transparent_hugepage: 'cannot parse, ignored'",
        cmdline("transparent_hugepage=defer"),
        {"boot-value-unknown": ("warning", "always, madvise, never")},
    ),
    "lockup-seconds": Case(
        "amdgpu_device_get_job_timeout_settings: milliseconds, or the probe fails",
        cmdline("amdgpu.lockup_timeout=10s", "amd_pstate=on"),
        {"boot-value-unknown": ("error", "lockup_timeout=10s.*refuses it.*amd_pstate=on")},
        others=("option-not-in-force",),
    ),
    "gpu-numbers": quiet(
        "numbers, as amdgpu_drv.c takes them",
        cmdline("amdgpu.ppfeaturemask=0xffffffff", "amdgpu.gpu_recovery=1", "pcie_aspm=off"),
    ),
}

FLAGS: dict[str, Case] = {
    "F08-draft-max": Case(
        "mesh-llm 571: the argument has been removed, use --spec-draft-n-max",
        server("--model-draft /srv/models/b.gguf --draft-max 16 --draft-min 5"),
        {"llama-gone-flags": ("error", "--draft-max, --draft-min.*--spec-draft-n-max")},
    ),
    "ctx-size-draft": Case(
        "llama.cpp 22838: removed by b9134",
        server("-cd 4096"),
        {"llama-gone-flags": ("error", "-cd.*remove -cd")},
    ),
    "bare-flash-attn": Case(
        "LLMKube 147, b7549: unknown value for --flash-attn: '--no-mmap'",
        server("-fa --jinja"),
        {"llama-flash-value": ("error", f"{UNIT} passes -fa without.*-fa on")},
    ),
    "bare-flash-attn-old": quiet(
        "before pull request 15434 it was a switch",
        server("-fa --jinja", version="6100 (abc1234)"),
    ),
    "flash-attn-valued": quiet("a value is given", server("-fa on -ngl 99")),
    "load-mode-too-new": Case(
        "llama.cpp 20834: --load-mode is of July 2026",
        server("--load-mode none", version="9400 (abc1234)"),
        {"llama-gone-flags": ("error", "--load-mode.*b9400.*--no-mmap")},
    ),
    "no-mmap-still-right": quiet(
        "b10434 takes --no-mmap", server("--no-mmap -ngl 99", version="10434 (7e4c0a9)")
    ),
    "draft-flags-of-today": quiet(
        "the names of 2026",
        server("--spec-type draft-mtp --spec-draft-n-max 4 --load-mode auto"),
    ),
    "image-mlock": Case(
        "llama.cpp 28334: by b10875 the flag is gone; the image's tag says b11669",
        {**IDLE, "/etc/containers/systemd/llama.container": QUADLET % "--mlock"},
        {"llama-gone-flags": ("error", "llama.container passes --mlock.*--load-mode mlock")},
    ),
    "image-old-mlock": quiet(
        "b9700 takes --no-mmap",
        IDLE,
        {
            "/etc/containers/systemd/llama.container": (QUADLET % "--no-mmap").replace(
                "vulkan-b11669", "b9700"
            )
        },
    ),
}

FILES: dict[str, Case] = {
    "F09-llama-swap": Case(
        "llama-swap 75: such a configuration, old flags",
        {
            **IDLE,
            **LLAMA_SWAP,
            **surroundings(backends=VULKAN),
            "/etc/llama-swap/config.yaml": SWAP_MACROS % "--no-mmap --mlock",
        },
        {"llama-gone-flags": ("error", "config.yaml passes --mlock, --no-mmap.*--load-mode none")},
    ),
    "llama-swap-right": quiet(
        "--load-mode is what b11669 takes",
        IDLE,
        LLAMA_SWAP,
        surroundings(backends=VULKAN),
        {"/etc/llama-swap/config.yaml": SWAP_MACROS % "--load-mode none -fa on"},
    ),
    "llama-swap-bare-fa": Case(
        "pull request 15434",
        {**IDLE, **LLAMA_SWAP, "/etc/llama-swap/config.yaml": SWAP_MACROS % "-fa --jinja"},
        {"llama-flash-value": ("error", "config.yaml passes -fa")},
    ),
    "llama-swap-elsewhere": quiet(
        "its configuration is not there to read: not known, with the file",
        IDLE,
        unit(f"{SYSTEM}/swap.service", "/usr/local/bin/llama-swap -config /opt/swap/config.yaml"),
        unknown={"llama-gone-flags": "/opt/swap/config.yaml, which cannot be read"},
    ),
    "llama-swap-user": Case(
        "systemd.unit(5): %h is the home of the manager's user",
        {
            **IDLE,
            **unit(
                "/home/alice/.config/systemd/user/swap.service",
                "%h/.local/bin/llama-swap -config %h/.config/llama-swap/config.yaml",
            ),
            "/home/alice/.config/llama-swap/config.yaml": SWAP_MACROS % "--mlock",
        },
        {"llama-gone-flags": ("error", "/.config/llama-swap/config.yaml passes --mlock")},
    ),
    "script": Case(
        "a unit whose ExecStart= is a script; --no-mmap is gone from b11669",
        {
            **IDLE,
            **unit(f"{SYSTEM}/llm.service", "/opt/llm/start-llama.sh", "User=llm"),
            "/opt/llm/start-llama.sh": SCRIPT % "--no-mmap",
        },
        {"llama-gone-flags": ("error", "/opt/llm/start-llama.sh passes --no-mmap")},
    ),
    "script-of-a-user": Case(
        "hive-mind's start-llama-native.sh is such a one; HSA_OVERRIDE_GFX_VERSION: "
        "rocm-systems 3461",
        {
            **IDLE,
            **unit("/home/alice/.config/systemd/user/llm.service", "/bin/bash %h/run-llama.sh"),
            "/home/alice/run-llama.sh": (
                "#!/bin/bash\nexport HSA_OVERRIDE_GFX_VERSION=11.0.0\n"
                'BIN="$HOME/llama.cpp/build/bin/llama-server"\n'
                "nohup $BIN -hf unsloth/x:Q4_K_M \\\n  -ngl 99 > /tmp/llama.log 2>&1 &\n"
            ),
        },
        {"rocm-override": ("error", "HSA_OVERRIDE_GFX_VERSION=11.0.0 \\(/home/\\w+/run-llama.sh")},
        others=("server-mapped-model",),
    ),
    "script-right": quiet(
        "nothing in it is gone",
        IDLE,
        unit(f"{SYSTEM}/llm.service", "/usr/bin/bash /opt/llm/start-llama.sh"),
        {"/opt/llm/start-llama.sh": SCRIPT % "--load-mode none"},
    ),
    "script-hidden": quiet(
        "what a script does that cannot be read is not known",
        IDLE,
        unit(f"{SYSTEM}/llm.service", "/opt/llm/start-llama.sh"),
        unknown={"llama-gone-flags": "llm.service starts /opt/llm/start-llama.sh, which cannot"},
    ),
    "script-of-something-else": quiet(
        "it starts no server",
        IDLE,
        unit(f"{SYSTEM}/llm-backup.service", "/opt/llm/backup.sh"),
        {"/opt/llm/backup.sh": "#!/bin/sh\nrsync -a /srv/models/x.gguf backup: # llama-server\n"},
    ),
    "quadlet-drop-in": Case(
        "podman-systemd.unit(5): NAME.container.d/*.conf changes Exec=",
        {
            **IDLE,
            "/etc/containers/systemd/llama.container": QUADLET % "",
            "/etc/containers/systemd/llama.container.d/10-flags.conf": (
                "[Container]\nExec=-m /models/a-UD-Q4_K_XL.gguf --draft-max 8\n"
            ),
        },
        {"llama-gone-flags": ("error", "10-flags.conf passes --draft-max.*--spec-draft-n-max")},
    ),
    "quadlet-drop-in-image": Case(
        "the same, with another image: flags of the quadlet, build of the drop-in",
        {
            **IDLE,
            "/etc/containers/systemd/llama.container": (QUADLET % "--mlock").replace(
                "-b11669", "-b9700"
            ),
            "/etc/containers/systemd/llama.container.d/image.conf": (
                "[Container]\nImage=ghcr.io/ggml-org/llama.cpp:server-vulkan-b11669\n"
            ),
        },
        {"llama-gone-flags": ("error", "--mlock.*image's b11669")},
    ),
    "quadlet-right": quiet(
        "all of b11669", IDLE, {"/etc/containers/systemd/llama.container": QUADLET % "-fa on"}
    ),
    "preset-by-variable": Case(
        "llama-server's README: LLAMA_ARG_MODELS_PRESET is --models-preset",
        {
            **IDLE,
            **unit(
                f"{SYSTEM}/router.service",
                "/usr/bin/llama-server --models-max 1 --port 8080",
                "Environment=LLAMA_ARG_MODELS_PRESET=/etc/llama/models.ini",
            ),
            "/etc/llama/models.ini": "[*]\nngl = 99\n[qwen]\nm = /srv/models/a.gguf\nmlock = on\n",
        },
        {"llama-gone-flags": ("error", "/etc/llama/models.ini passes --mlock")},
    ),
    "preset-right": quiet(
        "kyuz0's README: --models-preset models.ini --models-max 1",
        IDLE,
        unit(f"{SYSTEM}/r.service", "/usr/bin/llama-server --models-preset /etc/llama/m.ini"),
        {"/etc/llama/m.ini": "version = 1\n[qwen]\nm = /srv/models/a.gguf\nfa = on\nc = 32768\n"},
    ),
    "compose": Case(
        "llama.cpp 28334, in a compose file",
        {
            **IDLE,
            "/opt/llm/docker-compose.yml": (
                "services:\n  llama:\n    image: ghcr.io/ggml-org/llama.cpp:server-vulkan-b11669\n"
                "    devices:\n      - /dev/dri:/dev/dri\n    command: >\n"
                "      -m /models/a.gguf --no-mmap\n      -c 16384\n"
            ),
        },
        {"llama-gone-flags": ("error", "/opt/llm/docker-compose.yml passes --no-mmap")},
    ),
    "compose-override": Case(
        "rocm-systems 3461: code for gfx1100 on gfx1151",
        {
            **IDLE,
            "/srv/llm/compose.yaml": (
                "services:\n  llama:\n    image: ghcr.io/ggml-org/llama.cpp:server-rocm\n"
                '    environment:\n      HSA_OVERRIDE_GFX_VERSION: "11.0.0"\n'
                "      LLAMA_ARG_CTX_SIZE: 2048\n    command: -m /models/a.gguf\n"
            ),
        },
        {"rocm-override": ("error", "11.0.0 \\(/srv/llm/compose.yaml\\)")},
    ),
    "ollama-drop-in": Case(
        "the same in the drop-in that 'systemctl edit ollama' writes",
        {
            **IDLE,
            **unit("/usr/lib/systemd/system/ollama.service", "/usr/bin/ollama serve"),
            f"{SYSTEM}/ollama.service.d/override.conf": (
                '[Service]\nEnvironment="HSA_OVERRIDE_GFX_VERSION=10.3.0"\n'
            ),
        },
        {
            "rocm-override": (
                "error",
                "10.3.0 \\(/etc/systemd/system/ollama.service.d/override.conf",
            )
        },
    ),
    "ollama-variables": Case(
        "in a file of variables, on a snapshot that says nothing of its caller",
        {
            **IDLE,
            SURROUNDINGS: None,
            **unit(
                f"{SYSTEM}/ollama.service",
                "/usr/local/bin/ollama serve",
                "EnvironmentFile=-/etc/ollama/env.conf",
            ),
            "/etc/ollama/env.conf": "HSA_OVERRIDE_GFX_VERSION=11.0.2\nOLLAMA_FLASH_ATTENTION=1\n",
        },
        {"rocm-override": ("error", "11.0.2 \\(/etc/ollama/env.conf\\)")},
    ),
    "ollama-right": quiet(
        "nothing is given that is wrong",
        IDLE,
        unit(
            f"{SYSTEM}/ollama.service",
            "/usr/local/bin/ollama serve",
            "Environment=OLLAMA_FLASH_ATTENTION=1",
        ),
    ),
    "lemonade": Case(
        "its llama-server is one that it chose: a doubt",
        {
            **IDLE,
            "/var/lib/lemonade/.cache/lemonade/config.json": json.dumps(
                {"llamacpp": {"args": "--no-mmap", "backend": "rocm"}}
            ),
        },
        {"llama-gone-flags": ("warning", "lemonade/config.json passes --no-mmap.*Lemonade chose")},
    ),
    "toolbox-user-unit": Case(
        "kyuz0: llama-server in a toolbox",
        {
            **IDLE,
            **unit(
                "/home/alice/.config/systemd/user/llama.service",
                "/usr/bin/toolbox run -c llama-vulkan-radv llama-server -m /m/a.gguf --no-mmap",
            ),
        },
        {"llama-gone-flags": ("warning", "user/llama.service passes --no-mmap.*not known")},
    ),
}

BOOT: dict[str, Case] = {
    "F10-tuned-ppd-base": Case(
        "TuneD 669, bluefin 1824: tuned-ppd restores its base profile",
        {
            "/etc/tuned/profile_mode": "manual\n",
            "/etc/tuned/ppd_base_profile": "balanced\n",
            "/etc/tuned/ppd.conf": (
                "[main]\ndefault=balanced\n[profiles]\npower-saver=powersave\nbalanced=balanced\n"
                "performance=throughput-performance\n"
            ),
        },
        {"tuned-ppd-base": ("info", "accelerator-performance only until.*balanced.*ppd.conf")},
    ),
    "tuned-default": Case(
        "no base profile saved: ppd.conf's default",
        {
            "/etc/tuned/ppd_base_profile": None,
            "/etc/tuned/ppd.conf": "[main]\ndefault=balanced\n[profiles]\nbalanced=balanced\n",
        },
        {"tuned-ppd-base": ("info", "switches to balanced \\(/etc/tuned/ppd.conf\\)")},
    ),
    "tuned-auto": Case(
        "tuned/daemon/daemon.py, _get_startup_profile: in mode auto the recommended one",
        {"/etc/tuned/profile_mode": "auto\n"},
        {"tuned-auto": ("info", "accelerator-performance.*recommends.*tuned-adm profile")},
    ),
    "tuned-auto-balanced": quiet(
        "balanced is what it recommends",
        {
            "/etc/tuned/profile_mode": "auto\n",
            "/etc/tuned/active_profile": "balanced\n",
            f"{RUNNING}/tuned-ppd.service": None,
        },
    ),
    "tuned-added": Case(
        "post_loaded_profile is merged over every profile (tuned-adm(8))",
        {"/etc/tuned/post_loaded_profile": "powersave\n"},
        {"tuned-saves-power": ("warning", "merges powersave.*post_loaded_profile")},
    ),
    "tuned-added-audio": quiet(
        "an owner's own profile that keeps the sound card awake",
        {"/etc/tuned/post_loaded_profile": "overrides\n", "/etc/tuned/profile_mode": "manual\n"},
    ),
    "tuned-silent": quiet(
        "TuneD runs and its files are not there",
        {"/etc/tuned/active_profile": None},
        unknown={"tuned-saves-power": "its profile is not shown", "tuned-ppd-base": "not shown"},
    ),
    "ppd-balanced": Case(
        "power-profiles-daemon activates the saved profile again",
        {
            **NO_TUNED,
            **FAST,
            **running("power-profiles-daemon"),
            "/var/lib/power-profiles-daemon/state.ini": (
                "[State]\nCpuDriver=amd_pstate\nPlatformDriver=platform_profile\nProfile=balanced\n"
            ),
        },
        {"power-set-back": ("info", "only until power-profiles-daemon.*balanced.*state.ini")},
    ),
    "ppd-performance": quiet(
        "saved: it stays",
        NO_TUNED,
        FAST,
        running("power-profiles-daemon"),
        {"/var/lib/power-profiles-daemon/state.ini": "[State]\nProfile=performance\n"},
    ),
    "tlp": Case(
        "TLP settings: /etc/tlp.conf wins over tlp.d",
        {
            **NO_TUNED,
            **FAST,
            "/run/tlp/last_pwr": "0\n",
            "/etc/tlp.d/10-fast.conf": "PLATFORM_PROFILE_ON_AC=performance\n",
            "/etc/tlp.conf": 'PLATFORM_PROFILE_ON_AC="balanced"  # quiet\n',
        },
        {"power-set-back": ("info", "tlp.*balanced \\(/etc/tlp.conf\\)")},
    ),
    "tlp-profile": Case(
        "TLP 1.9: with TLP_PROFILE_AC=BAL the settings ON_BAT are those on mains",
        {
            **NO_TUNED,
            **FAST,
            "/run/tlp/last_pwr": "0\n",
            "/etc/tlp.conf": (
                "TLP_PROFILE_AC=BAL\nPLATFORM_PROFILE_ON_AC=performance\n"
                "PLATFORM_PROFILE_ON_BAT=balanced\n"
            ),
        },
        {"power-set-back": ("info", "tlp.*balanced")},
    ),
    "tlp-right": quiet(
        "it sets what is set",
        NO_TUNED,
        FAST,
        {"/run/tlp/last_pwr": "0\n", "/etc/tlp.conf": "PLATFORM_PROFILE_ON_AC=performance\n"},
    ),
    "tlp-off": quiet(
        "TLP is not in force",
        NO_TUNED,
        FAST,
        {"/etc/tlp.conf": "TLP_ENABLE=0\nPLATFORM_PROFILE_ON_AC=balanced\n"},
    ),
    "tlp-preference": Case(
        "CPU_ENERGY_PERF_POLICY_ON_AC is set at boot, too",
        {
            **NO_TUNED,
            "/run/tlp/last_pwr": "0\n",
            **{
                f"{CPUFREQ}/policy{number}/energy_performance_preference": "performance\n"
                for number in range(32)
            },
            "/etc/tlp.conf": "CPU_ENERGY_PERF_POLICY_ON_AC=balance_performance\n",
        },
        {"power-set-back": ("info", "energy preference.*balance_performance")},
    ),
    "asusd": Case(
        "asusd's update_policy_ac_or_bat; asus-wmi calls quiet low-power since 6.14",
        {
            **NO_TUNED,
            **FAST,
            **running("asusd"),
            "/etc/asusd/asusd.ron": (
                '(\n    charge_control_end_threshold: 80,\n    ac_command: "",\n'
                "    platform_profile_linked_epp: true,\n    platform_profile_on_battery: Quiet,\n"
                "    change_platform_profile_on_battery: true,\n"
                "    platform_profile_on_ac: Quiet,\n    change_platform_profile_on_ac: true,\n)\n"
            ),
        },
        {"power-set-back": ("info", "until asusd.*low-power.*asusd.ron")},
    ),
    "asusd-leaves-it": quiet(
        "change_platform_profile_on_ac is false",
        NO_TUNED,
        FAST,
        running("asusd"),
        {
            "/etc/asusd/asusd.ron": (
                "(\n platform_profile_on_ac: Quiet,\n change_platform_profile_on_ac: false,\n)"
            )
        },
    ),
    "sysctl": Case(
        "sysctl.d(5)",
        {"/etc/sysctl.d/99-swap.conf": "vm.swappiness = 100\n"},
        {"boot-writes-again": ("info", "vm.swappiness is 60.*99-swap.conf writes 100")},
    ),
    "sysctl-hidden": quiet(
        "of equal names /etc counts",
        {
            "/usr/lib/sysctl.d/99-swap.conf": "vm.swappiness = 100\n",
            "/etc/sysctl.d/99-swap.conf": "vm.swappiness = 60\n",
        },
    ),
}

NODES: dict[str, Case] = {
    "F11-lxc-root": Case(
        "hal0 420: root:root in LXC, no group helps",
        nodes("lxc", kfd=(False, "root:root", "0660"), render=(True, "root:render", "0660")),
        {"gpu-not-permitted": ("warning", "/dev/kfd \\(root:root, mode 0660.*gid=.*chgrp")},
    ),
    "lxc-no-kfd": Case(
        "Proxmox: dev0: /dev/kfd was forgotten",
        nodes("lxc", render=(True, "root:render", "0660")),
        {"gpu-not-permitted": ("info", "no /dev/kfd in this container.*dev0: /dev/kfd")},
    ),
    "lxc-right": quiet(
        "both may be opened",
        nodes("lxc", kfd=(True, "root:render", "0660"), render=(True, "root:render", "0660")),
    ),
    "podman": Case(
        "podman-run(1): --group-add keep-groups",
        nodes(
            "podman",
            kfd=(False, "nobody:nogroup", "0660"),
            render=(False, "nobody:nogroup", "0660"),
        ),
        {"gpu-not-permitted": ("warning", "nobody:nogroup.*keep-groups")},
    ),
    "docker": Case(
        "ROCm's docker page: --group-add",
        nodes("docker", kfd=(False, "root:992", "0660"), render=(True, "root:992", "0666")),
        {"gpu-not-permitted": ("warning", "root:992.*--group-add")},
    ),
    "docker-vulkan": quiet(
        "only /dev/dri was passed in, and llama-server computes with Vulkan",
        {
            **nodes("docker", render=(True, "root:render", "0660")),
            SURROUNDINGS: json.dumps(
                json.loads(surroundings(backends=VULKAN)[SURROUNDINGS])
                | {"devices": {"/dev/dri/renderD128": True}}
            ),
        },
    ),
    "host-group": Case(
        "ROCm post-installation",
        nodes(kfd=(False, "root:render", "0660"), render=(True, "root:render", "0666")),
        {"gpu-not-permitted": ("warning", "join the group render \\(usermod -aG render NAME")},
    ),
    "host-root": Case(
        "no group helps; udev sets it",
        nodes(kfd=(False, "root:root", "0600"), render=(True, "root:render", "0666")),
        {"gpu-not-permitted": ("warning", 'udev rule.*GROUP="render"')},
    ),
    "host-open": Case(
        "the mode is not the cause",
        nodes(kfd=(False, "root:render", "0666"), render=(True, "root:render", "0666")),
        {"gpu-not-permitted": ("warning", "lets everybody open it.*DeviceAllow=")},
    ),
}

BUILDS: dict[str, Case] = {
    "F20-b9672": Case(
        "llama.cpp 24734: b9660 good, b9672 bad; one report",
        server("", version="9672 (eae5b28)"),
        {"vulkan-cpu-compute": ("warning", "b9672.*in one report.*b9660")},
    ),
    "b9660": quiet("the good one", server("", version="9660 (abc1234)")),
    "b8700": Case(
        "llama.cpp 22375: b8460 good, b8933 bad",
        server("", version="8700 (abc1234)"),
        {"vulkan-slow-moe": ("warning", "b8700.*MoE.*b9049")},
    ),
    "image-vulkan": Case(
        "the same build in an image",
        {
            **IDLE,
            **surroundings(server=False),
            "/etc/containers/systemd/llama.container": (QUADLET % "").replace("b11669", "b9672"),
        },
        {"vulkan-cpu-compute": ("warning", "the image's llama-server b9672 \\(.*llama.container")},
    ),
    "image-rocm": Case(
        "llama.cpp 28211: wrong logits from b10040 on",
        {
            **IDLE,
            **surroundings(server=False),
            "/etc/containers/systemd/llama.container": (QUADLET % "").replace(
                "vulkan-b11669", "rocm-b10200"
            ),
        },
        {"llama-wrong-logits": ("error", "image's llama-server b10200.*wrong logits")},
        others=("llama-mixed-answers", "llama-misread-memory", "llama-top-k"),
    ),
    "vulkan-by-device": Case(
        "a build with both backends, told to use Vulkan",
        server("--device Vulkan0", version="9672 (eae5b28)", backends=("rocm", "vulkan", "cpu")),
        {"vulkan-cpu-compute": ("warning", "b9672")},
        others=("llama-misread-memory",),
    ),
}

ABSENT: dict[str, Case] = {
    "F29-cwsr": Case(
        "the command line says it; its file is not in the tree",
        {
            **cmdline("amdgpu.cwsr_enable=0"),
            "/sys/module/amdgpu/parameters": None,
            "/sys/module/amdgpu/refcnt": "1\n",
            KERNEL: "7.1.3-200.fc44.x86_64\n",
        },
        {"kernel-old-workaround": ("info", "cwsr_enable=0 .*command line.*has the fix")},
    ),
    "no-sensors": quiet(
        "no hwmon: the fan is not known",
        {"/sys/class/drm/card1/device/hwmon": None},
        unknown={"gpu-fan": "no sensors", "gpu-hot": "no temperature"},
    ),
}

SWAP: dict[str, Case] = {
    "zswap-before-zram": Case(
        "Arch wiki: zswap takes the pages before zram sees them",
        {
            "/proc/swaps": swaps("/dev/zram0"),
            "/sys/module/zswap/parameters/enabled": "Y\n",
            "/proc/sys/vm/swappiness": "150\n",
        },
        {"swap-zswap-zram": ("info", "twice.*zswap.enabled=0")},
    ),
    "zram": quiet(
        "bazzite 2861: 180 on purpose",
        {
            "/proc/swaps": swaps("/dev/zram0"),
            "/sys/module/zswap/parameters/enabled": "N\n",
            "/proc/sys/vm/swappiness": "180\n",
        },
    ),
    "zswap-disk": quiet(
        "zswap before a disk is what it is for",
        {"/sys/module/zswap/parameters/enabled": "Y\n", "/proc/sys/vm/swappiness": "100\n"},
    ),
    "zram-low": Case(
        "admin-guide/sysctl/vm: above 100 for swap in memory",
        {
            "/proc/swaps": swaps("/dev/zram0"),
            "/proc/sys/vm/swappiness": "10\n",
            "/sys/module/zswap/parameters/enabled": "N\n",
        },
        {"swap-swappiness": ("info", "is 10 and all swap is zram")},
    ),
}

CASES = {**VALUES, **FLAGS, **FILES, **BOOT, **NODES, **BUILDS, **ABSENT, **SWAP}


def ask(root: Root) -> dict[str, Result]:
    return {
        each.rule.id: each for each in diagnose(read_facts(root, recorded(root)), RULES.values())
    }


def taken(root: Root) -> str:
    def read(recorder: Root) -> None:
        read_facts(recorder, recorded(recorder))

    return record(root, read)


def judge(case: Case, results: Mapping[str, Result]) -> None:
    found = {id_: each for id_, each in results.items() if each.outcome == "finding"}
    assert set(case.says) <= set(found), {id_: results[id_].answer for id_ in case.says}
    for id_, (severity, words) in case.says.items():
        answer = found[id_].answer
        assert isinstance(answer, Finding)
        told = f"{answer.text} / {answer.fix or RULES[id_].fix}"
        assert re.search(words, told, re.DOTALL), told
        assert re.fullmatch(severity, found[id_].severity or ""), found[id_].severity
    expected = {*case.says, *case.others, "vulkan-short-lockup"}  # a note for every such machine
    more = {id_: each.answer for id_, each in found.items() if id_ not in expected}
    assert not more
    for id_, words in case.unknown.items():
        unknown = results[id_].answer
        assert isinstance(unknown, Unknown), unknown
        assert words in unknown.why
    failed = [
        each for each in results.values() if "please report" in getattr(each.answer, "why", "")
    ]
    assert not failed


@pytest.mark.parametrize("id_", CASES)
def test_case(id_: str, tmp_path: Path) -> None:
    case = CASES[id_]
    root = build(tmp_path / "machine", HEALTHY, case.overlay)
    here = ask(root)
    judge(case, here)
    file = tmp_path / "machine.snapshot"
    file.write_text(taken(root))
    with open_snapshot(str(file)) as replay:
        there = ask(replay)
    judge(case, there)
    same = {id_: each.outcome for id_, each in here.items()}
    assert {id_: each.outcome for id_, each in there.items()} == same


@pytest.mark.parametrize(
    ("overlay", "note"),
    [
        ({"/proc/swaps": swaps("/dev/zram0")}, "all swap here is zram: below 100 the kernel drops"),
        ({"/proc/swaps": swaps()}, "no effect here: there is no swap"),
        ({"/sys/module/zswap/parameters/enabled": "N\n"}, None),
    ],
)
def test_swappiness_is_judged_with_the_swap_there_is(
    overlay: Overlay, note: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """bazzite 2861: 180 on purpose, where all swap is zram; get_scan_count() without swap."""
    root = build(tmp_path, HEALTHY, overlay, {"/proc/sys/vm/swappiness": "180\n"})
    assert main(["--root", str(root.base), "plan", "long-context"]) in (0, 1)
    [line] = re.findall(r"^vm.swappiness.*", capsys.readouterr().out, re.MULTILINE)
    assert "180" in line
    assert line.rstrip().endswith("change") if note is None else note in line


@pytest.mark.parametrize(
    "text",
    [
        "A=" + "x" * 8000 + "\n" + 'A="$A$A$A$A$A$A$A$A"\n' * 100,
        "A=(" + "x " * 4000 + ")\n" + 'A=("${A[@]}" "${A[@]}" "${A[@]}")\n' * 100,
        "A=(a)\n" + "A+=(" + "x " * 2000 + ")\n" * 400,
        "A=(\n" * 4000,
        "bash -c " * 4000,
        "\udcff\x07 'llama-server \"$( ( ( " * 1000,
    ],
)
def test_a_script_cannot_swell_the_reader(text: str) -> None:
    started = time.process_time()
    tracemalloc.start()
    script("#!/bin/sh\n" + text + "llama-server -m x.gguf $A\n")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 << 20
    assert time.process_time() - started < 20


def test_a_third_of_the_machines_is_well_set_up() -> None:
    well = [case for case in CASES.values() if not case.says]
    assert len(well) * 3 >= len(CASES)
