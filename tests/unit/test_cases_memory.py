# SPDX-License-Identifier: Apache-2.0
"""Reported machines, and what their owners need to hear of the GPU's memory.

Each case stands for a class of fault: who holds memory, which of several limits bounds it, a large
carve-out, parts of the budget, other sizes of machine, files beside the model, what a boot changes.
The right answer was written down before it was tried; ``why`` names who reported the machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import gguf_files
from doctor_support import GPU, KERNEL, File, Overlay, build, cmdline, memory, pages, sized
from gguf_files import Spec, Value
from infertune.base.units import GIB
from infertune.cli.main import main
from known_models import KNOWN, Known, _llama

# -- models -------------------------------------------------------------------------------

_GEMMA4_FULL = [(number + 1) % 6 == 0 for number in range(60)]


def dense(layers: int) -> Known:
    """A llama of 70 B's width; 80 layers are 69.8 GiB in q8_0, 60 are 52.9."""
    keys: dict[str, Value] = {
        "block_count": layers,
        "context_length": 131072,
        "embedding_length": 8192,
        "feed_forward_length": 28672,
        "attention.head_count": 64,
        "attention.head_count_kv": 8,
        "rope.dimension_count": 128,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    return Known(f"dense {layers}", "llama", keys, 128256, _llama)


def gemma4() -> tuple[dict[str, Value], list[Spec]]:
    """Gemma 4 31B: 50 of 60 layers see a window of 1024 tokens."""
    head: dict[str, Value] = {
        "general.architecture": "gemma4",
        "tokenizer.ggml.model": "no_vocab",
        "gemma4.vocab_size": 262144,
        "gemma4.block_count": 60,
        "gemma4.context_length": 262144,
        "gemma4.embedding_length": 5376,
        "gemma4.feed_forward_length": 21504,
        "gemma4.attention.head_count": 32,
        "gemma4.attention.head_count_kv": [4 if full else 16 for full in _GEMMA4_FULL],
        "gemma4.attention.sliding_window": 1024,
        "gemma4.attention.sliding_window_pattern": [not full for full in _GEMMA4_FULL],
        "gemma4.attention.key_length": 512,
        "gemma4.attention.value_length": 512,
        "gemma4.attention.key_length_swa": 256,
        "gemma4.attention.value_length_swa": 256,
    }
    weights = [Spec("token_embd.weight", (5376, 262144), "q8_0")]
    for number, full in enumerate(_GEMMA4_FULL):
        wide, narrow = 32 * (512 if full else 256), (4 * 512 if full else 16 * 256)
        shapes = {
            "attn_q": (5376, wide),
            "attn_k": (5376, narrow),
            "attn_output": (wide, 5376),
            "ffn_gate": (5376, 21504),
            "ffn_up": (5376, 21504),
            "ffn_down": (21504, 5376),
        }
        weights += [
            Spec(f"blk.{number}.{name}.weight", dims, "q8_0") for name, dims in shapes.items()
        ]
    return head, weights


def _models() -> Iterator[tuple[str, dict[str, Value], list[Spec]]]:
    by_name = {model.name: model for model in KNOWN}
    known = {
        "70b": dense(80),
        "52b": dense(60),
        "1": dense(1),
        "8b": by_name["Llama 3.1 8B"],
        "gemma3": by_name["Gemma 3 27B"],
        "oss": by_name["gpt-oss 120B"],
        "next": by_name["Qwen3 Next 80B-A3B"],
        "air": by_name["GLM 4.5 Air"],
    }
    for name, model in known.items():
        yield name, model.metadata(), model.tensors()
    yield "gemma4", *gemma4()
    clip: dict[str, Value] = {"general.architecture": "clip", "general.type": "mmproj"}
    yield "mmproj", clip, [Spec("mm.weight", (1152, 400000), "f16")]
    yield "mmproj-big", clip, [Spec("mm.weight", (8192, 400000), "f16")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    where = tmp_path_factory.mktemp("models")
    return {
        name: str(gguf_files.write(where / f"{name}.gguf", head, tensors))
        for name, head, tensors in _models()
    }


# -- machines ------------------------------------------------------------------------------

GTT_USED, VRAM_USED = f"{GPU}/mem_info_gtt_used", f"{GPU}/mem_info_vram_used"
KFD = "/sys/class/kfd/kfd"


def kib(gib: float) -> int:
    return int(gib * 1024 * 1024)


def ram(total: float, available: float | None = None) -> Overlay:
    """MemTotal and MemAvailable in GiB."""
    return memory(
        MemTotal=kib(total), MemAvailable=kib(total - 6 if available is None else available)
    )


def carved(carveout: float, total: float, gtt: float | None = None) -> Overlay:
    """A carve-out, what it leaves to Linux, and GTT (default: half of that); GiB."""
    limit = kib(total) // 2 // 4 if gtt is None else int(gtt * 262144)
    return {
        **ram(total),
        **pages(limit),
        f"{GPU}/mem_info_gtt_total": f"{limit * 4096}\n",
        f"{GPU}/mem_info_vram_total": f"{int(carveout * GIB)}\n",
        f"{GPU}/mem_info_vis_vram_total": f"{int(carveout * GIB)}\n",
    }


def used(gtt: float | None = None, vram: float | None = None) -> Overlay:
    """What the driver counts, in GiB."""
    found = {GTT_USED: gtt, VRAM_USED: vram}
    return {path: f"{int(size * GIB)}\n" for path, size in found.items() if size is not None}


def engine(pid: int, name: str, group: str, gib: float) -> Overlay:
    """A program that holds memory through KFD."""
    return {
        f"{KFD}/topology/nodes/1/gpu_id": "17\n",
        f"{KFD}/proc/{pid}/vram_17": f"{int(gib * GIB)}\n",
        f"/proc/{pid}/comm": f"{name}\n",
        f"/proc/{pid}/cgroup": f"0::{group}\n",
    }


def client(pid: int, name: str, group: str, gtt: float, vram: float = 0) -> Overlay:
    """A program that holds memory through DRM (Vulkan)."""
    return {
        f"/proc/{pid}/fd/7": File(target="/dev/dri/renderD128"),
        f"/proc/{pid}/fdinfo/7": "drm-driver:\tamdgpu\ndrm-client-id:\t9\n"
        f"drm-pdev:\t0000:c3:00.0\ndrm-resident-gtt:\t{kib(gtt)} KiB\n"
        f"drm-resident-vram:\t{kib(vram)} KiB\n",
        f"/proc/{pid}/comm": f"{name}\n",
        f"/proc/{pid}/cgroup": f"0::{group}\n",
    }


ADDRESS = {
    f"{GPU}/uevent": "DRIVER=amdgpu\nPCI_SLOT_NAME=0000:c3:00.0\n",
    f"{GPU}/drm/renderD128/dev": "226:128\n",
}
HALOGEN = engine(4711, "flash_serve", f"/machine.slice/libpod-{'ab12' * 16}.scope", 60)
OLLAMA = engine(4712, "ollama", "/system.slice/ollama.service", 40)
LEMOND = engine(
    4713, "lemond", "/user.slice/user-1000.slice/user@1000.service/app.slice/lemond.service", 30
)


def profile(*lines: str) -> Overlay:
    return {"/etc/infertune/profiles/p.toml": "\n".join(("[boot]", *lines, ""))}


@dataclass(frozen=True)
class Case:
    """A machine, what is asked, and what the answer has to say."""

    id: str
    why: str
    overlay: Overlay
    ask: Sequence[str]
    """Words of the command line; ``@name`` is a model."""
    code: int
    says: Sequence[str] = ()
    """Regular expressions over lines joined by blanks, case-sensitive."""
    not_says: Sequence[str] = ()
    machine: str = "strix-halo-128"


def fit(model: str, *words: str, backend: str = "rocm") -> tuple[str, ...]:
    return ("fit", f"@{model}", "--ctx", "8192", "--parallel", "1", "--backend", backend, *words)


CASES = (
    # -- A01: who holds it --------------------------------------------------------------
    Case(
        "held-counted",
        "a second model beside a first one, notes of 14 owners",
        {**sized(96), **used(70), **ram(124.9, 80)},
        fit("70b"),
        1,
        [r"does not fit now", r"70 GiB"],
        [r"(?m)^fits", r"(?m)^tight"],
    ),
    Case(
        "held-kfd-only",
        "ROCm issue 5444: mem_info_gtt_used misses hipMalloc; MemAvailable counts pinned pages",
        {**sized(96), **used(0.1), **ram(124.9, 118), **HALOGEN},
        fit("52b"),
        1,
        [
            r"does not fit now: GTT: 54 GiB of the 36 GiB that are free",
            r"podman container ab12ab12ab12 \(flash_serve, pid 4711\) 60 GiB",
            r"fits with podman container ab12ab12ab12 \(flash_serve, pid 4711\) stopped",
        ],
    ),
    Case(
        "held-kfd-ram",
        "the same: RAM has only what the GPU does not hold, whatever MemAvailable says",
        {**sized(110), **used(0.1), **ram(124.9, 118), **HALOGEN},
        ("fit", "@70b", "--backend", "cpu", "--ctx", "8192", "--parallel", "1"),
        1,
        [r"does not fit now: RAM: .* of the 64\.9 GiB that are free"],
    ),
    Case(
        "held-two-one-enough",
        "two engines at once; the larger one has to go",
        {**sized(96), **used(1), **ram(124.9, 50), **OLLAMA, **LEMOND},
        fit("52b"),
        1,
        [r"does not fit now", r"with ollama.service \(ollama, pid 4712\) stopped"],
        [r"and lemond"],
    ),
    Case(
        "held-two-both",
        "two engines at once; only both make room, and both are named",
        {**sized(96), **used(1), **ram(124.9, 50), **OLLAMA, **LEMOND},
        fit("70b"),
        1,
        [
            r"does not fit now",
            (
                r"with ollama.service \(ollama, pid 4712\) and "
                r"lemond.service of user 1000 \(lemond, pid 4713\) stopped"
            ),
        ],
    ),
    Case(
        "held-vulkan-container",
        "an engine in docker, seen in fdinfo only",
        {
            **ADDRESS,
            **sized(96),
            **used(58),
            **client(99, "llama-server", f"/system.slice/docker-{'cd34' * 16}.scope", 58),
        },
        fit("52b", backend="vulkan"),
        1,
        [r"docker container cd34cd34cd34 \(llama-server, pid 99\) 58 GiB"],
    ),
    Case(
        "held-by-nobody",
        "Halogen issue 79: 35 GiB stay in use after a crash, only a reboot frees them",
        {**sized(62), **used(35), **ram(124.9, 80)},
        fit("52b"),
        1,
        [r"does not fit now", r"cannot be seen", r"reboot"],
    ),
    Case(
        "held-small-fits",
        "a small model beside Halogen still fits, and memory is not counted twice",
        {**sized(96), **used(70), **ram(124.9, 50)},
        fit("8b"),
        0,
        [r"(?m)^fits"],
    ),
    Case(
        "held-later",
        "an engine holds 70 GiB; what grows later has to fit into the rest",
        {**sized(96), **used(70), **ram(124.9, 52)},
        ("fit", "@gemma3", "--ctx", "8192", "--backend", "cpu", "--parallel", "1"),
        0,
        [r"(?m)^tight: RAM: .*grown"],
    ),
    Case(
        "held-carveout-of-gtt",
        "Z13: a Vulkan desktop holds 3.5 GiB of the carve-out, none of GTT",
        {
            **ADDRESS,
            **used(0.2, 3.5),
            **client(
                77,
                "gnome-shell",
                "/user.slice/user-1000.slice/user@1000.service/app.slice/gnome.service",
                0.1,
                3.4,
            ),
        },
        ("machine",),
        0,
        [r"in use"],
        [r"gnome-shell, pid 77\) 3\.5"],
        machine="rog-z13",
    ),
    Case(
        "held-in-carveout",
        "carve-out of 64 GiB, ROCm's engine in it",
        {
            **carved(64, 62.4),
            **used(0.1, 50),
            **engine(5, "vllm", "/system.slice/vllm.service", 50),
        },
        fit("52b"),
        1,
        [
            r"does not fit now: carve-out: .* of the 14 GiB that are free",
            r"vllm.service \(vllm, pid 5\) 50 GiB",
        ],
    ),
    Case(
        "held-before-6-10",
        "Linux 6.8: ROCm's engine is in the carve-out though GTT is larger",
        {
            **carved(16, 109, 54),
            **used(0.1),
            KERNEL: "6.8.0-60-generic\n",
            **engine(5, "vllm", "/system.slice/vllm.service", 15),
        },
        fit("8b"),
        1,
        [r"does not fit now: carve-out"],
    ),
    Case(
        "held-card",
        "a Radeon with 8 GiB, 5 of them in use",
        {**used(0.1, 5)},
        ("fit", "@gemma3", "--ctx", "4096", "--backend", "vulkan"),
        1,
        [r"does not fit: VRAM"],
        machine="radeon-desktop",
    ),
    Case(
        "held-unknown",
        "a snapshot without mem_info_gtt_used: unknown, not zero; MemAvailable still tells",
        {**sized(96), **ram(124.9, 20)},
        fit("70b"),
        1,
        [r"GTT\s+96[^\n]*unknown", r"does not fit now: RAM"],
    ),
    Case(
        "held-in-lxc",
        "Proxmox LXC with lxcfs: 32 GiB of RAM shown, the host's GTT has 70 of 96 GiB in use",
        {**sized(96), **used(70), **ram(32, 30), "/sys/fs/cgroup/memory.max": f"{32 * GIB}\n"},
        fit("52b"),
        1,
        [r"does not fit now: GTT", r"container"],
    ),
    Case(
        "held-in-another-namespace",
        "in LXC KFD shows the host's ids: a program here with that id is not the holder",
        {
            **sized(96),
            **used(60),
            **HALOGEN,
            "/proc/4711/comm": "nginx\n",
            "/proc/4711/fd/0": File(target="/dev/null"),
        },
        ("machine",),
        0,
        [r"60 GiB in use: process 4711 of the host"],
        [r"nginx"],
    ),
    Case(
        "held-doctor",
        "the doctor names the same holder as fit",
        {**sized(96), **used(0.1), **HALOGEN},
        ("doctor", "--rule", "gpu-memory-held"),
        0,
        [r"60 GiB of the GPU's 96 GiB", r"flash_serve, pid 4711"],
    ),
    # -- F01: which limit ----------------------------------------------------------------
    Case(
        "gttsize-only",
        "unsloth pull request 7960",
        {
            **cmdline("amdgpu.gttsize=131072"),
            **ram(124.9),
            **pages(16373355),
            f"{GPU}/mem_info_gtt_total": f"{128 * GIB}\n",
        },
        fit("70b"),
        1,
        [r"does not fit", r"62\.[45] GiB"],
        [r"(?m)^fits$"],
    ),
    Case(
        "gttsize-only-doctor",
        "the same: one cause, one finding",
        {
            **cmdline("amdgpu.gttsize=131072"),
            **ram(124.9),
            **pages(16373355),
            f"{GPU}/mem_info_gtt_total": f"{128 * GIB}\n",
        },
        ("doctor",),
        0,
        [r"rule: gtt-above-ttm"],
        [r"rule: gttsize-deprecated", r"rule: ttm-default"],
    ),
    Case(
        "gttsize-only-64",
        "the same on a 64 GB ZBook",
        {
            **cmdline("amdgpu.gttsize=61440"),
            **ram(61.9),
            **pages(kib(61.9) // 8),
            f"{GPU}/mem_info_gtt_total": f"{60 * GIB}\n",
        },
        ("machine",),
        0,
        [r"GPU memory\s+30\.9 GiB \(GTT\)"],
    ),
    Case(
        "gttsize-smaller",
        "both set, gttsize the smaller: it bounds; staging a TTM limit does not help",
        {
            **cmdline("amdgpu.gttsize=49152", "ttm.pages_limit=25165824"),
            **pages(25165824),
            f"{GPU}/mem_info_gtt_total": f"{48 * GIB}\n",
        },
        fit("52b"),
        1,
        [
            r"does not fit: GTT: 54 GiB of 48 GiB",
            r"amdgpu.gttsize 49152",
            r"fits with amdgpu.gttsize removed from",
        ],
        [r"fits with 'infertune boot stage"],
    ),
    Case(
        "gttsize-smaller-alone",
        "gttsize=32768 from an old guide on 128 GB",
        {**cmdline("amdgpu.gttsize=32768"), f"{GPU}/mem_info_gtt_total": f"{32 * GIB}\n"},
        ("machine",),
        0,
        [r"GPU memory\s+32 GiB \(GTT\): amdgpu.gttsize 32768"],
    ),
    Case(
        "limit-written-live",
        "amd-debug-tools: pages_limit written to sysfs is not in force until a reboot",
        {**pages(25165824)},
        fit("70b"),
        1,
        [r"does not fit: GTT: .* of 62\.5 GiB"],
    ),
    Case(
        "pool-size-only",
        "guides set page_pool_size alone: it is a cache, no limit",
        {**cmdline("ttm.page_pool_size=25165824")},
        ("machine",),
        0,
        [r"GPU memory\s+62\.5 GiB \(GTT\): the kernel's default"],
    ),
    Case(
        "both-above",
        "kyuz0's README: gttsize=126976 and pages_limit=32505856; amdkfd leaves 121.4 GiB",
        {**cmdline("amdgpu.gttsize=126976", "ttm.pages_limit=32505856"), **sized(124)},
        ("machine",),
        0,
        [r"GPU memory\s+124 GiB", r"for ROCm 121\.[45] GiB: amdkfd"],
    ),
    Case(
        "capped-at-ram",
        "Linux commit 5dafdd649280: GTT capped at RAM",
        {
            **cmdline("ttm.pages_limit=33554432"),
            **pages(33554432),
            **ram(124.9),
            f"{GPU}/mem_info_gtt_total": f"{kib(124.9) * 1024}\n",
        },
        ("doctor", "--rule", "ttm-above-ram"),
        1,
        [r"128 GiB", r"124\.9 GiB"],
    ),
    Case(
        "dkms-wrong-module",
        "ROCm issue 5595: ttm.conf written, the driver uses amdttm",
        {
            "/sys/module/ttm/parameters/pages_limit": "25165824\n",
            "/sys/module/amdttm/parameters/pages_limit": "16239820\n",
            f"{GPU}/mem_info_gtt_total": f"{16239820 * 4096}\n",
        },
        fit("70b"),
        1,
        [r"does not fit: GTT", r"amdttm.pages_limit 16239820"],
        machine="dkms-amdttm",
    ),
    Case(
        "limit-of-command-line",
        "48 GiB from the command line: ours comes last there, and wins",
        {**sized(48), **cmdline("ttm.pages_limit=12582912")},
        fit("52b"),
        1,
        [r"fits with 'infertune boot stage [\w-]+' and a reboot"],
    ),
    Case(
        "limit-of-command-line-doctor",
        "the same with a limit above RAM",
        {
            **cmdline("ttm.pages_limit=33554432"),
            **pages(33554432),
            f"{GPU}/mem_info_gtt_total": f"{128 * GIB}\n",
        },
        ("doctor", "--rule", "ttm-above-ram"),
        1,
        [r"fix:\s+'infertune boot stage [\w-]+' and a reboot"],
    ),
    # -- F05: a large carve-out ------------------------------------------------------------
    Case(
        "carveout-64-doctor",
        "amd-strix-halo-vllm-toolboxes issue 81",
        carved(64, 62.4),
        ("doctor",),
        0,
        [r"carve-out of 64 GiB"],
        [r"GPU memory is the kernel's default"],
    ),
    Case(
        "carveout-64-fit",
        "the same",
        carved(64, 62.4),
        fit("52b", backend="vulkan"),
        0,
        [r"(?m)^fits"],
    ),
    Case(
        "carveout-96",
        "HP Z2 Mini G1a, Halogen issue 95: 96 GiB carved out, Linux has 30, GTT 15.2",
        carved(96, 30.4),
        fit("70b"),
        0,
        [r"carve-out\s+96", r"(?m)^(fits|tight)"],
    ),
    Case(
        "carveout-96-doctor",
        "the same",
        carved(96, 30.4),
        ("doctor",),
        0,
        [r"carve-out of 96 GiB: Linux has 30\.4 GiB"],
        [r"half of RAM", r"ttm-default"],
    ),
    Case(
        "carveout-64-large-model",
        "the same machine, 70 GiB model: not by a TTM limit, but by a small carve-out first",
        carved(64, 62.4),
        fit("70b"),
        1,
        [r"does not fit: carve-out", r"smallest carve-out .*then .*boot stage"],
        [r"fits with 'infertune boot stage"],
    ),
    Case(
        "carveout-vulkan-spills",
        "ROCm issue 6050, LLMKube issue 1155: RADV takes GTT beside a carve-out",
        carved(64, 62.4),
        fit("70b", backend="vulkan"),
        1,
        [r"does not fit: carve-out", r"Vulkan"],
    ),
    Case(
        "carveout-32-lost",
        "32 GiB carved out beside a default GTT of 46.7: lost to ROCm",
        carved(32, 93.4),
        ("doctor",),
        0,
        [
            r"32 GiB are carved out",
            r"46\.7 GiB",
            r"smallest carve-out[^\n]*then 'infertune boot stage long-context'",
        ],
        [r"rule: ttm-default"],
    ),
    Case(
        "carveout-evo-2",
        "EVO-X2 offers no less than 2 GiB (strix-halo-gmktec-evo-x2 issue 3): no finding",
        {**carved(2, 123.4, 96), **cmdline("ttm.pages_limit=25165824")},
        ("doctor", "--rule", "carveout-wasted"),
        0,
        [],
        [r"rule: carveout-wasted"],
    ),
    Case(
        "carveout-64gb-half",
        "64 GB machine, 32 carved out: 52 GiB never fit, and nothing is promised",
        carved(32, 30.5),
        fit("52b"),
        1,
        [r"does not fit: carve-out"],
        [r"fits with .*'infertune boot stage long-context'"],
    ),
    Case(
        "carveout-limit-useless",
        "carve-out 64, ttm.pages_limit 48: the pool stays the carve-out",
        {**carved(64, 62.4, 48), **cmdline("ttm.pages_limit=12582912")},
        ("machine",),
        0,
        [r"GPU memory\s+64 GiB \(carve-out\)"],
    ),
    Case(
        "rocm-before-6-10",
        "Linux 6.8 in-tree: ROCm has 512 MiB",
        {KERNEL: "6.8.0-60-generic\n", **sized(96)},
        fit("8b"),
        1,
        [r"does not fit: carve-out: .* of 512 MiB", r"6\.10"],
    ),
    Case(
        "rocm-dkms-6-8",
        "ROCm issue 5595: amdgpu-dkms 6.14.14, newer than its kernel, here 6.8",
        {KERNEL: "6.8.0-60-generic\n"},
        fit("70b"),
        0,
        [r"GTT\s+105"],
        machine="dkms-amdttm",
    ),
    # -- F12: parts of the budget -----------------------------------------------------------
    Case(
        "checkpoints-gemma4",
        "amd-strix-halo-toolboxes issue 89: 32 of 3600 MiB each",
        sized(96),
        ("fit", "@gemma4", "--ctx", "262144"),
        0,
        [
            r"context checkpoints[^\n]*1[12]\d(\.\d)? GiB",
            r"(?m)^tight",
            r"fits with ctx_checkpoints=\d+",
        ],
    ),
    Case(
        "checkpoints-8",
        "llama.cpp issue 24265: 8 checkpoints, one slot",
        sized(96),
        ("fit", "@gemma4", "--ctx", "262144", "--parallel", "1", "--", "ctx_checkpoints=8"),
        0,
        [r"up to 8 of a slot", r"9\.4 GiB"],
    ),
    Case(
        "checkpoints-hybrid",
        "unsloth pull request 11073: state of a hybrid, 32 of each of 4 slots",
        sized(96),
        ("fit", "@next", "--ctx", "8192"),
        0,
        [r"context checkpoints[^\n]*9(\.4 GiB|6\d\d MiB)"],
    ),
    Case(
        "checkpoints-swa-full",
        "llama.cpp pull request 15293: none with --swa-full",
        sized(96),
        ("fit", "@gemma4", "--ctx", "8192", "--parallel", "1", "--", "swa_full=true"),
        0,
        [],
        [r"checkpoints"],
    ),
    Case(
        "checkpoints-none",
        "--ctx-checkpoints 0",
        sized(96),
        ("fit", "@gemma4", "--ctx", "8192", "--", "ctx_checkpoints=0"),
        0,
        [r"(?m)^fits"],
        [r"context checkpoints"],
    ),
    Case(
        "ubatch-16384",
        "pwilkin/strix-halo issue 6: the ubatch sizes the compute buffer",
        sized(96),
        (
            "fit",
            "@gemma4",
            "--ctx",
            "262144",
            "--parallel",
            "1",
            "--",
            "ubatch_size=16384",
            "batch_size=16384",
        ),
        0,
        [r"compute buffer, ubatch 16384\s+1\d\.\d GiB"],
    ),
    # -- F14: other sizes of machine -----------------------------------------------------------
    Case(
        "192-gb",
        "unsloth pull request 7290: Ryzen AI MAX+ PRO 495",
        {**ram(188), **pages(24641536), f"{GPU}/mem_info_gtt_total": f"{94 * GIB}\n"},
        ("boot", "plan", "big-moe"),
        0,
        [r"ttm\.pages_limit = 1[56]\d GiB"],
    ),
    Case(
        "96-gb",
        "96 GB: 93.5 GiB",
        {**carved(0.5, 93.5)},
        ("boot", "plan", "long-context"),
        0,
        [r"ttm\.pages_limit = 7\d GiB"],
    ),
    Case(
        "64-gb",
        "64 GB: 61.9 GiB",
        {**carved(0.5, 61.9)},
        ("boot", "plan", "big-moe"),
        0,
        [r"ttm\.pages_limit = 5[0-3] GiB"],
    ),
    Case(
        "32-gb",
        "32 GB: 30.6 GiB",
        {**carved(0.5, 30.6)},
        ("boot", "plan", "long-context"),
        0,
        [r"ttm\.pages_limit = 2[2-4] GiB"],
    ),
    Case(
        "256-gb",
        "two times 128",
        {**carved(0.5, 251)},
        ("boot", "plan", "long-context"),
        0,
        [r"ttm\.pages_limit = (18|19|20)\d GiB"],
    ),
    Case(
        "share-and-carveout",
        "a share of RAM counts of what RAM is after the boot: 80 % of 93.4, not of 124.9",
        profile('ttm.pages_limit = "80%"', 'amdgpu.uma_carveout = "32GiB"'),
        ("boot", "plan", "p"),
        2,
        [r"refused", r"93\.[34] GiB"],
    ),
    # -- F19: several files ------------------------------------------------------------------
    Case(
        "mmproj",
        "LLama-GUI issue 374",
        sized(96),
        fit("gemma4", "--mmproj", "@mmproj"),
        0,
        [r"projector[^\n]*878\.9 MiB"],
    ),
    Case(
        "mmproj-too-much",
        "llama.cpp issue 18111: what fits alone does not fit with its projector",
        sized(74),
        fit("70b", "--mmproj", "@mmproj-big"),
        1,
        [r"does not fit", r"mmproj_offload=false"],
    ),
    Case(
        "draft",
        "a draft model has weights, cache and buffers of its own",
        sized(96),
        fit("70b", "--draft", "@1"),
        0,
        [r"draft model: weights", r"draft model: KV cache"],
    ),
    Case(
        "mtp",
        "llama.cpp issue 23472: layers for MTP are loaded when they draft",
        sized(124),
        fit("air", "--", "spec_type=draft-mtp"),
        0,
        [r"MTP: weights", r"MTP: KV cache"],
    ),
    Case(
        "mmproj-missing",
        "a projector that is not there",
        {},
        fit("8b", "--mmproj", "/nowhere/mmproj.gguf"),
        2,
        [r"/nowhere/mmproj.gguf"],
    ),
    Case(
        "mmproj-as-model",
        "the projector given as the model",
        {},
        fit("mmproj"),
        2,
        [r"projector|clip"],
    ),
    # -- F34: what will be so after the boot ----------------------------------------------------
    Case(
        "limit-then-carveout",
        "amd-gfx, 2026-03-20: limit first, then the carve-out",
        {
            **sized(96),
            **cmdline("ttm.pages_limit=25165824"),
            **profile('ttm.pages_limit = "96GiB"', 'amdgpu.uma_carveout = "32GiB"'),
        },
        ("boot", "plan", "p"),
        2,
        [r"96 GiB is refused", r"93\.4 GiB"],
    ),
    Case(
        "limit-in-modprobe",
        "the same with the owner's modprobe.d",
        {
            **sized(96),
            "/etc/modprobe.d/ttm.conf": "options ttm pages_limit=25165824\n",
            **profile('amdgpu.uma_carveout = "32GiB"'),
        },
        ("boot", "plan", "p"),
        2,
        [r"96 GiB is refused", r"/etc/modprobe.d/ttm.conf"],
    ),
    Case(
        "limit-of-ours-wins",
        "112 GiB on the command line, of which the carve-out leaves 109.4: ours comes after it",
        {
            **sized(112),
            **cmdline("ttm.pages_limit=29360128"),
            **profile('ttm.pages_limit = "80GiB"', 'amdgpu.uma_carveout = "16GiB"'),
        },
        ("boot", "plan", "p"),
        0,
        [r"80 GiB \(GTT\) after the next boot"],
    ),
    Case(
        "limit-above-ram-alone",
        "the owner's limit is above RAM; the profile sets something else: said, not refused",
        {
            **cmdline("ttm.pages_limit=33554432"),
            **pages(33554432),
            f"{GPU}/mem_info_gtt_total": f"{128 * GIB}\n",
            **profile("amdgpu.lockup_timeout = 20000"),
        },
        ("boot", "plan", "p"),
        0,
        [r"128 GiB"],
    ),
    Case(
        "carveout-with-default",
        "no limit of anybody's: 32 GiB carved out are fine",
        profile('amdgpu.uma_carveout = "32GiB"'),
        ("boot", "plan", "p"),
        0,
        [r"uma_carveout"],
    ),
    Case(
        "carveout-with-small-limit",
        "60 GiB and a carve-out of 32: enough is left",
        {
            **sized(60),
            **cmdline("ttm.pages_limit=15728640"),
            **profile('amdgpu.uma_carveout = "32GiB"'),
        },
        ("boot", "plan", "p"),
        0,
        [r"uma_carveout"],
    ),
    Case(
        "dkms-limit-then-carveout",
        "the same with amdttm",
        {
            **cmdline("amdttm.pages_limit=30408704"),
            "/sys/module/amdttm/parameters/pages_limit": "30408704\n",
            **profile('amdgpu.uma_carveout = "16GiB"'),
            f"{GPU}/uma/carveout": "0\n",
            f"{GPU}/uma/carveout_options": "0: Minimum (1 GB)\n1: (16 GB)\n",
        },
        ("boot", "plan", "p"),
        2,
        [r"amdttm.pages_limit", r"116 GiB is refused"],
        machine="dkms-amdttm",
    ),
    Case(
        "next-boot-default",
        "a limit written since the boot: the next one brings half of RAM, and machine says so",
        {**sized(96), **pages(25165824)},
        ("machine",),
        0,
        [r"after the next boot"],
    ),
    Case(
        "carveout-asked-of-firmware",
        "amd-smi set --mem-carveout 32 GB is pending; then a limit of 96 GiB",
        {f"{GPU}/uma/carveout": "9\n", **profile('ttm.pages_limit = "96GiB"')},
        ("boot", "plan", "p"),
        2,
        [r"96 GiB is refused", r"93\.4 GiB"],
    ),
    Case(
        "carveout-asked-doctor",
        "the same with the owner's limit on the command line: the next boot has too little",
        {**sized(96), **cmdline("ttm.pages_limit=25165824"), f"{GPU}/uma/carveout": "9\n"},
        ("doctor", "--rule", "ttm-above-ram"),
        1,
        [
            r"after the next boot the TTM limit is 96 GiB and RAM is 93\.4 GiB",
            r"\(85 GiB\) at boot, or less",
        ],
        [r"a reboot, as configured"],
    ),
    Case(
        "carveout-asked-z13",
        "a Z13 shows 512 MB beside 4 GiB: nothing is pending",
        {f"{GPU}/uma/carveout": "0\n", f"{GPU}/uma/carveout_options": "0: Minimum (512 MB)\n"},
        ("machine",),
        0,
        [r"after the next boot the same"],
        machine="rog-z13",
    ),
    Case(
        "gttsize-then-carveout",
        "gttsize of 96 GiB alone, then a carve-out of 32: it would be lost",
        {
            **cmdline("amdgpu.gttsize=98304"),
            f"{GPU}/mem_info_gtt_total": f"{96 * GIB}\n",
            **profile('amdgpu.uma_carveout = "32GiB"'),
        },
        ("boot", "plan", "p"),
        0,
        [r"carve-out of 32 GiB would be lost"],
    ),
    Case(
        "limit-below-carveout",
        "carve-out 64 GiB: long-context's limit of 49 GiB changes nothing",
        carved(64, 62.4),
        ("boot", "plan", "long-context"),
        0,
        [r"changes nothing while the carve-out is larger \(64 GiB\)"],
    ),
    Case(
        "limit-below-gttsize",
        "gttsize=49152 stays on the command line: the limit changes nothing",
        {**cmdline("amdgpu.gttsize=49152"), f"{GPU}/mem_info_gtt_total": f"{48 * GIB}\n"},
        ("boot", "plan", "long-context"),
        0,
        [r"keeps GTT at 48 GiB: remove it"],
    ),
    Case(
        "smaller-carveout-share",
        "80 % of 62.4 GiB, and the carve-out goes from 64 GiB to 512 MiB",
        {
            **carved(64, 62.4),
            f"{GPU}/uma/carveout": "9\n",
            f"{GPU}/uma/carveout_options": "0: Minimum (512 MB)\n9: High (64 GB)\n",
            **profile('ttm.pages_limit = "80%"', 'amdgpu.uma_carveout = "512MiB"'),
        },
        ("boot", "plan", "p"),
        0,
        [r"counted from 62\.4 GiB of RAM; with the smaller carve-out there are 125\.9 GiB"],
    ),
    Case(
        "fix-of-a-large-limit",
        "long-context lowers 120 GiB of the command line",
        {**sized(120), **cmdline("ttm.pages_limit=31457280")},
        ("boot", "plan", "long-context"),
        0,
        [r"120 GiB \(GTT\) now, 96 GiB \(GTT\) after the next boot"],
    ),
    Case(
        "pool-size-refused",
        "page_pool_size counts pages, too",
        profile('ttm.page_pool_size = "120GiB"'),
        ("boot", "plan", "p"),
        2,
        [r"120 GiB is refused"],
    ),
    # -- no GPU, other GPUs -------------------------------------------------------------------
    Case(
        "no-gpu-cpu",
        "a virtual machine without a GPU",
        {},
        ("fit", "@8b", "--ctx", "4096", "--backend", "cpu"),
        0,
        [r"(?m)^fits"],
        machine="recorded-vm",
    ),
    Case(
        "no-gpu-rocm",
        "the same, ROCm asked for",
        {},
        ("fit", "@8b", "--ctx", "4096", "--backend", "rocm"),
        1,
        [r"unknown"],
        machine="recorded-vm",
    ),
    Case(
        "docker-limit",
        "docker --memory 16g on the host's kernel: the CPU part is held against it",
        {**sized(96), "/sys/fs/cgroup/memory.max": f"{16 * GIB}\n"},
        ("fit", "@70b", "--ctx", "8192", "--backend", "cpu"),
        1,
        [r"does not fit: RAM", r"memory\.max"],
    ),
    Case(
        "cma",
        "pepuscz: CMA pages are not for the GPU",
        {
            **sized(120),
            **memory(MemTotal=kib(124.9), MemAvailable=kib(100), CmaTotal=kib(32), CmaFree=kib(30)),
        },
        ("machine",),
        0,
        [r"GPU memory\s+92\.9 GiB"],
    ),
)


@pytest.mark.parametrize("case", CASES, ids=[each.id for each in CASES])
def test_reported_machine(
    case: Case, tmp_path: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    base = build(tmp_path, case.overlay, machine=case.machine).base
    words = [models[word[1:]] if word.startswith("@") else word for word in case.ask]
    code = main(["--root", str(base), *words])
    said = "".join(capsys.readouterr())
    flat = re.sub(r"\n\s+", " ", said)
    for pattern in case.says:
        assert re.search(pattern, said) or re.search(pattern, flat), (pattern, case.why, said)
    for pattern in case.not_says:
        assert not re.search(pattern, flat), (pattern, case.why, said)
    assert code == case.code, (case.why, said)
