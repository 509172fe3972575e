# SPDX-License-Identifier: Apache-2.0
"""Where a knob is on this machine, and what it says now."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from fnmatch import fnmatchcase

from infertune.base.errors import errno_name
from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.catalogue.knobs.base import Knob
from infertune.host.machine import Machine


@dataclass(frozen=True, slots=True)
class Target:
    """One file a knob stands for (a governor has one per cpufreq policy)."""

    knob: Knob
    path: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What a target says now."""

    value: str | None
    """Canonical value; None where it could not be read or understood."""
    raw: bytes = b""
    choices: tuple[str, ...] | None = None
    """Words the kernel offers; None where it does not say."""
    error: str | None = None
    """Why there is no value: an errno name, or what was not understood."""
    gone: bool = False
    """The file is not there (any more)."""


def targets(root: Root, machine: Machine, knob: Knob) -> tuple[Target, ...]:
    """The knob's files on this machine; empty where it is absent."""
    gpu = machine.inference_gpu
    places = {
        "{gpu}": gpu.path if gpu else None,
        "{ttm}": f"/sys/module/{machine.ttm.module}" if machine.ttm else None,
    }
    for pattern in knob.paths:
        path: str | None = pattern
        for name, place in places.items():
            if path is not None and name in path:
                path = path.replace(name, place) if place else None
        if path is None:
            continue
        found = root.glob(path) if "*" in path else [path] if root.exists(path) else []
        if found:
            return tuple(Target(knob, each) for each in found)
    return ()


def is_file_of(knob: Knob, path: str) -> bool:
    """Whether ``path`` is one the knob may stand for: a journal is not trusted with paths."""
    places = {"{gpu}": "/sys/class/drm/card*/device", "{ttm}": "/sys/module/*"}
    for pattern in knob.paths:
        for name, place in places.items():
            pattern = pattern.replace(name, place)
        parts, wanted = path.split("/"), pattern.split("/")
        if len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted)):
            return ".." not in parts
    return False


def read_live(root: Root, wanted: Iterable[Target], *, choices: bool = True) -> dict[str, Reading]:
    """Read each target once; keyed by path.  ``choices``: also where they are another file."""
    return {target.path: read_target(root, target, choices=choices) for target in wanted}


def read_target(root: Root, target: Target, *, choices: bool = True) -> Reading:
    """Read one target.  Never raises: what went wrong is part of the answer."""
    value = target.knob.value
    try:
        raw = root.read_value(target.path, 4096)
    except OSError as error:
        # ENODEV, ENXIO: the attribute is there, its device is not (module unloaded, hot-unplug).
        # EBUSY: a cpufreq policy whose CPUs are all offline (show() in drivers/cpufreq/cpufreq.c,
        # seen in 6.12 and 7.3; the policy and its governor wait for a CPU to come back).
        gone = error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.EBUSY)
        return Reading(None, error=errno_name(error), gone=gone)
    try:
        canonical = value.decode(raw)
    except ValueError as error:
        return Reading(None, raw, error=f"not understood: {error}")
    offered = value.choices(raw) if choices else None
    if choices and target.knob.choices_file:
        listed = root.get(f"{target.path.rpartition('/')[0]}/{target.knob.choices_file}")
        offered = tuple(listed.split()) if listed else None
    return Reading(canonical, raw, offered)
