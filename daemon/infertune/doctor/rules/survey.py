# SPDX-License-Identifier: Apache-2.0
"""Recommendations of a survey of March 2026 for Strix Halo, Tier 1 and Tier 2: where this machine
stands, and which of them still hold.

The survey: docs/inference-optimization-landscape.md of the strix-halo-optimizations repository.
What later facts contradict is ``outdated``, whatever this machine does.
"""

from __future__ import annotations

from collections.abc import Callable

from infertune.doctor.base import (
    Advice,
    Answer,
    Rule,
    Source,
    Unknown,
    github,
    kernel_doc,
    llama,
    need,
    rocm,
)
from infertune.doctor.conditions import STRIX_HALO
from infertune.doctor.facts import Facts
from infertune.doctor.rules.llama_cpp import LOAD_MODE_ONLY
from infertune.doctor.rules.tuners import short_lived
from infertune.host.servers import Declared
from infertune.host.unknown import Missing

_SURVEY = Source(
    "strix-halo-optimizations: survey of March 2026",
    "https://gitea.pragmazest.com/cardosofelipe/strix-halo-optimizations/src/commit/"
    "c8479917405ca7fe96e828546f5768dd9be02c71/docs/inference-optimization-landscape.md",
)


def _servers(facts: Facts) -> tuple[Declared, ...]:
    """Raises Missing where no server is declared: what others do by hand is not known."""
    return need(need(facts.declared) or Unknown("no file that starts a model server was found"))


def _dynamic_quants(facts: Facts) -> Answer:
    models = [server.model for server in _servers(facts) if server.model]
    if not models:
        return Unknown("no declared server names its model")
    if all("-UD-" in model for model in models):
        return Advice("done", "every declared model is an Unsloth Dynamic quant")
    return Advice(
        "not done",
        "a declared model is another quant; UD ones keep more quality at the same size, and the "
        "choice of quant moves speed more than any setting of the system",
    )


def _wmma(facts: Facts) -> Answer:
    return Advice(
        "outdated",
        "llama.cpp removed its rocWMMA path in summer 2026 (in one report it cost prompts of a "
        "long context 41 %), and GGML_HIP_UMA became GGML_CUDA_ENABLE_UNIFIED_MEMORY",
    )


def _no_mmap(facts: Facts) -> Answer:
    newer = "on an integrated GPU load_mode auto maps nothing by itself"
    server = facts.server
    if server is None or isinstance(server, Unknown) or server.build is None:
        return Advice("outdated", f"from b{LOAD_MODE_ONLY} on the flag is gone, and {newer}")
    if server.build >= LOAD_MODE_ONLY:
        return Advice("outdated", f"b{server.build} does not know the flag, and {newer}")
    if any(each.has("--no-mmap") for each in _servers(facts)):
        return Advice("done", f"a unit gives --no-mmap, right for b{server.build}")
    return Advice("not done", f"b{server.build} still maps models with ROCm unless told otherwise")


def _cache_types(facts: Facts) -> Answer:
    flags = ("--cache-type-k", "-ctk", "--cache-type-v", "-ctv")
    types = [each.flags[flag] for each in _servers(facts) for flag in flags if flag in each.flags]
    if any(name.startswith(("q4", "q5", "q8", "iq4")) for name in types):
        return Advice("done", f"a declared server has a cache of {', '.join(sorted(set(types)))}")
    return Advice(
        "not done",
        "worth it where a long context does not fit; it changes answers (q4_0 more than q8_0), and "
        "a quantised V needs flash attention",
    )


def _hipblaslt(facts: Facts) -> Answer:
    if any(value == "1" for value, _ in facts.variables("ROCBLAS_USE_HIPBLASLT")):
        return Advice("done", "ROCBLAS_USE_HIPBLASLT=1 is set")
    version = need(facts.rocm)
    if version is None:
        return Advice("outdated", "ROCm is not installed; Vulkan has no use for it")
    if version >= (7,):
        return Advice(
            "outdated",
            "hipBLASLt has kernels for this GPU and is largely the default since; the threefold "
            "gain was of mid-2025",
        )
    return Advice("not done", "with ROCm 6 it made prompts up to three times faster")


_SPECULATION = (
    *("--model-draft", "-md", "--spec-draft-model", "--spec-type", "--spec-default"),
    *("--draft", "--draft-max", "--draft-min"),
)


def _speculation(facts: Facts) -> Answer:
    if any(each.has(*_SPECULATION) for each in _servers(facts)):
        return Advice("done", "a declared server speculates")
    return Advice(
        "not done",
        "reports say a draft model or MTP doubles generation of dense models; check answers, one "
        "drafter lost a third of GSM8K",
    )


def _until(facts: Facts) -> str:
    """Which service takes it back at the next boot."""
    try:
        found = short_lived(facts)
    except Missing:
        return ""
    return f" until {found[0].service} next starts (then: {found[0].value})" if found else ""


def _clocks(facts: Facts) -> Answer:
    level = need(facts.sensors).level
    governors = need(facts.processor).governors
    if governors == {"performance"} or level in ("high", "profile_peak"):
        return Advice("done", f"clocks are kept high{_until(facts)}")
    return Advice(
        "not done",
        "a power profile for performance gives prompts 5 to 8 % and generation 2 to 3 %; for "
        "pinning the GPU's level no gain was found, and before Linux 7.1 it did harm",
    )


def _compression(facts: Facts) -> Answer:
    if "llmlingua" in need(facts.python):
        return Advice("done", "LLMLingua is in the system's Python")
    return Advice(
        "not done",
        "LLMLingua is not in the system's Python (your own virtual environments are "
        "not searched); it belongs in applications with long prompts, not in a server",
    )


