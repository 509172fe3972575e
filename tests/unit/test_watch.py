# SPDX-License-Identifier: Apache-2.0
"""Drift: whose a changed value is, what is set again, and what others hold for us."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from infertune.catalogue.knobs import KNOBS
from infertune.engine.state import Difference
from infertune.host.tuners import TUNERS
from support import CPUFREQ, GENEROUS_S, build, values
from unit.test_service import (  # the private bus
    World,
    ask,
    bus_address,  # noqa: F401
    close,
    properties,
    running,
)

pytest.importorskip("dbus_fast", reason="extra 'daemon' is not installed")

from dbus_fast import Message, MessageType
from dbus_fast.aio import MessageBus

from infertune.service.calls import BUS, call
from infertune.service.ownership import MOST, WINDOW_S, Ownership
from infertune.service.watch import DeviceEvent, PowerSupplies, started_anew

SWAPPINESS = "/proc/sys/vm/swappiness"
PLATFORM = "/sys/firmware/acpi/platform_profile"
GOVERNOR = f"{CPUFREQ}/policy1/scaling_governor"
CPU1 = "/sys/devices/system/cpu/cpu1"


class Devices:
    """Device events made by the test; a pipe stands in for the netlink socket."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()
        self._waiting: list[DeviceEvent] = []

    def fileno(self) -> int:
        return self._reading

    def events(self) -> list[DeviceEvent]:
        os.read(self._reading, 4096)
        found, self._waiting = self._waiting, []
        return found

    def happen(self, *events: DeviceEvent) -> None:
        self._waiting += events
        os.write(self._writing, b"x")

    def close(self) -> None:
        os.close(self._reading)
        os.close(self._writing)


class Service:
    """Another service on the bus: answers calls from a table, and sends signals."""

    def __init__(self, bus: MessageBus) -> None:
        self.bus = bus
        self.calls: list[tuple[str, list[Any]]] = []
        self.answers: dict[str, Callable[[list[Any]], tuple[str, list[Any]]]] = {}
        bus.add_message_handler(self._answer)

    @classmethod
    async def start(cls, world: World, *names: str) -> Any:
        one = cls(await world.client())
        for name in names:
            await one.bus.request_name(name)
        return one

    def _answer(self, message: Message) -> Message | bool:
        if message.message_type is not MessageType.METHOD_CALL:
            return False
        answer = self.answers.get(message.member or "")
        if answer is None:
            return False
        self.calls.append((str(message.member), message.body))
        try:
            signature, body = answer(message.body)
        except ValueError as error:
            return Message.new_error(message, "org.example.Error", str(error))
        return Message.new_method_return(message, signature, body)

    async def signal(
        self, path: str, interface: str, member: str, signature: str, *body: Any, to: str = ""
    ) -> None:
        message = Message(
            message_type=MessageType.SIGNAL,
            destination=to or None,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=list(body),
        )
        await self.bus.send(message)
        # A round trip: the bus has passed it on.
        await self.bus.call(
            Message(
                destination="org.freedesktop.DBus",
                path="/org/freedesktop/DBus",
                interface="org.freedesktop.DBus",
                member="GetId",
            )
        )

    async def sleep(self, going: bool, to: str | None = None) -> None:
        interface, path = "org.freedesktop.login1.Manager", "/org/freedesktop/login1"
        await self.signal(path, interface, "PrepareForSleep", "b", going, to=to or "")

    async def switched(self, profile: str) -> None:
        interface = "com.redhat.tuned.control"
        await self.signal("/Tuned", interface, "profile_changed", "sbs", profile, True, "OK")


PPD = "org.freedesktop.UPower.PowerProfiles"
PPD_OLD = "net.hadess.PowerProfiles"


