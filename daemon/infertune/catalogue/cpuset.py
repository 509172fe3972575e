# SPDX-License-Identifier: Apache-2.0
"""CPU sets in words: the same profile says the right thing on every machine.

    words := LIST | "all but" LIST | GROUP ["of the largest L3"] [[","] "minus" COUNT]
    LIST  := a kernel CPU list such as "0-7,16"
    GROUP := "all"                                       every logical CPU (SMT siblings too)
           | "physical cores"                            one CPU per core, the lowest sibling
           | "performance cores" | "efficiency cores"    the same, of one kind of core
           | "performance CPUs"  | "efficiency CPUs"     with SMT siblings
    COUNT := "one" to "eight", or a number

"The largest L3" is the cache shared by the most CPUs (a CCD on Zen), of equals
the one with the lowest CPU.  "minus one" leaves out the lowest-numbered core of
the set with all its siblings: that is where a default Linux takes most
interrupts and starts most daemons.  Where no core is of a special kind, all are
performance cores.  Upper and lower case are the same.
"""

from __future__ import annotations

import re

from infertune.base.records import dataclass
from infertune.base.units import format_cpulist, parse_cpulist
from infertune.catalogue.values import Value
from infertune.host.cpu import Core, Cpu
from infertune.host.machine import Machine

ACCEPTS = (
    "a list such as '0-7', 'all', 'all but 0-1', or 'physical cores', 'performance cores', "
    "'efficiency cores', each with 'of the largest L3' and 'minus one' where wanted"
)

_COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
_WORDS = re.compile(
    r"(?P<group>all|(?:physical|performance|efficiency) cores|(?:performance|efficiency) cpus)"
    r"(?P<largest> of the largest l3)?"
    rf"(?:,? minus (?P<count>{'|'.join(_COUNTS[1:])}|[1-9][0-9]{{0,3}}))?"
)


@dataclass(frozen=True, slots=True)
class _Words:
    """What the words say, before a machine is known."""

    group: str = ""
    largest: bool = False
    minus: int = 0
    listed: frozenset[int] | None = None
    excluded: frozenset[int] = frozenset()


@dataclass(frozen=True)
class CpuSet(Value):
    """A CPU set: configured in words, canonical as the kernel's list."""

    def parse(self, configured: object, machine: Machine | None = None) -> str:
        if machine is None:
            _parse(configured)
            return str(configured)
        return format_cpulist(resolve_cpus(configured, machine.cpu))

    def decode(self, raw: bytes) -> str:
        return format_cpulist(parse_cpulist(raw.decode("ascii")))

    def accepts(self) -> str:
        return ACCEPTS


def resolve_cpus(words: object, cpu: Cpu) -> tuple[int, ...]:
    """The CPUs that ``words`` means on this processor, lowest first; never none.

    Raises ValueError where the words are not in the grammar, name a CPU that is
    not online, leave nothing, or need facts this machine does not give.
    """
    meant = _parse(words)
    if meant.listed is not None:
        missing = meant.listed - set(cpu.online) if cpu.online else frozenset()
        if missing:
            raise ValueError(
                f"CPU {format_cpulist(missing)} of '{words}' is not online here; "
                f"online: {format_cpulist(cpu.online)}"
            )
        return tuple(sorted(meant.listed))
    if not cpu.online:
        raise ValueError(
            f"'{words}' needs to know which CPUs are online; write a list such as '0-7'"
        )
    if meant.group == "all" and not (meant.largest or meant.minus):
        cpus = set(cpu.online) - meant.excluded
    else:
        cpus = _of_cores(meant, str(words), cpu)
    if not cpus:
        raise ValueError(f"'{words}' leaves no CPU; online: {format_cpulist(cpu.online)}")
    return tuple(sorted(cpus))


def _of_cores(meant: _Words, words: str, cpu: Cpu) -> set[int]:
    online = set(cpu.online)
    cores = sorted((core for core in cpu.cores if online & set(core.cpus)), key=_lowest)
    if not cores:
        raise ValueError(
            f"'{words}' needs the core topology, which this machine does not give; "
            "write a list such as '0-7'"
        )
    kind = meant.group.partition(" ")[0]
    if kind == "efficiency" or (kind == "performance" and any(core.kind for core in cores)):
        cores = [core for core in cores if core.kind == kind]
    if meant.largest:
        cores = _largest_l3(cores, words)
    one_per_core = meant.group.endswith("cores")
    chosen: set[int] = set()
    for core in cores[meant.minus :]:
        siblings = sorted(online & set(core.cpus))
        chosen.update(siblings[:1] if one_per_core else siblings)
    return chosen


def _largest_l3(cores: list[Core], words: str) -> list[Core]:
    """The cores of one cache.  ``cores`` are in order, so the first of equals is the lowest."""
    sizes: dict[int, int] = {}
    for core in cores:
        if core.l3 is None:
            raise ValueError(
                f"'{words}' needs to know the L3 of each core, which this machine does not give"
            )
        sizes[core.l3] = sizes.get(core.l3, 0) + len(core.cpus)
    if not sizes:
        return []
    largest = max(sizes, key=sizes.__getitem__)
    return [core for core in cores if core.l3 == largest]


def _lowest(core: Core) -> int:
    return min(core.cpus)


def _parse(words: object) -> _Words:
    if not isinstance(words, str):
        raise ValueError(f"{words!r} is not a CPU set; write {ACCEPTS}")
    text = " ".join(words.lower().split())
    if match := _WORDS.fullmatch(text):
        count = match["count"] or "0"
        minus = _COUNTS.index(count) if count in _COUNTS else int(count)
        return _Words(match["group"], bool(match["largest"]), minus)
    excluded = text.startswith("all but ")
    try:
        listed = parse_cpulist(text.removeprefix("all but "))
    except ValueError as error:
        # "7-3" is meant as a list, so the list's own complaint helps more than the grammar.
        if re.fullmatch(r"(?:all but )?[0-9][0-9, -]*", text):
            raise
        raise ValueError(f"'{words}' is not a CPU set; write {ACCEPTS}") from error
    if not listed:
        raise ValueError(f"an empty CPU set makes no sense; write {ACCEPTS}")
    return _Words("all", excluded=listed) if excluded else _Words(listed=listed)
