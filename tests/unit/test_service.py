# SPDX-License-Identifier: Apache-2.0
"""The daemon on a private bus, on a recorded machine: who may, what it answers, what it keeps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import pytest

from infertune import __version__
from infertune.base.errors import Failed
from infertune.base.locks import DAEMON_LOCK
from infertune.base.root import Root
from infertune.engine.session import session
from support import GENEROUS_S, LONG, build, values

dbus_fast = pytest.importorskip("dbus_fast", reason="extra 'daemon' is not installed")
if shutil.which("dbus-daemon") is None:
    pytest.skip("dbus-daemon is not installed", allow_module_level=True)

from dbus_fast import BusType, Message, MessageType, Variant  # noqa: E402
from dbus_fast.aio import MessageBus  # noqa: E402
from dbus_fast.annotations import DBusSignature  # noqa: E402
from dbus_fast.service import ServiceInterface, dbus_method  # noqa: E402

from infertune.service import callers, calls, keeper, peers  # noqa: E402
from infertune.service.daemon import Daemon  # noqa: E402
from infertune.service.keeper import Keeper, boottime  # noqa: E402
from infertune.service.names import (  # noqa: E402
    ACTION_APPLY,
    ACTION_BOOT,
    ACTION_READ,
    ACTION_SERVE,
    BUS_NAME,
    ERROR,
    INTERFACE,
    OBJECT_PATH,
    ROOT_NAME,
)
from infertune.service.wire import from_bus  # noqa: E402

REPOSITORY = Path(__file__).parents[2]

CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "">
<busconfig>
  <type>system</type>
  <listen>unix:path={directory}/bus</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_type="method_call"/>
    <allow send_destination="*"/><allow receive_sender="*"/>
  </policy>
</busconfig>
"""

PROFILE = 'description = "test"\n[now]\n' + "".join(
    f'"{knob}" = {value!r}\n'.replace("'", '"') for knob, value in LONG.items()
)
"""LONG of support.py as a file."""