class FakePpd(Service):
    """power-profiles-daemon, as far as a hold goes."""

    def __init__(self, bus: MessageBus) -> None:
        super().__init__(bus)
        self.base: Path
        self.name = PPD
        self.held = False
        self.fails = False
        self.answers = {"HoldProfile": self._hold, "ReleaseProfile": self._release}

    def set(self, profile: str) -> None:
        words = {"balanced": "balance_performance", "performance": "performance"}
        for number in (0, 1):
            at = f"{CPUFREQ}/policy{number}/energy_performance_preference"
            write(self.base, at, words[profile])
        write(self.base, PLATFORM, profile)

    def _hold(self, body: list[Any]) -> tuple[str, list[Any]]:
        if self.fails or body[0] != "performance":
            raise ValueError("no")
        self.held = True
        self.set("performance")
        return "u", [0]  # tuned-ppd counts from 0

    def _release(self, body: list[Any]) -> tuple[str, list[Any]]:
        assert body == [0]
        self.held = False
        self.set("balanced")
        return "", []

    async def pick(self, world: World, profile: str) -> None:
        """A person picks a profile: holds end."""
        self.held = False
        self.set(profile)
        path = "/" + self.name.replace(".", "/")
        await self.signal(path, self.name, "ProfileReleased", "u", 0)


def write(base: Path, path: str, text: str) -> None:
    (base / path.lstrip("/")).write_text(f"{text}\n")


def read(world: World, path: str) -> str:
    return (world.base / path.lstrip("/")).read_text().strip()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    while not await condition():
        await asyncio.sleep(0.01)


async def drifted(bus: MessageBus) -> list[str]:
    found: list[str] = (await properties(bus))["Drift"]
    return found


async def settled(world: World) -> None:
    """Nothing the daemon heard of waits any more."""
    assert world.daemon is not None
    for _ in range(3):
        # The bus keeps the order: what it passed on before has arrived with this answer.
        await call(world.daemon._bus, BUS, "GetId", timeout_s=None)
        await asyncio.gather(*world.daemon._tasks)


async def state_of(bus: MessageBus, knob: str) -> set[tuple[str, str | None, str | None]]:
    status = await ask(bus, "Status")
    return {
        (each["state"], each.get("value"), each.get("by"))
        for each in status["drift"]
        if each["knob"] == knob
    }


def play(
    work: Callable[[World, MessageBus, Devices], Awaitable[None]],
    tmp_path: Path,
    address: str,
    *,
    enforce: bool = False,
) -> None:
    async def scene() -> None:
        base = tmp_path / "machine"
        devices = Devices()
        try:
            async with running(base, address) as (world, bus):
                await world.stop()
                world.devices = lambda root: devices
                config = f"enforce = {str(enforce).lower()}\n"
                (base / "etc/infertune/infertuned.toml").write_text(config)
                world.notified.clear()
                await world.start()
                await asyncio.wait_for(work(world, bus, devices), GENEROUS_S)
        finally:
            devices.close()

    (tmp_path / "machine").mkdir()
    asyncio.run(scene())


@pytest.fixture
def address(bus_address: str) -> str:  # noqa: F811
    return bus_address


# -- on the bus ---------------------------------------------------------------


def test_what_an_admin_changed_is_left_and_reported(tmp_path: Path, address: str) -> None:
    async def work(world: World, bus: MessageBus, devices: Devices) -> None:
        logind = await Service.start(world, "org.freedesktop.login1")
        await ask(bus, "Apply", "ssasu", "long", "cpu", [], 0)
        assert await drifted(bus) == []
        heard: list[list[str]] = []

        def hear(message: Message) -> None:
            if message.member == "PropertiesChanged" and "Drift" in message.body[1]:
                heard.append(message.body[1]["Drift"].value)

        bus.add_message_handler(hear)
        await bus.call(
            Message(
                destination="org.freedesktop.DBus",
                path="/org/freedesktop/DBus",
                interface="org.freedesktop.DBus",
                member="AddMatch",
                signature="s",
                body=["type='signal',member='PropertiesChanged'"],
            )
        )
        write(world.base, SWAPPINESS, "33")
        # No event comes of it; it is found when somebody asks, and told to everybody.
        assert await state_of(bus, "vm.swappiness") == {("external", "33", None)}
        assert await drifted(bus) == ["vm.swappiness"]
        assert ["vm.swappiness"] in heard
        # Known before the sleep, it stays his after it.
        await logind.sleep(True)
        await logind.sleep(False)
        await settled(world)
        assert read(world, SWAPPINESS) == "33"
        # And a revert leaves it.
        report = await ask(bus, "Revert")
        assert {i["outcome"] for i in report["items"] if i["knob"] == "vm.swappiness"} == {
            "conflict"
        }
        assert read(world, SWAPPINESS) == "33"
        assert await drifted(bus) == []
        await close(logind.bus)

    play(work, tmp_path, address)


