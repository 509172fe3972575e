# SPDX-License-Identifier: Apache-2.0
"""From facts to pools: the memory a server's GPU part is taken from, and the RAM beside it.  Pure.

An integrated GPU has no memory of its own.  Its carve-out is taken from RAM by the firmware and is
not in MemTotal; GTT is a limit on how much of RAM it may hold.  So GTT is never added to RAM, and
never to the carve-out: the driver allocates from one of the two (docs/memory.md).
"""

from __future__ import annotations

from typing import Literal

from infertune.base.records import dataclass
from infertune.base.units import GIB, MIB, format_size
from infertune.host.memory import PAGE
from infertune.host.unknown import Unknown
from infertune.pools.facts import Holder, PoolFacts

PoolName = Literal["GTT", "carve-out", "VRAM"]

_KFD_RESERVE = 3 << 29
"""AMDGPU_RESERVE_MEM_LIMIT of amdgpu_amdkfd_gpuvm.c: beside a 64th of RAM."""
_SAME = 64 * MIB
"""Sizes that differ by less are the same setting, rounded on its way."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One thing that bounds a pool."""

    bytes: int
    setting: str
    """Which setting makes it: ``ttm.pages_limit``, ``amdgpu.gttsize``, ``RAM``, ``firmware`` ..."""
    why: str
    """The same in words, with where it was read."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Memory that the GPU's part of a server is taken from."""

    name: PoolName
    limit: Limit
    """The one that bounds it."""
    limits: tuple[Limit, ...]
    """All of them, smallest first."""
    held: int | None
    """Bytes in use now, whoever holds them; None where the driver does not say."""
    reserved: int
    """Bytes promised to servers that are still loading."""
    loading: tuple[str, ...]
    """Who they are."""
    holders: tuple[Holder, ...]
    in_ram: bool
    """Whether it is a part of RAM."""

    @property
    def bytes(self) -> int:
        return self.limit.bytes

    @property
    def free(self) -> int:
        return max(0, self.bytes - (self.held or 0) - self.reserved)

    def of(self, holder: Holder) -> int:
        """Bytes that a program holds of this pool."""
        return holder.gtt_bytes if self.name == "GTT" else holder.vram_bytes


@dataclass(frozen=True, slots=True)
class Ram:
    """What Linux has for the CPU side, and for GTT."""

    bytes: int
    """MemTotal, or a container's limit where that is less."""
    free: int | None
    """What a program can have now; None where the kernel does not say."""
    reserve: int
    """Left to the system and its other programs."""
    hosts: bool
    """Whether it is the machine's; else GTT, which a container is not charged for, comes on top."""
    limit: str
    """``MemTotal`` or ``memory.max``."""


def gpu_pool(facts: PoolFacts, backend: str) -> Pool | Unknown:
    """The pool that ``backend`` (rocm, vulkan) allocates from on this machine."""
    vram, gtt = facts.memory.vram_bytes, facts.memory.gtt_bytes
    if facts.driver != "amdgpu" or vram is None:
        return Unknown("how much memory the GPU can have is not known here")
    if facts.integrated is not True:
        return _vram(facts, vram)
    if backend == "rocm" and facts.computes_in_carveout:
        return _carveout(facts, vram, "before Linux 6.10 ROCm allocates from the carve-out alone")
    if gtt is None:
        return Unknown("the GTT limit cannot be read")
    # amdkfd, apu_prefer_gtt: real_vram_size < gtt_size, as the driver took them at its load.
    return _gtt(facts, gtt, backend) if gtt > vram else _carveout(facts, vram)


def _vram(facts: PoolFacts, vram: int) -> Pool:
    limit = Limit(vram, "VRAM", "memory of the card (mem_info_vram_total)")
    return _of(facts, "VRAM", [limit], _vram_held(facts))


def _vram_held(facts: PoolFacts) -> int | None:
    return _most(facts.memory.vram_used_bytes, sum(each.vram_bytes for each in facts.holders))


def _gtt_held(facts: PoolFacts) -> int | None:
    return _most(facts.memory.gtt_used_bytes, sum(each.gtt_bytes for each in facts.holders))


def _carveout(facts: PoolFacts, vram: int, remark: str = "") -> Pool:
    why = "the firmware's setting (mem_info_vram_total)"
    limit = Limit(vram, "firmware", f"{why}; {remark}" if remark else why)
    return _of(facts, "carve-out", [limit], _vram_held(facts))


def _gtt(facts: PoolFacts, gtt: int, backend: str) -> Pool:
    return _of(facts, "GTT", _gtt_limits(facts, gtt, backend), _gtt_held(facts))


def _of(facts: PoolFacts, name: PoolName, limits: list[Limit], held: int | None) -> Pool:
    ordered = tuple(sorted(limits, key=lambda each: each.bytes))
    return Pool(
        name=name,
        limit=ordered[0],
        limits=ordered,
        held=held,
        reserved=facts.reserved,
        loading=facts.loading,
        holders=facts.holders,
        in_ram=name == "GTT",
    )


def _most(counted: int | None, listed: int) -> int | None:
    """The driver's counter has missed hipMalloc (ROCm issue 5444): the larger of the two counts."""
    return max(counted, listed) if counted is not None else listed or None