@contextlib.contextmanager
def bus_of(config: str) -> Iterator[str]:
    """A bus of its own; its address."""
    # Not in tmp_path: another user must reach the socket, and each start of pytest closes
    # the directory above it to others.
    with tempfile.TemporaryDirectory(prefix="infertune-bus-") as directory:
        os.chmod(directory, 0o755)
        file = Path(directory) / "config"
        file.write_text(config.format(directory=directory))
        process = subprocess.Popen(
            ["dbus-daemon", f"--config-file={file}", "--print-address", "--nofork"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        with process.stdout:
            yield process.stdout.readline().strip()
            process.terminate()
            process.wait(GENEROUS_S)


@pytest.fixture
def bus_address() -> Iterator[str]:
    with bus_of(CONFIG) as address:
        yield address


class World:
    """A machine, its bus, its daemon, and somebody who calls."""

    def __init__(self, base: Path, address: str) -> None:
        self.base = base
        self.root: Root = build(base)
        profiles = base / "etc/infertune/profiles"
        profiles.mkdir(parents=True)
        (profiles / "long.toml").write_text(PROFILE)
        (profiles / "low.toml").write_text('description = "test"\n[now]\nvm.swappiness = 1\n')
        self.address = address
        self.notified: list[str] = []
        self.task: asyncio.Task[bool] | None = None
        self.daemon: Daemon | None = None
        self.devices: Any = lambda root: None
        self.environment: dict[str, str] = {}

    async def start(self) -> None:
        receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        path = f"{self.base}/notify"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        receiver.bind(path)
        receiver.setblocking(False)
        self.environment |= {"DBUS_SYSTEM_BUS_ADDRESS": self.address, "NOTIFY_SOCKET": path}
        self.daemon = Daemon(self.root, self.environment, self.devices)
        self.task = asyncio.create_task(self.daemon.run())
        loop = asyncio.get_running_loop()
        try:
            while not any("READY=1" in text for text in self.notified):
                reading = asyncio.create_task(loop.sock_recv(receiver, 4096))
                done, _ = await asyncio.wait({reading, self.task}, return_when="FIRST_COMPLETED")
                if self.task in done:
                    reading.cancel()
                    self.task.result()
                    raise AssertionError("the daemon ended before it was ready")
                self.notified.append(reading.result().decode())
        finally:
            receiver.close()

    async def stop(self) -> None:
        assert self.daemon is not None
        assert self.task is not None
        self.daemon.stop()
        await asyncio.wait_for(self.task, GENEROUS_S)

    async def die(self) -> None:
        """As kill -9 would: no word to anybody, nothing put back."""
        assert self.daemon is not None
        assert self.task is not None
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        await self.daemon.leave()

    async def client(self) -> MessageBus:
        return await MessageBus(bus_address=self.address, bus_type=BusType.SYSTEM).connect()


async def close(bus: MessageBus) -> None:
    bus.disconnect()
    await bus.wait_for_disconnect()


async def ask(
    bus: MessageBus, member: str, signature: str = "", *arguments: Any, to: str = BUS_NAME
) -> Any:
    reply = await bus.call(
        Message(
            destination=to,
            path=OBJECT_PATH,
            interface=INTERFACE,
            member=member,
            signature=signature,
            body=list(arguments),
        )
    )
    assert reply is not None
    if reply.message_type is MessageType.ERROR:
        raise RuntimeError(f"{reply.error_name}: {reply.body[0]}")
    return from_bus(reply.body[0]) if reply.body else None


async def properties(bus: MessageBus) -> dict[str, Any]:
    reply = await bus.call(
        Message(
            destination=BUS_NAME,
            path=OBJECT_PATH,
            interface="org.freedesktop.DBus.Properties",
            member="GetAll",
            signature="s",
            body=[INTERFACE],
        )
    )
    assert reply is not None
    found: dict[str, Any] = from_bus(reply.body[0])
    return found


@contextlib.asynccontextmanager
async def running(base: Path, address: str) -> AsyncIterator[tuple[World, MessageBus]]:
    world = World(base, address)
    await world.start()
    bus = await world.client()
    try:
        yield world, bus
    finally:
        await close(bus)
        if world.task and not world.task.done():
            await world.stop()


def scenario(
    work: Callable[[World, MessageBus], Awaitable[None]], tmp_path: Path, address: str
) -> None:
    async def play() -> None:
        async with running(tmp_path / "machine", address) as (world, bus):
            await asyncio.wait_for(work(world, bus), GENEROUS_S)

    (tmp_path / "machine").mkdir()
    asyncio.run(play())


def test_apply_verify_status_revert(tmp_path: Path, bus_address: str) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        original = values(world.base)
        plan = await ask(bus, "Plan", "ssas", "long", "cpu", [])
        assert plan["counts"] == {"set": 5}
        assert values(world.base) == original
        report = await ask(bus, "Apply", "ssasu", "long", "cpu", [], 0)
        assert "failed" not in report
        assert {item["outcome"] for item in report["items"]} == {"applied"}
        assert values(world.base)["/proc/sys/vm/swappiness"] == "10\n"
        assert not (await ask(bus, "Verify", "ssas", "long", "cpu", []))["differs"]
        assert (await ask(bus, "Status"))["state"] == "applied"
        now = await properties(bus)
        assert now == {
            "Version": __version__,
            "State": "applied",
            "Profile": "long",
            "Backend": "cpu",
            "ConfirmBy": [],
            "Drift": [],
        }
        report = await ask(bus, "Revert")
        assert {item["outcome"] for item in report["items"]} == {"restored"}
        assert values(world.base) == original

    scenario(work, tmp_path, bus_address)


def test_ready_comes_after_the_name(tmp_path: Path, bus_address: str) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        told = "\n".join(world.notified).splitlines()
        assert told.index("STATUS=taking its name on the bus") < told.index("READY=1")
        # And the name is there: a second daemon cannot have it.
        second = Daemon(world.root, {"DBUS_SYSTEM_BUS_ADDRESS": world.address})
        with pytest.raises(Exception, match="another infertuned is running"):
            await second.run()
        await second.leave()

    scenario(work, tmp_path, bus_address)


def test_stop_puts_back_and_death_does_not(tmp_path: Path, bus_address: str) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        original = values(world.base)
        await ask(bus, "Apply", "ssasu", "long", "cpu", [], 0)
        tuned = values(world.base)
        await world.die()
        assert values(world.base) == tuned
        world.notified.clear()
        await world.start()
        # Settled values are kept by the next daemon, which knows what is applied.
        assert values(world.base) == tuned
        assert (await properties(bus))["Profile"] == "long"
        await world.stop()
        assert values(world.base) == original

    scenario(work, tmp_path, bus_address)


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """From now on it is so much later for whoever keeps a deadline."""
    monkeypatch.setattr(keeper, "boottime", lambda: boottime() + seconds)


async def expire(world: World) -> None:
    """As when the kernel's timer runs out."""
    assert world.daemon is not None
    world.daemon._expired()
    await asyncio.gather(*world.daemon._tasks)


@pytest.mark.real_time
def test_confirm_within(tmp_path: Path, bus_address: str) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        original = values(world.base)
        begin = boottime()
        await ask(bus, "Apply", "ssasu", "long", "cpu", [], 1)
        while (await properties(bus))["State"] != "idle":
            await asyncio.sleep(0.02)
        assert boottime() - begin > 0.9
        assert values(world.base) == original

    scenario(work, tmp_path, bus_address)


def test_what_is_confirmed_stays(
    tmp_path: Path, bus_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        begin = boottime()
        await ask(bus, "Apply", "ssasu", "long", "cpu", [], 600)
        now = await properties(bus)
        assert now["State"] == "unconfirmed"
        assert 600 <= now["ConfirmBy"][0] - begin < 600 + GENEROUS_S
        assert await ask(bus, "Confirm")
        assert not await ask(bus, "Confirm")
        assert (await properties(bus))["ConfirmBy"] == []
        later(monkeypatch, 700)
        await expire(world)
        assert values(world.base)["/proc/sys/vm/swappiness"] == "10\n"

    scenario(work, tmp_path, bus_address)


def test_a_deadline_survives_the_daemon(
    tmp_path: Path, bus_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        original = values(world.base)
        await ask(bus, "Apply", "ssasu", "long", "cpu", [], 600)
        await world.die()
        later(monkeypatch, 700)
        assert values(world.base) != original
        world.notified.clear()
        await world.start()
        assert values(world.base) == original

    scenario(work, tmp_path, bus_address)


def test_holds_end_with_their_owner(tmp_path: Path, bus_address: str) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        original = values(world.base)
        await ask(bus, "Apply", "ssasu", "low", "cpu", [], 0)
        low = values(world.base)
        other = await world.client()
        cookie = await ask(other, "Hold", "sss", "long", "cpu", "a benchmark")
        assert len(cookie) == 32
        assert (await properties(bus))["State"] == "held"
        assert "a benchmark" in str((await ask(bus, "Status"))["notes"])
        with pytest.raises(RuntimeError, match="no such hold of yours"):
            await ask(bus, "Release", "s", cookie)
        with pytest.raises(RuntimeError, match="is held by"):
            await ask(bus, "Apply", "ssasu", "low", "cpu", [], 0)
        await close(other)
        while (await properties(bus))["State"] == "held":
            await asyncio.sleep(0.02)
        assert values(world.base) == low
        # By hand, and to the untuned machine.
        await ask(bus, "Revert")
        cookie = await ask(bus, "Hold", "sss", "long", "cpu", "again")
        assert values(world.base) != original
        await ask(bus, "Release", "s", cookie)
        assert values(world.base) == original

    scenario(work, tmp_path, bus_address)


@pytest.mark.parametrize("noticed", ["by a turn", "by the watchdog"])
def test_a_hold_ends_though_the_bus_did_not_say_who_left(
    noticed: str, tmp_path: Path, bus_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bus drops a signal for a connection whose queue is full."""

    async def scene() -> None:
        monkeypatch.setattr(Daemon, "_heard_of", lambda self, name, owner: None)
        world = World(tmp_path / "machine", bus_address)
        original = values(world.base)
        if noticed == "by the watchdog":
            world.environment = {"WATCHDOG_USEC": "200000", "WATCHDOG_PID": str(os.getpid())}
        await world.start()
        bus, holder, gone = [await world.client() for _ in range(3)]
        await ask(bus, "Hold", "sss", "low", "cpu", "stays")
        low = values(world.base)
        await ask(gone, "Hold", "sss", "long", "cpu", "leaves")
        await close(gone)
        if noticed == "by a turn":
            await asyncio.sleep(0.1)
            assert values(world.base) != low, "nobody noticed so far"
            with pytest.raises(RuntimeError, match="no such hold of yours"):
                await ask(holder, "Release", "s", "x")
        while values(world.base) != low:
            await asyncio.sleep(0.05)
        assert (await properties(bus))["Profile"] == "low"
        await close(bus)
        if noticed == "by the watchdog":
            while (await properties(holder))["State"] != "idle":
                await asyncio.sleep(0.05)
            assert values(world.base) == original
        await close(holder)
        await world.stop()

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


def test_holds_are_limited_and_do_not_survive_the_daemon(tmp_path: Path, bus_address: str) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        original = values(world.base)
        for _ in range(16):
            await ask(bus, "Hold", "sss", "low", "cpu", "x")
        with pytest.raises(RuntimeError, match="16 holds already"):
            await ask(bus, "Hold", "sss", "low", "cpu", "x")
        await world.die()
        world.notified.clear()
        await world.start()
        assert values(world.base) == original

    scenario(work, tmp_path, bus_address)


BAD_NAMES = [
    "../long",
    "long\n",
    "\x1b[2J",
    "LONG",
    "",
    "a" * 65,
    "x" * 60_000,
    "lo ng",
    "/etc/passwd",
]


def test_names_that_are_none(tmp_path: Path, bus_address: str) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        original = values(world.base)
        for name in BAD_NAMES:
            with pytest.raises(
                RuntimeError, match=rf"{ERROR}\.InvalidArgument: .{{,80}} is not a profile name"
            ):
                await ask(bus, "Apply", "ssasu", name, "cpu", [], 0)
            for member in ("Serve", "Stop"):
                with pytest.raises(
                    RuntimeError, match=rf"{ERROR}\.InvalidArgument: not a server name"
                ):
                    await ask(bus, member, "s", name)
        with pytest.raises(RuntimeError, match="InvalidArgument: there is no profile"):
            await ask(bus, "Apply", "ssasu", "nothing-of-the-kind", "cpu", [], 0)
        with pytest.raises(RuntimeError, match="not a backend"):
            await ask(bus, "Apply", "ssasu", "long", "cuda", [], 0)
        with pytest.raises(RuntimeError, match="no such knob"):
            await ask(bus, "Apply", "ssasu", "long", "cpu", ["../x"], 0)
        with pytest.raises(RuntimeError, match="at the most"):
            await ask(bus, "Apply", "ssasu", "long", "cpu", [], 2**32 - 1)
        with pytest.raises(RuntimeError, match="printable"):
            await ask(bus, "Hold", "sss", "long", "cpu", "a\nb")
        assert values(world.base) == original

    scenario(work, tmp_path, bus_address)


def test_a_bug_tells_the_caller_its_kind_and_no_more(
    tmp_path: Path, bus_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dbus-fast would answer with a traceback."""

    def broken(self: Keeper) -> dict[str, Any]:
        raise ValueError("/etc/shadow\nroot:secret")

    monkeypatch.setattr(Keeper, "status", broken)

    async def work(world: World, bus: MessageBus) -> None:
        with pytest.raises(RuntimeError) as caught:
            await ask(bus, "Status")
        assert str(caught.value) == f"{ERROR}.Failed: a bug: ValueError"

    scenario(work, tmp_path, bus_address)


def test_a_failed_apply_says_what_was_rolled_back(tmp_path: Path, bus_address: str) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        original = values(world.base)
        (world.base / "etc/infertune/profiles/long.toml").write_text(
            'description = "x"\n[now]\nvm.swappiness = 7\n'
            "ksm.run = { value = 0, required = true }\n"
        )
        report = await ask(bus, "Apply", "ssasu", "long", "cpu", [], 0)
        assert report["failed"].startswith("ksm.run: absent, but")
        assert values(world.base) == original
        assert (await properties(bus))["State"] == "idle"

    scenario(work, tmp_path, bus_address)


def test_introspection_is_what_is_documented(tmp_path: Path, bus_address: str) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        found = await bus.introspect(BUS_NAME, OBJECT_PATH)
        node = found.to_xml()
        ours = next(each for each in node if each.get("name") == INTERFACE)
        written = ElementTree.parse(INTERFACE_XML).getroot()
        expected = next(each for each in written if each.get("name") == INTERFACE)
        assert _shape(ours) == _shape(expected)

    scenario(work, tmp_path, bus_address)


def _shape(element: ElementTree.Element) -> Any:
    attributes = {k: v for k, v in element.attrib.items() if k != "name" or element.tag != "arg"}
    return (element.tag, attributes, sorted((_shape(each) for each in element), key=str))


BEFORE = {
    "Adopt": "sssss",
    "Apply": "ssasu",
    "ApplyWhileServing": "ssasu",
    "Confirm": "",
    "GiveBack": "s",
    "Hold": "sss",
    "Plan": "ssas",
    "PlanAdoption": "sssss",
    "Release": "s",
    "Revert": "",
    "Serve": "s",
    "Servers": "",
    "Status": "",
    "Stop": "s",
    "Verify": "ssas",
}
"""What a client of the version before calls; a method that takes more is another method."""


def test_a_client_of_the_version_before_is_understood(tmp_path: Path, bus_address: str) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        given = {member: values for member, _, values in CALLS}
        for member, signature in BEFORE.items():
            answer = "done"
            try:
                await ask(bus, member, signature, *given[member])
            except RuntimeError as error:
                answer = str(error)
            # There is no systemd on this bus, and nothing is held: errors are ours.
            assert answer.startswith(("done", f"{ERROR}.")), (member, answer)

    scenario(work, tmp_path, bus_address)


INTERFACE_XML = REPOSITORY / "systemd" / f"{INTERFACE}.xml"
POLICY = REPOSITORY / "systemd" / "org.infertune.policy"

WHO_MAY = {
    "Plan": ACTION_READ,
    "Verify": ACTION_READ,
    "Status": ACTION_READ,
    "Servers": ACTION_READ,
    "Apply": ACTION_APPLY,
    "Revert": ACTION_APPLY,
    "ApplyWhileServing": ACTION_APPLY,
    "Confirm": ACTION_APPLY,
    "Hold": ACTION_APPLY,
    "Release": ACTION_APPLY,
    "Serve": ACTION_SERVE,
    "Stop": ACTION_SERVE,
    "PlanAdoption": ACTION_READ,
    "PlanAdoption of a user": ACTION_SERVE,
    "Adopt": ACTION_SERVE,
    "AdoptWith": ACTION_SERVE,
    "PlanAdoptionWith": ACTION_READ,
    "PlanAdoptionWith of a user": ACTION_SERVE,
    "GiveBack": ACTION_SERVE,
}
"""What polkit must be asked, by method."""

ARGUMENTS = {
    "profile": "long",
    "backend": "cpu",
    "without": [],
    "confirm_within_s": 0,
    "idle_seconds": 60,
    "reason": "x",
    "cookie": "x",
    "name": "one",
    "unit": "ollama.service",
    "user": "",
    "port": 11434,
    "engine": "ollama",
    "admission": "",
    "memory": 0,
}
"""What a method is called with, by the argument's name in the introspection."""


def _calls() -> list[tuple[str, str, list[Any]]]:
    """A call of every method that the introspection names."""
    found = []
    for method in ElementTree.parse(INTERFACE_XML).iterfind(
        f"interface[@name='{INTERFACE}']/method"
    ):
        given = method.findall("arg[@direction='in']")
        signature = "".join(each.attrib["type"] for each in given)
        found.append(
            (
                method.attrib["name"],
                signature,
                [ARGUMENTS.get(each.attrib["name"]) for each in given],
            )
        )
    of_a_user = [
        (f"{member} of a user", signature, [values[0], "1000", *values[2:]])
        for member, signature, values in found
        if member.startswith("PlanAdoption")
    ]
    return [*found, *of_a_user]


CALLS = _calls()


def test_every_method_has_an_action() -> None:
    assert {member for member, _, _ in CALLS} == WHO_MAY.keys()


def test_no_argument_is_a_path_a_command_or_options() -> None:
    """A new one belongs here only if it picks from what is installed, or is merely shown."""
    given = ElementTree.parse(INTERFACE_XML).iterfind(".//arg[@direction='in']")
    assert {(each.attrib["name"], each.attrib["type"]) for each in given} == {
        ("profile", "s"),
        ("backend", "s"),
        ("without", "as"),
        ("confirm_within_s", "u"),
        ("idle_seconds", "u"),
        ("reason", "s"),
        ("cookie", "s"),
        ("name", "s"),
        ("unit", "s"),
        ("user", "s"),
        ("port", "u"),
        ("engine", "s"),
        ("admission", "s"),
        ("memory", "t"),
    }


def test_whoever_sits_at_the_machine_may_change_nothing_unasked() -> None:
    found = {each.attrib["id"]: each for each in ElementTree.parse(POLICY).iter("action")}
    assert found.keys() == {ACTION_READ, ACTION_APPLY, ACTION_SERVE, ACTION_BOOT}
    for action, element in found.items():
        defaults = element.find("defaults")
        assert defaults is not None
        assert {each.tag for each in defaults} == {"allow_any", "allow_inactive", "allow_active"}
        if action != ACTION_READ:
            for each in defaults:
                assert each.text in ("no", "auth_admin", "auth_admin_keep"), (action, each.tag)


async def _call_all(address: str) -> str:
    bus = await MessageBus(bus_address=address, bus_type=BusType.SYSTEM).connect()
    lines = []
    for member, signature, arguments in CALLS:
        try:
            await ask(bus, member.partition(" ")[0], signature, *arguments)
            lines.append(f"{member}=ok")
        except RuntimeError as error:
            lines.append(f"{member}={str(error).partition(':')[0]}")
    return "\n".join(lines)


S = Annotated[str, DBusSignature("s")]
U = Annotated[int, DBusSignature("u")]
Subject = Annotated[tuple[str, dict[str, Any]], DBusSignature("(sa{sv})")]
Details = Annotated[dict[str, str], DBusSignature("a{ss}")]
Answer = Annotated[tuple[bool, bool, dict[str, str]], DBusSignature("(bba{ss})")]


class FakePolkit(ServiceInterface):
    """Answers what the test wants, and remembers the questions."""

    def __init__(self, answer: Any) -> None:
        super().__init__("org.freedesktop.PolicyKit1.Authority")
        self.answer = answer
        self.asked: list[tuple[str, str]] = []
        self.subjects: list[tuple[str, dict[str, Any]]] = []

    @dbus_method()
    def CheckAuthorization(
        self, subject: Subject, action: S, details: Details, flags: U, cancel: S
    ) -> Answer:
        kind, fields = subject
        # Judged by the test: whatever goes wrong in here is only an error to who asks.
        self.subjects.append((kind, {name: each.value for name, each in fields.items()}))
        self.asked.append((str(self.subjects[-1][1].get("name")), action))
        if isinstance(self.answer, Exception):
            raise self.answer
        return (self.answer(action), False, {})


async def _as_nobody(world: World) -> dict[str, str]:
    """All calls from a process of another user: what each was answered."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.write(writing, asyncio.run(_call_all(world.address)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answers:
        text = await asyncio.get_running_loop().run_in_executor(None, answers.read)
    os.waitpid(pid, 0)
    return dict(line.split("=", 1) for line in text.splitlines())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.parametrize("polkit", ["absent", "no", "broken", "read only", "yes"])
def test_who_may(polkit: str, tmp_path: Path, bus_address: str) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        original = values(world.base)
        answers: dict[str, Any] = {
            "no": lambda action: False,
            "broken": ValueError("no"),
            "read only": lambda action: action == "org.infertune.read",
            "yes": lambda action: True,
        }
        helper = None
        fake = None
        if polkit in answers:
            fake = FakePolkit(answers[polkit])
            helper = await world.client()
            helper.export("/org/freedesktop/PolicyKit1/Authority", fake)
            await helper.request_name("org.freedesktop.PolicyKit1")
        found = await _as_nobody(world)
        assert found.keys() == WHO_MAY.keys()
        denied = f"{ERROR}.NotAuthorized"
        for member, answer in found.items():
            if polkit == "yes":
                assert answer != denied, member
            elif polkit == "read only" and WHO_MAY[member] == ACTION_READ:
                # There is no systemd on this bus that could be asked for servers.
                asks_systemd = member in ("Servers", "PlanAdoption", "PlanAdoptionWith")
                assert answer == (f"{ERROR}.Failed" if asks_systemd else "ok"), member
            else:
                assert answer == denied, member
        if polkit != "yes":
            assert values(world.base) == original
        if fake and helper:
            # By the name on the bus, which is the caller's own as long as it is connected.
            assert {kind for kind, _ in fake.subjects} == {"system-bus-name"}
            assert all(fields.keys() == {"name"} for _, fields in fake.subjects)
            [caller] = {name for name, _ in fake.asked}
            assert caller.startswith(":")
            assert world.daemon is not None
            others = (bus, helper, world.daemon._bus)
            assert caller not in [each.unique_name for each in others]
            assert [action for _, action in fake.asked] == [WHO_MAY[name] for name, _, _ in CALLS]
            await close(helper)

    scenario(work, tmp_path, bus_address)


def test_an_answer_of_the_bus_that_is_lost_is_asked_for_again(
    tmp_path: Path, bus_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a connection whose queue is full the bus drops its own answers, too."""

    async def work(world: World, bus: MessageBus) -> None:
        monkeypatch.setattr(callers, "_TIMEOUTS_S", (0.1, GENEROUS_S))
        monkeypatch.setattr(peers, "_TIMEOUT_S", 0.1)
        lost: list[str] = []

        async def call(to: MessageBus, remote: Any, member: str, *about: Any, **more: Any) -> Any:
            if member not in lost or member == "NameHasOwner":
                lost.append(member)
                raise TimeoutError
            return await calls.call(to, remote, member, *about, **more)

        monkeypatch.setattr(callers, "call", call)
        monkeypatch.setattr(peers, "call", call)
        await ask(bus, "Hold", "sss", "low", "cpu", "x")
        assert lost == ["GetConnectionUnixUser", "NameHasOwner"]
        assert (await properties(bus))["State"] == "held", "who was not said to have left is there"
        cookie = await ask(bus, "Hold", "sss", "low", "cpu", "x")
        await ask(bus, "Release", "s", cookie)

    scenario(work, tmp_path, bus_address)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_what_is_over_the_bounds_is_busy_and_root_is_not(
    tmp_path: Path, bus_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        monkeypatch.setattr(callers, "MAX_CALLS_OF_ONE", 0)
        found = await _as_nobody(world)
        assert found.keys() == WHO_MAY.keys()
        assert set(found.values()) == {f"{ERROR}.Busy"}
        await ask(bus, "Status")

    scenario(work, tmp_path, bus_address)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_every_reading_of_others_waits_for_its_turn(
    tmp_path: Path, bus_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        turns = 0

        async def read(self: callers.Callers) -> None:
            nonlocal turns
            turns += 1

        monkeypatch.setattr(callers.Callers, "read", read)
        helper = await world.client()
        helper.export("/org/freedesktop/PolicyKit1/Authority", FakePolkit(lambda action: True))
        await helper.request_name("org.freedesktop.PolicyKit1")
        await _as_nobody(world)
        assert turns == list(WHO_MAY.values()).count(ACTION_READ)
        await ask(bus, "Status")
        assert turns == list(WHO_MAY.values()).count(ACTION_READ), "root waits for nobody"
        await close(helper)

    scenario(work, tmp_path, bus_address)


def test_the_unit_has_an_end() -> None:
    unit = (REPOSITORY / "systemd/infertune.service").read_text().splitlines()
    assert "MemoryMax=256M" in unit
    assert "TasksMax=16" in unit


def test_not_applied_again_after_an_unclean_shutdown(tmp_path: Path, bus_address: str) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        original = values(world.base)
        (world.base / "etc/infertune/infertuned.toml").write_text('profile = "long"\n')
        await ask(bus, "Apply", "ssasu", "long", "cpu", [], 0)
        await world.die()
        # The machine goes off and comes up again: another boot, fresh values, an empty /run.
        from support import FILES

        for path, text in FILES.items():
            (world.base / path.lstrip("/")).write_text(text)
        (world.base / "proc/sys/kernel/random/boot_id").write_text("another\n")
        shutil.rmtree(world.base / "run/infertune")
        world.notified.clear()
        await world.start()
        now = values(world.base)
        now["/proc/sys/kernel/random/boot_id"] = original["/proc/sys/kernel/random/boot_id"]
        assert now == original
        assert (await properties(bus))["State"] == "idle"
        assert "stopped without warning while 'long'" in str((await ask(bus, "Status"))["notes"])
        # By hand it may be applied, and after a clean stop it is applied at start.
        await ask(bus, "Apply", "ssasu", "long", "cpu", [], 0)
        await world.stop()
        world.notified.clear()
        await world.start()
        assert (await properties(bus))["Profile"] == "long"

    scenario(work, tmp_path, bus_address)


def test_many_calls_leave_nothing_behind(tmp_path: Path, bus_address: str, thorough: bool) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        async def some() -> None:
            for number in range(60 if thorough else 12):
                await ask(bus, "Status")
                with contextlib.suppress(RuntimeError):
                    await ask(bus, "Apply", "ssasu", BAD_NAMES[number % 6], "cpu", [], 0)
                await ask(bus, "Apply", "ssasu", ("low", "long")[number % 2], "cpu", [], 0)

        await some()
        files, tasks = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
        await some()
        assert len(os.listdir("/proc/self/fd")) == files
        assert len(asyncio.all_tasks()) == tasks

    scenario(work, tmp_path, bus_address)


def test_variants_round_trip() -> None:
    from infertune.service.wire import to_bus

    document = {
        "a": 1,
        "b": [],
        "c": ["x"],
        "d": [{"e": 1.5, "f": None}],
        "g": True,
        "h": {"i": "j", "k": None},
        "l": None,
    }
    over = {k: Variant(v.signature, v.value) for k, v in to_bus(document).items()}
    assert from_bus(over) == document
    with pytest.raises(TypeError, match="no form on the bus"):
        to_bus({"x": object()})


def test_a_hold_is_not_taken_away_and_what_was_not_confirmed_does_not_come_back(
    tmp_path: Path, bus_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        world = World(tmp_path / "machine", bus_address)
        before = values(world.base)
        await world.start()
        bus, holder = await world.client(), await world.client()
        await ask(bus, "Apply", "ssasu", "low", "cpu", [], 600)
        cookie = await ask(holder, "Hold", "sss", "long", "cpu", "test")
        held = values(world.base)
        with pytest.raises(Exception, match="busy"):
            await ask(bus, "Revert")
        later(monkeypatch, 700)
        await expire(world)
        assert values(world.base) == held
        await ask(holder, "Release", "s", cookie)
        assert values(world.base) == before
        # Confirmed during a hold: it stays after it.
        await ask(bus, "Apply", "ssasu", "low", "cpu", [], 60)
        cookie = await ask(holder, "Hold", "sss", "long", "cpu", "test")
        assert await ask(bus, "Confirm") is True
        await ask(holder, "Release", "s", cookie)
        assert (world.base / "proc/sys/vm/swappiness").read_text().strip() == "1"
        await close(bus)
        await close(holder)
        await world.stop()

    asyncio.run(scene())


def test_a_hold_that_cannot_be_had_again_is_over(tmp_path: Path, bus_address: str) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        original = values(world.base)
        mid = world.base / "etc/infertune/profiles/mid.toml"
        for base in ("low", None):
            mid.write_text('description = "test"\n[now]\nvm.swappiness = 5\n')
            if base:
                await ask(bus, "Apply", "ssasu", base, "cpu", [], 0)
            before = values(world.base)
            older = await ask(bus, "Hold", "sss", "mid", "cpu", "older")
            newer = await ask(bus, "Hold", "sss", "long", "cpu", "newer")
            mid.unlink()
            await ask(bus, "Release", "s", newer)
            assert values(world.base) == before
            assert "not held any more: mid: " in str((await ask(bus, "Status"))["notes"])
            assert (await properties(bus))["State"] == ("applied" if base else "idle")
            with pytest.raises(RuntimeError, match="no such hold of yours"):
                await ask(bus, "Release", "s", older)
            # A decision of somebody's makes it old news.
            await ask(bus, "Revert")
            assert "not held any more" not in str((await ask(bus, "Status"))["notes"])
        assert values(world.base) == original
        # What was applied before the hold has gone meanwhile.
        (world.base / "etc/infertune/profiles/mid.toml").write_text(
            'description = "test"\n[now]\nvm.swappiness = 5\n'
        )
        await ask(bus, "Apply", "ssasu", "mid", "cpu", [], 0)
        newer = await ask(bus, "Hold", "sss", "long", "cpu", "newer")
        mid.unlink()
        with pytest.raises(RuntimeError, match="mid"):
            await ask(bus, "Release", "s", newer)
        assert values(world.base) == original
        assert "not applied again: mid: " in str((await ask(bus, "Status"))["notes"])

    scenario(work, tmp_path, bus_address)


@pytest.mark.parametrize("base", ["low", None])
def test_a_reload_ends_holds(base: str | None, tmp_path: Path, bus_address: str) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        if base:
            await ask(bus, "Apply", "ssasu", base, "cpu", [], 0)
        before = values(world.base)
        await ask(bus, "Hold", "sss", "long", "cpu", "x")
        assert values(world.base) != before
        assert world.daemon is not None
        assert world.task is not None
        world.daemon._execute_again()
        assert await asyncio.wait_for(world.task, GENEROUS_S)
        assert values(world.base) == before
        world.notified.clear()
        await world.start()
        assert values(world.base) == before
        assert (await properties(bus))["Profile"] == (base or "")

    scenario(work, tmp_path, bus_address)


def test_an_emptied_run_does_not_hide_the_daemon(tmp_path: Path, bus_address: str) -> None:
    """Or the command line would act beside it."""

    async def work(world: World, bus: MessageBus) -> None:
        shutil.rmtree(world.base / "run/infertune")
        assert world.root.lock_owner(DAEMON_LOCK) == f"pid {os.getpid()}"
        second = Daemon(world.root, world.environment)
        with pytest.raises(Exception, match=f"another infertuned is running .pid {os.getpid()}"):
            await second.run()
        await second.leave()

    scenario(work, tmp_path, bus_address)


@contextlib.contextmanager
def nothing_read(bus: MessageBus) -> Iterator[None]:
    """As where more comes than can be read."""
    loop: Any = asyncio.get_running_loop()
    reader, _ = loop._selector.get_key(bus._fd).data
    callback, arguments = reader._callback, reader._args
    loop.remove_reader(bus._fd)
    try:
        yield
    finally:
        loop.add_reader(bus._fd, callback, *arguments)


def test_root_waits_behind_nobody(tmp_path: Path, bus_address: str) -> None:
    """Root's calls, and the answers to the daemon's own questions, have a queue of their own."""

    async def work(world: World, bus: MessageBus) -> None:
        assert world.daemon is not None
        with nothing_read(world.daemon._public):
            behind = asyncio.create_task(ask(bus, "Status"))
            # A new connection: the bus is asked whose it is, and then whether it is still there.
            new = await world.client()
            await ask(new, "Hold", "sss", "low", "cpu", "x", to=ROOT_NAME)
            assert (await ask(bus, "Status", to=ROOT_NAME))["state"] == "running"
            await close(new)
            while (await ask(bus, "Status", to=ROOT_NAME))["state"] != "idle":
                await asyncio.sleep(0.02)
            assert not behind.done()
        assert (await behind)["state"] == "idle"

    scenario(work, tmp_path, bus_address)


def test_a_change_is_told_once(tmp_path: Path, bus_address: str) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        told: list[Message] = []
        bus.add_message_handler(
            lambda message: told.append(message) if message.member == "PropertiesChanged" else None
        )
        match = f"type='signal',path='{OBJECT_PATH}'"
        await calls.call(bus, calls.BUS, "AddMatch", "s", match, timeout_s=None)
        await ask(bus, "Apply", "ssasu", "long", "cpu", [], 0, to=ROOT_NAME)
        await ask(bus, "Status")  # what was sent before its answer has come
        assert world.daemon is not None
        assert [message.sender for message in told] == [world.daemon._public.unique_name]

    scenario(work, tmp_path, bus_address)


def test_the_bus_policy_of_an_older_version_will_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        assert (await ask(bus, "Status"))["state"] == "idle"
        assert f"does not know {ROOT_NAME}: 'infertune setup'" in capsys.readouterr().err

    older = CONFIG.replace('<allow own="*"/>', f'<allow own="*"/><deny own="{ROOT_NAME}"/>')
    with bus_of(older) as address:
        scenario(work, tmp_path, address)


def test_without_its_bus_it_ends_and_leaves_what_is_applied(
    tmp_path: Path, bus_address: str
) -> None:
    async def scene() -> None:
        world = World(tmp_path / "machine", bus_address)
        await world.start()
        bus = await world.client()
        await ask(bus, "Apply", "ssasu", "long", "cpu", [], 0)
        tuned = values(world.base)
        reply = await bus.call(
            Message(
                destination="org.freedesktop.DBus",
                path="/org/freedesktop/DBus",
                interface="org.freedesktop.DBus",
                member="GetConnectionUnixProcessID",
                signature="s",
                body=["org.freedesktop.DBus"],
            )
        )
        assert reply is not None
        os.kill(reply.body[0], signal.SIGKILL)
        assert world.task is not None
        with pytest.raises(Failed, match="the system bus went away"):
            await asyncio.wait_for(world.task, GENEROUS_S)
        with contextlib.suppress(EOFError, OSError):
            await close(bus)
        assert values(world.base) == tuned
        # Its lock is free, and the journal is there for the next one.
        assert world.root.lock_owner(DAEMON_LOCK) is None
        with session(world.root, "test") as ours:
            assert ours.applied is not None
            assert ours.applied.profile == "long"

    asyncio.run(scene())


def test_whoever_waits_while_it_stops_changes_nothing(tmp_path: Path, bus_address: str) -> None:
    async def work(world: World, bus: MessageBus) -> None:
        original = values(world.base)
        assert world.daemon is not None
        async with world.daemon._power.turn():
            stopping = asyncio.create_task(world.stop())
            await asyncio.sleep(0.05)
            late = asyncio.create_task(ask(bus, "Apply", "ssasu", "long", "cpu", [], 0))
            await asyncio.sleep(0.1)
        await stopping
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(late, GENEROUS_S)
        assert values(world.base) == original

    scenario(work, tmp_path, bus_address)
