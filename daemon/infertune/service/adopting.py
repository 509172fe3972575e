# SPDX-License-Identifier: Apache-2.0
"""Adopting units that infertune did not make, and giving them back.

systemd owns them: what can be changed while they run is changed through it, the rest is a drop-in
for their next start.  What they run is never touched.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from infertune.base.errors import Failed, InfertuneError, UsageError
from infertune.base.names import is_foreign_unit, manager_unit, placing_unit, user_unit
from infertune.base.records import replace
from infertune.base.root import Root
from infertune.base.units import format_cpulist
from infertune.catalogue.launch_settings import TUNABLES
from infertune.host.cgroup import cgroup, controllers
from infertune.host.containers import elsewhere
from infertune.servers.adopted import (
    NO_LIMIT,
    SYSTEM,
    Adopted,
    Book,
    Change,
    Changed,
    Places,
    Value,
    Wanted,
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
from infertune.servers.of_users import Answer, One
from infertune.servers.unit import (
    GATE,
    PLACED,
    beside,
    foreign_drop_in,
    of_a_user,
)

_MEMORY_MIN = "MemoryMin"


class Manager(Protocol):
    """A service manager: the system's, or a user's."""

    async def unit(self, unit: str) -> dict[str, Any] | None: ...

    async def set_properties(self, unit: str, values: Mapping[str, Value]) -> None: ...

    async def reload(self) -> None: ...

    async def run(self, unit: str) -> None: ...


class UsersManagers(Protocol):
    """Whoever brings a request to a user's manager, and the answer back."""

    async def ask(
        self, uid: int, units: Mapping[str, One], about: str = "", plan: One | None = None
    ) -> Answer: ...

    def forget(self) -> None: ...