def _gtt_limits(facts: PoolFacts, gtt: int, backend: str) -> list[Limit]:
    ttm = ttm_limit(facts)
    found = [*([ttm] if ttm else []), _driver_limit(facts, gtt, ttm)]
    if facts.ram is not None and facts.ram_is_the_hosts:
        usable = facts.ram - facts.cma
        what = "RAM less the CMA area" if facts.cma else "RAM"
        found.append(Limit(usable, "RAM", f"{what} (MemTotal)"))
        kfd = facts.ram - facts.ram // 64 - _KFD_RESERVE
        if backend == "rocm" and not facts.no_system_limit and kfd > GIB:
            why = "amdkfd leaves the system a 64th of RAM and 1.5 GiB"
            found.append(Limit(kfd, "amdkfd", why))
    return found


def ttm_limit(facts: PoolFacts) -> Limit | None:
    """What TTM lets the GPU take, whatever GTT promises."""
    ttm = facts.ttm
    if ttm is None or not ttm.pages_limit:
        return None
    size = ttm.pages_limit * PAGE
    if is_default(facts):
        why = f"the kernel's default, half of RAM ({ttm.module}.pages_limit {ttm.pages_limit})"
        return Limit(size, "default", why)
    return Limit(size, f"{ttm.module}.pages_limit", f"{ttm.module}.pages_limit {ttm.pages_limit}")


def is_default(facts: PoolFacts) -> bool:
    """Whether the TTM limit is the kernel's own: half of RAM, and nobody asked for it."""
    if facts.ttm is None or not facts.ttm.pages_limit or not facts.ram:
        return False
    size = facts.ttm.pages_limit * PAGE
    # ttm_global_init: half of RAM, unless the parameter says otherwise.
    return facts.configured.pages_limit is None and 0.49 * facts.ram <= size <= 0.51 * facts.ram


def gttsize_in_force(facts: PoolFacts) -> int | None:
    """amdgpu.gttsize in bytes; what is configured where the module does not show it."""
    if facts.gttsize is not None:
        return facts.gttsize
    asked = facts.configured.gttsize
    return int(asked.value) * MIB if asked else None


def _driver_limit(facts: PoolFacts, gtt: int, ttm: Limit | None) -> Limit:
    """Where amdgpu's own GTT size (mem_info_gtt_total) is from."""
    where = "mem_info_gtt_total"
    if (size := gttsize_in_force(facts)) is not None and abs(size - gtt) < _SAME:
        return Limit(gtt, "amdgpu.gttsize", f"amdgpu.gttsize {size // MIB} ({where})")
    if ttm and abs(ttm.bytes - gtt) < _SAME:
        return Limit(gtt, ttm.setting, f"{ttm.why} ({where})")
    if facts.ram and abs(facts.ram - gtt) < _SAME:
        # Since commit 5dafdd649280 (July 2026) amdgpu caps GTT at RAM.
        return Limit(gtt, "RAM", f"capped at RAM by the driver ({where})")
    name = f"{facts.ttm.module}.pages_limit" if facts.ttm else "the TTM limit"
    return Limit(gtt, name, f"{name} when amdgpu was loaded ({where})")


def system_reserve(total: int) -> int:
    """Bytes left to the system and its other programs: a sixteenth, 512 MiB to 4 GiB.

    A choice, not a measurement: kernel, desktop and page cache of a 128 GB machine live in 4 GiB.
    """
    return min(4 * GIB, max(total // 16, 512 * MIB))


def ram(facts: PoolFacts, *, gpu: bool) -> Ram | Unknown:
    """RAM for a server's host part; ``gpu``: whether it also has a part on the GPU."""
    if facts.ram is None:
        return Unknown("how much memory this machine has is not known")
    total, limit = facts.ram, "MemTotal"
    if facts.group_limit is not None and facts.group_limit < total:
        total, limit = facts.group_limit, "memory.max"
    free = facts.available
    if free is not None:
        if gpu:
            # The GPU's pages cannot be moved, and the CMA area only lends itself to pages that can.
            free -= facts.cma_free
        free = max(0, min(free, facts.ram - pinned(facts), total) - facts.reserved_ram)
    return Ram(total, free, system_reserve(total), facts.ram_is_the_hosts, limit)


def pinned(facts: PoolFacts) -> int:
    """RAM that the GPU holds.  MemAvailable may count it: what an engine has mapped and pinned."""
    if facts.integrated is not True or not facts.ram_is_the_hosts:
        return 0
    return _gtt_held(facts) or 0


@dataclass(frozen=True, slots=True)
class Picture:
    """The GPU's memory now and after the next boot, as every verb shows it."""

    now: Pool | Unknown
    next_boot: Pool | Unknown
    rocm: Pool | Unknown
    """What ROCm gets of it now: KFD has a limit of its own."""


def picture(now: PoolFacts, then: PoolFacts | Unknown, backend: str) -> Picture:
    """Both, for one backend."""
    later = then if isinstance(then, Unknown) else gpu_pool(then, backend)
    return Picture(gpu_pool(now, backend), later, gpu_pool(now, "rocm"))


def held_by(pool: Pool) -> str:
    """Who holds a pool's memory, in one phrase; who cannot be seen is said, too."""
    if not pool.held:
        return "nobody holds any of it"
    holders = sorted((each for each in pool.holders if pool.of(each)), key=pool.of, reverse=True)
    named = [f"{each} {format_size(pool.of(each))}" for each in holders[:3]]
    rest = pool.held - sum(pool.of(each) for each in holders[:3])
    if not named:
        return "by whom cannot be seen from here"
    if rest > GIB:
        named.append(f"others {format_size(rest)}")
    return ", ".join(named)
