# SPDX-License-Identifier: Apache-2.0
"""Will it fit: what a server takes, against the pools of this machine.

An integrated GPU has no memory of its own.  Its carve-out is taken from RAM by the firmware and
is not in MemTotal; GTT is a limit on how much of RAM it may hold.  So GTT is never added to RAM,
and never to the carve-out: the driver allocates from one of the two (docs/memory.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from infertune.budget.kv import cells, pad
from infertune.budget.parts import Part, When, Where, parts
from infertune.budget.settings import ServerMemory
from infertune.budget.shape import Shape
from infertune.machine import Machine
from infertune.units import GIB, MIB, format_size

Verdict = Literal["fits", "tight", "does not fit", "unknown"]

_TIGHT = 0.95
"""A pool that is fuller than this is tight: drivers and fragments want some, too."""

_CTX_STEP = 1024
_FIT_CTX = 4096
"""What --fit leaves at least (--fit-ctx)."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Memory that parts are taken from."""

    name: str
    bytes: int
    need: int
    """At the start."""
    need_later: int
    """When everything has grown."""
    source: str


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
    pools: tuple[Pool, ...]
    remedies: tuple[Remedy, ...]

    def total(self, *whens: When) -> int:
        return sum(part.bytes for part in self.parts if part.when in (whens or ("start",)))


def budget(shape: Shape, memory: ServerMemory, machine: Machine, backend: str) -> Budget:
    """What a server with these settings takes on this machine, and whether there is room."""
    unset = not memory.ctx
    memory = replace(memory, ctx=memory.ctx or shape.context)
    found = _judge(shape, memory, machine, backend)
    if unset and memory.fit and backend != "cpu" and found.verdict == "does not fit":
        ctx = largest_context(shape, memory, machine, backend)
        if ctx and ctx >= _FIT_CTX:
            reason = f"ctx_size is not set: the server itself shortens it, to {ctx} or less"
            found = replace(found, verdict="tight", reasons=(*found.reasons, reason))
    if found.verdict in ("fits", "unknown"):
        return found
    return replace(found, remedies=tuple(_remedies(shape, memory, machine, backend, found)))


