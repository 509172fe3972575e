# SPDX-License-Identifier: Apache-2.0
"""Builds of llama.cpp: windows with a bug, flags that are gone, and one token as a proof.

Numbers of builds are those of the issues: the first and the last build somebody reported bad, and
the first one that is known to have the fix.  Where nobody has named that one, the end is estimated
from dates, and the window says so.
"""

from __future__ import annotations

from collections.abc import Callable

from infertune.doctor.base import (
    Answer,
    Finding,
    Rule,
    Severity,
    Source,
    Unknown,
    Window,
    github,
    llama,
    need,
)
from infertune.doctor.conditions import (
    AMDGPU,
    DECLARED,
    INTEGRATED,
    RDNA35,
    ROCM_SERVER,
    SERVER,
    SMOKED,
)
from infertune.doctor.facts import Facts

_WRONG_LOGITS = Window(first=(10040,), last=(10588,), good=(11669,), estimated=True)
"""b10039 is good and b10040 bad by bisection (#27506), b10588 was still bad; the fix, d4389a4dd920,
is of 8 September 2026, and Debian's b11669 is well after it."""
_MISREAD_MEMORY = Window(first=(7464,), last=(10460,), good=(10485,))
"""Reported with b7464; the fix 60eeeb6 is in v0.1.2, whose nightly is b10485."""
_PROMPT_REGRESSION = Window(first=(7349,), last=(7522,), good=(7700,), estimated=True)
"""Reported with b7349; eased by #18537 and #18666 in January 2026, whose build is a guess.  The
issue is still open."""
_TOP_K = Window(first=(10079,), last=(10241,), good=(10875,), estimated=True)
"""b10069 is good and b10079 bad (one report); #27466 was merged on 31 August 2026, b10875 is of 9
September.  Which build was the first with it is not known."""

_REPOSITORY = "https://github.com/ggml-org/llama.cpp/blob/master"
_BUILDING = Source("llama.cpp: docs/build.md", f"{_REPOSITORY}/docs/build.md")
_SERVER = Source("llama.cpp: llama-server", f"{_REPOSITORY}/tools/server/README.md")

LOAD_MODE_ONLY = 10875
"""First build without --mmap, --no-mmap, --mlock and --direct-io (pull request 28334)."""

_GONE_FLAGS = ("--mlock", "--no-mmap", "--mmap", "--direct-io", "-dio")
_GONE_VARIABLES = ("LLAMA_ARG_MLOCK", "LLAMA_ARG_MMAP", "LLAMA_ARG_NO_MMAP", "LLAMA_ARG_DIO")


def _window(window: Window, harm: str, doubt: Severity) -> Callable[[Facts], Answer]:
    """A check of the build; between the known ends it is a doubt, and less severe."""

    def check(facts: Facts) -> Answer:
        said = window.says((facts.build,))
        if said == "good":
            return None
        if said == "bad":
            return Finding(f"llama-server b{facts.build} with ROCm {harm}")
        return Finding(
            f"llama-server b{facts.build} may be from before the fix: with ROCm it {harm}",
            severity=doubt,
            confidence="likely",
        )

    return check


def _gone_flags(facts: Facts) -> Answer:
    for server in need(facts.declared):
        gone = [flag for flag in _GONE_FLAGS if flag in server.flags]
        if gone and facts.build >= LOAD_MODE_ONLY:
            return Finding(
                f"{server.path} gives {', '.join(gone)}, which b{facts.build} does not know: the "
                "server does not start"
            )
    return None


def _gone_variables(facts: Facts) -> Answer:
    for name in _GONE_VARIABLES:
        for value, where in facts.variables(name):
            if facts.build >= LOAD_MODE_ONLY:
                return Finding(f"{name}={value} ({where}) is ignored in silence by b{facts.build}")
    return None


def _no_gpu_backend(facts: Facts) -> Answer:
    backends = need(facts.llama).backends
    if set(backends) != {"cpu"}:
        return None
    return Finding("no ROCm or Vulkan library of this llama-server was found: it may use CPUs only")


def _no_number(facts: Facts) -> Answer:
    server = need(facts.llama)
    if server.build is not None:
        return None
    return Finding(f"'{server.version}': without its number no known bug can be looked up")


def _smoke(outcome: str) -> Callable[[Facts], Answer]:
    def check(facts: Facts) -> Answer:
        smoke = facts.smoke
        if smoke is None or smoke.outcome == "not-run":
            return Unknown(smoke.detail if smoke else "no server was asked")
        return Finding(smoke.detail) if smoke.outcome == outcome else None

    return check