def test_resume_sets_ours_again_and_keeps_the_originals(tmp_path: Path, address: str) -> None:
    async def work(world: World, bus: MessageBus, devices: Devices) -> None:
        original = values(world.base)
        logind = await Service.start(world, "org.freedesktop.login1")
        await ask(bus, "Apply", "ssasu", "long", "cpu", [], 0)
        tuned = values(world.base)
        # Changed silently, and never asked for: seen just before the machine sleeps.
        write(world.base, SWAPPINESS, "33")
        await logind.sleep(True)
        await settled(world)
        for path, text in ((PLATFORM, "low-power"), (GOVERNOR, "powersave")):
            write(world.base, path, text)
        write(world.base, f"{CPUFREQ}/policy1/energy_performance_preference", "default")
        # In between nobody's question makes the firmware's values somebody's.
        await ask(bus, "Status")
        await logind.sleep(False)
        await settled(world)
        assert values(world.base) == {**tuned, SWAPPINESS: "33\n"}
        assert await drifted(bus) == ["vm.swappiness"]
        assert await state_of(bus, "platform_profile") == {("restored", None, "resume")}
        # The firmware's words never become originals, and his value is still known as his.
        report = await ask(bus, "Revert")
        outcome = {item["knob"]: item["outcome"] for item in report["items"]}
        assert outcome["vm.swappiness"] == "conflict"
        assert values(world.base) == {**original, SWAPPINESS: "33\n"}
        await close(logind.bus)

    play(work, tmp_path, address)


def test_only_logind_may_say_that_the_machine_slept(tmp_path: Path, address: str) -> None:
    async def work(world: World, bus: MessageBus, devices: Devices) -> None:
        logind = await Service.start(world, "org.freedesktop.login1")
        liar = await Service.start(world)
        assert world.daemon is not None
        own, heard = world.daemon._bus, list[str | None]()
        own.add_message_handler(
            lambda message: heard.append(message.member) if message.sender != BUS.name else None
        )
        await ask(bus, "Apply", "ssasu", "long", "cpu", [], 0)
        write(world.base, PLATFORM, "balanced")
        await liar.sleep(False)
        await settled(world)
        assert heard == [], "what is told to everybody comes from whom it must come, or not at all"
        await liar.sleep(False, to=own.unique_name)
        await settled(world)
        assert heard == ["PrepareForSleep"]
        assert read(world, PLATFORM) == "balanced"
        await logind.sleep(False)
        await settled(world)
        assert read(world, PLATFORM) == "performance"
        await close(liar.bus)
        await close(logind.bus)

    play(work, tmp_path, address)


def test_a_cpu_that_goes_and_comes_back(tmp_path: Path, address: str) -> None:
    async def work(world: World, bus: MessageBus, devices: Devices) -> None:
        original = values(world.base)
        await ask(bus, "Apply", "ssasu", "long", "cpu", [], 0)
        tuned = values(world.base)
        policy = world.base / CPUFREQ.lstrip("/") / "policy1"
        away = world.base / "away"
        policy.rename(away)
        devices.happen(DeviceEvent("cpu", "offline", CPU1))
        await settled(world)
        assert await state_of(bus, "cpufreq.scaling_governor") == {("gone", None, None)}
        away.rename(policy)
        (policy / "affected_cpus").write_text("1\n")
        write(world.base, GOVERNOR, "powersave")
        write(world.base, f"{CPUFREQ}/policy1/energy_performance_preference", "default")
        # policy0 had its CPU all the time: what changed there was somebody's decision.
        (world.base / CPUFREQ.lstrip("/") / "policy0/affected_cpus").write_text("0\n")
        write(world.base, f"{CPUFREQ}/policy0/scaling_governor", "powersave")
        devices.happen(DeviceEvent("cpu", "online", CPU1))
        await settled(world)
        assert values(world.base) == {
            **tuned,
            f"{CPUFREQ}/policy0/scaling_governor": "powersave\n",
        }
        found = await state_of(bus, "cpufreq.scaling_governor")
        assert found == {("external", "powersave", None), ("restored", None, "hot-plug")}
        await ask(bus, "Revert")
        assert values(world.base) == original

    play(work, tmp_path, address)


