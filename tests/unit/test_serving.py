# SPDX-License-Identifier: Apache-2.0
"""Servers through the daemon, with a systemd that is made up: order, sums, and what is left."""

from __future__ import annotations

import asyncio
import fnmatch
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest

from infertune.pools.promised import LOCK
from infertune.servers.declaration import Declaration
from infertune.servers.store import write_declaration
from infertune.servers.unit import cpu_mask
from support import build

dbus_fast = pytest.importorskip("dbus_fast", reason="extra 'daemon' is not installed")

from dbus_fast import BusType, DBusError, PropertyAccess, Variant  # noqa: E402
from dbus_fast.aio import MessageBus  # noqa: E402
from dbus_fast.annotations import DBusSignature  # noqa: E402
from dbus_fast.service import ServiceInterface, dbus_method, dbus_property  # noqa: E402

from infertune.base.errors import Failed, UsageError  # noqa: E402
from infertune.service.serving import Serving  # noqa: E402
from infertune.service.systemd import Systemd  # noqa: E402
from unit.test_service import bus_address, close  # noqa: E402, F401

S = Annotated[str, DBusSignature("s")]
AS = Annotated[list[str], DBusSignature("as")]
O = Annotated[str, DBusSignature("o")]  # noqa: E741
U = Annotated[int, DBusSignature("u")]
B = Annotated[bool, DBusSignature("b")]
Properties = Annotated[list[Any], DBusSignature("a(sv)")]
Units = Annotated[list[Any], DBusSignature("a(ssssssouso)")]
Nothing = Annotated[None, DBusSignature("")]

SLICE_DROP_IN = "run/systemd/system/infertune.slice.d/50-infertune.conf"
UNIT_PATH = "/org/freedesktop/systemd1/unit/x"
MIB = 2**20


class FakeSystemd(ServiceInterface):
    """Starts what it is told to, a little later; keeps what a running slice was given."""

    def __init__(self, base: Path) -> None:
        super().__init__("org.freedesktop.systemd1.Manager")
        self.base = base
        self.units: dict[str, str] = {}
        self.jobs: dict[str, int] = {}
        self.slice_minimum = 0
        self.loaded_minimum = 0
        self.broken: set[str] = set()
        self.asked: list[str] = []

    def _later(self, unit: str, state: str) -> str:
        self.jobs[unit] = 7

        def end() -> None:
            self.jobs.pop(unit, None)
            self.units[unit] = state
            if state == "active":
                self.slice_minimum = self.loaded_minimum

        asyncio.get_running_loop().call_later(0.25, end)
        return "/org/freedesktop/systemd1/job/7"

    @dbus_method()
    def Reload(self) -> Nothing:
        self.asked.append("Reload")
        file = self.base / SLICE_DROP_IN
        text = file.read_text() if file.exists() else "MemoryMin=0\n"
        self.loaded_minimum = int(text.partition("MemoryMin=")[2].split()[0])

    @dbus_method()
    def StartUnit(self, unit: S, mode: S) -> O:
        self.asked.append(f"start {unit}")
        return self._later(unit, "failed" if unit in self.broken else "active")

    @dbus_method()
    def StopUnit(self, unit: S, mode: S) -> O:
        self.asked.append(f"stop {unit}")
        return self._later(unit, "inactive")

    @dbus_method()
    def ResetFailedUnit(self, unit: S) -> Nothing:
        self.asked.append(f"reset {unit}")

    @dbus_method()
    def GetUnit(self, unit: S) -> O:
        if self.units.get(unit) not in ("active", "failed"):
            raise DBusError("org.freedesktop.systemd1.NoSuchUnit", unit)
        return UNIT_PATH

    @dbus_method()
    def SetUnitProperties(self, unit: S, runtime: B, properties: Properties) -> Nothing:
        assert runtime
        values = {name: value.value for name, value in properties}
        self.slice_minimum = values["MemoryMin"]
        notes = self.base / f"run/systemd/system.control/{unit}.d"
        notes.mkdir(parents=True)
        (notes / "50-MemoryMin.conf").write_text("[Slice]\n")

    @dbus_method()
    def ListUnitsByPatterns(self, states: AS, patterns: AS) -> Units:
        found = []
        for unit, state in {**dict.fromkeys(self.jobs, "activating"), **self.units}.items():
            if any(fnmatch.fnmatch(unit, pattern) for pattern in patterns):
                job = self.jobs.get(unit, 0)
                path = UNIT_PATH
                state = "activating" if job else state
                found.append([unit, "", "loaded", state, "x", "", path, job, "", path])
        return found


