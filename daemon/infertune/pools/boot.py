# SPDX-License-Identifier: Apache-2.0
"""The same machine after its next boot: facts in, facts out.  Pure.

What is configured counts whoever configured it; a change that is looked at comes on top.
"""

from __future__ import annotations

from infertune.base.records import dataclass, replace
from infertune.base.units import GIB, MIB
from infertune.host.gpu import MemoryInfo
from infertune.host.memory import PAGE
from infertune.host.modprobe import Assignment
from infertune.host.text import integer
from infertune.host.unknown import Unknown
from infertune.pools.facts import Configured, PoolFacts
from infertune.pools.judge import is_default, ttm_limit

SMALLEST_CARVEOUT = 512 * MIB
"""The least that firmware of these machines offers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What would be asked for at the next boot, beside what is configured already."""

    pages_limit: int | None = None
    """Pages; None leaves what is configured."""
    carveout_bytes: int | None = None
    drop_gttsize: bool = False
    """Whether amdgpu.gttsize is taken away."""


NOTHING = Change()
STAGED = "staged"
"""The source of an assignment that is only looked at."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """A way to more memory for the GPU, and the machine after it."""

    text: str
    """What to do, as a command to type."""
    facts: PoolFacts


def after_boot(facts: PoolFacts, change: Change = NOTHING) -> PoolFacts | Unknown:
    """The facts after the next boot: nothing is held, and sizes are as configured and changed."""
    if facts.integrated is not True or facts.ttm is None:
        return Unknown("only an integrated GPU takes its memory from RAM at boot")
    if facts.ram is None or facts.memory.vram_bytes is None:
        return Unknown("the size of RAM is not known")
    if not facts.ram_is_the_hosts:
        return Unknown("a container's memory is not the machine's: the host decides")
    if change.pages_limit is None and _set_unseen(facts):
        return Unknown("the GPU's limit was set at boot, and what set it cannot be seen here")
    asked = _configured(facts.configured, change, facts.ttm.module)
    ram = ram_after(facts, change) or 0
    carveout = _carveout(facts, change) or 0
    pages = _value(asked.pages_limit) or ram // 2 // PAGE
    gttsize = _value(asked.gttsize)
    gtt = gttsize * MIB if gttsize else pages * PAGE
    return replace(
        facts,
        ram=ram,
        available=None,
        memory=MemoryInfo(carveout, 0, carveout, 0, gtt, 0),
        ttm=replace(facts.ttm, pages_limit=pages),
        gttsize=gttsize * MIB if gttsize else None,
        configured=asked,
        holders=(),
        unseen=False,
        reserved=0,
        reserved_ram=0,
    )


def ram_after(facts: PoolFacts, change: Change) -> int | None:
    """MemTotal after a boot with ``change``: the carve-out comes out of it, or goes back to it."""
    then = _carveout(facts, change)
    if facts.ram is None or facts.integrated is not True or then is None:
        return facts.ram
    # On an APU the VRAM is the carve-out.
    return max(0, facts.ram + (facts.memory.vram_bytes or 0) - then)


def _set_unseen(facts: PoolFacts) -> bool:
    """Whether the limit in force came from a place that was not read (an old snapshot, an image).

    One that was only written since the boot is not what amdgpu took then, and does not last.
    """
    limit, gtt = ttm_limit(facts), facts.memory.gtt_bytes
    if limit is None or gtt is None or facts.configured.pages_limit or is_default(facts):
        return False
    capped = facts.gttsize is None and limit.bytes > gtt > 0.95 * (facts.ram or gtt)
    return abs(limit.bytes - gtt) < GIB or capped


def _configured(now: Configured, change: Change, module: str) -> Configured:
    limit = now.pages_limit
    if change.pages_limit is not None:
        limit = Assignment(module, "pages_limit", str(change.pages_limit), STAGED)
    return Configured(limit, None if change.drop_gttsize else now.gttsize)


def _carveout(facts: PoolFacts, change: Change) -> int | None:
    """The carve-out after a boot: as it would be changed, as the firmware was asked, as it is."""
    if change.carveout_bytes is not None:
        return change.carveout_bytes
    return facts.configured.carveout_bytes or facts.memory.vram_bytes


def _value(found: Assignment | None) -> int | None:
    return integer(found.value) if found else None


def boot_reserve(total: int) -> int:
    """Bytes that stay the system's after a boot: 8 GiB, or an eighth where that is less."""
    return min(8 * GIB, total // 8)


def most_for_gpu(total: int) -> int:
    """Bytes of so much RAM that a TTM limit may allow at most."""
    return total - boot_reserve(total)
