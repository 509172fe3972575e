# SPDX-License-Identifier: Apache-2.0
"""What is wrong with the boot options that are set: misspelt, deprecated, set twice."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from infertune.base.records import dataclass
from infertune.base.units import printable_line
from infertune.host.modprobe import Assignment, Sources


@dataclass(frozen=True, slots=True)
class Finding:
    """A parameter that does not do what somebody meant."""

    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}"


@dataclass(frozen=True, slots=True)
class Mistake:
    """One parameter that is known to be wrong."""

    module: str
    name: str
    value: str
    """A shell pattern."""
    what: str
    fix: str
    nameless: bool = False
    """Whether the kernel has no such parameter at all."""


_SIZE = "set ttm.pages_limit instead (pages of 4 KiB: GiB x 262144)"

MISTAKES: tuple[Mistake, ...] = (
    # The kernel itself warns since 6.14: "Configuring gttsize via module parameter is deprecated".
    Mistake("amdgpu", "gttsize", "*", "amdgpu.gttsize is deprecated", _SIZE),
    *(
        Mistake(module, name, "*", f"{module} has no parameter {name}: it is ignored", _SIZE, True)
        for module, name in (
            ("amdgpu", "gtt_size"),
            ("amdgpu", "ggtsize"),
            ("amdgpu", "gtt"),
            ("ttm", "page_limit"),
            ("ttm", "pages_max"),
        )
    ),
    Mistake(
        "",
        "iommu",
        "pt",
        "iommu=pt gave inference nothing in published A/B runs",
        "leave it out, unless a device that is passed through needs it",
    ),
    Mistake("", "pages_limit", "*", "pages_limit without its module is ignored", _SIZE),
)


WORDS: Mapping[str, tuple[str, ...]] = {
    # drivers/iommu/amd/init.c, parse_amd_iommu_options, Linux 7.1; older kernels know fewer
    # (pgtbl_v1 and pgtbl_v2 came with 6.1).
    "amd_iommu": (
        *("fullflush", "force_enable", "off", "force_isolation", "pgtbl_v1", "pgtbl_v2"),
        *("irtcachedis", "nohugepages", "v2_pgsizes_only"),
    ),
    # arch/x86/kernel/pci-dma.c, iommu_setup, and amd_gart_64.c, gart_parse_options.
    "iommu": (
        *("off", "force", "noforce", "biomerge", "panic", "nopanic", "merge", "nomerge"),
        *("forcesac", "allowdac", "nodac", "usedac", "soft", "pt", "nopt"),
        *("leak", "noagp", "noaperture", "fullflush", "nofullflush", "memaper"),
    ),
}
"""Words that parameters of the kernel itself take, by parameter."""

HARMLESS_WORDS = ("on", "1", "auto")
"""Words that are none, from guides of other drivers: without them the IOMMU is on all the same."""


def ignored_words(name: str, value: str) -> tuple[str, ...]:
    """Words of a kernel parameter's value that the kernel does not know.

    It compares beginnings only (strncmp), so a longer word counts as the one it starts with.
    """
    known = WORDS.get(name)
    if known is None:
        return ()
    return tuple(word for word in value.split(",") if word and not word.startswith(known))


_KNOWN = {(mistake.module, mistake.name): mistake for mistake in MISTAKES}


def mistake_in(module: str, name: str, value: str) -> Mistake | None:
    """What is known to be wrong about one parameter."""
    words = ignored_words(name, value) if not module else ()
    if words:
        what = f"{name} does not know {', '.join(words)}, and ignores it"
        spelling = "; iommu=pt would be the spelling, and gives inference nothing"
        meant = spelling if name == "amd_iommu" and "pt" in words else ""
        return Mistake("", name, value, what, f"remove it{meant}")
    mistake = _KNOWN.get((module, name))
    return mistake if mistake and fnmatchcase(value, mistake.value) else None


def findings(sources: Sources) -> tuple[Finding, ...]:
    """Deprecated and misspelt parameters, and places that disagree."""
    found = [
        Finding(f"{_shown(each)}: {mistake.what}", mistake.fix)
        for each in sources.assignments
        if (mistake := mistake_in(each.module, each.name, each.value))
    ]
    by_name: dict[tuple[str, str], list[Assignment]] = {}
    for each in sources.assignments:
        if each.module in ("ttm", "amdttm", "amd_ttm", "amdgpu") or each.name in _ONCE:
            by_name.setdefault((each.module, each.name), []).append(each)
    for same in by_name.values():
        last, others = same[-1], [a for a in same[:-1] if a.value != same[-1].value]
        if others:
            said = ", ".join(map(_shown, others[:3])) + (" and others" if others[3:] else "")
            found.append(Finding(f"{said} is overruled by {_shown(last)}", "keep one of them"))
    return tuple(found)


_ONCE = ("amd_iommu", "transparent_hugepage", "isolcpus")


def _shown(each: Assignment) -> str:
    name = f"{each.module}.{each.name}" if each.module else each.name
    text = f"{name}={each.value}" if each.value else name
    return f"{printable_line(text, 80)} ({each.source})"