class RunningService(ServiceInterface):
    """Every unit that runs, or is failed."""

    def __init__(self) -> None:
        super().__init__("org.freedesktop.systemd1.Service")
        self.uid = 61234
        self.status = ""

    @dbus_property(access=PropertyAccess.READ)
    def UID(self) -> U:
        return self.uid

    @dbus_property(access=PropertyAccess.READ)
    def StatusText(self) -> S:
        return self.status


class World:
    def __init__(self, base: Path) -> None:
        self.root = build(base)
        self.systemd = FakeSystemd(base)
        self.unit = RunningService()
        profiles = base / "etc/infertune/profiles"
        profiles.mkdir(parents=True)
        (profiles / "kept.toml").write_text(
            'description = "test"\n[launch]\nmemory_min = "64MiB"\n'
        )
        for name, port in (("one", 8081), ("two", 8082)):
            write_declaration(self.root, Declaration(name, "kept", "/m.gguf", port))


async def meet(world: World, address: str) -> tuple[Serving, MessageBus, MessageBus]:
    service = await MessageBus(bus_address=address, bus_type=BusType.SYSTEM).connect()
    service.export("/org/freedesktop/systemd1", world.systemd)
    service.export(UNIT_PATH, world.unit)
    await service.request_name("org.freedesktop.systemd1")
    client = await MessageBus(bus_address=address, bus_type=BusType.SYSTEM).connect()
    return Serving(world.root, Systemd(client)), service, client


def test_servers_come_and_go_and_the_slice_has_their_sum(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
) -> None:
    world = World(tmp_path)

    async def scene() -> None:
        serving, service, client = await meet(world, bus_address)
        # Both at once: the sum of the slice is right whoever is first.
        await asyncio.gather(serving.serve("one"), serving.serve("two"))
        assert world.systemd.slice_minimum == 128 * MIB
        assert [each["state"] for each in await serving.servers()] == ["active", "active"]
        with pytest.raises(UsageError, match="active already"):
            await serving.serve("one")
        # What another server's declaration has become does not matter: it has its promise.
        (tmp_path / "run/infertune/servers.d/one.toml").write_text("broken")
        await serving.stop("two")
        assert world.systemd.slice_minimum == 64 * MIB
        assert not list(tmp_path.glob("run/systemd/system.control/*"))
        assert [each["name"] for each in await serving.servers() if each["state"] == "active"] == [
            "one"
        ]
        await serving.stop("one")
        assert not list(tmp_path.glob("run/systemd/system/*"))
        assert not list(tmp_path.glob("run/infertune/servers.d/*"))
        with pytest.raises(UsageError, match="no server 'one'"):
            await serving.stop("one")
        await close(client)
        await close(service)

    asyncio.run(scene())


def test_a_server_that_runs_can_start_again_after_run_was_emptied(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
) -> None:
    """Its unit opens the lock as its standard input; systemd starts it without asking us."""
    world = World(tmp_path)
    declared = tmp_path / "etc/infertune/servers.d"
    declared.mkdir(parents=True)
    (tmp_path / "run/infertune/servers.d/one.toml").rename(declared / "one.toml")

    async def scene() -> None:
        serving, service, client = await meet(world, bus_address)
        await serving.serve("one")
        shutil.rmtree(tmp_path / "run/infertune")
        started = world.systemd.asked.copy()
        assert await serving.start_declared() == []
        assert (tmp_path / LOCK.lstrip("/")).stat().st_mode & 0o777 == 0o600
        assert world.systemd.asked == started
        await close(client)
        await close(service)

    asyncio.run(scene())


def test_a_declaration_that_is_not_valid_can_be_forgotten(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
) -> None:
    world = World(tmp_path)
    file = tmp_path / "run/infertune/servers.d/one.toml"
    file.write_text('profile = "kept"\nport = "8081"\n')

    async def scene() -> None:
        serving, service, client = await meet(world, bus_address)
        await serving.stop("one")
        assert not file.exists()
        with pytest.raises(UsageError, match="no server 'one'"):
            await serving.stop("one")
        await close(client)
        await close(service)

    asyncio.run(scene())


