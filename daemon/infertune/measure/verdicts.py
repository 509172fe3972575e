# SPDX-License-Identifier: Apache-2.0
"""What was found on this machine, kept so that it is shown where a setting is: 'measured here'.

One file for each machine.  A verdict is of one model, kernel, server program and value; where one
of these is another by now it is shown all the same, and called stale.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from infertune.base.records import asdict, dataclass, replace
from infertune.base.root import Root
from infertune.base.units import printable_line
from infertune.measure.kept import made_of
from infertune.measure.statistics import HARMS, HELPS, NO_EFFECT, UNDECIDED

SCHEMA = "infertune.verdicts/1"
WHOLE = "whole profile"
"""In place of a setting: all of the profile's against none."""
QUIET = "quiet"
"""The arm in which nobody else was made to work."""
STRESS: Mapping[str, str] = {"cpu": "busy neighbours", "memory": "memory pressure"}
"""What ``--stress`` can make scarce, and how the arm is called."""
_MOST = 512
_MAX_FILE = 1024 * 1024
_MAX_TEXT = 4096
_WORDS = (HELPS, HARMS, NO_EFFECT, UNDECIDED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """A file that a verdict depends on, as it was."""

    name: str
    """For people: a version, a model's name."""
    path: str | None
    stamp: str | None
    """Size and time of the file; None where it cannot be told whether it has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One verdict."""

    profile: str
    setting: str
    """A knob, or another setting of the profile; WHOLE for all of them."""
    value: str | None
    """The setting's, as it is written; None for WHOLE."""
    arm: str
    """QUIET, or one of STRESS."""
    word: str
    """One of the verdicts of statistics.py."""
    estimate: float | None
    low: float | None
    high: float | None
    """Relative changes of tokens per second; positive is better."""
    pairs: int
    keeps: float | None = None
    """In a stress arm: share of the quiet machine's tokens per second under the profile."""
    bare: float | None = None
    """The same without it."""
    day: str
    """Of the measurement, ISO 8601, UTC."""
    kernel: str
    backend: str
    model: Thing
    server: Thing
    busy: bool = False
    """Whether others used the CPUs meanwhile, and the user wanted it all the same."""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """A newer verdict of the same key takes the place of an older one."""
        return (self.profile, self.setting, self.arm, self.model.name)


def stamp(root: Root, path: str) -> str | None:
    """What changes with a file: its size and time.  None where it cannot be told."""
    try:
        real = root.real(path)
        return f"{root.size(real)}-{root.modified(real)}"
    except (OSError, ValueError):  # ValueError: no path at all, in a file that was edited
        return None


def package(name: str) -> Thing:
    """A Python package that is the server, by its version."""
    now = _version(name)
    return Thing(name=f"{name} {now or 'unknown'}", path=f"package:{name}", stamp=now)


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version  # no daily verb needs it

    try:
        return version(name)
    except (PackageNotFoundError, ValueError):  # ValueError: no name at all
        return None


def stale(root: Root, one: Measured, kernel: str | None, value: str | None = None) -> list[str]:
    """What has changed since; empty where nothing has.  What cannot be told has not.

    ``value``: what the setting is now, to who knows it.
    """
    changed = []
    if kernel is not None and kernel != one.kernel:
        changed.append(f"the kernel was {one.kernel}")
    for what, thing in (("model", one.model), ("server", one.server)):
        if _differs(root, thing):
            changed.append(f"the {what} was another ({thing.name})")
    if value is not None and one.value is not None and value != one.value:
        changed.append(f"the value was {one.value}")
    return changed


def _differs(root: Root, thing: Thing) -> bool:
    if thing.path is None or thing.stamp is None:
        return False
    if thing.path.startswith("package:"):
        return _version(thing.path.removeprefix("package:")) != thing.stamp
    return stamp(root, thing.path) not in (None, thing.stamp)


def sentence(one: Measured, why_stale: Sequence[str] = ()) -> str:
    """``measured here 2026-11-28: +4 % (2..6), quiet, gemma-3-270m``."""
    where = one.arm if one.arm == QUIET else STRESS.get(one.arm, one.arm)
    among = ", among others' work" if one.busy else ""
    told = f"measured here {one.day}: {amount(one)}, {where}{among}, {one.model.name}"
    return f"{told}; stale: {', '.join(why_stale)}" if why_stale else told


def amount(one: Measured) -> str:
    """What was found: ``+4 % (2..6)``, ``no effect shown (-1..2)``, ``cannot decide``."""
    if one.keeps is not None and one.bare is not None:
        return (
            f"{one.word}, keeps {one.keeps:.2f}x of the quiet machine's tokens/s, "
            f"without it {one.bare:.2f}x"
        )
    if one.estimate is None or one.low is None or one.high is None or one.word == UNDECIDED:
        return one.word
    interval = f"({_percent(one.low)}..{_percent(one.high)})"
    return f"{one.word} {interval}" if one.word == NO_EFFECT else f"{change(one)} {interval}"


def change(one: Measured) -> str:
    """The estimate for a narrow column: ``+4 %``."""
    return one.word if one.estimate is None else f"{one.estimate * 100:+.0f} %"


def _percent(share: float) -> str:
    return f"{share * 100:.0f}".replace("-0", "0")


# -- the file --------------------------------------------------------------------------------


def load(root: Root, directories: Iterable[str], machine: str) -> list[Measured]:
    """The verdicts of this machine, the newest first; none where a file is not what it must be."""
    found = [one for each in directories for one in _read(root, f"{each}/{machine}/verdicts.json")]
    return sorted(found, key=lambda one: one.day, reverse=True)


def save(root: Root, directory: str, machine: str, new: Iterable[Measured]) -> None:
    """Keep verdicts, in place of older ones of the same keys.  Raises OSError."""
    kept = {one.key: one for one in [*load(root, [directory], machine)[::-1], *new]}
    verdicts = [asdict(one) for one in list(kept.values())[-_MOST:]]
    text = json.dumps({"schema": SCHEMA, "verdicts": verdicts}, indent=1)
    root.mkdir(f"{directory}/{machine}")
    root.replace(f"{directory}/{machine}/verdicts.json", f"{text}\n".encode())


def _read(root: Root, path: str) -> list[Measured]:
    try:
        document = json.loads(root.read_file(path, _MAX_FILE)[0])
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        return []
    listed = document.get("verdicts")
    read = map(_measured, listed[:_MOST] if isinstance(listed, list) else [])
    return [one for one in read if one is not None]


def _measured(found: Any) -> Measured | None:
    """One entry, checked: it is shown to whoever asks, and may be somebody else's."""
    try:
        one = made_of(Measured, found)
    except ValueError:
        return None
    texts = (one.profile, one.setting, one.value, one.arm, one.day, one.kernel, one.backend)
    if one.word not in _WORDS or any(map(_long, texts)):
        return None
    if any(map(_long, (*asdict(one.model).values(), *asdict(one.server).values()))):
        return None
    return replace(one, model=_named(one.model), server=_named(one.server))


def _named(thing: Thing) -> Thing:
    return replace(thing, name=printable_line(thing.name, 80))


def _long(text: str | None) -> bool:
    return text is not None and len(text) > _MAX_TEXT