def test_a_platform_profile_that_changed_is_somebodys_choice(tmp_path: Path, address: str) -> None:
    async def work(world: World, bus: MessageBus, devices: Devices) -> None:
        await ask(bus, "Apply", "ssasu", "long", "cpu", [], 0)
        write(world.base, PLATFORM, "balanced")
        devices.happen(DeviceEvent("platform-profile", "change", "/sys/class/platform-profile/x"))
        await settled(world)
        assert await drifted(bus) == ["platform_profile"]
        assert read(world, PLATFORM) == "balanced"

    play(work, tmp_path, address)


def test_enforce_sets_again_but_does_not_fight(tmp_path: Path, address: str) -> None:
    async def work(world: World, bus: MessageBus, devices: Devices) -> None:
        await ask(bus, "Apply", "ssasu", "low", "cpu", [], 0)
        for number in range(MOST + 1):
            write(world.base, SWAPPINESS, str(50 + number))
            devices.happen(DeviceEvent("module", "add", "/sys/module/x"))
            await settled(world)
            assert read(world, SWAPPINESS) == ("1" if number < MOST else str(50 + number))
        found = await state_of(bus, "vm.swappiness")
        assert found == {("contested", str(50 + MOST), None)}
        # The last value that was not ours is what a revert goes back to.
        await ask(bus, "Apply", "ssasu", "low", "cpu", [], 0)
        await ask(bus, "Revert")
        assert read(world, SWAPPINESS) == str(50 + MOST)

    play(work, tmp_path, address, enforce=True)


@pytest.mark.parametrize("enforce", [False, True])
def test_tuned_switches_its_profile(enforce: bool, tmp_path: Path, address: str) -> None:
    async def work(world: World, bus: MessageBus, devices: Devices) -> None:
        tuned = await Service.start(world, "com.redhat.tuned")
        await settled(world)
        await ask(bus, "Apply", "ssasu", "low", "cpu", [], 0)
        for number in range(2):
            write(world.base, SWAPPINESS, "77")
            await tuned.switched("balanced")
            await settled(world)
            assert read(world, SWAPPINESS) == ("1" if enforce and number == 0 else "77")
        state = "contested" if enforce else "external"
        found = await state_of(bus, "vm.swappiness")
        assert found == {(state, "77", "TuneD (profile balanced)")}
        await close(tuned.bus)

    play(work, tmp_path, address, enforce=enforce)


@pytest.mark.parametrize("name", [PPD, PPD_OLD])
def test_a_hold_instead_of_a_write(name: str, tmp_path: Path, address: str) -> None:
    async def work(world: World, bus: MessageBus, devices: Devices) -> None:
        original = values(world.base)
        ppd = await FakePpd.start(world, name)
        ppd.base, ppd.name = world.base, name
        await settled(world)
        report = await ask(bus, "Apply", "ssasu", "long", "cpu", [], 0)
        assert ppd.held
        held = [item for item in report["items"] if item["outcome"] == "held"]
        assert [item["knob"] for item in held] == ["platform_profile"]
        assert "'performance'" in held[0]["reason"]
        assert "keeps 'performance' for us: platform_profile" in str(await ask(bus, "Status"))
        await ask(bus, "Revert")
        assert not ppd.held
        assert values(world.base) == original

        # Another profile that does not ask for it: let go before anything is written.
        await ask(bus, "Apply", "ssasu", "long", "cpu", [], 0)
        await ask(bus, "Apply", "ssasu", "low", "cpu", [], 0)
        assert not ppd.held
        assert read(world, PLATFORM) == "balanced"

        # After a crash of ours the bus has ended the hold; the next daemon takes it again.
        await ask(bus, "Apply", "ssasu", "long", "cpu", [], 0)
        await world.die()
        ppd.held = False
        ppd.set("balanced")
        world.notified.clear()
        world.devices = lambda root: None
        await world.start()
        assert ppd.held
        assert await drifted(bus) == []
        await world.stop()
        assert not ppd.held
        assert values(world.base) == original
        await close(ppd.bus)

    play(work, tmp_path, address)


