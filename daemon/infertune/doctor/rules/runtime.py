# SPDX-License-Identifier: Apache-2.0
"""ROCm, the Vulkan drivers, and the variables that control them."""

from __future__ import annotations

from infertune.doctor.base import (
    Answer,
    Finding,
    Rule,
    Source,
    Unknown,
    Version,
    Window,
    format_version,
    github,
    llama,
    need,
    rocm,
)
from infertune.doctor.conditions import AMDGPU, RDNA35, ROCM, STRIX_HALO
from infertune.doctor.facts import Facts


def _installed(facts: Facts) -> Version:
    """Raises Missing."""
    return need(need(facts.rocm) or Unknown("ROCm is not installed"))


def _affected(window: Window, version: Version, does: str, may: str) -> str | None:
    """How the sentence on a version of ROCm begins; None for a good one."""
    if (said := window.says(version)) == "good":
        return None
    return f"ROCm {format_version(version)} {does if said == 'bad' else may}"


_NO_GFX1151 = Window(first=(0,), last=(6, 4, 0), good=(6, 4, 4))


def _too_old(facts: Facts) -> Answer:
    lacks = _affected(_NO_GFX1151, _installed(facts), "lacks", "may lack")
    return Finding(f"{lacks} full support for gfx1151") if lacks else None


_PROMPTS = Window(first=(7, 0), last=(7, 2, 0), good=(7, 2, 1))
_PROMPTS_PREVIEW = Window(first=(7, 10), last=(7, 11), good=(7, 13))


def _slow_prompts(facts: Facts) -> Answer:
    version = _installed(facts)
    # The previews 7.9 to 7.12 were a line of their own: a larger number, an older compiler.
    window = _PROMPTS_PREVIEW if version >= (7, 9) else _PROMPTS
    if compiles := _affected(window, version, "compiles", "may compile"):
        return Finding(
            f"{compiles} llama.cpp's quantised kernels badly: prompts took up to three times as "
            "long"
        )
    return None


_OLD_RUNTIME = Window(first=(0,), last=(7, 1, 1), good=(7, 2, 1))


def _mismatch(facts: Facts) -> Answer:
    version = _installed(facts)
    if facts.kernel < (6, 18, 4) or _OLD_RUNTIME.says(version) == "good":
        return None
    return Finding(
        f"ROCm {format_version(version)} computes the save area itself, and Linux "
        f"{facts.machine.kernel} needs a larger one: queues may be refused or fault"
    )


def _isa(target: str) -> str:
    """``gfx1151`` as HSA_OVERRIDE_GFX_VERSION writes it: 11.5.1."""
    digits = target.removeprefix("gfx")
    return f"{int(digits[:-2])}.{int(digits[-2], 16)}.{int(digits[-1], 16)}"


def _override(facts: Facts) -> Answer:
    found = facts.variables("HSA_OVERRIDE_GFX_VERSION")
    if not found:
        return None
    target = need(facts.gpu.gfx_target or Unknown("the GPU's instruction set is not known"))
    own = _isa(target)
    wrong = [(value, where) for value, where in found if value != own]
    if wrong:
        value, where = wrong[0]
        return Finding(
            f"HSA_OVERRIDE_GFX_VERSION={value} ({where}) makes ROCm run code for a chip other "
            f"than this {target}"
        )
    value, where = found[0]
    return Finding(
        f"HSA_OVERRIDE_GFX_VERSION={value} ({where}) is what the GPU reports anyway", "info"
    )


def _hidden(facts: Facts) -> Answer:
    for name in ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES"):
        for value, where in facts.variables(name):
            if value.strip() in ("", "-1"):
                return Finding(f"{name}={value} ({where}) hides every GPU")
    return None


def _folk(facts: Facts) -> Answer:
    names = ("HSA_ENABLE_SDMA", "GPU_MAX_HW_QUEUES", "RADV_PERFTEST")
    found = [
        f"{name}={value} ({where})" for name in names for value, where in facts.variables(name)
    ]
    if not found:
        return None
    return Finding(f"{', '.join(found)}: no measured gain on this hardware is known")


_FOLK_OPTIONS = ("noretry", "vm_update_mode", "sg_display")


def _folk_options(facts: Facts) -> Answer:
    found = [option for name in _FOLK_OPTIONS for option in facts.configured("amdgpu", name)]
    if not found:
        return None
    said = ", ".join(f"{option} ({option.origin})" for option in found)
    return Finding(f"{said}: the guide they come from does not say what they gain")


def _managed(facts: Facts) -> Answer:
    found = facts.variables("GGML_CUDA_ENABLE_UNIFIED_MEMORY")
    on = [where for value, where in found if value not in ("", "0")]
    if not on:
        return None
    return Finding(
        f"GGML_CUDA_ENABLE_UNIFIED_MEMORY is set ({on[0]}): weights are managed memory, charged to "
        "the server's control group and not limited by GTT"
    )


def _amdvlk(facts: Facts) -> Answer:
    icds = need(facts.vulkan)
    amdvlk = [name for name in icds if name.startswith(("amd_icd", "amd_pro_icd"))]
    if not amdvlk:
        return None
    chosen = [value.upper() for value, _ in facts.variables("AMD_VULKAN_ICD")]
    if chosen and all(value == "RADV" for value in chosen):
        return None
    radv = any(name.startswith("radeon_icd") for name in icds)
    return Finding(
        f"AMDVLK is installed{' beside RADV' if radv else ''} ({amdvlk[0]}); it refuses buffers "
        "over 2 GiB and is slower with prompts"
    )


def _no_radv(facts: Facts) -> Answer:
    if any(name.startswith("radeon_icd") for name in need(facts.vulkan)):
        return None
    return Finding("RADV is not installed: Vulkan cannot use the GPU")


