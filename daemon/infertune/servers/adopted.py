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

Value = int | tuple[int, ...]
"""Of a property on the bus: a number (2^64 - 1 is "no limit" or "not set"), or a mask of CPUs."""


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
    profile: str
    backend: str
    group: str
    """Its control group, below the mount."""
    slices: tuple[str, ...]
    """Those it is in, the nearest last."""
    memory_min: int
    """Bytes of protection it takes from each of its slices."""
    unit: Changed
    processes: Mapping[str, int] = field(default_factory=dict)
    """What its processes are given while they run: ``oom_score_adj``, ``nice``."""
    unit_values: Mapping[str, int] = field(default_factory=dict)
    """The same as the unit says it, without us."""


@dataclass(frozen=True, slots=True)
class Book:
    """All that is adopted."""

    units: Mapping[str, Adopted] = field(default_factory=dict)
    """By name of the server."""
    slices: Mapping[str, Changed] = field(default_factory=dict)
    """By name of the slice."""

    def changed(self) -> dict[str, Changed]:
        """Every unit and slice that was changed, slices first: a group gets no more than those
        above it."""
        return {**self.slices, **{each.unit.unit: each.unit for each in self.units.values()}}

    def needed(self, slice_name: str) -> int:
        """Bytes of protection that what is adopted needs of a slice."""
        return sum(each.memory_min for each in self.units.values() if slice_name in each.slices)


def read_book(root: Root) -> Book:
    """What is adopted; empty where nothing is.  Raises Failed for a document that is damaged."""
    try:
        data, _ = root.read_file(ADOPTED, _MAX_BYTES)
    except FileNotFoundError:
        return Book()
    except OSError as error:
        raise Failed(f"{ADOPTED}: {error.strerror}") from error
    try:
        found = json.loads(data)
        return Book(
            {name: _adopted(each) for name, each in found["units"].items()},
            {name: _changed(each) for name, each in found["slices"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Failed(
            f"{ADOPTED} is damaged: what was changed of adopted units is not known",
            hint="move it away; the changes end with the next boot",
        ) from error


def write_book(root: Root, book: Book) -> None:
    """Keep what is adopted.  Raises Failed, with nothing changed."""
    try:
        if not book.units and not book.slices:
            root.unlink(ADOPTED)
            return
        root.mkdir(ADOPTED.rpartition("/")[0])
        root.replace(ADOPTED, json.dumps(asdict(book), indent=1).encode())
    except OSError as error:
        raise Failed(f"{ADOPTED}: {error.strerror}") from error


def _adopted(found: dict[str, object]) -> Adopted:
    unit = found["unit"]
    slices = found["slices"]
    if not isinstance(unit, dict) or not isinstance(slices, list):
        raise TypeError
    return Adopted(
        name=_text(found["name"]),
        profile=_text(found["profile"]),
        backend=_text(found["backend"]),
        group=_text(found["group"]),
        slices=tuple(map(_text, slices)),
        memory_min=_number(found["memory_min"]),
        unit=_changed(unit),
        processes=_numbers(found["processes"]),
        unit_values=_numbers(found["unit_values"]),
    )


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
