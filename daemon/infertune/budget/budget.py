# SPDX-License-Identifier: Apache-2.0
"""Will it fit: what a server takes, against what the judge of GPU memory says there is.

How much there is, and who holds it, is :mod:`infertune.pools`' to say; here it is only compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from infertune.base.records import dataclass, replace
from infertune.base.units import GIB, MIB, format_size
from infertune.budget.kv import cells, pad
from infertune.budget.parts import Part, When, Where, parts
from infertune.budget.settings import ServerMemory
from infertune.budget.shape import Shape
from infertune.host.unknown import Unknown
from infertune.pools.boot import Outlook
from infertune.pools.facts import Holder, PoolFacts
from infertune.pools.judge import Pool, Ram, gpu_pool, held_by, pinned, ram

Verdict = Literal["fits", "tight", "unknown", "does not fit now", "does not fit"]
"""``does not fit now``: there is room once others have let go of theirs."""

_ORDER: tuple[Verdict, ...] = ("fits", "tight", "unknown", "does not fit now", "does not fit")
REFUSED: tuple[Verdict, ...] = ("does not fit now", "does not fit")
"""What is not started without --force."""

_TIGHT = 0.05
"""A pool with less than this share left is tight: drivers and fragments want some, too."""
_FLOOR = 0.01
_FLOOR_MOST = GIB
"""Of the GPU's pool this share, at most a GiB, has to stay free: below it the driver fails to
allocate what it needs itself, and on a machine with one memory that is a freeze, not an error."""
_RAM_FLOOR = 1 / 64
_RAM_FLOOR_LEAST, _RAM_FLOOR_MOST = 256 * MIB, 2 * GIB
"""Of RAM this share has to stay free at the moment of the start."""

_NAMED = 4
"""So many programs at most are named together."""
_SPILLS = 4 * GIB
"""A carve-out, or a GTT beside it, that is worth a remark."""
_CTX_STEP = 1024
_FIT_CTX = 4096
"""What --fit leaves at least (--fit-ctx)."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one pool has to give, and has."""

    name: str
    """GTT, carve-out, VRAM or RAM."""
    bytes: int
    held: int | None
    """In use or promised now; None where nobody says."""
    need: int
    """At the start."""
    need_later: int
    """When everything has grown."""
    limit: str
    """Which setting bounds the pool."""
    source: str
    """The same in words, with where it was read."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """What would make it fit, or less tight."""

    text: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Budget:
    verdict: Verdict
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    parts: tuple[Part, ...]
    pools: tuple[Demand, ...]
    remedies: tuple[Remedy, ...]

    def total(self, *whens: When) -> int:
        return sum(part.bytes for part in self.parts if part.when in (whens or ("start",)))

    def on_host(self) -> int:
        """Bytes that RAM has to give at the start, beside the GPU's."""
        return _need(self.parts, "host", "start")

    def on_gpu(self) -> int:
        """Bytes that the GPU's pool has to give at the start."""
        return _need(self.parts, "GPU", "start")


def budget(
    shape: Shape,
    memory: ServerMemory,
    facts: PoolFacts,
    backend: str,
    outlooks: Sequence[Outlook] = (),
) -> Budget:
    """What a server with these settings takes on this machine, and whether there is room.

    ``outlooks`` are ways to more memory for the GPU: each is only named if it leads there.
    """
    unset = not memory.ctx
    memory = replace(memory, ctx=memory.ctx or shape.context)
    found = _judge(shape, memory, facts, backend)
    if unset and memory.fit and backend != "cpu" and found.verdict in REFUSED:
        ctx = largest_context(shape, memory, facts, backend)
        if ctx and ctx >= _FIT_CTX:
            reason = f"ctx_size is not set: the server itself shortens it, to {ctx} or less"
            found = replace(found, verdict="tight", reasons=(*found.reasons, reason))
    if found.verdict in ("fits", "unknown"):
        return found
    ways = _remedies(shape, memory, facts, backend, found, outlooks)
    return replace(found, remedies=tuple(ways))


def budget_of(need: int, facts: PoolFacts, backend: str) -> Budget:
    """The same of a server of which only is said how much it takes."""
    where: Where = "host" if backend == "cpu" else "GPU"
    found = _weigh((Part("declared", need, where, "start", "memory"),), facts, backend)
    if found.verdict != "does not fit now":
        return found
    for text, then in _without_holders(facts):
        if (verdict := _weigh(found.parts, then, backend).verdict) not in REFUSED:
            return replace(found, remedies=(Remedy(text, verdict),))
    return found


