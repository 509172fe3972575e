# SPDX-License-Identifier: Apache-2.0
"""Boot settings: set twice, set wrongly, or not in force."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Mapping

from infertune.base.records import replace
from infertune.base.units import GIB, MIB, PAGES_PER_GIB, format_size
from infertune.boot.sources import HARMLESS_WORDS, Mistake, ignored_words, mistake_in
from infertune.doctor.base import (
    Answer,
    Finding,
    Rule,
    Source,
    Unknown,
    github,
    kernel_doc,
    need,
    rocm,
)
from infertune.doctor.conditions import AMDGPU, NPU, STRIX_HALO
from infertune.doctor.facts import Facts
from infertune.host.memory import PAGE
from infertune.host.modprobe import Assignment
from infertune.pools.boot import most_for_gpu

_TTM = ("ttm", "amdttm", "amd_ttm")

_KNOWN = {
    **dict.fromkeys(_TTM, ("pages_limit", "page_pool_size", "dma32_pages_limit")),
    "amdgpu": (
        *("gttsize", "lockup_timeout", "cwsr_enable", "noretry", "vm_update_mode", "sg_display"),
        *("ppfeaturemask", "no_system_mem_limit", "gpu_recovery", "dcdebugmask"),
    ),
}
"""Parameters that are set for inference, by module: they exist, whether shown here or not."""


def _gttsize(facts: Facts) -> Answer:
    found = facts.configured("amdgpu", "gttsize")
    if not found or found[-1].value in ("-1", ""):
        return None
    size = (_mib(found[-1].value) or 0) * MIB
    module = facts.machine.ttm.module if facts.machine.ttm else "ttm"
    fix = f"{_write(facts, f'{module}.pages_limit', size)} instead" if size else None
    text = f"{found[-1]} ({found[-1].origin}) is deprecated and will be removed"
    return Finding(text, fix=fix, about="amdgpu.gttsize")


def _write(facts: Facts, name: str, size: int) -> str:
    """The number of pages for a size, or for the largest that ``boot plan`` accepts here."""
    total = facts.machine.memory.total_bytes
    size = min(size, most_for_gpu(total)) if total else size
    return f"write {name}={size // PAGE} for {format_size(size)}"


def _mib(value: str) -> int | None:
    return int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else None


def _sizes_differ(facts: Facts) -> Answer:
    gtt = [option for option in facts.configured("amdgpu", "gttsize") if _mib(option.value)]
    limits = [o for module in _TTM for o in facts.configured(module, "pages_limit")]
    pages = [option for option in limits if _pages(option.value)]
    if not gtt or not pages:
        return None
    size, limit = (_mib(gtt[-1].value) or 0) * MIB, (_pages(pages[-1].value) or 0) * PAGE
    if abs(size - limit) < 64 * MIB:
        return Finding(f"{gtt[-1]} and {pages[-1]} set the same size twice", "info")
    return Finding(
        f"{gtt[-1]} is {format_size(size)}, {pages[-1]} is {format_size(limit)}: the driver "
        "reports one size, and TTM allows the other"
    )


def _pages(value: str) -> int | None:
    """As the kernel reads an unsigned long: 0x for hexadecimal, 0 for octal (kstrtoul, base 0)."""
    found = re.fullmatch(r"(0[xX])?([0-9a-fA-F]{1,12})", value)
    if found is None:
        return None
    base = 16 if found[1] else 8 if found[2].startswith("0") else 10
    try:
        return int(found[2], base)
    except ValueError:
        return None


def _disagree(facts: Facts) -> Answer:
    places: dict[str, dict[str, Assignment]] = defaultdict(dict)
    for option in need(facts.options):
        places[f"{option.module}.{option.name}"].setdefault(option.value, option)
    for name, values in places.items():
        if len(values) > 1:
            said = ", ".join(f"{value} ({option.origin})" for value, option in values.items())
            live = need(facts.live_options).get(name)
            force = f"; in force is {live}" if live is not None else ""
            return Finding(f"{name} is set to {said}{force}", about=name)
    return None


def _misspelt(facts: Facts) -> Answer:
    for option in need(facts.options):
        mistake = _mistake(option)
        if mistake:
            return Finding(f"{option} ({option.origin}): {mistake.what}", fix=mistake.fix)
    return None


def _mistake(option: Assignment) -> Mistake | None:
    """A name that guides and issues spell wrongly."""
    mistake = mistake_in(option.module, option.name, option.value)
    return mistake if mistake and mistake.nameless else None


def _unknown_option(facts: Facts) -> Answer:
    live = need(facts.live_options)
    unseen = [option for option in need(facts.options) if _unseen(facts, option)]
    for option in need(facts.options):
        name = f"{option.module}.{option.name}"
        if _mistake(option) or not facts.shows(option.module):
            continue
        if name not in live or live[name] is not None:  # not in it: no name of any parameter
            continue
        names = _KNOWN.get(option.module, ())
        if option.name in names:
            continue
        near = difflib.get_close_matches(option.name, names, n=1, cutoff=0.75)
        hint = f"; did you mean {option.module}.{near[0]}?" if near else ""
        text = f"{option} ({option.origin}): the module shows no such parameter{hint}"
        return Finding(text, about=name)
    return _not_shown(unseen)


def _unseen(facts: Facts, option: Assignment) -> bool:
    """Whether the module that takes the option is loaded, and shows nothing of itself here."""
    return not facts.shows(option.module) and option.module in facts.loaded


def _not_shown(unseen: list[Assignment]) -> Unknown | None:
    return Unknown(f"the parameters of {unseen[0].module} are not shown here") if unseen else None


def _pool_above_limit(facts: Facts) -> Answer:
    for module in _TTM:
        pool = facts.configured(module, "page_pool_size")
        if not pool:
            continue
        limits = facts.configured(module, "pages_limit")
        size, limit = _pages(pool[-1].value), _pages(limits[-1].value) if limits else None
        if size and limit and size > limit:
            return Finding(f"{pool[-1]} is above {limits[-1]}: the pool never grows that large")
    return None


def _uneven_pages(facts: Facts) -> Answer:
    for module in _TTM:
        for option in facts.configured(module, "pages_limit"):
            pages = _pages(option.value)
            name = f"{module}.pages_limit"
            if pages is None:
                return Finding(
                    f"{option} ({option.origin}) is not a number of pages: the module refuses it",
                    fix=_sized(facts, name, option.value),
                    about=name,
                )
            if 0 < pages < PAGES_PER_GIB:
                return Finding(
                    f"{option} ({option.origin}) is {format_size(pages * PAGE)}: the value counts "
                    "pages of 4 KiB, not MiB or GiB",
                    fix=_meant(facts, name, pages),
                    about=name,
                )
    return None


def _sized(facts: Facts, name: str, value: str) -> str | None:
    """What somebody meant who wrote ``96G`` for a number of pages."""
    found = re.fullmatch(r"(\d{1,6})\s*([GM])i?B?", value, re.IGNORECASE)
    if found is None:
        return None
    return _write(facts, name, int(found[1]) * (GIB if found[2] in "Gg" else MIB))


def _meant(facts: Facts, name: str, number: int) -> str | None:
    """The same number as GiB or MiB, whichever is a size of these machines."""
    size = number * MIB if number >= 8192 else number * GIB if number <= 512 else None
    return _write(facts, name, size) if size else None


def _newer_than_initramfs(facts: Facts) -> Answer:
    files = need(facts.option_files)
    if not files:
        return None
    image = need(facts.initramfs)
    newer = [file.path for file in files if file.modified and file.modified > image.modified]
    if not newer:
        return None
    return Finding(
        f"{', '.join(newer)} changed after {image.path} was built, which may lack the change"
    )


def _not_in_force(facts: Facts) -> Answer:
    files = {file.path: file.modified for file in need(facts.option_files)}
    booted = need(facts.booted)
    live = need(facts.live_options)
    latest = {f"{option.module}.{option.name}": option for option in need(facts.options)}
    for name, option in latest.items():
        value = live.get(name)
        if value is None or not option.value or _same(option.value, value):
            continue
        changed = files.get(option.origin)
        if changed is not None and changed > booted:
            text = f"{option} ({option.origin}) takes effect at the next boot; in force is {value}"
            return Finding(text, "info", about=name)
        text = f"{option} ({option.origin}) is not in force: {name} is {value}"
        return Finding(text, about=name)
    return _not_shown([option for option in latest.values() if _unseen(facts, option)])


def _same(configured: str, live: str) -> bool:
    try:
        return int(configured, 0) == int(live, 0)
    except ValueError:
        return configured == live or {configured, live} <= {"1", "Y", "y"} | {"on"}


def _staged(facts: Facts) -> Answer:
    staged = need(facts.staged)
    if staged.state in ("none", "active"):
        return None
    if staged.state == "pending-reboot":
        return Finding("boot settings staged by infertune take effect at the next boot", "info")
    said = f" ({'; '.join(staged.said)})" if any(staged.said) else ""
    became = {
        "staged": "were left half staged or half put back",
        "overridden": "are overridden elsewhere",
        "failed": "are not in force",
    }
    return Finding(f"boot settings staged by infertune {became[staged.state]}{said}")


def _odd_files(facts: Facts) -> Answer:
    if not facts.odd_files:
        return None
    more = f" (and {len(facts.odd_files) - 1} more)" if len(facts.odd_files) > 1 else ""
    return Finding(f"{facts.odd_files[0]}{more}: its options may not be what was meant")


def _invalid_iommu(facts: Facts) -> Answer:
    for name, value in need(facts.parameters):
        words = ignored_words(name, value)
        if not words:
            continue
        said = f"{name}={value}: the kernel does not know {', '.join(words)} and ignores it"
        if "pt" in words:
            return Finding(f"{said}; iommu=pt is meant", about=name)
        harmless = all(word in HARMLESS_WORDS for word in words)
        more = "; the IOMMU is on anyway" if harmless else ""
        return Finding(f"{said}{more}", "info" if harmless else None, about=name)
    return None


_VALUES: Mapping[str, tuple[tuple[str, ...], str]] = {
    # drivers/cpufreq/amd-pstate.c, get_mode_idx_from_str.
    "amd_pstate": (("disable", "passive", "active", "guided"), "active is the default since 6.5"),
    # mm/huge_memory.c, setup_transparent_hugepage.
    "transparent_hugepage": (("always", "madvise", "never"), "write one of these three"),
    # kernel/sched/core.c and mm/mempolicy.c, setup_numabalancing.
    "numa_balancing": (("enable", "disable"), "write enable or disable"),
    # drivers/pci/pcie/aspm.c, pcie_aspm_disable.
    "pcie_aspm": (("off", "force"), "pcie_aspm.policy=performance is the other parameter"),
}
"""Parameters of the kernel itself that take one of a few words; it ignores any other one."""

_NUMBERS: Mapping[str, tuple[str, ...]] = {
    "amdgpu": (
        *("gttsize", "cwsr_enable", "noretry", "vm_update_mode", "sg_display", "gpu_recovery"),
        *("dcdebugmask", "runpm", "mcbp", "dpm", "bapm", "aspm", "vramlimit", "sched_policy"),
    ),
    **dict.fromkeys(_TTM, ("page_pool_size", "dma32_pages_limit")),
}
"""Parameters of modules that take a number (drivers/gpu/drm/amd/amdgpu/amdgpu_drv.c)."""


def _wrong_value(facts: Facts) -> Answer:
    found = [*_refused(facts), *_unknown_words(facts)]
    if not found:
        return None
    more = "".join(f"; {each.text}" for each in found[1:])
    return replace(found[0], text=found[0].text + more)


def _refused(facts: Facts) -> list[Finding]:
    """Values that a module does not take: it fails to load."""
    return [
        Finding(
            f"{option} ({option.origin}) is not a number: {option.module} refuses it, and the GPU "
            "may have no driver at the next boot",
            "error",
            fix="write a number (see 'modinfo -p MODULE')",
            about=f"{option.module}.{option.name}",
        )
        for option in need(facts.options)
        if not _takes(option)
    ]


def _unknown_words(facts: Facts) -> list[Finding]:
    """Values of the kernel's own parameters that it ignores."""
    found = []
    for name, value in need(facts.parameters):
        words, hint = _VALUES.get(name, ((), ""))
        if words and value not in words:
            said = f"{name}={value}" if value else f"{name} without a value"
            text = f"{said} is ignored: the kernel takes {', '.join(words)}"
            found.append(Finding(text, fix=hint, about=name))
    return found