class Adopting:
    """The units of others that are under a profile; one change at a time."""

    def __init__(
        self,
        root: Root,
        systemd: Manager,
        users: UsersManagers | None = None,
        places: Places = SYSTEM,
    ) -> None:
        self._root = root
        self._systemd = systemd
        self._users = users
        self._places = places
        self._one = asyncio.Lock()

    async def plan(
        self, name: str, unit: str, wanted: Wanted, user: int | None = None
    ) -> dict[str, Any]:
        """What putting a unit under a profile would change.

        Raises UsageError for a unit that cannot be adopted.
        """
        async with self._one:
            new, _, document = await self._planned(name, unit, wanted, self._book(), user)
            if user is not None:
                asked = _asked(self._book()).get(user, {})
                plan = One(unit, new.units[name].wanted)
                _tell(document, await self._ask(user, asked, name, plan))
            return document

    async def adopt(
        self,
        name: str,
        unit: str,
        wanted: Wanted,
        user: int | None = None,
        *,
        waits: bool = False,
    ) -> dict[str, Any]:
        """Put a unit under a profile; with ``waits`` also one whose user's manager does not run.

        Raises UsageError for a unit that cannot be adopted, Failed with everything put back.
        """
        async with self._one:
            old = self._book()
            new, shown, document = await self._planned(name, unit, wanted, old, user, waits=waits)
            adopted = new.units[name]
            text = {adopted.unit.unit: foreign_drop_in(shown)} if adopted.unit.lasts else {}
            done = await self._become(old, new, text, name)
            _tell(document, done.answer)
            if adopted.wanted.processes or (name in old.units and old.units[name].wanted.processes):
                document["notes"] += await self._placed([placing_unit(name)])
            return document

    async def _planned(
        self,
        name: str,
        unit: str,
        wanted: Wanted,
        old: Book,
        user: int | None,
        *,
        waits: bool = False,
    ) -> tuple[Book, Wanted, dict[str, Any]]:
        """The book as it is to be, what the unit's drop-in is to give it, and what changes."""
        _refuse(unit)
        why: dict[str, str] = {}
        if user is None:
            about = await self._loaded(unit)
            _refuse_a_root_without_us(about, wanted)
            adopted = self._as_adopted(name, about, wanted, old)
            wanted = beside(wanted, _own_tunables(about, old.units.get(name)))
        else:
            about = await self._manager(user, waits)
            wanted, why = of_a_user(wanted, user, self._delegated(about))
            adopted = _of_user(name, unit, wanted, user)
        self._refuse_another(adopted, old)
        new = await self._with_slices({**old.units, name: adopted}, old)
        return (
            new,
            wanted,
            {
                "name": name,
                "unit": adopted.unit.unit,
                "user": user,
                "profile": wanted.profile,
                "backend": wanted.backend,
                "active": about["ActiveState"] == "active",
                "items": _items(new, adopted, wanted),
                "notes": [f"{each}: {reason}" for each, reason in why.items()],
            },
        )

    async def give_back(self, name: str) -> list[str]:
        """Make a unit what it was; returns what was left because another program changed it.

        Raises UsageError where nothing of that name is adopted.
        """
        async with self._one:
            old = self._book()
            if name not in old.units:
                raise UsageError(f"no unit is adopted as '{name}'", hint="infertune servers")
            units = {other: each for other, each in old.units.items() if other != name}
            return await self._without([name], old, await self._with_slices(units, old))

    async def give_all_back(self) -> list[str]:
        """Make every adopted unit what it was."""
        async with self._one:
            old = self._book()
            left = await self._without([*old.units], old, Book()) if old != Book() else []
            if self._users:
                self._users.forget()
            return left

    async def _without(self, names: Iterable[str], old: Book, new: Book) -> list[str]:
        """Give units back, with their processes; returns sentences on what was left."""
        units = [placing_unit(name) for name in names if old.units[name].wanted.processes]
        left = []
        # Those that were started since are noted while the book still says what they were given.
        left += await self._placed(units)
        left += (await self._become(old, new, {})).left
        left += await self._placed(units)
        return list(dict.fromkeys(left))

    async def _placed(self, units: Iterable[str]) -> list[str]:
        """Have processes placed, or put back; returns what failed.

        All at once: a daemon that stops has 30 s for everything that is adopted.
        """
        done = await asyncio.gather(*map(self._systemd.run, units), return_exceptions=True)
        failed = []
        for each in done:
            if isinstance(each, Failed):
                failed.append(f"processes may lack what the profile says: {each.message}")
            elif isinstance(each, BaseException):
                raise each
        return failed

    def adopted(self) -> Mapping[str, Adopted]:
        """What is adopted now, by name."""
        return self._book().units

    def _book(self) -> Book:
        return read_book(self._root, self._places.book)

    # -- what is to be -----------------------------------------------------------

    async def _loaded(self, unit: str) -> dict[str, Any]:
        about = await self._systemd.unit(unit)
        if about is None:
            tool = "systemctl" if self._places is SYSTEM else "systemctl --user"
            raise UsageError(f"there is no unit '{unit}'", hint=f"{tool} status {unit}")
        if self._places is not SYSTEM and about["Id"] != unit:
            raise UsageError(f"'{unit}' is another name of {about['Id']}", hint="adopt that")
        _refuse_an_empty_shell(about)
        # Also what its other names, or a template, really are.
        if not is_foreign_unit(about["Id"]):
            raise UsageError(f"'{unit}' is {about['Id']}, which cannot be adopted")
        return about

    async def _manager(self, user: int, waits: bool) -> dict[str, Any]:
        """What is known of a user's manager, which must run unless one can wait for it."""
        about = await self._systemd.unit(manager_unit(user))
        if about is None or (about["ActiveState"] != "active" and not waits):
            raise UsageError(
                f"no manager of user {user} runs",
                hint=f"loginctl enable-linger {user} starts it without a session",
            )
        return about

    def _delegated(self, about: Mapping[str, Any]) -> list[str] | None:
        """Controllers that a user's manager was told it has, and that its group has by now."""
        told, group = about.get("DelegateControllers"), about.get("ControlGroup")
        mount = cgroup(self._root).mount
        if told is None or not mount or not group:
            return told
        there = controllers(self._root, f"{mount}{group}")
        return [each for each in told if each in there]

    def _as_adopted(
        self, name: str, about: Mapping[str, Any], wanted: Wanted, old: Book
    ) -> Adopted:
        unit = about["Id"]
        before = old.units.get(name)
        lasts = unit.endswith(".service") and not about.get("Transient")
        return Adopted(
            name=name,
            group=str(about.get("ControlGroup") or ""),
            slices=_slices(str(about.get("Slice") or "")),
            unit=self._changed(about, wanted.values, before.unit if before else None, lasts),
            wanted=wanted,
            unit_values=before.unit_values
            if before
            else {name: about[value] for name, value in PLACED.items() if value in about},
        )

    def _refuse_another(self, adopted: Adopted, old: Book) -> None:
        """A unit has one name, and a name one unit.  Raises UsageError."""
        unit, name, who = adopted.unit.unit, adopted.name, adopted.user
        for other, each in old.units.items():
            if other != name and (each.unit.unit, each.user) == (unit, who):
                raise UsageError(f"{unit} is adopted already, as '{other}'")
        before = old.units.get(name)
        if before and (before.unit.unit, before.user) != (unit, who):
            raise UsageError(
                f"'{name}' is {before.unit.unit} already", hint="another --name, or release it"
            )

    async def _with_slices(self, units: Mapping[str, Adopted], old: Book) -> Book:
        """The book with what these units need of the slices they are in."""
        book = Book(units)
        slices: dict[str, Changed] = {}
        names = dict.fromkeys(name for each in units.values() for name in each.slices)
        for name in names:
            # The manager of a user also starts, with ours, what its units are to be.
            if not book.needed(name) and name.endswith(".slice"):
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
            notes |= read_notes(self._root, unit, missing, self._places)
        return Changed(unit, changes, notes, lasts)

    # -- from one to the other ----------------------------------------------------

    async def _become(
        self, old: Book, new: Book, texts: Mapping[str, str], about: str = ""
    ) -> _Done:
        """Make it so.  Raises Failed or UsageError with the old put back."""
        kept = [each for each in old.units.values() if each.unit.lasts]
        # On disk first, and all of it: whatever ends us, both can be undone.
        both = Book({**old.units, **new.units}, {**old.slices, **new.slices})
        write_book(self._root, both, self._places.book)
        before = {
            each.unit.unit: read_drop_in(self._root, each.unit.unit, self._places) for each in kept
        }
        try:
            done = await self._carry_out(old, new, texts, about)
        except InfertuneError:
            with contextlib.suppress(InfertuneError):
                await self._carry_out(new, _again(old, new), before)
                write_book(self._root, old, self._places.book)
            raise
        write_book(self._root, _settled(new), self._places.book)
        return done

    async def _carry_out(
        self, old: Book, new: Book, texts: Mapping[str, str], about: str = ""
    ) -> _Done:
        wanted, gone = new.changed(), _gone(old, new)
        minimum = {name: _above(name, each) for name, each in new.slices.items()}
        write_drop_ins(self._root, {**minimum, **texts}, self._places)
        for unit, each in gone.items():
            if each.lasts:
                remove_drop_in(self._root, unit, self._places)
        for unit, each in wanted.items():
            values = {
                name: change.ours
                for name, change in each.changes.items()
                if change.before is not None
            }
            await self._set(unit, values)
            put_notes_back(self._root, each.notes)
        # A group must not keep what those above it no longer have: the nearest goes first.
        done = await self._tell_users(old, new, about)
        for unit, each in reversed(gone.items()):
            done.left += await self._restore(unit, each)
            put_notes_back(self._root, each.notes)
        await self._systemd.reload()
        return done

    async def _tell_users(self, old: Book, new: Book, about: str) -> _Done:
        """Have users' managers do their part.  Raises Failed or UsageError for that of ``about``.

        Whoever does not answer keeps what he was given at most: the rest goes on without him.
        """
        before, after = _asked(old), _asked(new)
        done = _Done()
        first = new.units[about].user if about else None
        if first is not None:
            done.answer = await self._ask(first, after[first], about)
            done.left += done.answer.left
        others = [
            uid
            for uid in before.keys() | after.keys()
            if uid != first and before.get(uid) != after.get(uid)
        ]
        asked = [self._ask(uid, after.get(uid, {})) for uid in sorted(others)]
        for uid, each in zip(
            sorted(others), await asyncio.gather(*asked, return_exceptions=True), strict=True
        ):
            if isinstance(each, InfertuneError):
                done.left.append(f"units of user {uid} may be unchanged: {each.message}")
            elif isinstance(each, BaseException):
                raise each
            else:
                done.left += each.left
        return done

    async def _ask(
        self, uid: int, units: Mapping[str, One], about: str = "", plan: One | None = None
    ) -> Answer:
        if self._users is None:
            raise Failed("a user's manager has no users of its own")
        answer = await self._users.ask(uid, units, about, plan)
        if answer.error and answer.usage:
            raise UsageError(answer.error, hint=answer.hint or None)
        if answer.error:
            raise Failed(f"{manager_unit(uid)}: {answer.error}", hint=answer.hint or None)
        return answer

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


