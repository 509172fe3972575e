# SPDX-License-Identifier: Apache-2.0
"""Starting and stopping declared servers: drop-ins first, then systemd."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Any

from infertune.base.addresses import reached_at
from infertune.base.errors import Failed, InfertuneError, UsageError, did_you_mean
from infertune.base.names import DECLARED, OF_CONTAINER, SLICE, server_of_unit, server_unit
from infertune.base.records import dataclass, replace
from infertune.base.root import Root
from infertune.host.containers import CONTAINER, named
from infertune.host.machine import read_machine
from infertune.host.sockets import listeners
from infertune.pools.promised import LOCK, OF_ROOT, sweep
from infertune.profiles.profile import load_profile
from infertune.profiles.resolve import Desired, resolve
from infertune.servers.adopted import ADOPTED, Adopted, Wanted
from infertune.servers.api_key import refuse_open_file
from infertune.servers.declaration import TRANSIENT, Declaration, Foreign, why_no_gate
from infertune.servers.dropins import (
    drop_in_path,
    remove_drop_in,
    remove_notes,
    units_with_drop_in,
    write_drop_ins,
)
from infertune.servers.foreground import foreground
from infertune.servers.models import with_its_model
from infertune.servers.running import RUN, group_of_adopted
from infertune.servers.store import (
    declared_names,
    declared_ports,
    find_declaration,
    gpu_groups,
    remove_declaration,
    user_id,
    write_declaration,
)
from infertune.servers.unit import (
    GATE,
    Needs,
    cpu_mask,
    drop_in,
    gate,
    needs,
    promised,
    slice_drop_in,
    together,
    wanted,
)
from infertune.service.adopting import Adopting
from infertune.service.keeper import Choice
from infertune.service.systemd import Systemd
from infertune.service.users import Users

_RUNNING = ("active", "activating", "reloading", "deactivating", "restarting")


@dataclass(frozen=True, slots=True)
class Asked:
    """What whoever adopts a server says of it; None is not said."""

    port: int | None = None
    """Where the exporter asks it."""
    engine: str | None = None
    """By its name in engines/."""
    admission: str | None = None
    """One of ADMISSIONS, or OFF."""
    memory: int | None = None
    """Bytes that it takes."""


OFF = "off"
"""Its starts are not judged any more."""


UNSAID = Asked()


class Serving:
    """The declared servers of this machine.  systemd owns them; this only says what they get."""

    def __init__(self, root: Root, systemd: Systemd) -> None:
        self._root = root
        self._systemd = systemd
        self._adopting = Adopting(root, systemd, Users(root, systemd))
        # The slice's drop-in is the sum over all servers: one change at a time.
        self._one = asyncio.Lock()

    def declared(self, name: str) -> Declaration:
        """The declaration of a server.  Raises UsageError where there is none."""
        found = find_declaration(self._root, name)
        if found is None:
            near = did_you_mean(name, self._declared())
            hint = None if near else f"{DECLARED}/{name}.toml"
            raise UsageError(f"no server '{name}' is declared{near}", hint=hint)
        if isinstance(found, Foreign):
            raise UsageError(
                f"'{name}' is {found.unit}, which infertune does not start",
                hint=f"systemctl start {found.unit}",
            )
        return found

    async def serve(self, name: str) -> str:
        """Start a declared server under its profile; returns its unit."""
        declaration = with_its_model(self._root, self.declared(name))
        unit = declaration.unit
        async with self._one:
            state = (await self._systemd.states(unit)).get(unit, "inactive")
            if state in _RUNNING:
                raise UsageError(
                    f"server '{name}' is {state} already", hint=f"infertune stop {name}"
                )
            self._refuse_a_taken_port(declaration)
            if declaration.api_key_file:
                refuse_open_file(self._root, declaration.api_key_file)
            desired = self._desired(declaration)
            # The slice too: a group gets no more protection than those above it.
            texts = {
                SLICE: slice_drop_in(together([*self._others(unit), needs([desired])])),
                unit: drop_in(
                    declaration, desired, python=sys.executable, groups=gpu_groups(self._root)
                ),
            }
            write_drop_ins(self._root, texts)
            self._make_lock()
            await self._systemd.reload()
            try:
                await self._systemd.start(unit)
            except Failed as failed:
                why = await self._systemd.status_text(unit)
                message = f"{failed.message}: {why}" if why else failed.message
                raise Failed(message, hint=f"infertune logs {name}") from None
        return unit

    async def stop(self, name: str) -> None:
        """Stop a server and take away what was written for it.  UsageError where there is none."""
        unit = server_unit(name)
        async with self._one:
            state = (await self._systemd.states(unit)).get(unit, "inactive")
            known = state != "inactive" or unit in units_with_drop_in(self._root)
            # One that is not valid can be forgotten as well.
            if not known and name not in self._declared():
                near = did_you_mean(name, self._declared())
                hint = None if near else "infertune servers"
                raise UsageError(f"there is no server '{name}'{near}", hint=hint)
            if known:
                await self._systemd.stop(unit)
            remove_drop_in(self._root, unit)
            remove_declaration(self._root, name)
            others = self._others(unit)
            if not others:
                remove_drop_in(self._root, SLICE)
                await self._systemd.reload()
                return
            wanted = together(others)
            write_drop_ins(self._root, {SLICE: slice_drop_in(wanted)})
            await self._systemd.reload()
            # A reload leaves the group of a running slice as it is (systemd 257).
            await self._systemd.set_properties(
                SLICE, {"MemoryMin": wanted.memory_min, "AllowedCPUs": cpu_mask(wanted.cpus)}
            )
            remove_notes(self._root, SLICE)

    async def plan_adoption(
        self,
        name: str,
        unit: str,
        choice: Choice,
        user: str | None = None,
        *,
        asked: Asked = UNSAID,
    ) -> dict[str, Any]:
        """What putting a unit of others under a profile would change.  Raises UsageError."""
        foreign = self._foreign(name, self._unit(unit, user), choice, user, asked)
        return await self._adopting.plan(name, unit, self._wanted(foreign), self._uid(foreign))

    async def adopt(
        self,
        name: str,
        unit: str,
        choice: Choice,
        user: str | None = None,
        *,
        asked: Asked = UNSAID,
        waits: bool = False,
    ) -> dict[str, Any]:
        """Put a unit of others under a profile until the next boot.

        ``user`` is whose manager has it; ``waits``: it may start later.  Raises UsageError or
        Failed with everything as it was.
        """
        foreign = self._foreign(name, self._unit(unit, user), choice, user, asked)
        wanted, uid = self._wanted(foreign), self._uid(foreign)
        done = await self._adopting.adopt(name, unit, wanted, uid, waits=waits)
        if not self._lasting(name):
            write_declaration(self._root, replace(foreign, unit=done["unit"]))
        return done

    def _unit(self, unit: str, user: str | None) -> str:
        """The unit itself, where a container is named.  Raises UsageError for no container."""
        container = unit.removeprefix(OF_CONTAINER)
        if container == unit:
            return unit
        if user is not None:
            raise UsageError(
                "a user's container is in a unit of that user's",
                hint="adopt that unit, with --user",
            )
        found = named(self._root, container) if CONTAINER.fullmatch(container) else ()
        if len(found) != 1:
            what = "no container" if not found else "more than one container"
            raise UsageError(
                f"root has {what} called '{container}'",
                hint="'podman ps' and 'docker ps' show their names",
            )
        return found[0].scope

    def _wanted(self, foreign: Foreign) -> Wanted:
        found = wanted(self._desired(foreign))
        if foreign.admission is None:
            return found
        step = gate(foreign.name, foreign.admission, sys.executable)
        return replace(found, directives={**found.directives, GATE: step})

    def _uid(self, foreign: Foreign) -> int | None:
        return None if foreign.user is None else user_id(self._root, foreign.user)

    def _foreign(
        self, name: str, unit: str, choice: Choice, user: str | None, asked: Asked
    ) -> Foreign:
        known = self._known(name, unit, choice, user)
        if asked == UNSAID:
            return known
        if self._lasting(name):
            raise UsageError(
                f"'{name}' is declared in {DECLARED}/{name}.toml: what is said of it stands there"
            )
        admission = None if asked.admission == OFF else asked.admission or known.admission
        memory = (asked.memory or known.memory) if admission else None
        if asked.memory and not admission:
            raise UsageError("how much it takes is of use only with an admission")
        if admission and (why := why_no_gate(unit, user)):
            raise UsageError(why)
        port, engine = asked.port or known.port, asked.engine or known.engine
        return replace(known, port=port, engine=engine, admission=admission, memory=memory)

    def _known(self, name: str, unit: str, choice: Choice, user: str | None) -> Foreign:
        found = self._found(name)
        if isinstance(found, Declaration) or (found and found.unit != unit and self._lasting(name)):
            raise UsageError(f"'{name}' is another server, {found.unit}", hint="another --name")
        if isinstance(found, Foreign):
            known = replace(found, profile=choice.profile, unit=unit, backend=choice.backend)
            return replace(known, user=user)
        return Foreign(name, choice.profile, unit, choice.backend, user=user)

    def _lasting(self, name: str) -> bool:
        return self._root.exists(f"{DECLARED}/{name}.toml")

    async def release(self, name: str) -> dict[str, Any]:
        """Make an adopted unit what it was."""
        unit = self._adopting.adopted().get(name)
        left = await self._adopting.give_back(name)
        remove_declaration(self._root, name)
        if self._lasting(name):
            left.append(f"{DECLARED}/{name}.toml adopts it again when infertuned starts")
        return {"name": name, "unit": unit.unit.unit if unit else None, "notes": left}

    async def release_all(self) -> None:
        """Make every adopted unit what it was: the daemon ends.  What is declared stays so."""
        await self._adopting.give_all_back()

    def _found(self, name: str) -> Declaration | Foreign | None:
        with contextlib.suppress(InfertuneError):  # one that is not valid names nothing
            return find_declaration(self._root, name)
        return None

    async def servers(self) -> list[dict[str, Any]]:
        """Every declared or running server."""
        states = await self._systemd.states(server_unit("*"))
        running = {name: state for unit, state in states.items() if (name := server_of_unit(unit))}
        names = sorted(self._declared() | running.keys())
        adopted = self._adopting.adopted()
        return [
            await self._about_adopted(adopted[name])
            if name in adopted
            else await self._about(name, running.get(name, "inactive"))
            for name in sorted({*names, *adopted})
        ] + [
            {"name": each.name, "unit": RUN, "state": "active", "profile": each.profile}
            | ({} if each.port is None else {"port": each.port})
            for each in foreground(self._root)
        ]

    async def start_declared(self) -> list[str]:
        """Start what /etc declares and does not run, and adopt what is declared so.

        Returns what went wrong, in sentences.
        """
        problems = await self._release_forgotten()
        states = await self._systemd.states(server_unit("*"))
        lasting = declared_names(self._root, DECLARED)
        for name in sorted({*lasting, *declared_names(self._root, TRANSIENT)}):
            try:
                found = find_declaration(self._root, name)
                if isinstance(found, Foreign):
                    choice = Choice(found.profile, found.backend)
                    await self.adopt(name, found.unit, choice, found.user, waits=True)
                elif states.get(server_unit(name)) in _RUNNING:
                    # systemd may start it again by itself; without this file it could not.
                    self._make_lock()
                elif name in lasting:
                    await self.serve(name)
            except InfertuneError as error:
                problems.append(f"server {name}: {error.message}")
        return problems

    async def _release_forgotten(self) -> list[str]:
        """What an earlier run was adopting when it was killed, and nobody declares."""
        problems = []
        try:
            forgotten = self._adopting.adopted().keys() - self._declared()
            for name in sorted(forgotten):
                await self._adopting.give_back(name)
        except InfertuneError as error:
            problems.append(f"adopted units: {error.message}")
        return problems

    def has_work(self) -> bool:
        """Whether anything is declared, or was adopted by a run that was killed."""
        return bool(self._declared()) or self._root.exists(ADOPTED)

    def _declared(self) -> set[str]:
        places = (DECLARED, TRANSIENT)
        return {name for place in places for name in declared_names(self._root, place)}

    async def _about_adopted(self, adopted: Adopted) -> dict[str, Any]:
        unit, user = adopted.unit.unit, adopted.user
        if user is None:
            state = (await self._systemd.states(unit)).get(unit, "inactive")
        else:
            # His manager could say anything; the kernel does not.
            state = "active" if group_of_adopted(self._root, adopted) else "inactive"
        about = {"name": adopted.name, "unit": unit, "state": state}
        whose = None if user is None else str(user)
        return {**about, "profile": adopted.wanted.profile, "user": whose}

    async def _about(self, name: str, state: str) -> dict[str, Any]:
        about: dict[str, Any] = {"name": name, "state": state}
        unit = server_unit(name)
        if state in _RUNNING:
            about["uid"] = await self._systemd.uid(unit)
        if state == "failed" and (why := await self._systemd.status_text(unit)):
            about["error"] = why
        try:
            found = find_declaration(self._root, name)
        except InfertuneError as error:
            return {**about, "error": error.message}
        if isinstance(found, Foreign):
            about |= {"unit": found.unit, "profile": found.profile, "engine": found.engine}
            about["user"] = found.user
        elif found:
            model = found.model or next(iter(found.router.values()), None)
            about |= {"profile": found.profile, "port": found.port, "model": model}
            about |= {"host": found.host, "key": found.api_key_file is not None}
            about["engine"] = found.engine
        return about

    def _refuse_a_taken_port(self, declaration: Declaration) -> None:
        """Whoever listens there would be taken for the server.  Raises UsageError."""
        ports = declared_ports(self._root)
        for other in map(server_of_unit, units_with_drop_in(self._root)):
            if other not in (None, declaration.name) and ports.get(other) == declaration.port:
                raise UsageError(
                    f"port {declaration.port} belongs to server '{other}', which was started",
                    hint=f"infertune stop {other}, or another port",
                )
        if found := listeners(self._root, declaration.port, reached_at(declaration.host)):
            users = ", ".join(sorted({str(each.uid) for each in found}))
            raise UsageError(
                f"port {declaration.port} is taken, by a program of uid {users}",
                hint="end that program, or declare another port",
            )

    def _make_lock(self) -> None:
        """The unit's standard input: its launcher waits for its turn with it.  Raises Failed."""
        try:
            self._root.mkdir(LOCK.rpartition("/")[0])
            with self._root.turn(LOCK, 0) as alone:
                if alone:
                    # The launcher cannot see that a process of root's has ended.
                    sweep(self._root, OF_ROOT)
        except OSError as error:
            raise Failed(f"{LOCK}: {error.strerror}") from error

    def _desired(self, declaration: Declaration | Foreign) -> Desired:
        profile = load_profile(self._root, declaration.profile)
        return resolve(profile, read_machine(self._root), declaration.backend)

    def _others(self, unit: str) -> list[Needs]:
        """What the other servers that have been started were promised."""
        others = (other for other in units_with_drop_in(self._root) if other != unit)
        return [promised(self._root.get(drop_in_path(other)) or "") for other in others]