def _takes(option: Assignment) -> bool:
    """Whether a module takes a parameter's value, as far as that is known."""
    if option.name in _NUMBERS.get(option.module, ()):
        return _is_number(option.value)
    if (option.module, option.name) == ("amdgpu", "lockup_timeout"):
        # amdgpu_device_get_job_timeout_settings: empty parts keep their defaults.
        return all(not part or _is_number(part) for part in option.value.split(","))
    return True


def _is_number(value: str) -> bool:
    return re.fullmatch(r"-?(?:0[xX][0-9a-fA-F]{1,16}|\d{1,20})", value) is not None


def _iommu_off(facts: Facts) -> bool:
    return facts.parameter("amd_iommu") == "off" or facts.parameter("iommu") == "off"


def _npu_lost(facts: Facts) -> Answer:
    if not _iommu_off(facts):
        return None
    return Finding("the IOMMU is off: the NPU cannot work (it needs PASID)")


def _iommu_trade(facts: Facts) -> Answer:
    if _iommu_off(facts):
        return Finding(
            "the IOMMU is off: on one host prompts ran 5 to 12 % faster, generation 2 %; the price "
            "is DMA protection, VFIO and the NPU"
        )
    if facts.parameter("iommu") == "pt":
        return Finding("iommu=pt measured no faster than the default (translated) on this chip")
    return None


