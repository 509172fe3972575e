# SPDX-License-Identifier: Apache-2.0
"""Starting and stopping declared servers: drop-ins first, then systemd."""

from __future__ import annotations

from typing import Any

from infertune.errors import InfertuneError, UsageError
from infertune.machine import read_machine
from infertune.profile import load_profile
from infertune.resolve import Desired, resolve
from infertune.root import Root
from infertune.service.declared import declared_names, find_declaration, remove_declaration
from infertune.service.servers import (
    DECLARED,
    SLICE,
    TRANSIENT,
    Declaration,
    drop_in,
    memory_min,
    slice_drop_in,
)
from infertune.service.systemd import (
    Systemd,
    remove_drop_in,
    units_with_drop_in,
    write_drop_ins,
)

_PREFIX, _SUFFIX = "infertune-server@", ".service"


class Serving:
    """The declared servers of this machine.  systemd owns them; this only says what they get."""

    def __init__(self, root: Root, systemd: Systemd) -> None:
        self._root = root
        self._systemd = systemd

    def declared(self, name: str) -> Declaration:
        """The declaration of a server.  Raises UsageError where there is none."""
        found = find_declaration(self._root, name)
        if found is None:
            raise UsageError(f"no server '{name}' is declared", hint=f"{DECLARED}/{name}.toml")
        return found

    async def serve(self, name: str) -> str:
        """Start a declared server under its profile; returns its unit."""
        declaration = self.declared(name)
        desired = self._desired(declaration)
        texts = {declaration.unit: drop_in(declaration, desired)}
        # The slice first: a group gets no more protection than those above it.
        others = [unit for unit in units_with_drop_in(self._root) if unit != declaration.unit]
        texts = {SLICE: self._slice(others, memory_min(desired))} | texts
        write_drop_ins(self._root, texts)
        await self._systemd.reload()
        await self._systemd.start(declaration.unit)
        return declaration.unit

    async def stop(self, name: str) -> None:
        """Stop a server and take away what was written for it."""
        unit = f"{_PREFIX}{name}{_SUFFIX}"
        await self._systemd.stop(unit)
        remove_drop_in(self._root, unit)
        others = units_with_drop_in(self._root)
        if others:
            write_drop_ins(self._root, {SLICE: self._slice(others, 0)})
        else:
            remove_drop_in(self._root, SLICE)
        remove_declaration(self._root, name)
        await self._systemd.reload()

    async def servers(self) -> list[dict[str, Any]]:
        """Every declared or running server."""
        states = await self._systemd.states(f"{_PREFIX}*{_SUFFIX}")
        running = {
            unit.removeprefix(_PREFIX).removesuffix(_SUFFIX): s for unit, s in states.items()
        }
        names = {
            *declared_names(self._root, DECLARED),
            *declared_names(self._root, TRANSIENT),
            *running,
        }
        return [self._about(name, running.get(name, "inactive")) for name in sorted(names)]

    async def start_declared(self) -> list[str]:
        """Start what /etc declares; returns what went wrong, in sentences."""
        problems = []
        states = await self._systemd.states(f"{_PREFIX}*{_SUFFIX}")
        for name in declared_names(self._root, DECLARED):
            if states.get(f"{_PREFIX}{name}{_SUFFIX}") == "active":
                continue
            try:
                await self.serve(name)
            except InfertuneError as error:
                problems.append(f"server {name}: {error.message}")
        return problems

    def _about(self, name: str, state: str) -> dict[str, Any]:
        about: dict[str, Any] = {"name": name, "state": state}
        try:
            found = find_declaration(self._root, name)
        except InfertuneError as error:
            return {**about, "error": error.message}
        if found:
            about |= {"profile": found.profile, "port": found.port, "model": found.model}
        return about

    def _desired(self, declaration: Declaration) -> Desired:
        profile = load_profile(self._root, declaration.profile)
        return resolve(profile, read_machine(self._root), declaration.backend)

    def _slice(self, units: list[str], more: int) -> str:
        minima = [more]
        for unit in units:
            found = find_declaration(self._root, unit.removeprefix(_PREFIX).removesuffix(_SUFFIX))
            if found:
                minima.append(memory_min(self._desired(found)))
        return slice_drop_in(minima)
