# SPDX-License-Identifier: Apache-2.0
"""Sizes of the next boot: refused where they leave too little, and what a profile would bring.

Judged is the machine after the boot, whoever set what: a limit that is on the command line already
counts beside a carve-out that the profile makes larger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os.path import basename

from infertune.base.errors import InfertuneError, UsageError
from infertune.base.records import replace
from infertune.base.root import Root
from infertune.base.units import GIB, MIB, format_size
from infertune.boot import record
from infertune.boot.options import Option, options
from infertune.boot.plan import MODPROBE, plan
from infertune.boot.record import Stage
from infertune.host.machine import Machine
from infertune.host.memory import PAGE
from infertune.host.modprobe import Assignment, read_sources
from infertune.host.system import COMMAND_LINE, boot_id
from infertune.host.unknown import Unknown
from infertune.pools.boot import (
    SMALLEST_CARVEOUT,
    STAGED,
    Change,
    Outlook,
    after_boot,
    most_for_gpu,
    ram_after,
)
from infertune.pools.facts import Configured, PoolFacts, read_facts
from infertune.pools.judge import Picture, picture
from infertune.profiles.profile import load_profile, places
from infertune.profiles.resolve import assume_backend, resolve

LIMIT = "ttm.pages_limit"
SIZES = (LIMIT, "ttm.page_pool_size")
"""Boot settings that count pages."""


def change_of(machine: Machine, staged: Sequence[Option]) -> Change:
    """What staged options change about the GPU's memory."""
    values = {option.id: option.value for option in staged}
    gpu = machine.inference_gpu
    sizes = {each.number: each.size_bytes for each in gpu.carveout_sizes} if gpu else {}
    limit = values.get(LIMIT)
    return Change(
        pages_limit=int(limit) if limit else None,
        carveout_bytes=sizes.get(values.get("amdgpu.uma_carveout", "")),
    )


def check_sizes(facts: PoolFacts, machine: Machine, staged: Sequence[Option]) -> None:
    """Raises UsageError where the next boot would leave too little to the system."""
    change = change_of(machine, staged)
    sized = {option.id: option for option in staged if option.id in SIZES}
    if not sized and change.carveout_bytes is None:
        return
    others = _overruling(facts, change, sized.get(LIMIT))
    total = ram_after(facts, change)
    if total is None:
        if sized:
            raise UsageError(
                f"{next(iter(sized))}: the size of memory is not known; nothing was touched"
            )
        return
    most = most_for_gpu(total)
    for option in sized.values():
        if int(option.value) * PAGE > most:
            hint = f"write 'at most {most * 100 // (total or 1)}%' beside the size"
            raise _refused(option.id, int(option.value), option.source, total, hint)
    if others and int(others.value) * PAGE > most:
        raise _refused(str(others), int(others.value), others.source, total, _lower(others))


def _overruling(facts: PoolFacts, change: Change, ours: Option | None) -> Assignment | None:
    """A limit of somebody else's that will be in force beside a new carve-out."""
    others = facts.configured.pages_limit
    if others is None or change.carveout_bytes is None:
        return None
    return others if ours is None or _wins(others, ours) else None


def _wins(others: Assignment, ours: Option) -> bool:
    """Whether their limit stays in force beside ours, which comes last on the command line."""
    if ours.on_command_line or others.value == ours.value:
        return False
    return others.file == COMMAND_LINE or basename(others.file) > basename(MODPROBE)


def _lower(others: Assignment) -> str:
    return f"lower it first ({others.origin}), or choose a smaller carve-out"


def _refused(what: str, pages: int, source: str, total: int, hint: str) -> UsageError:
    return UsageError(
        f"{what}: {format_size(pages * PAGE)} is refused ({source}): after the next boot Linux has "
        f"{format_size(total)}, of which at most {format_size(most_for_gpu(total))} may go to the "
        "GPU; nothing was touched",
        hint=hint,
    )