def _vllm(facts: Facts) -> Answer:
    if "vllm" in need(facts.python):
        return Advice("done", "vLLM is in the system's Python")
    slots = [each for each in need(facts.declared) if each.flags.get("--parallel", "1") != "1"]
    if slots:
        return Advice(
            "not done",
            f"{slots[0].path} serves several clients from llama-server's own slots instead",
        )
    return Advice(
        "not done",
        "only needed for many clients; eight slots of llama-server gave 173 tokens/s together in "
        "one report",
    )


def _reservation(facts: Facts) -> Answer:
    protected = [each for each in need(facts.declared) if "MemoryMin" in each.settings]
    if protected:
        return Advice("done", f"{protected[0].path} has MemoryMin: it protects the CPU side")
    return Advice(
        "outdated",
        "memory of the GPU is not charged to a control group, so memory.min does not protect it; "
        "what protects it is a GTT that fits, and infertune's profiles for the CPU side",
    )


def _vulkan(facts: Facts) -> Answer:
    backends = need(facts.llama).backends
    radv = any(name.startswith("radeon_icd") for name in need(facts.vulkan))
    if "vulkan" in backends and radv:
        return Advice(
            "done",
            "Vulkan is there to compare: it generated up to 17 % faster with small MoE models, "
            "ROCm was faster with prompts",
        )
    return Advice(
        "not done",
        f"{'RADV' if not radv else 'the Vulkan backend of llama-server'} is not installed; it is "
        "also a way around ROCm bugs",
    )


def _pinning(facts: Facts) -> Answer:
    pinned = [
        each
        for each in _servers(facts)
        if each.has("--cpu-range", "-Cr", "--cpu-mask", "-C")
        or not each.settings.keys().isdisjoint(("AllowedCPUs", "CPUAffinity"))
    ]
    if pinned:
        return Advice("done", f"{pinned[0].path} has CPUs of its own")
    return Advice(
        "not done",
        "no gain was found for models on the GPU; for one on the CPU beside other work it can help "
        "(cpus in a profile)",
    )


def _entry(
    number: str, id_: str, title: str, check: Callable[[Facts], Answer], fix: str, *sources: Source
) -> Rule:
    return Rule(
        id=f"survey-{id_}",
        title=f"{number}: {title}",
        when=STRIX_HALO,
        check=check,
        severity="info",
        fix=fix,
        sources=(*sources, _SURVEY),
    )


RULES: tuple[Rule, ...] = (
    _entry(
        "1.1",
        "dynamic-quants",
        "Unsloth Dynamic GGUFs",
        _dynamic_quants,
        "choose a UD quant where there is one",
        github("kyuz0/amd-strix-halo-toolboxes", 111),
    ),
    _entry(
        "1.2",
        "wmma-attention",
        "build with rocWMMA flash attention and HIP UMA",
        _wmma,
        "build without both options",
        llama(26220),
        llama(24437),
        github("lemonade-sdk/lemonade", 2624),
    ),
    _entry(
        "1.3",
        "no-mmap",
        "do not map models with ROCm",
        _no_mmap,
        "leave load_mode at auto",
        llama(28334),
        llama(26081),
    ),
    _entry(
        "1.4",
        "cache-types",
        "quantise the KV cache for long contexts",
        _cache_types,
        "cache_type_k and cache_type_v = q8_0",
        llama(27975),
    ),
    _entry(
        "1.5",
        "hipblaslt",
        "ROCBLAS_USE_HIPBLASLT=1",
        _hipblaslt,
        "leave it out with ROCm 7, or measure",
        github("ROCm/pytorch", 2582),
        rocm(4748),
    ),
    _entry(
        "1.6",
        "speculation",
        "speculative decoding",
        _speculation,
        "spec_type=draft-mtp where the model has layers for it; else spec_type=draft-simple, and a "
        "small model of the family as model_draft",
        llama(27975),
    ),
    _entry(
        "1.7",
        "clocks",
        "performance governor and pinned GPU clocks",
        _clocks,
        "apply a profile (infertune apply), and leave the GPU's level at auto",
        github("noamsto/nix-amd-ai", 19),
        github("kyuz0/amd-strix-halo-toolboxes", 66),
    ),
    _entry(
        "2.1",
        "prompt-compression",
        "compress long prompts with LLMLingua-2",
        _compression,
        "in the application, where prompts are long",
        Source("LLMLingua", "https://github.com/microsoft/LLMLingua"),
    ),
    _entry(
        "2.2",
        "vllm",
        "vLLM for many clients",
        _vllm,
        "try llama-server's slots first (parallel)",
        Source("strix-halo-guide", "https://github.com/hogeheer499-commits/strix-halo-guide"),
        rocm(6165),
    ),
    _entry(
        "2.3",
        "memory-reservation",
        "reserve memory with control groups",
        _reservation,
        "memory_min in a profile protects the server's CPU side",
        rocm(6370),
        kernel_doc("admin-guide/cgroup-v2"),
    ),
    _entry(
        "2.4",
        "vulkan",
        "try Vulkan for short contexts",
        _vulkan,
        "install RADV and a Vulkan build, and compare",
        github("kyuz0/amd-strix-halo-toolboxes", 118),
    ),
    _entry(
        "2.5",
        "pinning",
        "pin the server to CPUs",
        _pinning,
        "cpus in a profile",
        kernel_doc("admin-guide/cgroup-v2"),
    ),
)