def test_a_port_that_somebody_has_is_refused_before_the_start(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
) -> None:
    world = World(tmp_path)
    write_declaration(world.root, Declaration("same", "kept", "/m.gguf", 8081))
    table = tmp_path / "proc/net/tcp"
    table.parent.mkdir(parents=True)
    row = "0: {}:1F91 00000000:0000 {} 0:0 00:0 0  1000  0 4711 1 0\n"
    address = f"{int.from_bytes(bytes([127, 0, 0, 1]), sys.byteorder):08X}"

    async def scene() -> None:
        serving, service, client = await meet(world, bus_address)
        table.write_text(row.format(address, "0A"))
        with pytest.raises(UsageError, match="port 8081 is taken, by a program of uid 1000"):
            await serving.serve("one")
        assert world.systemd.asked == []
        # A connection that waits for its end is not a listener.
        table.write_text(row.format(address, "06"))
        # Two that are started at once cannot both have it.
        done = await asyncio.gather(
            serving.serve("one"), serving.serve("same"), return_exceptions=True
        )
        assert done[0] == "infertune-server@one.service"
        assert isinstance(done[1], UsageError)
        assert "port 8081 belongs to server 'one'" in done[1].message
        await serving.stop("one")
        await serving.serve("same")
        await close(client)
        await close(service)

    asyncio.run(scene())


def test_which_user_a_server_runs_as(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
) -> None:
    world = World(tmp_path)

    async def scene() -> None:
        serving, service, client = await meet(world, bus_address)
        await serving.serve("one")
        found = {each["name"]: each.get("uid") for each in await serving.servers()}
        assert found == {"one": 61234, "two": None}
        world.unit.uid = 2**32 - 1  # systemd does not know yet
        assert [each.get("uid") for each in await serving.servers()] == [None, None]
        await close(client)
        await close(service)

    asyncio.run(scene())


def test_a_unit_that_does_not_start_is_a_failure_with_a_hint(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
) -> None:
    world = World(tmp_path)
    world.systemd.broken.add("infertune-server@one.service")

    async def scene() -> None:
        serving, service, client = await meet(world, bus_address)
        with pytest.raises(Failed, match="did not start, it is failed") as failure:
            await serving.serve("one")
        assert failure.value.hint == "infertune logs one"
        unit = "infertune-server@one.service"
        assert world.systemd.asked[-2:] == [f"reset {unit}", f"start {unit}"], "its start limit"
        # What the launcher has said is told; what could move a terminal's cursor is not.
        world.unit.status = "does not fit now: RAM: \x1b[2J" + "x" * 5000
        with pytest.raises(Failed, match=r"it is failed: does not fit now: RAM: \\x1b\[2Jxxx"):
            await serving.serve("one")
        about = {each["name"]: each.get("error") for each in await serving.servers()}
        assert about["one"].startswith("does not fit now: RAM: ")
        assert len(about["one"]) < 1100
        assert about["two"] is None
        await close(client)
        await close(service)

    asyncio.run(scene())


def test_resources_are_typed_as_systemd_wants_them(
    tmp_path: Path,
    bus_address: str,  # noqa: F811
) -> None:
    world = World(tmp_path)
    seen: list[Any] = []
    world.systemd.SetUnitProperties = lambda *_: None  # type: ignore[method-assign, assignment]

    async def scene() -> None:
        _, service, client = await meet(world, bus_address)
        systemd = Systemd(client)

        async def call(member: str, signature: str = "", *body: Any, may_fail: bool = False) -> Any:
            seen.append((member, signature, body))

        systemd._call = call  # type: ignore[method-assign]
        for memory, cpus in ((5, {0, 9}), (0, set())):
            values = {"MemoryMin": memory, "AllowedCPUs": cpu_mask(cpus)}
            await systemd.set_properties("infertune.slice", values)
        await close(client)
        await close(service)

    asyncio.run(scene())
    first, second = seen
    assert first[:2] == ("SetUnitProperties", "sba(sv)")
    assert first[2][2] == [
        ("MemoryMin", Variant("t", 5)),
        ("AllowedCPUs", Variant("ay", b"\x01\x02")),
    ]
    assert second[2][2][1] == ("AllowedCPUs", Variant("ay", b""))