def system_reserve(total: int) -> int:
    """Bytes left to the system and its other programs: a sixteenth, 512 MiB to 4 GiB.

    A choice, not a measurement: kernel, desktop and page cache of a 128 GB machine live in 4 GiB.
    """
    return min(4 * GIB, max(total // 16, 512 * MIB))


# -- pools ------------------------------------------------------------------------


def _judge(shape: Shape, memory: ServerMemory, machine: Machine, backend: str) -> Budget:
    found = parts(shape, memory, backend)

    def need(where: Where, *whens: When) -> int:
        return sum(part.bytes for part in found if part.where == where and part.when in whens)

    start = {"GPU": need("GPU", "start"), "host": need("host", "start")}
    later = need("host", "later")
    verdict: Verdict = "fits"
    reasons: list[str] = []
    notes = _notes(shape, memory, machine)
    pools: list[Pool] = []
    in_ram = start["host"]
    if backend != "cpu":
        pool, shares_ram = _gpu_pool(machine, start["GPU"])
        if pool is None:
            verdict = "unknown"
            reasons.append("how much memory the GPU can have is not known here")
            in_ram += start["GPU"]
        else:
            pools.append(pool)
            in_ram += start["GPU"] if shares_ram else 0
            verdict = _worse(verdict, _of_pool(pool, reasons))
    verdict = _worse(verdict, _of_ram(machine, in_ram, later, pools, reasons, backend != "cpu"))
    if shape.known and not cells(shape, memory).full:
        if memory.ctx:
            verdict = "does not fit"
            reasons.append(
                f"{memory.slots} slots share {pad(memory.ctx)} tokens: no whole one is left for "
                "each, and the server does not start"
            )
        else:
            verdict = _worse(verdict, "unknown")
            reasons.append("the file does not say its context, and ctx_size is not set")
    if not shape.known and verdict != "does not fit":
        verdict = "unknown"
        reasons.insert(
            0, f"what a model of architecture '{shape.architecture}' keeps is not known here"
        )
    return Budget(verdict, tuple(reasons), tuple(notes), found, tuple(pools), ())


_ORDER: tuple[Verdict, ...] = ("fits", "tight", "unknown", "does not fit")


def _worse(one: Verdict, other: Verdict) -> Verdict:
    return max(one, other, key=_ORDER.index)


def _gpu_pool(machine: Machine, need: int) -> tuple[Pool | None, bool]:
    """Where the GPU's part goes, and whether that is RAM."""
    gpu = machine.inference_gpu
    if gpu is None or gpu.vram_bytes is None:
        return None, True
    if not gpu.integrated:
        return Pool("VRAM", gpu.vram_bytes, need, need, "mem_info_vram_total"), False
    if gpu.gtt_bytes is None:
        return None, True
    # amdkfd, apu_prefer_gtt: whichever is larger, and only that (docs/memory.md).
    if gpu.gtt_bytes > gpu.vram_bytes:
        return Pool("GTT limit", gpu.gtt_bytes, need, need, "mem_info_gtt_total"), True
    return Pool("carve-out", gpu.vram_bytes, need, need, "mem_info_vram_total"), False


def _of_pool(pool: Pool, reasons: list[str]) -> Verdict:
    if pool.need > pool.bytes:
        reasons.append(
            f"{pool.name}: {format_size(pool.need)} of {format_size(pool.bytes)}, "
            f"{format_size(pool.need - pool.bytes)} too much"
        )
        return "does not fit"
    if pool.need > _TIGHT * pool.bytes:
        left = format_size(pool.bytes - pool.need)
        reasons.append(f"{pool.name}: only {left} of {format_size(pool.bytes)} would be left")
        return "tight"
    return "fits"


def _of_ram(
    machine: Machine, need: int, later: int, pools: list[Pool], reasons: list[str], gpu: bool
) -> Verdict:
    memory = machine.memory
    if memory.total_bytes is None:
        reasons.append("how much memory this machine has is not known")
        return "unknown"
    reserve = system_reserve(memory.total_bytes)
    room = memory.total_bytes - reserve
    source = f"MemTotal less {format_size(reserve)} for the system"
    pools.append(Pool("RAM", room, need, need + later, source))
    if need > room:
        reasons.append(
            f"RAM: {format_size(need)} of {format_size(room)}, {format_size(need - room)} too much"
        )
        return "does not fit"
    verdict: Verdict = "fits"
    if need + later > room:
        reasons.append(
            f"RAM: {format_size(need + later)} of {format_size(room)} when the prompt cache and "
            "checkpoints have grown"
        )
        verdict = "tight"
    if memory.available_bytes is not None:
        # The GPU's pages cannot be moved, and the CMA area only lends itself to pages that can.
        free = memory.available_bytes - (memory.cma_free_bytes or 0 if gpu else 0)
        if need > free:
            reasons.append(
                f"RAM: {format_size(need)} of the {format_size(max(free, 0))} that are available "
                "now: other programs hold the rest"
            )
            verdict = "tight"
    return verdict


def _notes(shape: Shape, memory: ServerMemory, machine: Machine) -> list[str]:
    notes = []
    if shape.context and memory.ctx > shape.context * (1 if memory.unified else memory.slots):
        notes.append(f"the model was trained for {shape.context} tokens; a slot gets no more")
    if machine.memory.swap_bytes:
        notes.append(
            f"{format_size(machine.memory.swap_bytes)} of swap are not counted: a model in swap "
            "is read from disk for every token"
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


# -- remedies ---------------------------------------------------------------------


def _remedies(
    shape: Shape, memory: ServerMemory, machine: Machine, backend: str, now: Budget
) -> Iterator[Remedy]:
    """Single changes that help, those of the machine first."""

    def helps(changed: ServerMemory, on: Machine = machine) -> Verdict | None:
        then = _judge(shape, changed, on, backend)
        better = _ORDER.index(then.verdict) < _ORDER.index(now.verdict) or (
            len(then.reasons) < len(now.reasons) and then.verdict == now.verdict
        )
        return then.verdict if better else None

    gtt = next((pool for pool in now.pools if pool.name in ("GTT limit", "carve-out")), None)
    gpu = machine.inference_gpu
    if gtt and gpu and gpu.gtt_bytes is not None:
        gib = -(-int(gtt.need / _TIGHT) // GIB)
        larger = replace(gpu, gtt_bytes=gib * GIB)
        gpus = tuple(larger if each is gpu else each for each in machine.gpus)
        verdict = helps(memory, replace(machine, gpus=gpus))
        if verdict and gib * GIB > gpu.gtt_bytes:
            how = f'ttm.pages_limit = "{gib}GiB" under [boot] of a profile'
            text = f"a GTT limit of {gib} GiB ({how}, 'infertune boot stage' and a reboot)"
            yield Remedy(text, verdict)
    settings = {
        "cache_ram=0MiB (no prompt cache)": replace(memory, cache_ram=0),
        "cache_type_k=q8_0 cache_type_v=q8_0": replace(
            memory, cache_type_k="q8_0", cache_type_v="q8_0", flash_attn=True
        ),
        "parallel=1": replace(memory, slots=1),
        "ubatch_size=512": replace(memory, ubatch=min(512, memory.ubatch)),
    }
    for text, changed in settings.items():
        if changed != memory and (verdict := helps(changed)):
            yield Remedy(text, verdict)
    if now.verdict == "does not fit" and (ctx := largest_context(shape, memory, machine, backend)):
        verdict = _judge(shape, replace(memory, ctx=ctx), machine, backend).verdict
        yield Remedy(f"ctx_size={ctx} (the largest that fits)", verdict)


def largest_context(
    shape: Shape, memory: ServerMemory, machine: Machine, backend: str
) -> int | None:
    """The longest context, in steps of 1024, that does fit; None where none does."""

    def fits(steps: int) -> bool:
        changed = replace(memory, ctx=pad(steps * _CTX_STEP))
        return _judge(shape, changed, machine, backend).verdict != "does not fit"

    low, high = 0, max(memory.ctx, shape.context) // _CTX_STEP
    while low < high:  # fits(low), or low is 0
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * _CTX_STEP or None