@pytest.mark.parametrize("enforce", [False, True])
def test_a_person_picks_another_power_profile(enforce: bool, tmp_path: Path, address: str) -> None:
    async def work(world: World, bus: MessageBus, devices: Devices) -> None:
        logind = await Service.start(world, "org.freedesktop.login1")
        ppd = await FakePpd.start(world, PPD)
        ppd.base = world.base
        await settled(world)
        await ask(bus, "Apply", "ssasu", "long", "cpu", [], 0)
        assert ppd.held
        # Somebody who only says so is not believed.
        liar = await Service.start(world)
        await liar.signal("/" + PPD.replace(".", "/"), PPD, "ProfileReleased", "u", 0)
        await settled(world)
        assert await drifted(bus) == []
        await ppd.pick(world, "balanced")
        await settled(world)
        assert await drifted(bus) == ["platform_profile"]
        # Neither a sleep nor an event nor enforce makes us fight it.
        await logind.sleep(True)
        await logind.sleep(False)
        devices.happen(DeviceEvent("drm", "change", "/sys/class/drm/card0"))
        await settled(world)
        assert not ppd.held
        assert read(world, PLATFORM) == "balanced"
        assert [member for member, _ in ppd.calls] == ["HoldProfile"]
        # An apply is a new decision.
        await ask(bus, "Apply", "ssasu", "long", "cpu", [], 0)
        assert ppd.held
        for each in (ppd, logind, liar):
            await close(each.bus)

    play(work, tmp_path, address, enforce=enforce)


def test_a_service_that_refuses_or_comes_late(tmp_path: Path, address: str) -> None:
    async def work(world: World, bus: MessageBus, devices: Devices) -> None:
        original = values(world.base)
        ppd = await FakePpd.start(world, PPD)
        ppd.base, ppd.fails = world.base, True
        await settled(world)
        report = await ask(bus, "Apply", "ssasu", "long", "cpu", [], 0)
        assert {item["outcome"] for item in report["items"]} == {"applied"}
        assert read(world, PLATFORM) == "performance"
        await close(ppd.bus)
        # It comes back, sets what it had in mind, and then gives us the hold.
        ppd = FakePpd(await world.client())
        ppd.base = world.base
        ppd.set("balanced")
        await ppd.bus.request_name(PPD)
        await settled(world)
        assert ppd.held
        assert await drifted(bus) == []
        # What was written before is in the journal and goes back from there.
        report = await ask(bus, "Apply", "ssasu", "long", "cpu", [], 0)
        assert {item["outcome"] for item in report["items"]} == {"already"}
        await ask(bus, "Revert")
        assert not ppd.held
        assert values(world.base) == original
        await close(ppd.bus)

    play(work, tmp_path, address)