def _need(found: Sequence[Part], where: Where, *whens: When) -> int:
    return sum(part.bytes for part in found if part.where == where and part.when in whens)


def _judge(shape: Shape, memory: ServerMemory, facts: PoolFacts, backend: str) -> Budget:
    found = _weigh(parts(shape, memory, backend), facts, backend, _of_shape(shape, memory))
    notes = [*_notes(shape, memory, facts), *_beside_carveout(facts, backend, found.on_gpu())]
    return replace(found, notes=tuple(notes))


def _weigh(
    found: tuple[Part, ...],
    facts: PoolFacts,
    backend: str,
    beside: Iterable[tuple[Verdict, str]] = (),
) -> Budget:
    """Parts against the pools; ``beside``: what else is said of it."""
    on_gpu, in_ram = _need(found, "GPU", "start"), _need(found, "host", "start")
    later = _need(found, "host", "later")
    said: list[tuple[Verdict, str]] = []
    demands: list[Demand] = []
    room = ram(facts, gpu=backend != "cpu")
    if backend != "cpu":
        pool = gpu_pool(facts, backend)
        if isinstance(pool, Unknown):
            said.append(("unknown", pool.why))
            in_ram += on_gpu
        else:
            demands.append(_demand(pool, on_gpu))
            said += _of_pool(pool, on_gpu)
            in_ram += on_gpu if pool.in_ram and facts.ram_is_the_hosts else 0
    if isinstance(room, Unknown):
        said.append(("unknown", room.why))
    else:
        demands.append(_ram_demand(room, in_ram, later))
        said += _of_ram(room, in_ram, later, facts)
    said += beside
    verdicts: list[Verdict] = ["fits", *(each for each, _ in said)]
    verdict = max(verdicts, key=_ORDER.index)
    reasons = tuple(text for _, text in said)
    return Budget(verdict, reasons, (), found, tuple(demands), ())


def _of_shape(shape: Shape, memory: ServerMemory) -> Iterator[tuple[Verdict, str]]:
    if not shape.known:
        text = f"what a model of architecture '{shape.architecture}' keeps is not known here"
        yield "unknown", text
    elif not cells(shape, memory).full and memory.ctx:
        text = (
            f"{memory.slots} slots share {pad(memory.ctx)} tokens: no whole one is left for each, "
            "and the server does not start"
        )
        yield "does not fit", text
    elif not cells(shape, memory).full:
        yield "unknown", "the file does not say its context, and ctx_size is not set"


# -- pools ------------------------------------------------------------------------


def _demand(pool: Pool, need: int) -> Demand:
    held = None if pool.held is None else pool.held + pool.reserved
    return Demand(pool.name, pool.bytes, held, need, need, pool.limit.setting, pool.limit.why)


def _of_pool(pool: Pool, need: int) -> Iterator[tuple[Verdict, str]]:
    size, floor = pool.bytes, min(int(_FLOOR * pool.bytes), _FLOOR_MOST)
    left = pool.free - need
    if need > size - floor:
        over = format_size(need - (size - floor))
        text = (
            f"{pool.name}: {format_size(need)} of {format_size(size)}, {over} too much; limited by "
            f"{pool.limit.why}"
        )
        yield "does not fit", text
    elif left < floor:
        free = format_size(pool.free)
        text = f"{pool.name}: {format_size(need)} of the {free} that are free; {_in_use(pool)}"
        yield "does not fit now", text
    elif left < _TIGHT * size:
        text = f"{pool.name}: only {format_size(left)} of {format_size(size)} would be left"
        yield "tight", text


def _in_use(pool: Pool) -> str:
    held = f"{format_size(pool.held or 0)} are in use: {held_by(pool)}"
    if not pool.reserved:
        return held
    return f"{held}; {_promised(pool.reserved, pool.loading)}"


def _promised(size: int, loading: tuple[str, ...]) -> str:
    named, more = loading[:_NAMED], len(loading) - _NAMED
    who = " and ".join((*named, f"{more} more") if more > 0 else named)
    verb = "is" if len(loading) == 1 else "are"
    return f"{format_size(size)} are promised to {who}, which {verb} loading"