def after_staging(
    facts: PoolFacts, machine: Machine, staged: Sequence[Option]
) -> PoolFacts | Unknown:
    """The machine after a boot with ``staged``, and with what stays in force beside it."""
    change = change_of(machine, staged)
    others = facts.configured.pages_limit
    if others and any(each.id == LIMIT and _wins(others, each) for each in staged):
        change = replace(change, pages_limit=None)
    return after_boot(facts, change)


def remarks(facts: PoolFacts, machine: Machine, staged: Sequence[Option]) -> Iterator[str]:
    """What the sizes after the next boot come to, where that is not what one would think."""
    change = change_of(machine, staged)
    then = after_staging(facts, machine, staged)
    if isinstance(then, Unknown) or then.ram is None:
        return
    limit, gttsize = then.configured.pages_limit, then.configured.gttsize
    if limit and limit.source != STAGED and int(limit.value) * PAGE > most_for_gpu(then.ram):
        yield (
            f"{limit} ({limit.origin}) is {format_size(int(limit.value) * PAGE)} of the "
            f"{format_size(then.ram)} that Linux has: at most "
            f"{format_size(most_for_gpu(then.ram))} leave enough to the system"
        )
    carveout, gtt = then.memory.vram_bytes or 0, then.memory.gtt_bytes or 0
    sized = change.pages_limit or 0
    if sized and gttsize and gtt + MIB < sized * PAGE:
        yield (
            f"{gttsize} ({gttsize.origin}) keeps GTT at {format_size(gtt)}: remove it, or "
            f"{LIMIT} changes nothing"
        )
    elif sized and gtt <= carveout:
        yield (
            f"{LIMIT} changes nothing while the carve-out is larger ({format_size(carveout)}): "
            "make it small in the firmware first, reboot, and stage this again"
        )
    elif change.carveout_bytes and carveout > 4 * GIB and gtt > carveout:
        yield (
            f"the carve-out of {format_size(carveout)} would be lost: GTT stays larger "
            f"({format_size(gtt)}), and ROCm allocates there"
        )
    elif sized and then.ram > (facts.ram or 0) + GIB:
        yield (
            f"{LIMIT} was counted from {format_size(facts.ram or 0)} of RAM; with the smaller "
            f"carve-out there are {format_size(then.ram)}: stage it again after the reboot"
        )


# -- what the next boot brings -------------------------------------------------------------


def next_boot(root: Root, machine: Machine, facts: PoolFacts) -> PoolFacts | Unknown:
    """The machine after its next boot, with what infertune has staged, or put back, in this one."""
    if machine.boot_style == "none":
        return Unknown("a container has its host's boot settings")
    staged = _record(root)
    here = boot_id(root)
    if staged and staged.in_force and staged.boot_id == here:
        return after_boot(facts, change_of(machine, staged.options))
    if staged and staged.phase == "undone" and staged.tried == here:
        facts = replace(facts, configured=_without(facts.configured, staged))
    return after_boot(facts)


def look(root: Root, machine: Machine, backend: str | None = None) -> Picture:
    """The GPU's memory now and after the next boot."""
    facts = read_facts(root, machine)
    then = next_boot(root, machine, facts)
    return picture(facts, then, backend or assume_backend(machine)[0])


def _record(root: Root) -> Stage | None:
    try:
        return record.load(root)
    except InfertuneError:
        return None  # 'infertune boot status' says what is wrong with it


def _without(found: Configured, staged: Stage) -> Configured:
    """What is configured without words of ours that only the running kernel still has."""
    limit = found.pages_limit
    ours = {option.value for option in staged.options if option.id == LIMIT}
    if limit and limit.file == COMMAND_LINE and limit.value in ours:
        return replace(found, pages_limit=None)
    return found


# -- what a profile would bring ---------------------------------------------------------


