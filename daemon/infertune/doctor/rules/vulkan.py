# SPDX-License-Identifier: Apache-2.0
"""A llama-server that computes with Vulkan: builds, and what the kernel's driver does to it."""

from __future__ import annotations

from infertune.doctor.base import Answer, Finding, Rule, Source, Window, github, llama
from infertune.doctor.builds import VULKAN_BUILD, affected
from infertune.doctor.conditions import STRIX_HALO
from infertune.doctor.facts import Facts
from infertune.host.unknown import known

# Good: a later report from Strix Halo with b10005 is of another fault, on the GPU (#25664).
_CPU_COMPUTE = Window(first=(9661,), last=(9672,), good=(10005,), estimated=True)


def _cpu_compute(facts: Facts) -> Answer:
    found = affected(facts, "vulkan", _CPU_COMPUTE)
    if found is None:
        return None
    build, bad = found
    how = "in one report loaded" if bad else "may load"
    computes = "computed" if bad else "compute"
    return Finding(
        f"{build.name}: with Vulkan it {how} models on the GPU and {computes} on the CPU"
    )


# b8460 was good and b8933 bad; the same machine's figures with b9049 are good again.
_SLOW_MOE = Window(first=(8461,), last=(8933,), good=(9049,), estimated=True)


def _slow_moe(facts: Facts) -> Answer:
    found = affected(facts, "vulkan", _SLOW_MOE)
    if found is None:
        return None
    build, bad = found
    processes = "processes" if bad else "may process"
    return Finding(
        f"{build.name}: with Vulkan it {processes} prompts of MoE models up to 39 % slower"
    )


_SHORT_LOCKUP = Window(first=(7, 0), last=(7, 1), good=None)


def _short_lockup(facts: Facts) -> Answer:
    if _SHORT_LOCKUP.says(facts.kernel) == "good":
        return None
    if known(facts.option("amdgpu", "lockup_timeout")) not in (None, "", "0"):
        return None  # 0 keeps the default
    return Finding(
        f"amdgpu of Linux {facts.machine.kernel} resets the GPU when one job takes 2 s (10 s, for "
        "compute 60 s, before 7.0): long contexts with Vulkan have ended in 'device lost'"
    )


RULES: tuple[Rule, ...] = (
    Rule(
        id="vulkan-cpu-compute",
        title="llama.cpp from b9661 on computes on the CPU with Vulkan on Strix Halo (one report)",
        when=STRIX_HALO & VULKAN_BUILD,
        check=_cpu_compute,
        fix="watch gpu_busy_percent while it answers; if it stays 0, use b9660 or a newer build",
        sources=(llama(24734),),
        window=_CPU_COMPUTE,
    ),
    Rule(
        id="vulkan-slow-moe",
        title="with Vulkan, llama.cpp b8461 to b8933 is slow at prompts of MoE models",
        when=STRIX_HALO & VULKAN_BUILD,
        check=_slow_moe,
        fix="use b9049 or newer",
        sources=(
            llama(22375),
            Source("strix-halo-guide", "https://github.com/hogeheer499-commits/strix-halo-guide"),
        ),
        window=_SLOW_MOE,
    ),
    Rule(
        id="vulkan-short-lockup",
        title="Linux 7.0 and newer give a GPU job 2 s, too little for long contexts with Vulkan",
        when=STRIX_HALO & VULKAN_BUILD,
        check=_short_lockup,
        severity="info",
        fix="where it happens: amdgpu.lockup_timeout=10000,60000,10000,10000 on the kernel command "
        "line, as before 7.0, or a smaller ubatch_size",
        sources=(llama(25664), llama(27076), github("defilantech/LLMKube", 886)),
        window=_SHORT_LOCKUP,
    ),
)