def _refuse(unit: str) -> None:
    """Raises UsageError for what no unit is called that could be adopted."""
    if not is_foreign_unit(unit):
        raise UsageError(
            f"'{unit}' cannot be adopted: a service or scope that runs a server can be",
            hint="'systemctl list-units --type=service,scope' shows what there is",
        )


def _refuse_an_empty_shell(about: Mapping[str, Any]) -> None:
    """Raises UsageError for a unit that only starts a container, which is in another one."""
    for _, argv, *_ in about.get("ExecStart", ()):
        if engine := elsewhere(argv):
            raise UsageError(
                f"{about['Id']} starts a container with {engine}, which runs in a unit of its own",
                hint="adopt that one: --container NAME, or its unit, which 'systemctl list-units "
                "libpod-* docker-*' shows; podman's --cgroups=split keeps it inside",
            )


def _refuse_a_root_without_us(about: Mapping[str, Any], wanted: Wanted) -> None:
    """Raises UsageError where a step before the start is wanted, and could not run."""
    for name in ("RootDirectory", "RootImage"):
        if GATE in wanted.directives and about.get(name):
            raise UsageError(
                f"{about['Id']} has {name}={about[name]}, in which infertune is not: nobody can "
                "judge its starts there"
            )


class _Done:
    """What became of a change."""

    def __init__(self) -> None:
        self.left: list[str] = []
        """What was left as it is, in sentences."""
        self.answer: Answer | None = None
        """That of the user's manager that was asked about one unit."""


