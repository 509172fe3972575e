# SPDX-License-Identifier: Apache-2.0
"""What was changed of units that infertune did not make, so that it can be put back.

One small document in /run, on disk before the first change.  What it speaks of ends with the boot,
as it does.  It holds no secret: the exporter reads it too, for the names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from infertune.base.errors import Failed
from infertune.base.records import asdict, dataclass, field
from infertune.base.root import Root

ADOPTED = "/run/infertune/adopted.json"
_MAX_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Places:
    """Where what is done to the units of one service manager is written."""

    book: str
    """This document."""
    units: str
    """Drop-ins that end with the boot, or with the user's session."""
    notes: str
    """What the manager itself writes of properties that are set at run time."""


SYSTEM = Places(ADOPTED, "/run/systemd/system", "/run/systemd/system.control")


def places_of(uid: int) -> Places:
    """Of the manager of a user; all of it goes with the last of his sessions."""
    own = f"/run/user/{uid}"
    return Places(
        f"{own}/infertune/adopted.json", f"{own}/systemd/user", f"{own}/systemd/user.control"
    )


Value = int | tuple[int, ...]
"""Of a property on the bus: a number, or a mask of CPUs."""

NO_LIMIT = 2**64 - 1
"""Of a number among systemd's properties: no limit, or not set."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a profile gives a unit that infertune did not make."""

    profile: str
    backend: str
    values: Mapping[str, Value] = field(default_factory=dict)
    """Properties that its manager can change while it runs."""
    memory_min: int = 0
    """Bytes of protection it takes from each slice it is in."""
    processes: Mapping[str, int] = field(default_factory=dict)
    """What its processes are given while they run: ``oom_score_adj``, ``nice``."""
    directives: Mapping[str, str] = field(default_factory=dict)
    """[Service] of its drop-in."""
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Change:
    """One property of a unit or slice that was changed while it ran."""

    original: Value
    ours: Value
    before: Value | None = None
    """What it may still be while ours is being set; None where that is done."""

    def is_known(self, value: Value) -> bool:
        """Whether a value is one that we may put back; another is somebody else's."""
        return value in (self.original, self.ours, self.before)


@dataclass(frozen=True, slots=True)
class Changed:
    """A unit or a slice, as it was and as we made it."""

    unit: str
    changes: Mapping[str, Change]
    notes: Mapping[str, str | None]
    """Files in which systemd notes such changes, as they were; None: there was none."""
    lasts: bool = True
    """Whether it has files, so that a drop-in reaches its next start; a scope has none."""


@dataclass(frozen=True, slots=True)
class Adopted:
    """One adopted unit."""

    name: str
    group: str
    """Its control group, below the mount; of a user's unit that of his manager."""
    slices: tuple[str, ...]
    """Those it is in, the nearest last; of a user's unit those that his manager is in, and it."""
    unit: Changed
    wanted: Wanted
    unit_values: Mapping[str, int] = field(default_factory=dict)
    """What its processes would have of ``wanted.processes`` without us, as the unit says it."""
    user: int | None = None
    """Whose manager has the unit; None for the system's."""


@dataclass(frozen=True, slots=True)
class Book:
    """All that is adopted."""

    units: Mapping[str, Adopted] = field(default_factory=dict)
    """By name of the server."""
    slices: Mapping[str, Changed] = field(default_factory=dict)
    """By name of the slice."""

    def changed(self) -> dict[str, Changed]:
        """Every unit and slice that was changed, slices first: a group gets no more than those
        above it.  Those of users are in books of their own."""
        own = (each for each in self.units.values() if each.user is None)
        return {**self.slices, **{each.unit.unit: each.unit for each in own}}

    def users(self) -> dict[int, dict[str, Adopted]]:
        """Units by name, by user, of those that users' managers have."""
        found: dict[int, dict[str, Adopted]] = {}
        for name, each in self.units.items():
            if each.user is not None:
                found.setdefault(each.user, {})[name] = each
        return found

    def needed(self, slice_name: str) -> int:
        """Bytes of protection that what is adopted needs of a slice."""
        return sum(
            each.wanted.memory_min for each in self.units.values() if slice_name in each.slices
        )


def read_book(root: Root, path: str = ADOPTED) -> Book:
    """What is adopted; empty where nothing is.  Raises Failed for a document that is damaged."""
    try:
        data, _ = root.read_file(path, _MAX_BYTES)
    except FileNotFoundError:
        return Book()
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from error
    try:
        found = json.loads(data)
        return Book(
            {name: _adopted(each) for name, each in found["units"].items()},
            {name: _changed(each) for name, each in found["slices"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Failed(
            f"{path} is damaged: infertune does not know what it changed of adopted units",
            hint="move it away; the changes end with the next boot",
        ) from error


def write_book(root: Root, book: Book, path: str = ADOPTED) -> None:
    """Keep what is adopted.  Raises Failed, with nothing changed."""
    try:
        if not book.units and not book.slices:
            root.unlink(path)
            return
        root.mkdir(path.rpartition("/")[0])
        root.replace(path, json.dumps(asdict(book), indent=1).encode())
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from error


def _adopted(found: dict[str, object]) -> Adopted:
    unit, slices, user = found["unit"], found["slices"], found["user"]
    if not isinstance(unit, dict) or not isinstance(slices, list):
        raise TypeError
    return Adopted(
        name=_text(found["name"]),
        group=_text(found["group"]),
        slices=tuple(map(_text, slices)),
        unit=_changed(unit),
        wanted=parse_wanted(found["wanted"]),
        unit_values=_numbers(found["unit_values"]),
        user=None if user is None else _number(user),
    )


def parse_wanted(found: object) -> Wanted:
    """What ``asdict`` made of it.  Raises KeyError, TypeError or ValueError."""
    if not isinstance(found, dict) or not isinstance(found["values"], dict):
        raise TypeError
    return Wanted(
        _text(found["profile"]),
        _text(found["backend"]),
        {_text(name): _value(each) for name, each in found["values"].items()},
        _number(found["memory_min"]),
        _numbers(found["processes"]),
        _texts(found["directives"]),
        _texts(found["env"]),
    )


def _texts(found: object) -> dict[str, str]:
    if not isinstance(found, dict):
        raise TypeError
    return {_text(name): _text(each) for name, each in found.items()}


def _changed(found: dict[str, object]) -> Changed:
    changes, notes = found["changes"], found["notes"]
    if not isinstance(changes, dict) or not isinstance(notes, dict):
        raise TypeError
    return Changed(
        _text(found["unit"]),
        {
            name: Change(
                _value(each["original"]),
                _value(each["ours"]),
                None if each["before"] is None else _value(each["before"]),
            )
            for name, each in changes.items()
        },
        {path: None if text is None else _text(text) for path, text in notes.items()},
        found["lasts"] is True,
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**64:
        raise ValueError
    return value


def _numbers(found: object) -> dict[str, int]:
    if not isinstance(found, dict) or not all(type(each) is int for each in found.values()):
        raise TypeError
    return {_text(name): each for name, each in found.items()}


def _value(value: object) -> Value:
    return tuple(map(_number, value)) if isinstance(value, list) else _number(value)
