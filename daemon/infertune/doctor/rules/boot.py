# SPDX-License-Identifier: Apache-2.0
"""Settings of the boot: set twice, set wrongly, or not in force."""

from __future__ import annotations

import difflib
from collections import defaultdict

from infertune.boot.sources import Mistake, mistake_in
from infertune.doctor.base import (
    Answer,
    Finding,
    Rule,
    Source,
    github,
    kernel_doc,
    need,
    rocm,
)
from infertune.doctor.conditions import ALWAYS, AMDGPU, NPU, STRIX_HALO
from infertune.doctor.facts import Facts
from infertune.host.modprobe import Assignment
from infertune.units import MIB, PAGES_PER_GIB, format_size

_TTM = ("ttm", "amdttm", "amd_ttm")

_KNOWN = ("pages_limit", "page_pool_size", "lockup_timeout", "cwsr_enable", "gttsize")


def _gttsize(facts: Facts) -> Answer:
    found = facts.configured("amdgpu", "gttsize")
    if not found or found[-1].value in ("-1", ""):
        return None
    return Finding(f"{found[-1]} ({found[-1].origin}) is deprecated, and will be removed")


def _mib(value: str) -> int | None:
    return int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else None


def _sizes_differ(facts: Facts) -> Answer:
    gtt = [option for option in facts.configured("amdgpu", "gttsize") if _mib(option.value)]
    limits = [o for module in _TTM for o in facts.configured(module, "pages_limit")]
    pages = [option for option in limits if _pages(option.value)]
    if not gtt or not pages:
        return None
    size, limit = (_mib(gtt[-1].value) or 0) * MIB, (_pages(pages[-1].value) or 0) * 4096
    if abs(size - limit) < 64 * MIB:
        return Finding(
            f"{gtt[-1]} and {pages[-1]} set the same size twice",
            "info",
        )
    return Finding(
        f"{gtt[-1]} is {format_size(size)}, {pages[-1]} is {format_size(limit)}: the driver "
        "promises one size, and TTM gives the other"
    )


def _pages(value: str) -> int | None:
    return int(value) if value.isascii() and value.isdecimal() and len(value) < 12 else None


def _disagree(facts: Facts) -> Answer:
    places: dict[str, dict[str, Assignment]] = defaultdict(dict)
    for option in need(facts.options):
        places[f"{option.module}.{option.name}"].setdefault(option.value, option)
    for name, values in places.items():
        if len(values) > 1:
            said = ", ".join(f"{value} ({option.origin})" for value, option in values.items())
            live = need(facts.live_options).get(name)
            force = f"; in force is {live}" if live is not None else ""
            return Finding(f"{name} is set to {said}{force}")
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
    for option in need(facts.options):
        name = f"{option.module}.{option.name}"
        if _mistake(option) or name not in live or live[name] is not None:
            continue
        near = difflib.get_close_matches(option.name, _KNOWN, n=1, cutoff=0.75)
        hint = f"; did you mean {option.module}.{near[0]}?" if near else ""
        return Finding(f"{option} ({option.origin}): the module shows no such parameter{hint}")
    return None


def _pool_above_limit(facts: Facts) -> Answer:
    for module in _TTM:
        pool = facts.configured(module, "page_pool_size")
        if not pool:
            continue
        limits = facts.configured(module, "pages_limit")
        size, limit = _pages(pool[-1].value), _pages(limits[-1].value) if limits else None
        if size and limit and size > limit:
            return Finding(f"{pool[-1]} is more than {limits[-1]}: no pool can be that large")
    return None


def _uneven_pages(facts: Facts) -> Answer:
    for module in _TTM:
        for option in facts.configured(module, "pages_limit"):
            pages = _pages(option.value)
            if pages is None:
                return Finding(f"{option} ({option.origin}) is not a number of pages")
            if 0 < pages < PAGES_PER_GIB:
                return Finding(
                    f"{option} ({option.origin}) is {format_size(pages * 4096)}: the value counts "
                    "pages of 4 KiB, not MiB or GiB"
                )
    return None