def _several_clients(facts: Facts) -> Answer:
    clients = need(facts.compute_clients)
    if clients < 2:
        return None
    return Finding(
        f"{clients} processes have ROCm open: on one machine two idle ones kept the GPU at "
        "2900 MHz, for 25 W"
    )


_SPINNING = Window(first=(7, 14), last=(10, 0), good=None)


def _spinning(facts: Facts) -> Answer:
    keeps = _affected(_SPINNING, _installed(facts), "keeps", "may keep")
    return Finding(f"{keeps} one CPU core busy after a program's first GPU work") if keeps else None


RULES: tuple[Rule, ...] = (
    Rule(
        id="rocm-too-old",
        title="ROCm without native support for gfx1151",
        when=STRIX_HALO & ROCM,
        check=_too_old,
        fix="install ROCm 7.2.1 or newer, or use Vulkan",
        sources=(github("ROCm/pytorch", 2582), rocm(4499)),
        window=_NO_GFX1151,
    ),
    Rule(
        id="rocm-slow-prompts",
        title="ROCm 7.0 to 7.2.0 compiles llama.cpp's quantised kernels badly",
        when=RDNA35 & ROCM,
        check=_slow_prompts,
        # It affects what was built with this ROCm, and a server may bring its own.
        fix="build llama.cpp with ROCm 7.2.1 or newer (or with "
        "-DCMAKE_HIP_FLAGS='-mllvm --amdgpu-unroll-threshold-local=600')",
        sources=(github("ROCm/rocm-systems", 2865), llama(17917)),
        window=_PROMPTS,
    ),
    Rule(
        id="rocm-save-area",
        title="ROCm before 7.2.1 does not ask the kernel how large a queue's save area is",
        when=STRIX_HALO & ROCM,
        check=_mismatch,
        fix="install ROCm 7.2.1 or newer",
        sources=(github("ROCm/rocm-systems", 2200), github("ROCm/TheRock", 2991)),
        window=_OLD_RUNTIME,
    ),
    Rule(
        id="rocm-override",
        title="HSA_OVERRIDE_GFX_VERSION makes ROCm run code for another chip",
        when=AMDGPU,
        check=_override,
        severity="error",
        confidence="sure",
        fix="unset HSA_OVERRIDE_GFX_VERSION; ROCm knows this GPU",
        sources=(github("ROCm/rocm-systems", 3461),),
    ),
    Rule(
        id="gpu-hidden",
        title="a variable hides every GPU from the server",
        when=AMDGPU,
        check=_hidden,
        confidence="sure",
        fix="unset it, or set it to the number of the GPU",
        sources=(
            Source(
                "ROCm: GPU isolation",
                "https://rocm.docs.amd.com/en/latest/conceptual/gpu-isolation.html",
            ),
        ),
    ),
    Rule(
        id="rocm-folk-settings",
        title="variables from guides, with no measured effect on this hardware",
        when=AMDGPU,
        check=_folk,
        severity="info",
        fix="leave them out unless you have measured a gain",
        sources=(github("noamsto/nix-amd-ai", 105),),
    ),
    Rule(
        id="rocm-managed-memory",
        title="unified memory changes what the weights are charged to",
        when=AMDGPU,
        check=_managed,
        severity="info",
        confidence="sure",
        fix="unset it unless it works around wrong results of an old build (llama-wrong-logits)",
        sources=(llama(26543), rocm(6370)),
    ),
    Rule(
        id="vulkan-amdvlk",
        title="AMDVLK can take the place of RADV",
        when=AMDGPU,
        check=_amdvlk,
        confidence="sure",
        fix="remove AMDVLK, or set AMD_VULKAN_ICD=RADV for the server (infertune's profiles do)",
        sources=(
            github("GPUOpen-Drivers/AMDVLK", 413),
            github("GPUOpen-Drivers/AMDVLK", 420),
        ),
    ),
    Rule(
        id="vulkan-no-radv",
        title="no Vulkan driver for the GPU",
        when=AMDGPU,
        check=_no_radv,
        severity="info",
        fix="install mesa-vulkan-drivers (vulkan-radeon on Arch)",
        sources=(Source("Mesa: RADV", "https://docs.mesa3d.org/drivers/radv.html"),),
    ),
    Rule(
        id="option-folk-settings",
        title="amdgpu options from guides, with no measured effect",
        when=STRIX_HALO,
        check=_folk_options,
        severity="info",
        fix="remove them unless you have measured a gain",
        sources=(
            Source(
                "halogen-flash-server: host settings",
                "https://github.com/peonist-ai/halogen-flash-server"
                "#the-host-settings-these-numbers-were-measured-on",
            ),
        ),
    ),
    Rule(
        id="rocm-several-clients",
        title="two or more processes with ROCm open keep the GPU's clock up while idle",
        when=STRIX_HALO,
        check=_several_clients,
        severity="info",
        fix="keep one model resident (llama-swap, or llama-server's router); no fix is known",
        sources=(github("ROCm/TheRock", 7578), rocm(6639)),
    ),
    Rule(
        id="rocm-spinning-thread",
        title="ROCm 7.14 and 10.0 keep one CPU core busy after the first GPU work",
        when=STRIX_HALO & ROCM,
        check=_spinning,
        severity="info",
        # ROCm of python wheels is not seen, and a server may bring its own.
        fix="use ROCm 7.2, whose runtime (1.18) does not, where the core or its heat matters",
        sources=(
            github("ROCm/TheRock", 7051),
            github("ROCm/TheRock", 8213),
            rocm(6522),
            github("Luce-Org/lucebox", 750),
        ),
        window=_SPINNING,
    ),
)