def outlook(root: Root, machine: Machine, facts: PoolFacts, profile: str) -> Outlook | Unknown:
    """The machine after a profile's [boot] was staged, and booted.

    Unknown where 'infertune boot stage' refuses it, or it changes nothing.
    """
    if machine.boot_style == "none":
        return Unknown("a container has its host's boot settings")
    sources = read_sources(root)
    try:
        wanted = resolve(load_profile(root, profile), machine)
        staged = options(root, machine, wanted, sources)[0]
        way = plan(root, machine, staged)
        check_sizes(facts, machine, (*way.options, *way.by_hand))
    except InfertuneError as error:
        return Unknown(error.message)
    change = change_of(machine, staged)
    if change == Change():
        return Unknown(f"'{profile}' changes nothing about the GPU's memory here")
    then = after_boot(facts, change)
    if isinstance(then, Unknown):
        return then
    text = _command(root, profile, by_hand=bool(way.by_hand))
    limit = next((each for each in way.options if each.id == LIMIT), None)
    others = facts.configured.pages_limit
    if limit and others and _wins(others, limit):
        text = f"{others} removed from {others.origin}, then {text}"
    return Outlook(text, then)


def _command(root: Root, profile: str, *, by_hand: bool) -> str:
    """What to type.  One change at a time is staged: another one is undone first."""
    before = _record(root)
    undo = "'infertune boot undo', " if before and before.in_force else ""
    if by_hand:
        return f"{undo}what 'infertune boot plan {profile}' says to do by hand, and a reboot"
    return f"{undo}'infertune boot stage {profile}' and a reboot"


def outlooks(
    root: Root, machine: Machine, facts: PoolFacts, first: str | None = None
) -> tuple[Outlook, ...]:
    """What each profile would bring: ``first`` before all others, then the smallest change first.

    Where the firmware's carve-out is what GTT would have to outgrow, with that made small before.
    """
    waiting = next_boot(root, machine, facts)
    found = [] if isinstance(waiting, Unknown) else [Outlook("a reboot, as configured", waiting)]
    if first and not isinstance(chosen := outlook(root, machine, facts, first), Unknown):
        found.append(chosen)
    # The profile that all others extend is nobody's first choice.
    names = sorted((name for name in places(root) if name != first), key=lambda n: n == "base")
    others = [outlook(root, machine, facts, name) for name in names]
    known = [each for each in others if isinstance(each, Outlook)]
    known.sort(key=lambda each: (each.facts.ttm and each.facts.ttm.pages_limit) or 0)
    long = first or "long-context"
    return (
        *found,
        *known,
        *_without_gttsize(root, machine, facts, long),
        *_without_carveout(root, machine, facts, long),
    )


def _without_gttsize(
    root: Root, machine: Machine, facts: PoolFacts, profile: str
) -> Iterator[Outlook]:
    """With amdgpu.gttsize taken away, which bounds GTT whatever TTM allows."""
    asked = facts.configured.gttsize
    if asked is None or machine.boot_style == "none":
        return
    gone = f"amdgpu.gttsize removed from {asked.origin}"
    if not isinstance(then := after_boot(facts, Change(drop_gttsize=True)), Unknown):
        yield Outlook(f"{gone} and a reboot", then)
    freed = replace(facts, gttsize=None, configured=replace(facts.configured, gttsize=None))
    if not isinstance(after := outlook(root, machine, freed, profile), Unknown):
        yield Outlook(f"{gone}, then {after.text}", after.facts)


def _without_carveout(
    root: Root, machine: Machine, facts: PoolFacts, profile: str
) -> tuple[Outlook, ...]:
    gpu = machine.inference_gpu
    if gpu is None or (facts.memory.vram_bytes or 0) <= 4 * SMALLEST_CARVEOUT:
        return ()
    small = after_boot(facts, Change(carveout_bytes=SMALLEST_CARVEOUT))
    if isinstance(small, Unknown):
        return ()
    changed = replace(gpu, vram_bytes=SMALLEST_CARVEOUT, gtt_bytes=small.memory.gtt_bytes)
    then = replace(
        machine,
        memory=replace(machine.memory, total_bytes=small.ram),
        gpus=tuple(changed if each is gpu else each for each in machine.gpus),
    )
    after = outlook(root, then, small, profile)
    if isinstance(after, Unknown):
        return ()
    text = f"the firmware's smallest carve-out (in the BIOS) and a reboot, then {after.text}"
    return (Outlook(text, after.facts),)