RULES: tuple[Rule, ...] = (
    Rule(
        id="llama-wrong-logits",
        title="wrong results with ROCm for prompts longer than a micro-batch",
        when=RDNA35 & ROCM_SERVER,
        check=_window(
            _WRONG_LOGITS,
            "computes wrong logits for prompts longer than n_ubatch, without any error",
            "warning",
        ),
        severity="error",
        confidence="sure",
        fix="use a build of October 2026 or later, or Vulkan; until then let ubatch_size be as "
        "large as batch_size",
        sources=(llama(28211), llama(27506), github("noamsto/nix-amd-ai", 128)),
        window=_WRONG_LOGITS,
    ),
    Rule(
        id="llama-mixed-answers",
        title="with several slots one request can get another's answer",
        when=RDNA35 & ROCM_SERVER,
        check=_window(
            _WRONG_LOGITS,
            "can give one client another's answer with several slots and a unified cache",
            "warning",
        ),
        severity="error",
        confidence="sure",
        fix="use a build of October 2026 or later, Vulkan, or one slot (--parallel 1)",
        sources=(llama(25992), llama(27579)),
        window=_WRONG_LOGITS,
    ),
    Rule(
        id="llama-misread-memory",
        title="free memory of an APU is taken from MemAvailable instead of GTT",
        when=INTEGRATED & ROCM_SERVER,
        check=_window(
            _MISREAD_MEMORY,
            "takes MemAvailable for the GPU's free memory: it fits too little, or too much",
            "info",
        ),
        severity="warning",
        confidence="sure",
        fix="use b10485 or newer; until then set --fit off and the sizes yourself",
        sources=(llama(18159), llama(27083)),
        window=_MISREAD_MEMORY,
    ),
    Rule(
        id="llama-slow-prompts",
        title="WMMA kernels that made prompts slower on RDNA 3.5",
        when=RDNA35 & ROCM_SERVER,
        check=_window(_PROMPT_REGRESSION, "processes prompts of quantised models slowly", "info"),
        severity="warning",
        confidence="likely",
        fix="use a newer build, built with ROCm 7.2.1 or newer",
        sources=(llama(17917), llama(17576)),
        window=_PROMPT_REGRESSION,
    ),
    Rule(
        id="llama-top-k",
        title="TOP_K is not on the GPU with ROCm: generation falls back to the CPU",
        when=AMDGPU & ROCM_SERVER,
        check=_window(_TOP_K, "does top-k on the CPU: 39 tokens/s became 11 in one report", "info"),
        severity="warning",
        confidence="likely",
        fix="use a build from September 2026 on, or Vulkan",
        sources=(github("unslothai/unsloth", 7371), llama(26399), llama(27466)),
        window=_TOP_K,
    ),
    Rule(
        id="llama-gone-flags",
        title="a unit gives flags that the installed llama-server no longer knows",
        when=SERVER & DECLARED,
        check=_gone_flags,
        severity="error",
        confidence="sure",
        fix="write --load-mode auto (none for --no-mmap, mlock for --mlock, dio for --direct-io)",
        sources=(llama(28334), llama(20834)),
    ),
    Rule(
        id="llama-gone-variables",
        title="variables that the installed llama-server ignores",
        when=SERVER,
        check=_gone_variables,
        severity="warning",
        confidence="sure",
        fix="set LLAMA_ARG_LOAD_MODE instead",
        sources=(llama(28334),),
    ),
    Rule(
        id="llama-no-gpu",
        title="a llama-server without a GPU backend",
        when=AMDGPU & SERVER,
        check=_no_gpu_backend,
        severity="warning",
        confidence="likely",
        fix="install the Vulkan backend (libggml0-backend-vulkan on Debian) or a ROCm build",
        sources=(_BUILDING,),
    ),
    Rule(
        id="llama-no-number",
        title="a llama-server that does not know its build number",
        when=SERVER,
        check=_no_number,
        severity="info",
        confidence="sure",
        fix="build from a checkout with its history, or set LLAMA_BUILD_NUMBER",
        sources=(github("AOSC-Dev/aosc-os-abbs", 15369),),
    ),
    Rule(
        id="llama-illegal-instruction",
        title="llama-server dies of an illegal instruction at its first token",
        when=SMOKED,
        check=_smoke("illegal-instruction"),
        severity="error",
        confidence="sure",
        fix="install a build for this CPU, one with several CPU backends (Debian's), or build it "
        "here",
        sources=(_BUILDING,),
    ),
    Rule(
        id="llama-no-token",
        title="llama-server does not come to its first token",
        when=SMOKED,
        check=_smoke("died"),
        severity="error",
        confidence="sure",
        fix="'infertune run' shows the server's own words",
        sources=(_SERVER,),
    ),
    Rule(
        id="llama-silent",
        title="llama-server gives no token in time",
        when=SMOKED,
        check=_smoke("silent"),
        severity="warning",
        confidence="likely",
        fix="try a smaller model; look for a GPU that hangs in the kernel log",
        sources=(_SERVER,),
    ),
)
