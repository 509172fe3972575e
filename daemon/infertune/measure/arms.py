# SPDX-License-Identifier: Apache-2.0
"""A profile as arms of a comparison: with it, without it, and without one part.  Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from infertune.base.records import dataclass, replace
from infertune.catalogue.knobs import KNOBS
from infertune.profiles.resolve import Desired, Setting


@dataclass(frozen=True, slots=True)
class Part:
    """One setting of a profile that can be measured."""

    id: str
    value: str
    starts: bool
    """Whether a server only gets it at its start, so that each sample takes a new one."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A setting that is not measured, and why."""

    id: str
    why: str


_AT_START = "transparent_hugepage."
"""Memory has the pages it was first given.  What khugepaged does goes on while a server runs."""
_NOT_AT_START = "transparent_hugepage.khugepaged."


def risky(desired: Desired) -> tuple[LeftOut, ...]:
    """Knobs that may change heat, noise or stability."""
    return tuple(
        LeftOut(each.id, f"risk: {KNOBS[each.id].risk}; --allow-risk measures it")
        for each in desired.now
        if KNOBS[each.id].risk != "safe"
    )


def at_boot(desired: Desired) -> tuple[LeftOut, ...]:
    """What no verb can change back and forth."""
    return tuple(LeftOut(each.id, "takes a reboot") for each in desired.boot)


def bare(desired: Desired) -> Desired:
    """The machine and the server as they are without the profile."""
    return replace(desired, now=(), boot=(), launch={}, env={}, server={}, unresolved=())


def without(desired: Desired, left_out: Collection[str]) -> Desired:
    """The profile as if it did not name these settings."""

    def kept(settings: Mapping[str, Setting]) -> dict[str, Setting]:
        return {name: each for name, each in settings.items() if name not in left_out}

    return replace(
        desired,
        now=tuple(each for each in desired.now if each.id not in left_out),
        boot=(),
        launch=kept(desired.launch),
        env=kept(desired.env),
        server=kept(desired.server),
    )


def parts(desired: Desired) -> tuple[Part, ...]:
    """Every setting that can be measured, in the order of the catalogue."""
    knobs = [
        Part(
            each.id,
            each.canonical,
            each.id.startswith(_AT_START) and not each.id.startswith(_NOT_AT_START),
        )
        for each in desired.now
    ]
    at_launch = [
        Part(each.id, each.canonical, True)
        for group in (desired.launch, desired.env, desired.server)
        for each in group.values()
    ]
    return (*knobs, *at_launch)