def _thp_on_command_line(facts: Facts) -> Answer:
    value = facts.parameter("transparent_hugepage")
    tuned = any(each.id == "tuned" and each.running for each in facts.machine.tuners)
    if value is None or not tuned:
        return None
    return Finding(
        f"transparent_hugepage={value} is on the command line, so TuneD leaves huge pages alone",
        about="transparent_hugepage",
    )


def _lockup(facts: Facts) -> Answer:
    found = facts.configured("amdgpu", "lockup_timeout")
    values = [part for option in found for part in option.value.split(",")]
    # A negative number is no timeout; 0 keeps the default (amdgpu_drv.c, lockup_timeout).
    if not any(part.startswith("-") for part in values):
        return None
    return Finding(f"{found[-1]} ({found[-1].origin}): a hung GPU is never reset")


RULES: tuple[Rule, ...] = (
    Rule(
        id="gttsize-deprecated",
        title="amdgpu.gttsize is deprecated",
        when=AMDGPU,
        check=_gttsize,
        confidence="sure",
        fix="set ttm.pages_limit (GiB x 262144) instead",
        sources=(kernel_doc("gpu/amdgpu/module-parameters"), rocm(5595)),
        covers=("log-gttsize",),
    ),
    Rule(
        id="gtt-sizes-differ",
        title="amdgpu.gttsize and pages_limit set different sizes",
        when=AMDGPU,
        check=_sizes_differ,
        severity="error",
        confidence="sure",
        fix="remove amdgpu.gttsize and keep pages_limit",
        sources=(kernel_doc("gpu/amdgpu/module-parameters"), rocm(5595)),
        covers=("gttsize-deprecated", "log-gtt-differs", "log-gttsize"),
    ),
    Rule(
        id="option-twice",
        title="one module parameter is set to different values",
        check=_disagree,
        confidence="sure",
        fix="keep one of them",
        sources=(kernel_doc("admin-guide/kernel-parameters"),),
    ),
    Rule(
        id="option-misspelt",
        title="a misspelt parameter copied from guides",
        when=AMDGPU,
        check=_misspelt,
        severity="error",
        confidence="sure",
        fix="correct the parameter's name",
        sources=(rocm(5595), github("kyuz0/amd-strix-halo-toolboxes", 39)),
        covers=("log-unknown-parameter",),
    ),
    Rule(
        id="option-unknown",
        title="a parameter that the loaded module does not have",
        when=AMDGPU,
        check=_unknown_option,
        # A few parameters are not shown in sysfs at all.
        fix="see 'modinfo -p MODULE' for the names",
        sources=(kernel_doc("gpu/amdgpu/module-parameters"),),
        covers=("log-unknown-parameter",),
    ),
    Rule(
        id="ttm-pool-above-limit",
        title="page_pool_size above pages_limit",
        when=AMDGPU,
        check=_pool_above_limit,
        severity="info",
        confidence="sure",
        fix="remove page_pool_size: it only caps the cache of freed pages and reserves nothing",
        sources=(github("ROCm/rocm-systems", 351),),
    ),
    Rule(
        id="ttm-wrong-unit",
        title="pages_limit in the wrong unit",
        when=AMDGPU,
        check=_uneven_pages,
        severity="error",
        fix="write GiB x 262144",
        sources=(github("ROCm/rocm-systems", 351),),
    ),
    Rule(
        id="initramfs-older",
        title="options changed after the initramfs was built",
        when=AMDGPU,
        check=_newer_than_initramfs,
        # Where the module is loaded from the root file system, the file alone counts.
        fix="rebuild it (update-initramfs -u, dracut -f, or mkinitcpio -P), and reboot",
        sources=(rocm(5595), github("superm1/amd-debug-tools", 10)),
        covers=("option-not-in-force",),
    ),
    Rule(
        id="option-not-in-force",
        title="an option set before this boot that is not in force",
        check=_not_in_force,
        severity="error",
        fix="rebuild the initramfs, look for a second place that sets it, and reboot",
        sources=(rocm(5595), rocm(5562)),
    ),
    Rule(
        id="boot-staged",
        title="boot settings staged by infertune that are not in force",
        check=_staged,
        confidence="sure",
        fix="see 'infertune boot status'; 'infertune boot undo' puts everything back",
        sources=(kernel_doc("admin-guide/kernel-parameters"),),
        covers=("option-not-in-force", "ttm-not-in-force", "initramfs-older"),
    ),
    Rule(
        id="modprobe-odd-file",
        title="a file in modprobe.d that is not a small text file",
        check=_odd_files,
        confidence="sure",
        fix="replace or remove it",
        sources=(github("superm1/amd-debug-tools", 10),),
    ),
    Rule(
        id="iommu-invalid",
        title="a value of amd_iommu or iommu that the kernel does not know",
        check=_invalid_iommu,
        confidence="sure",
        fix="remove it; amd_iommu=off is the value that changes speed (see iommu-trade)",
        sources=(
            Source(
                "Linux: drivers/iommu/amd/init.c",
                "https://git.kernel.org/pub/scm/linux/kernel/git/torvalds/linux.git/tree/drivers/"
                "iommu/amd/init.c",
            ),
            kernel_doc("admin-guide/kernel-parameters"),
            github("kyuz0/amd-strix-halo-toolboxes", 66),
        ),
        covers=("log-iommu-option",),
    ),
    Rule(
        id="boot-value-unknown",
        title="a boot parameter with a value that the kernel or its module does not know",
        check=_wrong_value,
        confidence="sure",
        fix="write one of the values the kernel knows",
        sources=(
            kernel_doc("admin-guide/kernel-parameters"),
            kernel_doc("gpu/amdgpu/module-parameters"),
        ),
        covers=("option-not-in-force", "thp-command-line"),
    ),
    Rule(
        id="npu-without-iommu",
        title="an NPU without the IOMMU it needs",
        when=NPU,
        check=_npu_lost,
        severity="info",
        confidence="sure",
        fix="remove amd_iommu=off if you want the NPU",
        sources=(github("noamsto/nix-amd-ai", 53), github("antirez/ds4", 871)),
    ),
    Rule(
        id="iommu-trade",
        title="what the IOMMU setting gains and costs",
        when=STRIX_HALO,
        check=_iommu_trade,
        severity="info",
        fix="choose: amd_iommu=off for speed, nothing for the NPU, VFIO and protection",
        sources=(
            github("kyuz0/amd-strix-halo-toolboxes", 66),
            github("noamsto/nix-amd-ai", 132),
        ),
        covers=("npu-without-iommu",),
    ),
    Rule(
        id="thp-command-line",
        title="huge pages set on the command line, which makes TuneD leave them alone",
        check=_thp_on_command_line,
        severity="info",
        fix="set them in one place",
        sources=(
            Source(
                "TuneD: plugin_vm.py",
                "https://github.com/redhat-performance/tuned/blob/master/tuned/plugins/plugin_vm.py",
            ),
        ),
    ),
    Rule(
        id="gpu-lockup-never",
        title="a hung GPU is never reset",
        when=AMDGPU,
        check=_lockup,
        confidence="sure",
        fix="write amdgpu.lockup_timeout=20000 (ms; enough for long prompts)",
        sources=(
            kernel_doc("gpu/amdgpu/module-parameters"),
            github("defilantech/LLMKube", 886),
        ),
    ),
)
