# SPDX-License-Identifier: Apache-2.0
"""What the kernel has logged since boot.  The signs themselves: host/kernel_log.py."""

from __future__ import annotations

from collections.abc import Callable

from infertune.boot.sources import HARMLESS_WORDS
from infertune.doctor.base import (
    Answer,
    Finding,
    Rule,
    Source,
    github,
    kernel_doc,
    linux,
    llama,
    need,
    rocm,
)
from infertune.doctor.facts import Facts
from infertune.host import kernel_log


def _sign(sign: str, meaning: str) -> Callable[[Facts], Answer]:
    """A check for one sign: how often, its first words, and what it means."""

    def check(facts: Facts) -> Answer:
        found = kernel_log.find(sign, need(facts.log))
        if not found:
            return None
        times = "once" if len(found) == 1 else f"{len(found)} times"
        return Finding(f"'{found[0][0][:100]}' ({times}): {meaning}")

    return check


def _killed(facts: Facts) -> Answer:
    names = [match["name"] for match in kernel_log.find("oom", need(facts.log))]
    if not names:
        return None
    innocents = [name for name in names if not kernel_log.is_server(name)]
    text = f"the OOM killer killed {len(names)} {'process' if len(names) == 1 else 'processes'}"
    if innocents:
        text += (
            f", {len(innocents)} of them not model servers: it does not see the memory that the "
            "GPU holds"
        )
    return Finding(text)


def _died(facts: Facts) -> Answer:
    found = kernel_log.find("invalid-opcode", need(facts.log))
    if not found:
        return None
    return Finding(
        f"a program died with an illegal instruction in {found[0]['file']}, which was built for "
        "another CPU"
    )


def _ignored_word(facts: Facts) -> Answer:
    found = kernel_log.find("iommu-option", need(facts.log))
    if not found:
        return None
    words = found[0]["option"].split(",")
    harmless = all(word in HARMLESS_WORDS for word in words)
    text = f"the kernel logged '{found[0][0][:100]}': the value has no effect"
    return Finding(text, "info" if harmless else None, about="amd_iommu")


_DEVICE_LOST = (llama(21724), github("defilantech/LLMKube", 886), github("ollama/ollama", 17870))
_GTTSIZE = (kernel_doc("gpu/amdgpu/module-parameters"), rocm(5595))

RULES: tuple[Rule, ...] = (
    Rule(
        id="log-ring-timeout",
        title="the GPU did not finish work in time and was reset",
        check=_sign("ring-timeout", "the program lost its work ('device lost')"),
        confidence="sure",
        fix="a smaller ubatch_size (128 worked where 512 did not), or amdgpu.lockup_timeout=20000",
        sources=_DEVICE_LOST,
        covers=("vulkan-short-lockup", "log-gpu-reset"),
    ),
    Rule(
        id="log-mes",
        title="the GPU's scheduler firmware did not answer",
        check=_sign("mes", "the GPU hangs until it is reset"),
        severity="error",
        confidence="sure",
        fix="check firmware-mes-broken and kernel-save-area, then reboot",
        sources=(rocm(5724), rocm(5590), rocm(5151)),
        covers=("log-ring-timeout", "log-gpu-reset"),
    ),
    Rule(
        id="log-gpu-reset",
        title="the GPU was reset",
        check=_sign("gpu-reset", "every program using it lost its work"),
        confidence="sure",
        fix="see what the kernel logged just before",
        sources=(kernel_doc("gpu/drm-uapi"), llama(21724)),
    ),
    Rule(
        id="log-page-fault",
        title="the GPU accessed memory that is not its own",
        check=_sign("page-fault", "a program or its driver is at fault"),
        confidence="sure",
        fix="check firmware-mes-broken, rocm-save-area and rocm-override",
        sources=(rocm(5991), rocm(5724)),
    ),
    Rule(
        id="log-oom",
        title="the OOM killer killed processes",
        check=_killed,
        confidence="sure",
        fix="less GTT, context or --cache-ram (8 GiB by default); oom_score_adj for the server",
        sources=(rocm(6370),),
        covers=("oom-kills",),
    ),
    Rule(
        id="log-illegal-instruction",
        title="a model server died with an illegal instruction",
        check=_died,
        severity="error",
        confidence="sure",
        fix="install a build for this CPU; 'infertune doctor --smoke' tries it",
        sources=(
            Source(
                "llama.cpp: docs/build.md",
                "https://github.com/ggml-org/llama.cpp/blob/master/docs/build.md",
            ),
        ),
    ),
    Rule(
        id="log-gttsize",
        title="the driver says that gttsize is deprecated",
        check=_sign("gttsize-deprecated", "set pages_limit of TTM"),
        confidence="sure",
        fix="set ttm.pages_limit (GiB x 262144) instead",
        sources=_GTTSIZE,
    ),
    Rule(
        id="log-gtt-differs",
        title="the driver says that GTT and TTM have different sizes",
        check=_sign("gtt-ttm-differ", "one of the two is not what you meant"),
        confidence="sure",
        fix="remove amdgpu.gttsize and keep pages_limit",
        sources=_GTTSIZE,
    ),
    Rule(
        id="log-gtt-capped",
        title="the driver capped GTT at RAM",
        check=_sign("gtt-capped", "the configured size is more than RAM"),
        confidence="sure",
        fix="set pages_limit to RAM less what the system needs",
        sources=(linux("5dafdd649280", "July 2026"),),
    ),
    Rule(
        id="log-unknown-parameter",
        title="the kernel ignored a parameter of a GPU module",
        check=_sign("unknown-parameter", "it has no effect"),
        severity="error",
        confidence="sure",
        fix="correct its name, or remove it",
        sources=(rocm(5595),),
    ),
    Rule(
        id="log-iommu-option",
        title="the kernel ignored a value of amd_iommu",
        check=_ignored_word,
        confidence="sure",
        fix="remove it; where pt is meant, iommu=pt is the spelling, and gains nothing here",
        sources=(github("kyuz0/amd-strix-halo-toolboxes", 66),),
    ),
    Rule(
        id="log-firmware-missing",
        title="a firmware file of the GPU was not found",
        check=_sign("firmware-missing", "some of these files are optional, most are not"),
        fix="install linux-firmware (firmware-amd-graphics on Debian), rebuild the initramfs",
        sources=(kernel_doc("driver-api/firmware/introduction"),),
    ),
    Rule(
        id="log-npu-fault",
        title="memory accesses of the NPU fault",
        check=_sign("npu-page-fault", "the NPU gets many times slower"),
        fix="use a kernel and firmware with the fix; turning the IOMMU off disables the NPU",
        sources=(github("OpenGamingCollective/kernel-packages", 39),),
    ),
    Rule(
        id="log-npu-timeout",
        title="a command of the NPU timed out",
        check=_sign("npu-timeout", "with ROCm busy at the same time the NPU stopped in one report"),
        fix="do not use the NPU and ROCm at once on this kernel; no fix is known",
        sources=(github("amd/xdna-driver", 1605), github("ROCm/FastFlowLM", 670)),
    ),
)
