# SPDX-License-Identifier: Apache-2.0
"""Adopting units that infertune did not make, and giving them back.

systemd owns them: what can be changed while they run is changed through it, the rest is a drop-in
for their next start.  What they run is never touched.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from infertune.base.errors import Failed, InfertuneError, UsageError
from infertune.base.names import is_foreign_unit, placing_unit
from infertune.base.records import replace
from infertune.base.root import Root
from infertune.base.units import format_cpulist
from infertune.profiles.resolve import Desired
from infertune.servers.adopted import (
    Adopted,
    Book,
    Change,
    Changed,
    Value,
    read_book,
    write_book,
)
from infertune.servers.dropins import (
    put_notes_back,
    read_drop_in,
    read_notes,
    remove_drop_in,
    write_drop_ins,
)
from infertune.servers.unit import (
    NO_LIMIT,
    PLACED,
    directives,
    foreign_drop_in,
    live_values,
    memory_min,
    process_values,
)
from infertune.service.systemd import Systemd

_MEMORY_MIN = "MemoryMin"


class Adopting:
    """The units of others that are under a profile; one change at a time."""

    def __init__(self, root: Root, systemd: Systemd) -> None:
        self._root = root
        self._systemd = systemd
        self._one = asyncio.Lock()

    async def plan(self, name: str, unit: str, desired: Desired) -> dict[str, Any]:
        """What putting a unit under a profile would change.

        Raises UsageError for a unit that cannot be adopted.
        """
        async with self._one:
            return (await self._planned(name, unit, desired, read_book(self._root)))[1]

    async def adopt(self, name: str, unit: str, desired: Desired) -> dict[str, Any]:
        """Put a unit under a profile.

        Raises UsageError for a unit that cannot be adopted, Failed with everything put back.
        """
        async with self._one:
            old = read_book(self._root)
            new, document = await self._planned(name, unit, desired, old)
            adopted = new.units[name]
            text = {adopted.unit.unit: foreign_drop_in(desired)} if adopted.unit.lasts else {}
            await self._become(old, new, text)
            try:
                await self._systemd.run(placing_unit(name))
            except Failed as failed:
                document["notes"].append(f"its processes are as they were: {failed.message}")
            return document

    async def _planned(
        self, name: str, unit: str, desired: Desired, old: Book
    ) -> tuple[Book, dict[str, Any]]:
        about = await self._loaded(unit)
        adopted = self._as_adopted(name, about, desired, old)
        new = await self._with_slices({**old.units, name: adopted}, old)
        return new, {
            "name": name,
            "unit": adopted.unit.unit,
            "profile": desired.profile,
            "backend": desired.backend,
            "active": about["ActiveState"] == "active",
            "items": _items(new, adopted, desired),
            "notes": [],
        }

    async def give_back(self, name: str) -> list[str]:
        """Make a unit what it was; returns what was left because somebody else changed it.

        Raises UsageError where nothing of that name is adopted.
        """
        async with self._one:
            old = read_book(self._root)
            if name not in old.units:
                raise UsageError(f"no unit is adopted as '{name}'", hint="infertune servers")
            units = {other: each for other, each in old.units.items() if other != name}
            return await self._without([name], old, await self._with_slices(units, old))

    async def give_all_back(self) -> list[str]:
        """Make every adopted unit what it was."""
        async with self._one:
            old = read_book(self._root)
            return await self._without([*old.units], old, Book()) if old != Book() else []

    async def _without(self, names: Iterable[str], old: Book, new: Book) -> list[str]:
        """Give units back, with their processes; returns sentences on what was left."""
        units = [placing_unit(name) for name in names if old.units[name].processes]
        left = []
        # Those that were started since are noted while the book still says what they were given.
        for unit in units:
            left += await self._placed(unit)
        left += await self._become(old, new, {})
        for unit in units:
            left += await self._placed(unit)
        return list(dict.fromkeys(left))

    async def _placed(self, unit: str) -> list[str]:
        try:
            await self._systemd.run(unit)
        except Failed as failed:
            return [f"processes may have what they were given: {failed.message}"]
        return []

    def adopted(self) -> Mapping[str, Adopted]:
        """What is adopted now, by name."""
        return read_book(self._root).units

    # -- what is to be -----------------------------------------------------------

    async def _loaded(self, unit: str) -> dict[str, Any]:
        if not is_foreign_unit(unit):
            raise UsageError(
                f"'{unit}' cannot be adopted: a service or scope that runs a server can be",
                hint="'systemctl list-units --type=service,scope' shows what there is",
            )
        about = await self._systemd.unit(unit)
        if about is None:
            raise UsageError(f"there is no unit '{unit}'", hint="systemctl status " + unit)
        # Also what its other names, or a template, really are.
        if not is_foreign_unit(about["Id"]):
            raise UsageError(f"'{unit}' is {about['Id']}, which cannot be adopted")
        return about

    def _as_adopted(
        self, name: str, about: Mapping[str, Any], desired: Desired, old: Book
    ) -> Adopted:
        unit = about["Id"]
        other = next((n for n, each in old.units.items() if each.unit.unit == unit), name)
        if other != name:
            raise UsageError(f"{unit} is adopted already, as '{other}'")
        before = old.units.get(name)
        if before and before.unit.unit != unit:
            raise UsageError(
                f"'{name}' is {before.unit.unit} already", hint="another --name, or release it"
            )
        lasts = unit.endswith(".service") and not about.get("Transient")
        return Adopted(
            name=name,
            profile=desired.profile,
            backend=desired.backend,
            group=str(about.get("ControlGroup") or ""),
            slices=_slices(str(about.get("Slice") or "")),
            memory_min=memory_min(desired),
            unit=self._changed(about, live_values(desired), before.unit if before else None, lasts),
            processes=process_values(desired),
            unit_values=before.unit_values
            if before
            else {name: about[value] for name, value in PLACED.items() if value in about},
        )

    async def _with_slices(self, units: Mapping[str, Adopted], old: Book) -> Book:
        """The book with what these units need of the slices they are in."""
        book = Book(units)
        slices: dict[str, Changed] = {}
        names = dict.fromkeys(name for each in units.values() for name in each.slices)
        for name in names:
            if not book.needed(name):
                continue
            known = old.slices.get(name)
            about = await self._systemd.unit(name)
            if about is None:
                raise Failed(f"systemd does not know {name}")
            now = _value(about[_MEMORY_MIN])
            original = known.changes[_MEMORY_MIN].original if known else now
            assert isinstance(original, int)
            ours = {_MEMORY_MIN: original + book.needed(name)}
            slices[name] = self._changed(about, ours, known, lasts=True)
        return Book(units, slices)

    def _changed(
        self,
        about: Mapping[str, Any],
        ours: Mapping[str, Value],
        known: Changed | None,
        lasts: bool,
    ) -> Changed:
        """A unit with the values it is to have; the first originals stay."""
        changes = {}
        for name, value in ours.items():
            now = _value(about[name])
            original = now
            if known and name in known.changes:
                original = known.changes[name].original
            changes[name] = Change(original, value, None if now == value else now)
        if known:
            # What the new profile does not name goes back to what it was.
            gone = {name: each for name, each in known.changes.items() if name not in ours}
            changes |= {
                name: Change(each.original, each.original, each.ours) for name, each in gone.items()
            }
        unit = str(about["Id"])
        notes = dict(known.notes) if known else {}
        missing = [name for name in changes if not known or name not in known.changes]
        if lasts:
            notes |= read_notes(self._root, unit, missing)
        return Changed(unit, changes, notes, lasts)

    # -- from one to the other ----------------------------------------------------

    async def _become(self, old: Book, new: Book, texts: Mapping[str, str]) -> list[str]:
        """Make it so; returns sentences on what was left.  Raises Failed with the old put back."""
        kept = [each for each in old.units.values() if each.unit.lasts]
        # On disk first, and all of it: whatever ends us, both can be undone.
        write_book(self._root, Book({**old.units, **new.units}, {**old.slices, **new.slices}))
        before = {each.unit.unit: read_drop_in(self._root, each.unit.unit) for each in kept}
        try:
            left = await self._carry_out(old, new, texts)
        except InfertuneError:
            with contextlib.suppress(InfertuneError):
                await self._carry_out(new, _again(old, new), before)
                write_book(self._root, old)
            raise
        write_book(self._root, _settled(new))
        return left

    async def _carry_out(self, old: Book, new: Book, texts: Mapping[str, str]) -> list[str]:
        wanted, gone = new.changed(), _gone(old, new)
        minimum = {
            name: f"# Written by infertuned: what is adopted in it.\n[Slice]\n"
            f"MemoryMin={each.changes[_MEMORY_MIN].ours}\n"
            for name, each in new.slices.items()
        }
        write_drop_ins(self._root, {**minimum, **texts})
        for unit, each in gone.items():
            if each.lasts:
                remove_drop_in(self._root, unit)
        left = []
        for unit, each in wanted.items():
            values = {
                name: change.ours
                for name, change in each.changes.items()
                if change.before is not None
            }
            await self._set(unit, values)
            put_notes_back(self._root, each.notes)
        # A group must not keep what those above it no longer have: the nearest goes first.
        for unit, each in reversed(gone.items()):
            left += await self._restore(unit, each)
            put_notes_back(self._root, each.notes)
        await self._systemd.reload()
        return left

    async def _restore(self, unit: str, changed: Changed) -> list[str]:
        about = await self._systemd.unit(unit)
        if about is None:
            return []
        values, left = {}, []
        for name, change in changed.changes.items():
            now = _value(about[name])
            if not change.is_known(now):
                left.append(f"{unit}: {name} was changed by another program and is left as it is")
            elif now != change.original:
                values[name] = change.original
        await self._set(unit, values)
        return left

    async def _set(self, unit: str, values: Mapping[str, Value]) -> None:
        if values:
            await self._systemd.set_properties(unit, values)


def _gone(old: Book, new: Book) -> dict[str, Changed]:
    wanted = new.changed()
    return {unit: each for unit, each in old.changed().items() if unit not in wanted}


def _again(old: Book, new: Book) -> Book:
    """The old book, to be carried out once more: what is set now may be what the new one says."""
    newer = new.changed()

    def again(changed: Changed) -> Changed:
        after = newer[changed.unit].changes if changed.unit in newer else {}
        changes = {
            name: replace(each, before=after[name].ours)
            if name in after and after[name].ours != each.ours
            else each
            for name, each in changed.changes.items()
        }
        return replace(changed, changes=changes)

    return Book(
        {name: replace(each, unit=again(each.unit)) for name, each in old.units.items()},
        {name: again(each) for name, each in old.slices.items()},
    )


def _settled(book: Book) -> Book:
    """Every change is done; what is as it was before is forgotten."""

    def done(changed: Changed) -> Changed:
        changes = {
            name: replace(each, before=None)
            for name, each in changed.changes.items()
            if each.ours != each.original or each.before is None
        }
        return replace(changed, changes=changes)

    return Book(
        {name: replace(each, unit=done(each.unit)) for name, each in book.units.items()},
        {name: done(each) for name, each in book.slices.items()},
    )


def _slices(nearest: str) -> tuple[str, ...]:
    """A slice and those above it, the nearest last; the root slice has no protection to give.

    ``a-b.slice`` is in ``a.slice`` (systemd.slice(5)).
    """
    stem = nearest.removesuffix(".slice")
    if stem in ("", "-"):
        return ()
    parts = stem.split("-")
    return tuple("-".join(parts[: depth + 1]) + ".slice" for depth in range(len(parts)))


def _value(raw: Any) -> Value:
    """A property as it came over the bus; a mask of CPUs without the zeros at its end."""
    return raw if isinstance(raw, int) else tuple(bytes(raw).rstrip(b"\0"))


def _items(new: Book, adopted: Adopted, desired: Desired) -> list[dict[str, Any]]:
    """What changes, slices first, then the unit now, then at its next start."""
    rows: list[tuple[str, str, str | None, str, str]] = []
    own = adopted.unit.unit
    for unit, each in new.changed().items():
        if unit == own or unit in adopted.slices:
            for name, change in each.changes.items():
                now = change.ours if change.before is None else change.before
                rows.append((unit, name, _shown(now), _shown(change.ours), "now"))
    for name, value in adopted.processes.items():
        before = adopted.unit_values.get(name)
        rows.append((own, PLACED[name], None if before is None else str(before), str(value), "now"))
    at_once = {*adopted.unit.changes, *(PLACED[name] for name in adopted.processes)}
    later = {n: v for n, v in directives(desired).items() if n not in at_once}
    later |= {f"Environment {name}": each.canonical for name, each in sorted(desired.env.items())}
    when = "next start" if adopted.unit.lasts else "never"
    rows += [(own, name, None, value, when) for name, value in later.items()]
    fields = ("unit", "property", "before", "wanted", "when")
    return [dict(zip(fields, row, strict=True)) for row in rows]


def _shown(value: Value) -> str:
    """A property as its directive would be written."""
    if isinstance(value, tuple):
        mask = int.from_bytes(bytes(value), "little")
        return (
            format_cpulist(cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1) or "not set"
        )
    return "not set" if value == NO_LIMIT else str(value)