@pytest.mark.parametrize("stays", [False, True])
def test_who_leaves_before_the_hold_is_there(stays: bool, tmp_path: Path, address: str) -> None:
    async def work(world: World, bus: MessageBus, devices: Devices) -> None:
        original = values(world.base)
        service, holder = await Service.start(world), await world.client()

        async def answer(question: Message) -> None:
            """Not before the holder has left the bus, and the daemon has heard of it."""
            if not stays:
                await close(holder)
            service.bus.send(Message.new_method_return(question, "u", [0]))

        def hear(message: Message) -> bool:
            if message.member == "HoldProfile":
                tasks.append(asyncio.create_task(answer(message)))
                return True
            return False

        tasks: list[asyncio.Task[None]] = []
        service.answers["ReleaseProfile"] = lambda body: ("", [])
        service.bus.add_message_handler(hear)
        await service.bus.request_name(PPD)
        await settled(world)
        with contextlib.suppress(EOFError, OSError):
            await ask(holder, "Hold", "sss", "long", "cpu", "x")
        await asyncio.gather(*tasks)
        await settled(world)

        async def as_wanted() -> bool:
            found: bool = (await properties(bus))["State"] == ("held" if stays else "idle")
            return found

        # The daemon asks the bus whether the holder is there once the profile is applied.
        await until(as_wanted)
        assert (values(world.base) == original) is not stays
        if stays:
            await close(holder)
        await close(service.bus)

    play(work, tmp_path, address)


# -- rules --------------------------------------------------------------------


def different(value: str | None = "33") -> Difference:
    return Difference("vm.swappiness", SWAPPINESS, value, "10")


def test_attempts_are_counted_within_a_window() -> None:
    clock = [0.0]
    owner = Ownership(enforce=True, now=lambda: clock[0])
    for _ in range(2 * MOST):
        clock[0] += WINDOW_S / MOST + 1
        decision = owner.decide([different()])
        assert decision.retake == {SWAPPINESS}
        owner.set_again(decision, {SWAPPINESS: "vm.swappiness"}, "event")
    for _ in range(MOST):
        decision = owner.decide([different()])
        owner.set_again(decision, {}, "event")
    assert owner.decide([different()]).leave == {SWAPPINESS}
    # Given up is given up, also when the window has passed.
    clock[0] += 10 * WINDOW_S
    assert owner.decide([different()]).leave == {SWAPPINESS}
    owner.forget()
    assert owner.decide([different()]).retake == {SWAPPINESS}


def test_a_value_that_was_gone_is_nobodys() -> None:
    owner = Ownership(enforce=False, now=lambda: 0.0)
    assert owner.decide([different()]).leave == {SWAPPINESS}
    assert owner.decide([different(None)]).leave == set()
    assert owner.knobs == ["vm.swappiness"]
    assert owner.decide([different("1")], was_reset=lambda _: True).reset == {SWAPPINESS}
    assert owner.decide([]).leave == set()
    assert owner.knobs == []


def test_which_files_an_event_starts_anew(tmp_path: Path) -> None:
    root = build(tmp_path)
    card = tmp_path / "sys/class/drm/card1"
    device = tmp_path / "sys/devices/pci0/0000:c5:00.0"
    device.mkdir(parents=True)
    card.mkdir(parents=True)
    (card / "device").symlink_to(device)
    (device / "power_dpm_force_performance_level").write_text("auto\n")
    level = "/sys/class/drm/card1/device/power_dpm_force_performance_level"

    def anew(path: str, *events: DeviceEvent) -> bool:
        return started_anew(root, events)(path)

    gpu = "/sys/class/drm/card1"
    assert anew(level, DeviceEvent("drm", "add", gpu))
    assert anew(level, DeviceEvent("drm", "change", gpu, wedged=True))
    assert not anew(level, DeviceEvent("drm", "change", gpu))  # a monitor
    assert not anew(level, DeviceEvent("cpu", "online", CPU1))
    (tmp_path / CPUFREQ.lstrip("/") / "policy0/affected_cpus").write_text("0 1\n")
    shared = f"{CPUFREQ}/policy0/scaling_governor"
    assert not anew(shared, DeviceEvent("cpu", "online", CPU1))
    both = [DeviceEvent("cpu", "online", f"/sys/devices/system/cpu/cpu{n}") for n in (0, 1)]
    assert anew(shared, *both)
    assert not anew(shared, DeviceEvent("cpu", "offline", CPU1))
    assert anew(PLATFORM, DeviceEvent("platform-profile", "add", "/sys/x"))
    assert not anew(SWAPPINESS, *both, DeviceEvent("platform-profile", "add", "/sys/x"))