def _above(unit: str, changed: Changed) -> str:
    """The drop-in of a slice, or of a user's manager, that adopted units are in."""
    lines = ["# Written by infertuned: what is adopted in it."]
    slice_ = unit.endswith(".slice")
    if not slice_:
        # It may come later, or come back: it has none of its units' drop-ins then.
        uid = int(unit.removeprefix("user@").removesuffix(".service"))
        lines += ["[Unit]", f"Wants={user_unit(uid)}"]
    lines += ["[Slice]" if slice_ else "[Service]"]
    lines.append(f"{_MEMORY_MIN}={changed.changes[_MEMORY_MIN].ours}")
    return "\n".join(lines) + "\n"


def _of_user(name: str, unit: str, wanted: Wanted, user: int) -> Adopted:
    """A unit that a user's manager has: ours is what that manager itself is in."""
    slices = ("user.slice", f"user-{user}.slice")
    manager = manager_unit(user)
    group = "/".join(("", *slices, manager))
    unchanged = Changed(unit, {}, {}, lasts=False)
    return Adopted(name, group, (*slices, manager), unchanged, wanted, {}, user)


def _asked(book: Book) -> dict[int, dict[str, One]]:
    """What users' managers are to do, by user."""
    return {
        uid: {
            name: One(each.unit.unit, replace(each.wanted, processes={}))
            for name, each in units.items()
        }
        for uid, units in book.users().items()
    }


def _tell(document: dict[str, Any], answer: Answer | None) -> None:
    """Add to what is said of an adoption what a user's manager says of it."""
    if answer is None:
        return
    document["active"] = answer.active
    document["notes"] += answer.left
    above = [each for each in document["items"] if each["unit"] != document["unit"]]
    own = [_row(*row, "now") for row in answer.rows]
    document["items"] = [*above, *own, *document["items"][len(above) :]]


def _own_tunables(about: Mapping[str, Any], before: Adopted | None) -> str:
    """GLIBC_TUNABLES as a unit itself has it, without what it was given when it was adopted."""
    own = ""
    for each in about.get("Environment", ()):
        name, _, value = str(each).partition("=")
        own = value if name == TUNABLES else own
    added = before.wanted.env.get(TUNABLES, "") if before else ""
    return own.removesuffix(added).removesuffix(":")


def _items(new: Book, adopted: Adopted, wanted: Wanted) -> list[dict[str, Any]]:
    """What changes, slices first, then the unit now, then at its next start."""
    rows = [
        _row(unit, *row, "now")
        for unit, each in new.changed().items()
        if unit in adopted.slices or (adopted.user is None and unit == adopted.unit.unit)
        for row in changes_shown(each)
    ]
    own = adopted.unit.unit
    for name, value in wanted.processes.items():
        before = adopted.unit_values.get(name)
        now = None if before is None else str(before)
        rows.append(_row(own, PLACED[name], now, str(value), "now"))
    at_once = {*wanted.values, *(PLACED[name] for name in wanted.processes)}
    later = {n: v for n, v in wanted.directives.items() if n not in at_once}
    later |= {f"Environment {name}": value for name, value in wanted.env.items()}
    when = "next start" if adopted.unit.lasts or adopted.user is not None else "never"
    return rows + [_row(own, name, None, value, when) for name, value in later.items()]


def changes_shown(changed: Changed) -> list[tuple[str, str, str]]:
    """Property, what it is and what it is to be, for people."""
    return [
        (name, _shown(change.ours if change.before is None else change.before), _shown(change.ours))
        for name, change in changed.changes.items()
    ]


def _row(unit: str, name: str, before: str | None, wanted: str, when: str) -> dict[str, Any]:
    fields = ("unit", "property", "before", "wanted", "when")
    return dict(zip(fields, (unit, name, before, wanted, when), strict=True))


def _shown(value: Value) -> str:
    """A property as its directive would be written."""
    if isinstance(value, tuple):
        mask = int.from_bytes(bytes(value), "little")
        return (
            format_cpulist(cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1) or "not set"
        )
    return "not set" if value == NO_LIMIT else str(value)