def _ram_demand(room: Ram, need: int, later: int) -> Demand:
    source = f"{room.limit} less {format_size(room.reserve)} for the system"
    held = None if room.free is None else max(0, room.bytes - room.free)
    return Demand("RAM", room.bytes - room.reserve, held, need, need + later, room.limit, source)


def _of_ram(room: Ram, need: int, later: int, facts: PoolFacts) -> Iterator[tuple[Verdict, str]]:
    most = room.bytes - room.reserve
    floor = min(max(int(_RAM_FLOOR * room.bytes), _RAM_FLOOR_LEAST), _RAM_FLOOR_MOST)
    if need > most:
        over = format_size(need - most)
        yield "does not fit", f"RAM: {format_size(need)} of {format_size(most)}, {over} too much"
        return
    grows_too_far = need + later > most
    if grows_too_far:
        text = (
            f"RAM: {format_size(need + later)} of {format_size(most)} when the prompt cache and "
            "checkpoints have grown"
        )
        yield "tight", text
    if room.free is None:
        return
    left = room.free - need
    promised = f"; {_promised(facts.reserved_ram, facts.loading)}" if facts.reserved_ram else ""
    if left < floor:
        text = (
            f"RAM: {format_size(need)} of the {format_size(room.free)} that are free; other "
            f"programs hold the rest, and {format_size(floor)} have to stay free{promised}"
        )
        yield "does not fit now", text
    elif left < room.reserve:
        yield "tight", f"RAM: only {format_size(left)} would be free after the start"
    elif left < later and not grows_too_far:
        text = (
            f"RAM: {format_size(need + later)} when the prompt cache and checkpoints have grown, "
            f"and {format_size(room.free)} are free now"
        )
        yield "tight", text


def _notes(shape: Shape, memory: ServerMemory, facts: PoolFacts) -> list[str]:
    notes = []
    if shape.context and memory.ctx > shape.context * (1 if memory.unified else memory.slots):
        notes.append(f"the model was trained for {shape.context} tokens; a slot gets no more")
    if facts.swap:
        notes.append(
            f"{format_size(facts.swap)} of swap are not counted: a model in swap is read from disk "
            "for every token"
        )
    if facts.unseen:
        notes.append("programs of other users have the GPU open: what they hold cannot be seen")
    if not facts.ram_is_the_hosts:
        notes.append(
            "this is a container: memory of the GPU is not charged to it, and whether the host has "
            "room for it is not known here"
        )
    if shape.known and not shape.checked:
        notes.append(
            f"not checked: what a model of architecture '{shape.architecture}' keeps follows from "
            "llama.cpp's source and was held against no server"
        )
    if shape.known:
        old = 4 * shape.vocab * memory.ubatch
        notes.append(
            f"llama-server of before June 2026 (PR 23861) takes {format_size(old)} more for the "
            "logits of a whole ubatch"
        )
    return notes


def _beside_carveout(facts: PoolFacts, backend: str, need: int) -> Iterator[str]:
    """Vulkan's driver does not stop at the larger of the two: whether that ends well is another
    matter."""
    vram, gtt = facts.memory.vram_bytes or 0, facts.memory.gtt_bytes or 0
    if backend != "vulkan" or facts.integrated is not True or min(vram, gtt) < _SPILLS:
        return
    if max(vram, gtt) < need <= vram + gtt:
        yield (
            "with Vulkan the driver may put what does not fit into the carve-out in GTT, and the "
            "other way round (reported in ROCm issue 6050): not counted here; --force starts it"
        )


# -- remedies ---------------------------------------------------------------------


def _remedies(
    shape: Shape,
    memory: ServerMemory,
    facts: PoolFacts,
    backend: str,
    now: Budget,
    outlooks: Sequence[Outlook],
) -> Iterator[Remedy]:
    """Single changes that help, those of the machine first.  Each was put before the judge."""

    def helps(changed: ServerMemory, on: PoolFacts = facts) -> Verdict | None:
        then = _judge(shape, changed, on, backend)
        better = _ORDER.index(then.verdict) < _ORDER.index(now.verdict) or (
            len(then.reasons) < len(now.reasons) and then.verdict == now.verdict
        )
        return then.verdict if better else None

    if now.verdict == "does not fit now":
        for text, then in _without_holders(facts):
            if (verdict := helps(memory, then)) and verdict not in REFUSED:
                yield Remedy(text, verdict)
                break
    elif backend != "cpu":
        for each in outlooks:
            if (verdict := helps(memory, each.facts)) and verdict not in REFUSED:
                yield Remedy(each.text, verdict)
                break
    for text, changed in _smaller(memory).items():
        if changed != memory and (verdict := helps(changed)):
            yield Remedy(text, verdict)
    if (fewer := _checkpoints(memory, helps)) is not None:
        yield fewer
    if now.verdict in REFUSED and (ctx := largest_context(shape, memory, facts, backend)):
        verdict = _judge(shape, replace(memory, ctx=ctx), facts, backend).verdict
        yield Remedy(f"ctx_size={ctx} (the largest that fits)", verdict)