def _newer_than_initramfs(facts: Facts) -> Answer:
    files = need(facts.option_files)
    if not files:
        return None
    image = need(facts.initramfs)
    newer = [file.path for file in files if file.modified and file.modified > image.modified]
    if not newer:
        return None
    return Finding(
        f"{', '.join(newer)} changed after {image.path} was made: it may lack the change"
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
            return Finding(
                f"{option} ({option.origin}) waits for the next boot; in force is {value}", "info"
            )
        return Finding(f"{option} ({option.origin}) is not in force: {name} is {value}")
    return None


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
        return Finding("boot settings that infertune staged wait for the next boot", "info")
    said = f" ({'; '.join(staged.said)})" if any(staged.said) else ""
    became = {
        "staged": "were left half staged or half put back",
        "overridden": "are overruled by another place",
        "failed": "are not in force",
    }
    return Finding(f"boot settings that infertune staged {became[staged.state]}{said}")


def _odd_files(facts: Facts) -> Answer:
    if not facts.odd_files:
        return None
    more = f" (and {len(facts.odd_files) - 1} more)" if len(facts.odd_files) > 1 else ""
    return Finding(f"{facts.odd_files[0]}{more}: its options may not be what was meant")


def _invalid_iommu(facts: Facts) -> Answer:
    value = facts.parameter("amd_iommu")
    valid = {"fullflush", "off", "force_isolation", "force_enable", "pgtbl_v1", "pgtbl_v2"}
    more = {"irtcachedis", "nohugepages", "v2_pgsizes_only", "nopasid", "on"}
    if value is None or set(value.split(",")) <= valid | more:
        return None
    meant = "; meant is iommu=pt" if "pt" in value.split(",") else ""
    return Finding(f"amd_iommu={value}: the kernel ignores the unknown value{meant}")


def _iommu_off(facts: Facts) -> bool:
    return facts.parameter("amd_iommu") == "off" or facts.parameter("iommu") == "off"


def _npu_lost(facts: Facts) -> Answer:
    if not _iommu_off(facts):
        return None
    return Finding("the IOMMU is off: the NPU cannot work (it needs PASID)")


def _iommu_trade(facts: Facts) -> Answer:
    if _iommu_off(facts):
        return Finding(
            "the IOMMU is off: on one host prompts gained 5 to 12 %, generation 2 %; the price is "
            "protection from devices' DMA, VFIO, and the NPU"
        )
    if facts.parameter("iommu") == "pt":
        return Finding("iommu=pt was no faster than translation in comparisons on this chip")
    return None


def _thp_on_command_line(facts: Facts) -> Answer:
    value = facts.parameter("transparent_hugepage")
    tuned = any(each.id == "tuned" and each.running for each in facts.machine.tuners)
    if value is None or not tuned:
        return None
    return Finding(f"transparent_hugepage={value} on the command line: TuneD then leaves it alone")


def _lockup(facts: Facts) -> Answer:
    found = facts.configured("amdgpu", "lockup_timeout")
    values = [part for option in found for part in option.value.split(",")]
    if not any(part == "0" or part == "-1" for part in values):
        return None
    return Finding(f"{found[-1]}: a GPU that hangs is never reset")


RULES: tuple[Rule, ...] = (
    Rule(
        id="gttsize-deprecated",
        title="amdgpu.gttsize is deprecated",
        when=AMDGPU,
        check=_gttsize,
        severity="warning",
        confidence="sure",
        fix="set ttm.pages_limit (GiB x 262144) on its own",
        sources=(kernel_doc("gpu/amdgpu/module-parameters"), rocm(5595)),
    ),
    Rule(
        id="gtt-sizes-differ",
        title="amdgpu.gttsize and pages_limit set different sizes",
        when=AMDGPU,
        check=_sizes_differ,
        severity="error",
        confidence="sure",
        fix="take amdgpu.gttsize away and keep pages_limit",
        sources=(kernel_doc("gpu/amdgpu/module-parameters"), rocm(5595)),
    ),
    Rule(
        id="option-twice",
        title="one module parameter is set to different values",
        when=ALWAYS,
        check=_disagree,
        severity="warning",
        confidence="sure",
        fix="keep one of them",
        sources=(kernel_doc("admin-guide/kernel-parameters"),),
    ),
    Rule(
        id="option-misspelt",
        title="a parameter that guides spell wrongly",
        when=AMDGPU,
        check=_misspelt,
        severity="error",
        confidence="sure",
        fix="write the parameter's name",
        sources=(rocm(5595), github("kyuz0/amd-strix-halo-toolboxes", 39)),
    ),
    Rule(
        id="option-unknown",
        title="a parameter the loaded module does not show",
        when=AMDGPU,
        check=_unknown_option,
        severity="warning",
        # A few parameters are not shown in sysfs at all.
        confidence="likely",
        fix="see 'modinfo -p MODULE' for the names",
        sources=(kernel_doc("gpu/amdgpu/module-parameters"),),
    ),
    Rule(
        id="ttm-pool-above-limit",
        title="page_pool_size above pages_limit",
        when=AMDGPU,
        check=_pool_above_limit,
        severity="info",
        confidence="sure",
        fix="leave page_pool_size out: it keeps freed pages, it reserves nothing",
        sources=(github("ROCm/rocm-systems", 351),),
    ),
    Rule(
        id="ttm-wrong-unit",
        title="pages_limit in the wrong unit",
        when=AMDGPU,
        check=_uneven_pages,
        severity="error",
        confidence="likely",
        fix="write GiB x 262144",
        sources=(github("ROCm/rocm-systems", 351),),
    ),
    Rule(
        id="initramfs-older",
        title="options that changed after the initramfs was made",
        when=AMDGPU,
        check=_newer_than_initramfs,
        severity="warning",
        # Where the module is loaded from the root file system, the file alone counts.
        confidence="likely",
        fix="rebuild it (update-initramfs -u, dracut -f, or mkinitcpio -P), and reboot",
        sources=(rocm(5595), github("superm1/amd-debug-tools", 10)),
    ),
    Rule(
        id="option-not-in-force",
        title="an option that was set before the boot and is not in force",
        when=ALWAYS,
        check=_not_in_force,
        severity="error",
        confidence="likely",
        fix="rebuild the initramfs, look for a second place that sets it, and reboot",
        sources=(rocm(5595), rocm(5562)),
    ),
    Rule(
        id="boot-staged",
        title="boot settings that infertune staged and that are not in force",
        when=ALWAYS,
        check=_staged,
        severity="warning",
        confidence="sure",
        fix="see 'infertune boot status'; 'infertune boot undo' puts everything back",
        sources=(kernel_doc("admin-guide/kernel-parameters"),),
    ),
    Rule(
        id="modprobe-odd-file",
        title="a file of modprobe.d that is not a small text file",
        when=ALWAYS,
        check=_odd_files,
        severity="warning",
        confidence="sure",
        fix="replace or remove it",
        sources=(github("superm1/amd-debug-tools", 10),),
    ),
    Rule(
        id="iommu-invalid",
        title="a value of amd_iommu that does not exist",
        when=ALWAYS,
        check=_invalid_iommu,
        severity="warning",
        confidence="sure",
        fix="take it away, or write amd_iommu=off and pay its price (iommu-trade)",
        sources=(
            github("kyuz0/amd-strix-halo-toolboxes", 66),
            kernel_doc("admin-guide/kernel-parameters"),
        ),
    ),
    Rule(
        id="npu-without-iommu",
        title="the NPU without an IOMMU",
        when=NPU,
        check=_npu_lost,
        severity="info",
        confidence="sure",
        fix="take amd_iommu=off away if you want the NPU",
        sources=(github("noamsto/nix-amd-ai", 53), github("antirez/ds4", 871)),
    ),
    Rule(
        id="iommu-trade",
        title="what the IOMMU's setting gives and takes",
        when=STRIX_HALO,
        check=_iommu_trade,
        severity="info",
        confidence="likely",
        fix="choose: amd_iommu=off for speed, nothing for the NPU, VFIO and protection",
        sources=(
            github("kyuz0/amd-strix-halo-toolboxes", 66),
            github("noamsto/nix-amd-ai", 132),
        ),
    ),
    Rule(
        id="thp-command-line",
        title="huge pages set on the command line, where TuneD leaves them alone",
        when=ALWAYS,
        check=_thp_on_command_line,
        severity="info",
        confidence="likely",
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
        title="a GPU hang is never noticed",
        when=AMDGPU,
        check=_lockup,
        severity="warning",
        confidence="sure",
        fix="set amdgpu.lockup_timeout to a time in ms (20000 for long prompts)",
        sources=(
            kernel_doc("gpu/amdgpu/module-parameters"),
            github("defilantech/LLMKube", 886),
        ),
    ),
)