def test_batteries_that_report_their_level_are_no_news() -> None:
    supplies = PowerSupplies()
    mains = DeviceEvent("power_supply", "change", "/sys/ac", online="1")
    assert supplies.changed([mains])
    assert not supplies.changed([mains])
    assert not supplies.changed([DeviceEvent("power_supply", "change", "/sys/battery")])
    assert supplies.changed([DeviceEvent("power_supply", "change", "/sys/ac", online="0")])


@pytest.mark.parametrize("tuner", TUNERS, ids=lambda tuner: tuner.id)
def test_what_a_tuner_writes_are_knobs(tuner: Any) -> None:
    from fnmatch import fnmatchcase

    for pattern in tuner.writes:
        assert any(fnmatchcase(knob, pattern) for knob in KNOBS), pattern


def test_what_is_known_of_the_machine_is_forgotten_when_it_may_be_untrue(
    tmp_path: Path, address: str
) -> None:
    async def work(world: World, bus: MessageBus, devices: Devices) -> None:
        async def planned() -> tuple[str, str]:
            plan = await ask(bus, "Plan", "ssas", "long", "cpu", [])
            [outcome] = [
                item["outcome"] for item in plan["items"] if item["knob"] == "platform_profile"
            ]
            return outcome, " ".join(plan["notes"])

        assert await planned() == ("set", "")
        product = world.base / "sys/class/dmi/id/product_name"
        product.parent.mkdir(parents=True)
        product.write_text("ROG Flow Z13 GZ302EA\n")
        (world.base / "proc/4711").mkdir(parents=True)
        (world.base / "proc/4711/comm").write_text("tuned\n")
        assert await planned() == ("set", "")
        devices.happen(DeviceEvent("module", "add", "/sys/module/asus_wmi"))
        await settled(world)
        assert await planned() == ("refused", "")
        tuned = await Service.start(world, "com.redhat.tuned")
        await settled(world)
        assert (await planned())[1].startswith("TuneD is running")
        await close(tuned.bus)

    play(work, tmp_path, address)


def test_a_plan_says_who_else_sets_a_knob(tmp_path: Path) -> None:
    from infertune.engine.state import make_plan
    from infertune.host.machine import read_machine
    from support import LONG, desired

    root = build(tmp_path)
    (tmp_path / "proc/4711").mkdir()
    (tmp_path / "proc/4711/comm").write_text("tuned\n")
    (tmp_path / "etc/tuned").mkdir(parents=True)
    (tmp_path / "etc/tuned/active_profile").write_text("throughput-performance\n")
    notes = make_plan(root, read_machine(root), desired("long", LONG)).notes
    assert " ".join(notes) == (
        "TuneD (profile throughput-performance) is running and may set "
        "transparent_hugepage.enabled, vm.swappiness, cpufreq.scaling_governor, "
        "platform_profile as well"
    )
    (tmp_path / "etc/tuned/active_profile").write_text("a\x1b[2Jb\n")
    assert "\x1b" not in str(make_plan(root, read_machine(root), desired("long", LONG)).notes)
    (tmp_path / "proc/4711/comm").write_text("bash\n")
    (tmp_path / "usr/lib/systemd/system").mkdir(parents=True)
    (tmp_path / "usr/lib/systemd/system/tuned.service").touch()
    assert make_plan(root, read_machine(root), desired("long", LONG)).notes == ()


def test_a_signal_that_comes_after_somebody_asked_still_names_who_it_was() -> None:
    clock = [0.0]
    owner = Ownership(enforce=False, now=lambda: clock[0])
    theirs = Difference("vm.swappiness", SWAPPINESS, "33", "10")
    owner.decide([theirs])
    clock[0] = 1.0
    owner.decide([theirs], by="TuneD")
    assert owner.document()[0]["by"] == "TuneD"
    # What was somebody's long before is not put down to whoever comes next.
    owner.forget()
    owner.decide([theirs])
    clock[0] = 60.0
    owner.decide([theirs], by="TuneD")
    assert owner.document()[0]["by"] is None