def _smaller(memory: ServerMemory) -> dict[str, ServerMemory]:
    """Settings of the server that take less."""
    return {
        "cache_ram=0MiB (no prompt cache)": replace(memory, cache_ram=0),
        "cache_type_k=q8_0 cache_type_v=q8_0": replace(
            memory, cache_type_k="q8_0", cache_type_v="q8_0", flash_attn=True
        ),
        "parallel=1": replace(memory, slots=1),
        "ubatch_size=512": replace(memory, ubatch=min(512, memory.ubatch)),
        "mmproj_offload=false": replace(
            memory, mmproj_offload=memory.mmproj_offload and not memory.companions.projector
        ),
    }


def _checkpoints(
    memory: ServerMemory, helps: Callable[[ServerMemory], Verdict | None]
) -> Remedy | None:
    """As many checkpoints of a slot as there is room for; None where their number is not it."""

    def fewer(count: int) -> Verdict | None:
        return helps(replace(memory, ctx_checkpoints=count))

    most = largest(lambda count: fewer(count) is not None, memory.ctx_checkpoints)
    verdict = fewer(most)
    if verdict is None:
        return None
    why = f"instead of {memory.ctx_checkpoints} of a slot; older ones go sooner"
    return Remedy(f"ctx_checkpoints={most} ({why})", verdict)


def _without_holders(facts: PoolFacts) -> Iterator[tuple[str, PoolFacts]]:
    """The machine with one holder stopped, largest first, then with several, then with all."""
    for holder in facts.holders:
        yield f"{holder} stopped (it holds {format_size(holder.bytes)})", without(facts, [holder])
    for count in range(2, min(len(facts.holders), _NAMED) + 1):
        gone = facts.holders[:count]
        size = format_size(sum(each.bytes for each in gone))
        named = f"{', '.join(map(str, gone[:-1]))} and {gone[-1]}"
        yield f"{named} stopped (they hold {size})", without(facts, gone)
    used = max(facts.memory.gtt_used_bytes or 0, facts.memory.vram_used_bytes or 0)
    held = max(used, sum(each.bytes for each in facts.holders))
    if held:
        text = (
            f"the {format_size(held)} of the GPU's memory freed: stop what holds them, or reboot "
            "where no program does"
        )
        yield text, without(facts, facts.holders, everything=True)


def without(facts: PoolFacts, gone: Sequence[Holder], *, everything: bool = False) -> PoolFacts:
    """The machine without some holders, or, with ``everything``, with none known or unknown."""
    gtt, vram = sum(each.gtt_bytes for each in gone), sum(each.vram_bytes for each in gone)
    now = facts.memory
    used = (now.gtt_used_bytes or 0, now.vram_used_bytes or 0)
    left = (0, 0) if everything else (max(0, used[0] - gtt), max(0, used[1] - vram))
    info = replace(now, gtt_used_bytes=left[0], vram_used_bytes=left[1])
    stay = tuple(each for each in facts.holders if each not in gone)
    then = replace(facts, memory=info, holders=stay)
    if facts.available is None:
        return then
    freed = facts.available + pinned(facts) - pinned(then)
    return replace(then, available=min(freed, facts.ram or freed))


def largest_context(
    shape: Shape, memory: ServerMemory, facts: PoolFacts, backend: str
) -> int | None:
    """The longest context, in steps of 1024, that does fit; None where none does."""

    def fits(steps: int) -> bool:
        changed = replace(memory, ctx=pad(steps * _CTX_STEP))
        return _judge(shape, changed, facts, backend).verdict not in REFUSED

    return largest(fits, max(memory.ctx, shape.context) // _CTX_STEP) * _CTX_STEP or None


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number that fits, at most ``most``; 0 also where not even that does."""
    low, high = 0, most
    while low < high:  # fits(low), or low is 0
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
