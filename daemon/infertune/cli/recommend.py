# SPDX-License-Identifier: Apache-2.0
"""``infertune recommend``: which profile suits this machine, and why."""

from __future__ import annotations

from infertune.base.errors import Exit
from infertune.base.records import dataclass
from infertune.base.units import format_size
from infertune.boot.sizes import outlook
from infertune.cli.base import JSON, Command, Context, verb
from infertune.cli.render import counted
from infertune.engine.state import make_plan
from infertune.host.devices import on_mains
from infertune.host.gpu import screens
from infertune.host.machine import Machine, read_machine
from infertune.host.unknown import Unknown
from infertune.pools.facts import read_facts
from infertune.pools.judge import gpu_pool
from infertune.profiles.profile import check_profile, load_profile, places
from infertune.profiles.resolve import resolve


@dataclass(frozen=True)
class Choice:
    """A profile, and the facts of the machine that speak for it."""

    profile: str
    because: tuple[str, ...]


def choose(machine: Machine, connected: tuple[str, ...] | Unknown, mains: bool | None) -> Choice:
    """The profile of infertune's own that suits a machine.

    ``connected``: connectors with a screen; ``mains``: see ``on_mains``.  What the machine is used
    for it cannot tell: those profiles are for whoever knows.
    """
    if machine.inference_gpu is None:
        return Choice("long-context", ("no AMD GPU: a model runs on the CPU, in huge pages",))
    if mains is not None:
        return Choice("desktop-share", ("it has a battery: it is a laptop, and a desktop as well",))
    if isinstance(connected, Unknown):
        why = f"not known whether it is a desktop as well: {connected.why}"
        return Choice("long-context", (why, "if it is one: desktop-share"))
    if connected:
        where = ", ".join(connected)
        return Choice(
            "desktop-share", (f"a screen is connected ({where}): it is a desktop as well",)
        )
    return Choice("long-context", ("no screen is connected: all of it is for the model",))


def _recommend(ctx: Context) -> int:
    machine = read_machine(ctx.root)
    choice = choose(machine, screens(ctx.root), on_mains(ctx.root))
    profile = load_profile(ctx.root, choice.profile)
    items = make_plan(ctx.root, machine, resolve(profile, machine)).items
    now = sorted({item.knob for item in items if item.outcome == "set"})
    later = sorted({item.knob for item in items if item.outcome == "pending-reboot"})
    others = _others(ctx, choice.profile)
    if ctx.args.json:
        document = {
            "profile": choice.profile,
            "because": list(choice.because),
            "changes_now": now,
            "changes_at_boot": later,
            "others": [{"profile": name, "description": text} for name, text in others],
        }
        ctx.print_json("infertune.recommend/1", document)
        return Exit.DONE
    ctx.labelled(
        [
            ("profile", f"{profile.name}: {profile.description}"),
            *(("" if number else "because", why) for number, why in enumerate(choice.because)),
            ("memory", _memory(ctx, machine, profile.name)),
            ("changes", f"{counted(len(now), 'setting')} now, {len(later) or 'none'} at a boot"),
            ("next", f"infertune plan {profile.name}"),
        ]
    )
    ctx.print("\nThe machine cannot tell what it is for. Where it is for something else:")
    ctx.table(("PROFILE", "FOR"), others)
    return Exit.DONE


def _memory(ctx: Context, machine: Machine, profile: str) -> str:
    """What the GPU may use now, and after the next boot with this profile."""
    facts = read_facts(ctx.root, machine)
    now, way = gpu_pool(facts, "vulkan"), outlook(ctx.root, machine, facts, profile)
    if isinstance(now, Unknown):
        return f"of the GPU unknown: {now.why}"
    text = f"{format_size(now.bytes)} for the GPU"
    then = way if isinstance(way, Unknown) else gpu_pool(way.facts, "vulkan")
    if isinstance(way, Unknown) or isinstance(then, Unknown) or then.bytes == now.bytes:
        return text
    return f"{text}; {format_size(then.bytes)} after {way.text}"


def _others(ctx: Context, chosen: str) -> list[tuple[str, str]]:
    """Name and description of every other profile that is one to choose."""
    found = []
    for name in places(ctx.root):
        profile, _ = check_profile(ctx.root, name)
        if profile and name not in (chosen, "base"):
            found.append((name, profile.description))
    return found


COMMANDS: tuple[Command, ...] = (
    verb(
        "recommend",
        _recommend,
        (JSON,),
        "Says which profile suits this machine, by its GPU and by whether it is a desktop, too (a "
        "screen is connected, or it has a battery), and what that profile would change. Reads "
        "only. What the machine is used for it cannot know: the other profiles are listed with "
        "what they are for.",
    ),
)
